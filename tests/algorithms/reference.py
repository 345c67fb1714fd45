"""The algorithms from their definitions, in Python's own numbers: what the package must equal to 1e-9.

One function a definition, no torch, no arrays and nothing of the package; slow and obvious on purpose. A recipe is any
object with a recipe's fields; `recipe` makes one from the published table below. `Dual` differentiates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

# ---- recipes, as published -------------------------------------------------------------------------------------------

DEFAULTS = {
    "objective": "policy_gradient",
    "wrong_reward": 0.0,
    "overlong": "none",
    "overlong_cache_tokens": None,
    "group_filter": "none",
    "backfill": "none",
    "samples_per_round": None,
    "sample_filter": "none",
    "dropped": "remove",
    "baseline": "none",
    "scale": "none",
    "std_ddof": 1,
    "scale_eps": 1e-6,
    "gamma": 1.0,
    "gae_lambda": 1.0,
    "value_clip": 0.5,
    "ratio": "none",
    "old_policy": "trainer",
    "clip": "none",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": None,
    "sapo_tau_positive": 1.0,
    "sapo_tau_negative": 1.05,
    "ratio_cap": 20.0,
    "mismatch": "none",
    "mismatch_low": 0.5,
    "mismatch_high": 2.0,
    "aggregation": "seq_mean_token_mean",
    "proximal": "none",
    "proximal_level": "sequence",
    "proximal_coef": 0.1,
    "kl_coef": 0.0,
    "kl_estimator": "k3",
    "entropy_coef": 0.0,
    "dpo_beta": 0.1,
    "label_smoothing": 0.1,
}
MISMATCH_BOUNDS = {"token_icepop": (0.5, 5.0), "geo_reject": (0.999, 1.001)}  # of the others: DEFAULTS
PLUS_MINUS_ONE = {"wrong_reward": -1.0}
PPO = {"ratio": "token", "clip": "ppo"}
GRPO = {"baseline": "mean", "scale": "group_std"}
TOKEN_SUM = {"aggregation": "seq_mean_token_sum"}
RECIPES = {
    "raft": {"sample_filter": "positive"},
    "raft_pp": {"sample_filter": "positive", **PPO},
    "raft_pp_no_clip": {"sample_filter": "positive", "ratio": "token"},
    "raft_pp_clip_higher": {"sample_filter": "positive", **PPO, "clip_high": 0.28},
    "reinforce": {**PLUS_MINUS_ONE, **PPO},
    "reinforce_mean_zero": {**PLUS_MINUS_ONE, **PPO, "baseline": "mean"},
    "reinforce_drop_all_correct": {**PLUS_MINUS_ONE, **PPO, "group_filter": "all_correct"},
    "reinforce_drop_all_wrong": {**PLUS_MINUS_ONE, **PPO, "group_filter": "all_wrong"},
    "reinforce_rej": {**PLUS_MINUS_ONE, **PPO, "group_filter": "both"},
    "reinforce_rej_std": {**PLUS_MINUS_ONE, **PPO, "group_filter": "both", "scale": "group_std"},
    "grpo": {**GRPO, **PPO},
    "ppo": {"baseline": "critic", **PPO},
    "iterative_dpo": {"objective": "dpo"},
    "dr_grpo": {"baseline": "mean", **PPO, "aggregation": "seq_mean_token_sum_norm"},
    "dapo": {
        **PLUS_MINUS_ONE,
        **GRPO,
        **PPO,
        "clip_high": 0.28,
        "group_filter": "both",
        "backfill": "resample",
        "overlong": "soft",
        "aggregation": "token_mean",
    },
    "rloo": {"baseline": "leave_one_out", **TOKEN_SUM},
    "opo": {"baseline": "length_mean", **TOKEN_SUM},
    "remax": {"baseline": "greedy", **TOKEN_SUM},
    "reinforce_plus_plus": {"baseline": "batch_token_mean", "scale": "batch_token_std"},
    "gspo": {**GRPO, "ratio": "sequence", "clip": "ppo", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {**GRPO, "ratio": "token", "clip": "cispo", "aggregation": "token_mean"},
    "scale_rl": {
        "group_filter": "both",
        "baseline": "mean",
        "scale": "batch_std",
        "ratio": "token",
        "old_policy": "rollout",
        "clip": "cispo",
        "clip_high": 4.0,
        "aggregation": "prompt_mean_token_mean",
    },
    "maxrl": {"baseline": "mean", "scale": "group_mean", **TOKEN_SUM},
    "gmpo": {**GRPO, "ratio": "sequence", "clip": "token_log", "clip_low": 0.4, "clip_high": 0.4},
    "sapo": {**GRPO, "ratio": "token", "clip": "sapo"},
    "dppo": {
        "baseline": "mean",
        "ratio": "token",
        "old_policy": "rollout",
        "clip": "dppo_tv",
        "clip_low": 0.15,
        "clip_high": 0.15,
    },
    "kimi_k2": {"baseline": "mean", "proximal": "squared_log_ratio", **TOKEN_SUM},
    "reinforce_ada": {
        "backfill": "adaptive",
        "samples_per_round": 8,
        "baseline": "pool_mean",
        **PPO,
        "clip_high": 0.28,
    },
}
SCRIPTS_WITH_KL = ("raft", "raft_pp", "grpo", "reinforce_rej")


def recipe(name: str | None = None, variant: str = "paper", **fields) -> SimpleNamespace:
    r = SimpleNamespace(**{**DEFAULTS, **(RECIPES[name] if name else {}), **fields})
    for side, bound in zip(("mismatch_low", "mismatch_high"), MISMATCH_BOUNDS.get(r.mismatch, ()), strict=False):
        setattr(r, side, fields.get(side, bound))
    if variant == "minimal_rl" and r.objective != "dpo":
        r.aggregation, r.entropy_coef = "token_mean", 0.001
        r.kl_coef = 0.001 if name in SCRIPTS_WITH_KL else 0.0
        if r.clip == "ppo":
            r.dual_clip = 3.0
        if r.backfill != "resample":
            r.dropped = "zero"
    return r


# ---- credit ----------------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    prompt: int
    correct: bool
    length: int = 1
    valid: bool = True
    pool: float | None = None  # share of correct answers among everything sampled for the prompt
    greedy: bool | None = None  # whether the greedy answer to the prompt is correct
    truncated: bool = False


def answer_reward(r, correct: float) -> float:
    """1 for a correct answer, the recipe's wrong reward for a wrong one, linear between."""
    return correct + (1 - correct) * r.wrong_reward


def overlong_penalty(r, length: int, limit: int) -> float:
    """DAPO, equation 13."""
    if r.overlong != "soft":
        return 0.0
    cache = r.overlong_cache_tokens or max(limit // 5, 1)
    if length <= limit - cache:
        return 0.0
    return (limit - cache - length) / cache if length <= limit else -1.0


def reward(r, sample: Sample, limit: int) -> float:
    return answer_reward(r, sample.correct) + overlong_penalty(r, sample.length, limit)


def masked(r, sample: Sample) -> bool:
    """With overlong=mask a truncated response leaves the loss; statistics still count it as a wrong answer."""
    return r.overlong == "mask" and sample.truncated


def group(samples: list[Sample], sample: Sample) -> list[Sample]:
    return [other for other in samples if other.prompt == sample.prompt and other.valid]


def learned_from(r, samples: list[Sample], sample: Sample) -> bool:
    """Valid, not masked, and neither it nor its group is filtered out."""
    correct = [other.correct for other in group(samples, sample)]
    if not sample.valid or masked(r, sample) or (r.sample_filter == "positive" and not sample.correct):
        return False
    if r.group_filter in ("all_wrong", "both") and not any(correct):
        return False
    return not (r.group_filter in ("all_correct", "both") and all(correct))


def mean(values: list[float], weights: list[float] | None = None) -> float:
    weights = weights or [1.0] * len(values)
    return math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)


def deviation(values: list[float], ddof: int, weights: list[float] | None = None) -> float:
    """Standard deviation; a value of weight w counts w times."""
    weights = weights or [1.0] * len(values)
    centre = mean(values, weights)
    squares = math.fsum(w * (v - centre) ** 2 for w, v in zip(weights, values, strict=True))
    return math.sqrt(squares / max(math.fsum(weights) - ddof, 1))


def baseline(r, samples: list[Sample], sample: Sample, limit: int) -> float:
    own = reward(r, sample, limit)
    peers = group(samples, sample)
    if r.baseline == "mean":
        return mean([reward(r, s, limit) for s in peers])
    if r.baseline == "leave_one_out":
        return mean([reward(r, s, limit) for s in peers if s is not sample] or [own])
    if r.baseline == "length_mean":
        return mean([reward(r, s, limit) for s in peers], [s.length for s in peers])
    if r.baseline == "pool_mean":
        return answer_reward(r, mean([s.correct for s in peers]) if sample.pool is None else sample.pool)
    if r.baseline == "greedy":
        return answer_reward(r, sample.greedy)
    if r.baseline == "batch_token_mean":
        batch = [s for s in samples if learned_from(r, samples, s)]
        return mean([reward(r, s, limit) for s in batch], [s.length for s in batch])
    return 0.0  # none; critic, whose values are subtracted per token


def divisor(r, samples: list[Sample], sample: Sample, limit: int) -> float:
    if r.scale == "none":
        return 1.0
    rewards = [reward(r, s, limit) for s in group(samples, sample)]
    if r.scale == "group_std":
        return deviation(rewards, r.std_ddof) + r.scale_eps
    if r.scale == "group_mean":
        return mean(rewards) + r.scale_eps
    batch = [s for s in samples if learned_from(r, samples, s)]
    centred = [reward(r, s, limit) - baseline(r, samples, s, limit) for s in batch]
    lengths = [s.length for s in batch] if r.scale == "batch_token_std" else None
    return deviation(centred, r.std_ddof, lengths) + r.scale_eps


def dpo_choice(r, samples: list[Sample], sample: Sample) -> float:
    """+1 for its prompt's first correct sample, -1 for the first wrong one, if there are both."""
    peers = [other for other in group(samples, sample) if not masked(r, other)]
    chosen = next((s for s in peers if s.correct), None)
    rejected = next((s for s in peers if not s.correct), None)
    if chosen is None or rejected is None:
        return 0.0
    return 1.0 if sample is chosen else -1.0 if sample is rejected else 0.0


def credit(r, samples: list[Sample], limit: int) -> tuple[list[bool], list[float]]:
    """Which samples count in the loss, and their advantages."""
    keep, advantages = [], []
    for sample in samples:
        if r.objective == "dpo":
            advantages.append(dpo_choice(r, samples, sample))
            keep.append(advantages[-1] != 0)
        elif learned_from(r, samples, sample):
            centred = reward(r, sample, limit) - baseline(r, samples, sample, limit)
            advantages.append(centred / divisor(r, samples, sample, limit))
            keep.append(True)
        else:
            advantages.append(0.0)
            keep.append(sample.valid and not masked(r, sample) and r.dropped == "zero")
    return keep, advantages


# ---- derivatives -----------------------------------------------------------------------------------------------------


class Dual:
    """A number with its partial derivatives by variable: forward differentiation, exact but for rounding."""

    def __init__(self, value: float, slopes: dict | None = None):
        self.value, self.slopes = float(value), slopes or {}

    def __add__(self, other):
        other = lift(other)
        return chain(self.value + other.value, (self, 1.0), (other, 1.0))

    def __mul__(self, other):
        other = lift(other)
        return chain(self.value * other.value, (self, other.value), (other, self.value))

    def __neg__(self):
        return self * -1.0

    def __sub__(self, other):
        return self + -lift(other)

    def __rsub__(self, other):
        return -self + other

    def __truediv__(self, number: float):
        return self * (1 / number)

    def __lt__(self, other):
        return self.value < lift(other).value

    def __gt__(self, other):
        return self.value > lift(other).value

    __radd__, __rmul__ = __add__, __mul__


def lift(x: Dual | float) -> Dual:
    return x if isinstance(x, Dual) else Dual(x)


def chain(value: float, *inputs: tuple[Dual, float]) -> Dual:
    """A function's result, given its value and, of each input, the derivative with respect to it."""
    slopes: dict = {}
    for x, slope in inputs:
        for name, own in x.slopes.items():
            slopes[name] = slopes.get(name, 0.0) + slope * own
    return Dual(value, slopes)


def stop_gradient(x) -> float:
    return lift(x).value


def exp(x) -> Dual:
    value = math.exp(lift(x).value)
    return chain(value, (lift(x), value))


def sigmoid(x) -> Dual:
    v = lift(x).value
    value = 1 / (1 + math.exp(-v)) if v > 0 else math.exp(v) / (1 + math.exp(v))
    return chain(value, (lift(x), value * (1 - value)))


def log_sigmoid(x) -> Dual:
    v = lift(x).value
    return chain(min(v, 0.0) - math.log1p(math.exp(-abs(v))), (lift(x), stop_gradient(sigmoid(-v))))


def clip(x, low: float, high: float):
    return max(min(x, high), low)


# ---- loss ------------------------------------------------------------------------------------------------------------


@dataclass
class Token:
    logp: Dual | float
    old: float
    rollout: float
    ref: float
    entropy: Dual | float = 0.0
    value: float = 0.0  # the critic's, of the tokens before this one


@dataclass
class Response:
    """The tokens that count; none for a sample that was removed."""

    tokens: list[Token]
    advantages: list[float]  # of each token
    prompt: int = 0


def log_ratio(r, token: Token):
    return token.logp - (token.rollout if r.old_policy == "rollout" else token.old)


def sequence_log_ratio(r, response: Response):
    return sum(log_ratio(r, token) for token in response.tokens) / len(response.tokens)


def ratio_of(log_s) -> Dual:
    return exp(min(log_s, 20.0))


def geometric_mean_clipped_ratio(r, response: Response) -> Dual:
    """GMPO: each token's log-ratio clipped on the side of its advantage."""
    logs = []
    for token, advantage in zip(response.tokens, response.advantages, strict=True):
        log = log_ratio(r, token)
        logs.append(min(log, r.clip_high) if advantage > 0 else max(log, -r.clip_low) if advantage < 0 else log)
    return ratio_of(sum(logs) / len(logs))


def ppo_objective(r, s, advantage: float):
    objective = min(s * advantage, clip(s, 1 - r.clip_low, 1 + r.clip_high) * advantage)
    if r.dual_clip is not None and advantage < 0:
        objective = max(objective, r.dual_clip * advantage)
    return objective


def moved_too_far(r, token: Token, advantage: float) -> bool:
    """DPPO: its probability went more than the threshold where the advantage points."""
    old = token.rollout if r.old_policy == "rollout" else token.old
    move = math.exp(stop_gradient(token.logp)) - math.exp(old)
    return (advantage > 0 and move > r.clip_high) or (advantage < 0 and move < -r.clip_low)


def objective(r, response: Response, token: Token, advantage: float):
    """What is maximised, of one token."""
    if r.ratio == "none":
        return advantage * token.logp
    s = ratio_of(sequence_log_ratio(r, response) if r.ratio == "sequence" else log_ratio(r, token))
    if r.clip == "ppo":
        return ppo_objective(r, s, advantage)
    if r.clip == "cispo":
        return stop_gradient(min(s, 1 + r.clip_high)) * advantage * token.logp
    if r.clip == "token_log":
        return geometric_mean_clipped_ratio(r, response) * advantage
    if r.clip == "sapo":
        tau = r.sapo_tau_positive if advantage > 0 else r.sapo_tau_negative
        return 4 / tau * sigmoid(tau * (s - 1)) * advantage
    if r.clip == "dppo_tv":
        truncated = stop_gradient(min(s, r.ratio_cap))
        return 0.0 if moved_too_far(r, token, advantage) else truncated * advantage * token.logp
    return s * advantage


def mismatch_weight(r, response: Response, token: Token) -> float:
    """Trainer's old probability over the rollout engine's; 0 rejects."""
    differences = [t.old - t.rollout for t in response.tokens]
    own, total = math.exp(token.old - token.rollout), math.exp(math.fsum(differences))
    geometric = math.exp(math.fsum(differences) / len(differences))
    low, high = r.mismatch_low, r.mismatch_high
    return {
        "none": 1.0,
        "token_tis": min(own, high),
        "token_icepop": own if low <= own <= high else 0.0,
        "seq_tis": min(total, high),
        "seq_reject": 1.0 if low <= total <= high else 0.0,
        "geo_reject": 1.0 if low <= geometric <= high else 0.0,
    }[r.mismatch]


def counted(r, responses: list[Response]) -> list[Response]:
    """Those with tokens; a rejected response leaves the loss and its denominator."""
    rejects = r.mismatch in ("seq_reject", "geo_reject")
    return [x for x in responses if x.tokens and not (rejects and mismatch_weight(r, x, x.tokens[0]) == 0)]


def token_weight(r, responses: list[Response], response: Response, limit: int) -> float:
    """Of each token of a response, among the responses that count."""
    own, total = len(response.tokens), sum(len(x.tokens) for x in responses)
    prompt = sum(len(x.tokens) for x in responses if x.prompt == response.prompt)
    return {
        "token_mean": 1 / total,
        "seq_mean_token_mean": 1 / (len(responses) * own),
        "seq_mean_token_sum": 1 / len(responses),
        "seq_mean_token_sum_norm": 1 / (len(responses) * limit),
        "prompt_mean_token_mean": 1 / (len({x.prompt for x in responses}) * prompt),
    }[r.aggregation]


def kl_estimate(r, token: Token):
    """Of KL(policy || reference) from one token: Schulman's k1, k2, k3; the gradient of k1 is that of k2."""
    if r.kl_estimator == "k1":
        difference = token.logp - token.ref
        half_square = difference * difference / 2
        return stop_gradient(difference) + half_square - stop_gradient(half_square)
    if r.kl_estimator == "k2":
        return (token.logp - token.ref) * (token.logp - token.ref) / 2
    x = min(token.ref - token.logp, 20.0)
    return exp(x) - x - 1


def loss(r, responses: list[Response], limit: int) -> Dual:
    responses = counted(r, responses)
    if r.objective == "dpo":
        return dpo_loss(r, responses)
    terms = [Dual(0.0)]
    for response in responses:
        weight = token_weight(r, responses, response, limit)
        for token, advantage in zip(response.tokens, response.advantages, strict=True):
            term = -mismatch_weight(r, response, token) * objective(r, response, token, advantage)
            term += r.kl_coef * kl_estimate(r, token) - r.entropy_coef * token.entropy
            if r.proximal == "squared_log_ratio" and r.proximal_level == "token":
                term += r.proximal_coef / 2 * log_ratio(r, token) * log_ratio(r, token)
            terms.append(weight * term)
        if r.proximal == "squared_log_ratio" and r.proximal_level == "sequence":
            total = sum(log_ratio(r, token) for token in response.tokens)
            terms.append(r.proximal_coef / 2 * total * total / len(responses))
    return chain(math.fsum(term.value for term in terms), *((term, 1.0) for term in terms))


def dpo_loss(r, responses: list[Response]) -> Dual:
    """DPO, equation 7, with smoothed labels; the old policy is the reference."""
    pairs: dict[int, Dual] = {}
    for x in responses:
        sign = math.copysign(1.0, x.advantages[0])
        pairs[x.prompt] = pairs.get(x.prompt, Dual(0.0)) + sum(sign * (t.logp - t.old) for t in x.tokens)
    smooth, beta = r.label_smoothing, r.dpo_beta
    losses = [-(1 - smooth) * log_sigmoid(beta * m) - smooth * log_sigmoid(-beta * m) for m in pairs.values()]
    return sum(losses, Dual(0.0)) / max(len(losses), 1)


# ---- critic ----------------------------------------------------------------------------------------------------------


def gae(r, final_reward: float, values: list[float]) -> tuple[list[float], list[float]]:
    """GAE, equation 16: A_t = sum_k (gamma lambda)^k delta_{t+k}; and the returns A_t + V_t. Of one response."""
    rewards = [0.0] * (len(values) - 1) + [final_reward]
    after = [*values[1:], 0.0]
    deltas = [reward + r.gamma * v_next - v for reward, v_next, v in zip(rewards, after, values, strict=True)]
    advantages = [
        math.fsum((r.gamma * r.gae_lambda) ** (k - t) * deltas[k] for k in range(t, len(deltas)))
        for t in range(len(deltas))
    ]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def whiten(r, rows: list[list[float]]) -> list[list[float]]:
    flat = [a for row in rows for a in row]
    if not flat:
        return rows
    centre, spread = mean(flat), deviation(flat, r.std_ddof)
    return [[(a - centre) / (spread + r.scale_eps) for a in row] for row in rows]


def value_loss(r, value: Dual, old: float, target: float) -> Dual:
    """Of one token."""
    moved = clip(value, old - r.value_clip, old + r.value_clip)
    return max((value - target) * (value - target), lift(moved - target) * (moved - target)) * 0.5

"""The loss and its gradient against the definitions, token by token in Python's own arithmetic."""

import math
from dataclasses import dataclass

import pytest
import torch
from test_credit import DEFINITIONS, GROUPS

from megarl.algorithms.credit import credit
from megarl.algorithms.loss import clipped_objective, kl_estimate, policy_loss, token_weights
from megarl.algorithms.recipe import RECIPES, SFT, Recipe
from megarl.data.packing import micro_batches
from megarl.types import Batch

RATIOS = (0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 1.6, 4.0)
EXACT = {"rel": 1e-9, "abs": 1e-12}


@dataclass
class Response:
    """One sequence: its advantage and, of each token, (log-prob, old log-prob, reference log-prob, entropy)."""

    advantage: float
    tokens: list[tuple[float, float, float, float]]


def responses(advantages):
    """Ragged responses of 1 to 7 tokens that walk through RATIOS; references on both sides."""
    made, step = [], 0
    for i, advantage in enumerate(advantages):
        tokens = []
        for _ in range(1 + (3 * i) % 7):
            logprob = -0.05 - (step * 0.37) % 3
            ref = logprob + math.sin(step)
            tokens.append((logprob, logprob - math.log(RATIOS[step % len(RATIOS)]), ref, 0.1 + step % 5))
            step += 1
        made.append(Response(advantage, tokens))
    return made


@dataclass
class Flat:
    """The responses as flat float64 arrays, two prompt tokens of junk before each."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    sequence: torch.Tensor

    @property
    def response(self):
        return self.mask > 0


JUNK = (-7.0, 5.0, -9.0, 1e6)


def flat(made):
    rows = [token for response in made for token in (JUNK, JUNK, *response.tokens)]
    columns = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4).T
    lengths = torch.tensor([2 + len(response.tokens) for response in made], dtype=torch.int64)
    mask = [value for response in made for value in (0.0, 0.0, *[1.0] * len(response.tokens))]
    advantages = torch.tensor([response.advantage for response in made], dtype=torch.float64)
    return Flat(
        logprobs=columns[0].clone().requires_grad_(),
        entropy=columns[3].clone().requires_grad_(),
        old=columns[1].clone(),
        ref=columns[2].clone(),
        advantages=advantages.repeat_interleave(lengths),
        mask=torch.tensor(mask, dtype=torch.float64),
        sequence=torch.arange(len(made)).repeat_interleave(lengths),
    )


def computed(recipe, made, on_policy=False):
    """(loss, gradient by log-prob of each response token, gradient by entropy)."""
    f = flat(made)
    weights = token_weights(recipe, f.mask, f.sequence, len(made))
    loss = policy_loss(recipe, f.logprobs, f.entropy, f.advantages, weights, None if on_policy else f.old, f.ref)
    assert loss.dtype == torch.float64
    loss.backward()
    by_entropy = torch.zeros_like(f.mask) if f.entropy.grad is None else f.entropy.grad
    for gradient in (f.logprobs.grad, by_entropy):
        assert (gradient[~f.response] == 0).all(), "prompt tokens have a gradient"
    return float(loss.detach()), f.logprobs.grad[f.response].tolist(), by_entropy[f.response].tolist()


# (advantage, log-prob, old, reference) of a token -> (loss, its derivative by the log-prob).
def likelihood(advantage, logprob, old, ref):
    return -advantage * logprob, -advantage


def ppo(advantage, logprob, old, ref):
    ratio = math.exp(logprob - old)
    if advantage >= 0:
        bounded, moves = min(ratio, 1.2) * advantage, ratio < 1.2
    else:
        bounded, moves = max(ratio, 0.8) * advantage, ratio > 0.8
    return -bounded, -advantage * ratio if moves else 0.0


def ppo_with_kl(advantage, logprob, old, ref):
    loss, slope = ppo(advantage, logprob, old, ref)
    inverse = math.exp(ref - logprob)
    return loss + 0.001 * (inverse - (ref - logprob) - 1), slope + 0.001 * (1 - inverse)


TOKEN_LOSS = {"raft": likelihood, "raft_pp": ppo, "reinforce": ppo, "reinforce_rej": ppo, "grpo": ppo_with_kl}


def defined(token_loss, made):
    """Mean over responses of the mean over their tokens: (loss, gradient of each token)."""
    loss, gradient = 0.0, []
    for response in made:
        share = 1 / (len(made) * len(response.tokens))
        for logprob, old, ref, _ in response.tokens:
            value, slope = token_loss(response.advantage, logprob, old, ref)
            loss += share * value
            gradient.append(share * slope)
    return loss, gradient


@pytest.mark.parametrize("name", RECIPES)
def test_loss_and_gradient_of_every_recipe_are_as_defined(name):
    advantages = [a for group in GROUPS for a in DEFINITIONS[name](group)]
    everything = responses([0.0 if a is None else a for a in advantages])
    made = [response for response, a in zip(everything, advantages, strict=True) if a is not None]
    tokens = [
        (r.advantage > 0, lp > old + math.log(1.2), lp < old + math.log(0.8)) for r in made for lp, old, *_ in r.tokens
    ]
    assert {(True, True, False), (True, False, True), (True, False, False)} <= set(tokens), "the case is too easy"

    loss, gradient, by_entropy = computed(RECIPES[name], made)
    expected_loss, expected_gradient = defined(TOKEN_LOSS[name], made)
    assert loss == pytest.approx(expected_loss, **EXACT)
    assert gradient == pytest.approx(expected_gradient, **EXACT)
    assert set(by_entropy) == {0.0}


@pytest.mark.parametrize("name", RECIPES)
def test_credit_and_loss_together_are_as_defined(name):
    recipe = RECIPES[name]
    index = torch.arange(len(GROUPS)).repeat_interleave(4)
    credited = credit(recipe, index, torch.tensor(GROUPS).flatten())
    everything = responses(credited.advantages.tolist())
    kept = [response for response, keep in zip(everything, credited.keep.tolist(), strict=True) if keep]
    loss, gradient, _ = computed(recipe, kept)

    advantages = [a for group in GROUPS for a in DEFINITIONS[name](group)]
    wanted = [Response(a, r.tokens) for r, a in zip(everything, advantages, strict=True) if a is not None]
    expected_loss, expected_gradient = defined(TOKEN_LOSS[name], wanted)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert gradient == pytest.approx(expected_gradient, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        # Clipped above at 1.3 only where the advantage would push the ratio further up...
        (1.31, 1.0, 1.3, 0.0),
        (1.29, 1.0, 1.29, 1.29),
        (0.5, 1.0, 0.5, 0.5),
        (9.0, 2.0, 2.6, 0.0),
        # ... below at 0.9 only where it would push it further down ...
        (0.89, -1.0, -0.9, 0.0),
        (0.91, -1.0, -0.91, -0.91),
        (1.31, -1.0, -1.31, -1.31),
        (0.1, -2.0, -1.8, 0.0),
        # ... and from dual_clip * A on where a bad sample has become far more likely.
        (2.99, -1.0, -2.99, -2.99),
        (3.01, -1.0, -3.0, 0.0),
        (9.0, -2.0, -6.0, 0.0),
        (9.0, 0.0, 0.0, 0.0),
        (1.0, 1.0, 1.0, 1.0),
        (1.0, -1.0, -1.0, -1.0),
    ],
)
def test_clipping_stops_the_gradient_where_the_ratio_has_gone_far_enough(ratio, advantage, objective, slope):
    recipe = Recipe(ratio="token", clip="ppo", clip_low=0.1, clip_high=0.3, dual_clip=3.0)
    logratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    value = clipped_objective(recipe, logratio.exp(), torch.tensor([advantage], dtype=torch.float64))
    value.backward()
    assert float(value.detach()) == pytest.approx(objective, **EXACT)
    assert float(logratio.grad) == pytest.approx(slope, **EXACT)


def test_without_dual_clip_a_bad_sample_that_became_likely_keeps_its_gradient():
    ratio = torch.tensor([9.0], dtype=torch.float64)
    recipe = RECIPES["reinforce"]
    assert float(clipped_objective(recipe, ratio, torch.tensor([-1.0], dtype=torch.float64))) == -9.0
    unclipped = Recipe(ratio="token")
    assert float(clipped_objective(unclipped, ratio, torch.tensor([1.0], dtype=torch.float64))) == 9.0


def test_without_old_log_probs_the_ratio_is_one_and_the_gradient_the_policy_gradient():
    made = responses([1.0, -1.0, 0.5])
    loss, gradient, _ = computed(RECIPES["reinforce"], made, on_policy=True)
    expected_loss, _ = defined(lambda advantage, *_: (-advantage, 0.0), made)
    _, expected_gradient = defined(likelihood, made)
    assert loss == pytest.approx(expected_loss, **EXACT)
    assert gradient == pytest.approx(expected_gradient, **EXACT)


@pytest.mark.parametrize(
    ("aggregation", "shares"),
    [
        ("token_mean", [1 / 4, 1 / 4, 1 / 4, 1 / 4]),
        ("seq_mean_token_mean", [1 / 2, 1 / 6, 1 / 6, 1 / 6]),
        ("seq_mean_token_sum", [1 / 2, 1 / 2, 1 / 2, 1 / 2]),
    ],
)
def test_an_aggregation_gives_each_token_its_share(aggregation, shares):
    made = [Response(1.0, [(-1.0, -1.0, -1.0, 0.0)]), Response(1.0, [(-x, -x, -x, 0.0) for x in (2.0, 3.0, 4.0)])]
    loss, gradient, _ = computed(Recipe(aggregation=aggregation), made)
    assert loss == pytest.approx(sum(s * x for s, x in zip(shares, (1.0, 2.0, 3.0, 4.0), strict=True)), **EXACT)
    assert gradient == pytest.approx([-share for share in shares], **EXACT)


@pytest.mark.parametrize("logratio", [-1.5, -0.1, 0.0, 0.1, 1.5])
@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        ("k1", lambda d: d, lambda d: 1.0),
        ("k2", lambda d: d * d / 2, lambda d: d),
        ("k3", lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
    ],
)
def test_kl_estimators_are_schulmans(estimator, value, slope, logratio):
    logprobs = torch.tensor([logratio - 3.0], dtype=torch.float64, requires_grad=True)
    estimate = kl_estimate(estimator, logprobs, torch.tensor([-3.0], dtype=torch.float64))
    estimate.backward()
    assert float(estimate.detach()) == pytest.approx(value(logratio), **EXACT)
    assert float(logprobs.grad) == pytest.approx(slope(logratio), **EXACT)


def test_k3_stays_finite_however_far_the_policy_has_moved():
    logprobs = torch.tensor([-500.0, 0.0], requires_grad=True)
    estimate = kl_estimate("k3", logprobs, torch.tensor([0.0, -500.0]))
    estimate.sum().backward()
    assert estimate.isfinite().all() and (estimate > 0).all() and logprobs.grad.isfinite().all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_term_is_added_to_the_loss_and_weighed_like_it(estimator):
    made = responses([1.0, -1.0, 0.0])
    plain, _, _ = computed(Recipe(), made)
    with_kl, _, _ = computed(Recipe(kl_coef=0.25, kl_estimator=estimator), made)
    mean = 0.0
    for response in made:
        of_tokens = [
            {"k1": lp - ref, "k2": (lp - ref) ** 2 / 2, "k3": math.exp(ref - lp) - 1 - (ref - lp)}[estimator]
            for lp, _, ref, _ in response.tokens
        ]
        mean += sum(of_tokens) / len(of_tokens) / len(made)
    assert with_kl - plain == pytest.approx(0.25 * mean, **EXACT)


def test_an_entropy_bonus_rewards_entropy():
    made = responses([1.0, -1.0])
    plain, plain_gradient, _ = computed(RECIPES["reinforce"], made)
    loss, gradient, by_entropy = computed(RECIPES["reinforce"].model_copy(update={"entropy_coef": 0.01}), made)
    shares = [1 / (2 * len(response.tokens)) for response in made for _ in response.tokens]
    entropies = [entropy for response in made for *_, entropy in response.tokens]
    assert loss - plain == pytest.approx(-0.01 * sum(s * h for s, h in zip(shares, entropies, strict=True)), **EXACT)
    assert by_entropy == pytest.approx([-0.01 * share for share in shares], **EXACT)
    assert gradient == plain_gradient


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"])
def test_removed_samples_leave_the_denominator_and_zeroed_ones_stay_in_it(aggregation):
    advantages = DEFINITIONS["raft"](GROUPS[0] + GROUPS[1])  # two of eight are right
    everything = responses([0.0 if a is None else a for a in advantages])
    kept = [response for response in everything if response.advantage]
    recipe = Recipe(aggregation=aggregation)
    removed, _, _ = computed(recipe, kept)
    zeroed, _, _ = computed(recipe, everything)
    tokens = {"all": sum(len(r.tokens) for r in everything), "kept": sum(len(r.tokens) for r in kept)}
    fraction = tokens["kept"] / tokens["all"] if aggregation == "token_mean" else len(kept) / len(everything)
    assert 0 < fraction < 1
    assert zeroed == pytest.approx(removed * fraction, **EXACT)


def test_zeroed_samples_still_pay_for_kl_and_entropy():
    recipe = Recipe(kl_coef=0.5, entropy_coef=0.5)
    _, gradient, by_entropy = computed(recipe, responses([0.0, 0.0]))
    assert all(gradient[1:]) and all(by_entropy)  # the first token's reference equals the policy


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"])
def test_nothing_kept_gives_no_loss(aggregation):
    recipe = RECIPES["grpo"].model_copy(update={"aggregation": aggregation})
    assert computed(recipe, []) == (0.0, [], [])
    nothing_to_learn = computed(RECIPES["reinforce"].model_copy(update={"aggregation": aggregation}), responses([0.0]))
    assert nothing_to_learn[0] == 0 and not any(nothing_to_learn[1])


CUTS = [(1, 10_000, True), (1, 9, True), (1, 20, False), (2, 9, True), (3, 14, False), (30, 9, True)]


@pytest.mark.parametrize(("ranks", "max_tokens", "packing"), CUTS)
@pytest.mark.parametrize("recipe", [*RECIPES.values(), SFT, Recipe(name="sum", aggregation="seq_mean_token_sum")])
def test_one_step_has_one_loss_however_it_is_cut(recipe, ranks, max_tokens, packing):
    made = responses([(-1.0) ** i * (1 + i / 10) for i in range(19)])
    whole_loss, whole_gradient, _ = computed(recipe, made)
    f = flat(made)
    lengths = torch.tensor([2 + len(response.tokens) for response in made])
    batch = Batch(
        tokens=torch.arange(len(f.mask)),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        mask=f.mask,
        advantages=torch.tensor([response.advantage for response in made], dtype=torch.float64),
        prompt_index=torch.arange(len(made)),
    )
    weights = token_weights(recipe, batch.mask, batch.sequence_of_token, len(batch))
    advantages = batch.advantages[batch.sequence_of_token]
    losses = [
        policy_loss(
            recipe,
            *map(micro.of_token, (f.logprobs, f.entropy, advantages, weights)),
            old_logprobs=micro.of_token(f.old),
            ref_logprobs=micro.of_token(f.ref),
        )
        for rank in range(ranks)
        for micro in micro_batches(batch, rank, ranks, max_tokens, packing)
    ]
    assert len(losses) > 1 or ranks * 10_000 == max_tokens
    total = torch.stack(losses).sum()
    total.backward()
    assert float(total.detach()) == pytest.approx(whole_loss, **EXACT)
    assert f.logprobs.grad[f.response].tolist() == pytest.approx(whole_gradient, **EXACT)
    assert (f.logprobs.grad[~f.response] == 0).all()

"""The maths of a token's loss, and its derivatives, written once for torch and for Triton.

Only arithmetic, comparisons and functions that `xp` has in both are used: torch runs this file on tensors, and
`kernels.py` compiles the same lines into the epilogue with `xp` = triton.language. Words in capitals are strings or
booleans known when the kernel is compiled. All other arguments are per token, or numbers.
"""

from typing import NamedTuple

import torch as xp

LOG_RATIO_LIMIT = 20.0  # nats; exp beyond this overflows long before it informs


class Rule(NamedTuple):
    """The constants of a token's loss; the names are a recipe's."""

    ratio: str = "none"
    clip: str = "none"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    sapo_tau_positive: float = 1.0
    sapo_tau_negative: float = 1.0
    ratio_cap: float = 1.0  # of dppo_tv
    log_ratio_limit: float = LOG_RATIO_LIMIT
    kl_estimator: str = "k3"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0

    @property
    def of_objective(self) -> tuple:
        """What `clipped_objective` takes after the tokens' values."""
        edges = (self.clip_low, self.clip_high, self.dual_clip or 0.0)
        numbers = (*edges, self.sapo_tau_positive, self.sapo_tau_negative, self.ratio_cap, self.log_ratio_limit)
        return *numbers, self.ratio, self.clip, self.dual_clip is not None


def clipped_objective(
    logprob,
    log_ratio,
    advantage,
    low,
    high,
    dual_clip,
    sapo_tau_positive,
    sapo_tau_negative,
    ratio_cap,
    log_ratio_limit,
    RATIO,
    CLIP,
    DUAL,
):
    """What is maximised: (value, d/d logprob, d/d log_ratio, held from below, held from above).

    `logprob` is the policy's, `log_ratio` its distance from the old policy's (of the sequence, where that is the
    ratio). Held: the clip has a say about the token. At the edges the token counts as inside.

    PPO's clip: arXiv 1707.06347, equation 7; dual clip: 1912.09729, equation 4; cispo: 2506.13585, equation 4; sapo:
    2511.20347; dppo_tv: 2602.04879. token_log (GMPO, 2507.20673) clips before the ratio is formed.
    """
    good = advantage > 0
    bad = advantage < 0
    never = advantage != advantage
    if RATIO == "none":
        return advantage * logprob, advantage, advantage * 0.0, never, never

    bounded = xp.where(log_ratio > log_ratio_limit, log_ratio_limit, log_ratio)
    ratio = xp.exp(bounded)
    by_ratio = xp.where(log_ratio > log_ratio_limit, 0.0, ratio * advantage)
    if CLIP == "cispo":
        above = ratio > 1 + high
        weight = xp.where(above, 1 + high, ratio) * advantage
        return weight * logprob, weight, advantage * 0.0, never, (good | bad) & above
    if CLIP == "dppo_tv":
        moved = xp.exp(logprob) - xp.exp(logprob - log_ratio)
        below = bad & (moved < -low)
        above = good & (moved > high)
        weight = xp.where(ratio > ratio_cap, ratio_cap, ratio) * advantage
        weight = xp.where(below | above, 0.0, weight)
        return weight * logprob, weight, advantage * 0.0, below, above
    if CLIP == "sapo":
        tau = xp.where(good, sapo_tau_positive, advantage * 0.0 + sapo_tau_negative)  # of the tokens' type
        gate = xp.sigmoid(tau * (ratio - 1))
        return 4 / tau * gate * advantage, advantage * 0.0, 4 * gate * (1 - gate) * by_ratio, never, never
    value = ratio * advantage
    if CLIP == "ppo":
        below = bad & (ratio < 1 - low)
        above = good & (ratio > 1 + high)
        value = xp.where(below, (1 - low) * advantage, value)
        value = xp.where(above, (1 + high) * advantage, value)
        if DUAL:
            far = bad & (ratio > dual_clip)
            value = xp.where(far, dual_clip * advantage, value)
            above = above | far
        return value, advantage * 0.0, xp.where(below | above, 0.0, by_ratio), below, above
    return value, advantage * 0.0, by_ratio, never, never


def kl_estimate(logprob, ref_logprob, log_ratio_limit, ESTIMATOR):
    """Estimate of KL(policy || reference) at a sampled token (Schulman's k1, k2, k3): (value, d/d logprob).

    k1 itself has a gradient that knows nothing of the reference and is 0 on average; it therefore lends its value, and
    k2 its gradient, which on average is that of the KL (arXiv 2506.09477). k3 is held where its exponential would grow
    beyond bounds, the policy far below the reference; on the other side it goes on.
    """
    log_ratio = logprob - ref_logprob
    if ESTIMATOR == "k1":
        return log_ratio, log_ratio
    if ESTIMATOR == "k2":
        return 0.5 * log_ratio * log_ratio, log_ratio
    inverse = -log_ratio
    held = inverse > log_ratio_limit
    inverse = xp.where(held, log_ratio_limit, inverse)
    ratio = xp.exp(inverse)
    return ratio - inverse - 1, xp.where(held, 0.0, 1 - ratio)

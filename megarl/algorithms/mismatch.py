"""Corrects for the rollout engine's log-probs differing from the trainer's, though the weights are the same.

Truncated importance sampling (TIS): Yao et al., "Your efficient RL framework secretly brings you off-policy RL
training", 2025; IcePop: Ling team, 2025, arXiv 2510.18855; rejection by sequence and by geometric mean: Liu et al.,
"When speed kills stability", 2025.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from megarl.algorithms.recipe import Recipe
from megarl.ops.rules import LOG_RATIO_LIMIT
from megarl.types import Metrics

REJECTS_SEQUENCES = ("seq_reject", "geo_reject")


def mismatch_weights(
    recipe: Recipe, old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, sequence: Tensor
) -> Tensor:
    """f[T]: what each token's objective is multiplied by; 0 off the mask.

    Args:
        old_logprobs, rollout_logprobs: f[T], of the same weights by the trainer and by the engine.
        mask: f[T], 1 on response tokens.
        sequence: i64[T], which response each token belongs to.

    A response rejected by seq_reject or geo_reject has weight 0 throughout and is to leave the loss's denominator too.
    """
    low, high = recipe.mismatch_low, recipe.mismatch_high
    log_ratio = (old_logprobs - rollout_logprobs) * mask
    if recipe.mismatch in ("seq_tis", "seq_reject"):
        log_ratio = sequence_sum(log_ratio, sequence)
    elif recipe.mismatch == "geo_reject":
        log_ratio = sequence_mean(log_ratio, mask, sequence)
    ratio = log_ratio.clamp(max=LOG_RATIO_LIMIT).exp()
    inside = ((ratio >= low) & (ratio <= high)).to(mask)
    if recipe.mismatch in ("token_tis", "seq_tis"):
        return ratio.clamp(max=high) * mask
    if recipe.mismatch == "token_icepop":
        return ratio * inside * mask
    if recipe.mismatch in REJECTS_SEQUENCES:
        return inside * mask
    return mask


def mismatch_metrics(logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Metrics:
    """How far the engine's log-probs are from the learner's, on the same tokens under the same weights.

    Effective sample size is that of the weights exp(learner - engine), as a fraction; 1 is perfect agreement.
    """
    kept = mask > 0
    if not kept.any():
        return {}
    log_ratio = (logprobs - rollout_logprobs)[kept].double()
    difference, ratio = log_ratio.abs(), log_ratio.exp()
    return {
        "mismatch/mean": float(difference.mean()),
        "mismatch/p99": float(np.quantile(difference.numpy(), 0.99)),
        "mismatch/max": float(difference.max()),
        "mismatch/k3": float((ratio - 1 - log_ratio).mean()),
        "mismatch/effective_sample_size": float(ratio.sum() ** 2 / (ratio**2).sum() / len(ratio)),
    }


def sequence_mean(values: Tensor, mask: Tensor, sequence: Tensor) -> Tensor:
    """f[T]: the mean over the response tokens of each token's sequence, at each of its tokens."""
    return sequence_sum(values * mask, sequence) / sequence_sum(mask, sequence).clamp(min=1)


def sequence_sum(values: Tensor, sequence: Tensor) -> Tensor:
    """f[T]: the sum over each token's sequence, at each of its tokens."""
    count = int(sequence.max()) + 1 if len(sequence) else 0
    return values.new_zeros(count).index_add(0, sequence, values)[sequence]

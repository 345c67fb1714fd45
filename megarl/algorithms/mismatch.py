"""Corrects for the rollout engine's log-probs differing from the trainer's, though the weights are the same.

Truncated importance sampling (TIS): Yao et al., "Your efficient RL framework secretly brings you off-policy RL
training", 2025; IcePop: Ling team, 2025, arXiv 2510.18855; rejection by sequence and by geometric mean: Liu et al.,
"When speed kills stability", 2025.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.algorithms.recipe import Recipe
from megarl.ops.rules import LOG_RATIO_LIMIT
from megarl.sums import Sums
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


def add_mismatch(sums: Sums, logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> None:
    """What `mismatch_metrics` are made of: log-probs by learner and engine of the same tokens, all [T]."""
    response = (mask > 0).nonzero().flatten()
    log_ratio = logprobs[response].double() - rollout_logprobs[response].double()
    ratio = log_ratio.exp()
    sums.add("mismatch/difference", log_ratio.abs(), quantiles=True)
    sums.add("mismatch/ratio", ratio)
    sums.add("mismatch/k3", ratio - 1 - log_ratio)


def mismatch_metrics(sums: Sums) -> Metrics:
    """How far the engine's log-probs are from the learner's, on the same tokens under the same weights.

    p99 up to sums.QUANTILE_ERROR. Effective sample size is that of the weights exp(learner - engine), as a fraction; 1
    is perfect agreement.
    """
    difference, ratio = "mismatch/difference", "mismatch/ratio"
    if difference not in sums:
        return {}
    return {
        "mismatch/mean": sums.mean(difference),
        "mismatch/p99": sums.quantile(difference, 0.99),
        "mismatch/max": sums.max(difference),
        "mismatch/k3": sums.mean("mismatch/k3"),
        "mismatch/effective_sample_size": sums.total(ratio) ** 2 / sums.squares(ratio) / sums.count(ratio),
    }


def sequence_mean(values: Tensor, mask: Tensor, sequence: Tensor) -> Tensor:
    """f[T]: the mean over the response tokens of each token's sequence, at each of its tokens."""
    return sequence_sum(values * mask, sequence) / sequence_sum(mask, sequence).clamp(min=1)


def sequence_sum(values: Tensor, sequence: Tensor) -> Tensor:
    """f[T]: the sum over each token's sequence, at each of its tokens; sequences are counted from 0, below T."""
    return torch.zeros_like(values).index_add(0, sequence, values)[sequence]

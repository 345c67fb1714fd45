"""The loss: ratio x clip x aggregation, KL and entropy, per token. Returns sums; the denominator is in the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.algorithms.recipe import Recipe

LOG_RATIO_LIMIT = 20.0  # nats; exp beyond this overflows long before it informs


def token_weights(recipe: Recipe, mask: Tensor, sequence_of_token: Tensor, sequences: int) -> Tensor:
    """f32[T]: what each token counts in the mini-batch's loss, the global denominator included.

    Computed once over the whole mini-batch, so the gradient can't depend on how it is cut into micro-batches or spread
    over ranks.

    Args:
        mask: f32[T], 1 on response tokens.
        sequence_of_token: i64[T] in [0, sequences).
    """
    tokens = mask.new_zeros(sequences).index_add(0, sequence_of_token, mask)  # f32[S], response lengths
    if recipe.aggregation == "token_mean":
        return mask / tokens.sum().clamp(min=1)
    per_sequence = mask / max(sequences, 1)
    if recipe.aggregation == "seq_mean_token_mean":
        return per_sequence / tokens.clamp(min=1)[sequence_of_token]
    return per_sequence  # seq_mean_token_sum


def policy_loss(
    recipe: Recipe,
    logprobs: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    weights: Tensor,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
) -> Tensor:
    """The weighted sum over tokens of -objective + kl_coef * KL - entropy_coef * entropy.

    Args:
        logprobs, entropy: [T], differentiable, of the policy.
        advantages: [T], of each token's sequence.
        weights: [T], from `token_weights`; 0 off the response.
        old_logprobs: [T], by the policy that the ratio is taken against; None: the policy itself, ratio 1.
        ref_logprobs: [T], by the frozen reference; needed when kl_coef > 0.
    """
    objective = advantages * logprobs
    if recipe.ratio == "token":
        old = logprobs.detach() if old_logprobs is None else old_logprobs
        objective = clipped_objective(recipe, (logprobs - old).clamp(max=LOG_RATIO_LIMIT).exp(), advantages)
    loss = -objective
    if recipe.kl_coef > 0:
        assert ref_logprobs is not None, "kl_coef > 0 needs reference log-probs"
        loss = loss + recipe.kl_coef * kl_estimate(recipe.kl_estimator, logprobs, ref_logprobs)
    if recipe.entropy_coef != 0:
        loss = loss - recipe.entropy_coef * entropy
    return (torch.where(weights > 0, loss, 0.0) * weights).sum()


def clipped_objective(recipe: Recipe, ratio: Tensor, advantages: Tensor) -> Tensor:
    """min(s A, clip(s, 1 - low, 1 + high) A), bounded below by dual_clip * A where A < 0.

    PPO, arXiv 1707.06347, equation 7; dual clip, arXiv 1912.09729, equation 4.
    """
    objective = ratio * advantages
    if recipe.clip == "ppo":
        clipped = ratio.clamp(1 - recipe.clip_low, 1 + recipe.clip_high) * advantages
        objective = torch.minimum(objective, clipped)
        if recipe.dual_clip is not None:
            bounded = torch.maximum(objective, recipe.dual_clip * advantages)
            objective = torch.where(advantages < 0, bounded, objective)
    return objective


def kl_estimate(estimator: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference) from sampled tokens, [T] (Schulman's k1, k2, k3)."""
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio**2
    inverse = (-log_ratio).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return inverse.exp() - inverse - 1

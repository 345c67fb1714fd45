"""The critic's side of PPO: generalised advantages from values, whitening, and the value loss."""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.algorithms.recipe import Recipe
from megarl.sums import Ranks, Sums


def gae(recipe: Recipe, rewards: Tensor, values: Tensor, mask: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
    """Generalised advantages and returns of each response token (arXiv 1506.02438, equation 16), 0 off the mask.

    Args:
        rewards: f[S], of each sequence, received at its last response token.
        values: f[T], of the state before each token.
        mask: f[T], 1 on response tokens, which are contiguous in a sequence.
        sequence: i64[T], which sequence each token belongs to, in order.

    Returns (advantages f[T], returns f[T]); returns = advantages + values.
    """
    response = (mask > 0).nonzero().flatten()
    value = values[response]
    count = torch.bincount(sequence[response], minlength=len(rewards))
    order = count.argsort(descending=True, stable=True)
    last, lengths = (count.cumsum(0) - 1)[order], count[order]
    received = torch.zeros_like(value)
    received[last[lengths > 0]] = rewards[order][lengths > 0].to(values)
    active = torch.bincount(lengths, minlength=1).flip(0).cumsum(0).flip(0)[1:].tolist()  # responses of over t tokens
    advantage = torch.zeros_like(value)
    later_value = later_advantage = value.new_zeros(len(lengths))
    for t, longer in enumerate(active):  # from the ends of all responses towards their beginnings
        here = last[:longer] - t
        delta = received[here] + recipe.gamma * later_value[:longer] - value[here]
        advantage[here] = delta + recipe.gamma * recipe.gae_lambda * later_advantage[:longer]
        later_value, later_advantage = value[here], advantage[here]
    advantages = torch.zeros_like(values)
    advantages[response] = advantage
    return advantages, torch.where(mask > 0, advantages + values, 0.0)


def whiten(recipe: Recipe, advantages: Tensor, mask: Tensor, ranks: Ranks | None = None) -> Tensor:
    """f[T]: mean 0 and standard deviation 1 over the tokens of the mask, on all ranks, 0 off it."""
    sums = Sums(ranks)
    sums.add("advantages", advantages[mask > 0])
    sums.reduce()
    if "advantages" not in sums:
        return torch.zeros_like(advantages)
    mean, deviation = sums.mean("advantages"), sums.variance("advantages", recipe.std_ddof) ** 0.5
    return (advantages - mean) / (deviation + recipe.scale_eps) * mask


def value_loss(recipe: Recipe, values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum over tokens of half the squared error, the larger of clipped and unclipped value.

    All [T]; weights as `sequence_weights` says, 0 off the response. Clipping: Schulman et al.'s implementation of PPO.
    """
    clipped = old_values + (values - old_values).clamp(-recipe.value_clip, recipe.value_clip)
    errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (torch.where(weights > 0, errors, 0.0) * weights).sum()

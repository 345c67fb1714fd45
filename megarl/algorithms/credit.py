"""Credit: which samples count, and the advantage of each. Whole groups, before any split into mini-batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.algorithms.recipe import Recipe
from megarl.types import SampleGroup


@dataclass(frozen=True)
class Credit:
    keep: Tensor  # bool[S], the sample is in the loss and its denominator
    advantages: Tensor  # f32[S], 0 where not kept


def credit(recipe: Recipe, prompt_index: Tensor, correct: Tensor, valid: Tensor | None = None) -> Credit:
    """Select samples and assign advantages from verified answers.

    Args:
        prompt_index: i64[S], which prompt each sample answers; samples of one prompt form its group.
        correct: bool[S], the verdict.
        valid: bool[S], False where there is no verdict or the recipe masks the sample. Such samples are always
            removed and take no part in the statistics of their group. Default: all valid.

    Group mean and standard deviation follow GRPO (arXiv 2402.03300, section 4.1.2); the filters are Reinforce-Rej's and
    RAFT's (arXiv 2504.11343, sections 2 and 4).
    """
    valid = torch.ones_like(correct) if valid is None else valid
    reward = torch.where(correct, 1.0, recipe.wrong_reward).double()
    prompts = int(prompt_index.max()) + 1 if len(prompt_index) else 0

    def group_sum(values: Tensor) -> Tensor:  # f64[S] -> f64[prompts]
        return torch.zeros(prompts, dtype=torch.float64).index_add(0, prompt_index, values * valid)

    count = group_sum(torch.ones_like(reward))
    correct_count = group_sum(correct.double())
    mean = group_sum(reward) / count.clamp(min=1)
    deviation = reward - mean[prompt_index]
    std = (group_sum(deviation**2) / (count - recipe.std_ddof).clamp(min=1)).sqrt()

    advantages = reward.clone()
    if recipe.baseline == "mean":
        advantages = deviation
    if recipe.scale == "group_std":
        advantages = advantages / (std[prompt_index] + recipe.std_eps)

    dropped = torch.zeros_like(correct)
    if recipe.group_filter in ("all_wrong", "both"):
        dropped |= (correct_count == 0)[prompt_index]
    if recipe.group_filter in ("all_correct", "both"):
        dropped |= (correct_count == count)[prompt_index]
    if recipe.sample_filter == "positive":
        dropped |= ~correct
    keep = valid & ~dropped if recipe.dropped == "remove" else valid
    return Credit(keep=keep, advantages=torch.where(keep & ~dropped, advantages, 0.0).float())


def credit_groups(recipe: Recipe, groups: list[SampleGroup]) -> Credit:
    """`credit` of a step's sample groups, samples in order of the groups."""
    samples = [sample for group in groups for sample in group.samples]
    prompt_index = torch.tensor([i for i, group in enumerate(groups) for _ in group.samples], dtype=torch.int64)
    correct = torch.tensor([sample.correct for sample in samples], dtype=torch.bool)
    masked = [recipe.overlong == "mask" and sample.truncated for sample in samples]
    valid = torch.tensor(
        [s.status.is_verdict and not m for s, m in zip(samples, masked, strict=True)], dtype=torch.bool
    )
    return credit(recipe, prompt_index, correct, valid)

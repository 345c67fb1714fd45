"""Credit: which samples count, and the advantage of each. Whole groups, before any split into mini-batches."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from megarl.algorithms.recipe import Recipe
from megarl.batch import Credit
from megarl.types import Sample, SampleGroup

T = TypeVar("T")


def credit(
    recipe: Recipe,
    prompt_ids: Tensor,
    rewards: Tensor,
    *,
    valid: Tensor | None = None,
    masked: Tensor | None = None,
    lengths: Tensor | None = None,
    pool_rewards: Tensor | None = None,
    greedy_rewards: Tensor | None = None,
    max_response_tokens: int | None = None,
) -> Credit:
    """Select samples and assign advantages from verified answers.

    Args:
        prompt_ids: i64[S], which prompt each sample answers; samples of one prompt form its group.
        rewards: [S], 1 for a correct answer, 0 for a wrong one; `recipe.wrong_reward` says what wrong is worth.
        valid: bool[S], False where there is no verdict. Such samples are always removed and take no part in any
            statistics. Default: all valid.
        masked: bool[S], True where the sample leaves the loss (overlong=mask) but not the statistics of its group.
            Default: none.
        lengths: i64[S], tokens of each response; needed by statistics over tokens and by overlong=soft.
        pool_rewards: [S], mean 0/1 reward of everything sampled for the prompt; default: of its group.
        greedy_rewards: [S], 0/1 reward of the prompt's greedy response; needed by baseline=greedy.
        max_response_tokens: the response limit; needed by overlong=soft.

    With baseline=critic the advantages are the rewards, for `gae` to spread over tokens; with objective=dpo they are 1
    for the chosen and -1 for the rejected sample of each pair.

    Sources: group mean and standard deviation: GRPO (arXiv 2402.03300, section 4.1.2); filters: arXiv 2504.11343,
    sections 2 and 4; leave_one_out: RLOO (2402.14740); length_mean: OPO (2505.23585); batch_token_*: REINFORCE++
    (2501.03262); greedy: ReMax (2310.10505); group_mean: MaxRL (2602.02710); batch_std: ScaleRL (2510.13786); soft
    overlong penalty: DAPO (2503.14476, equation 13).
    """
    scores = rewards.double()
    if not ((scores == 0) | (scores == 1)).all():
        raise ValueError("rewards must be 1 (correct) or 0 (wrong); recipe.wrong_reward says what wrong is worth")
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    masked = torch.zeros_like(valid) if masked is None else masked
    groups = Groups(prompt_ids, valid)
    correct = scores > 0

    if recipe.objective == "dpo":
        pairs = _first_pairs(groups, correct, valid & ~masked)
        return Credit(keep=pairs != 0, advantages=pairs, rewards=scores)

    def worth(score: Tensor) -> Tensor:
        return recipe.wrong_reward + score.double() * (1 - recipe.wrong_reward)

    reward = worth(scores)
    if recipe.overlong == "soft":
        limit = _given(max_response_tokens, "max_response_tokens")
        reward = reward + overlong_penalty(_given(lengths, "lengths"), limit, recipe.overlong_cache_tokens)

    dropped = filtered_groups(recipe, groups, correct)
    if recipe.sample_filter == "positive":
        dropped = dropped | ~correct
    learned = valid & ~masked & ~dropped
    tokens = None if lengths is None else lengths.double()

    if recipe.baseline == "mean":
        baseline = groups.mean(reward)
    elif recipe.baseline == "leave_one_out":
        others = groups.sum(torch.ones_like(reward)) - 1
        baseline = torch.where(others > 0, (groups.sum(reward) - reward) / others.clamp(min=1), reward)
    elif recipe.baseline == "length_mean":
        baseline = groups.mean(reward, _given(tokens, "lengths"))
    elif recipe.baseline == "pool_mean":
        baseline = worth(groups.mean(scores) if pool_rewards is None else pool_rewards)
    elif recipe.baseline == "greedy":
        baseline = worth(_given(greedy_rewards, "greedy_rewards"))
    elif recipe.baseline == "batch_token_mean":
        baseline, _ = _mean_and_std(reward, _given(tokens, "lengths") * learned, ddof=0)
    else:  # none; critic
        baseline = torch.zeros(())
    advantages = reward - baseline

    if recipe.scale == "group_std":
        advantages = advantages / (groups.std(reward, recipe.std_ddof) + recipe.scale_eps)
    elif recipe.scale == "group_mean":
        advantages = advantages / (groups.mean(reward) + recipe.scale_eps)
    elif recipe.scale in ("batch_std", "batch_token_std"):
        weights = learned.double() if recipe.scale == "batch_std" else _given(tokens, "lengths") * learned
        _, std = _mean_and_std(advantages, weights, recipe.std_ddof)
        advantages = advantages / (std + recipe.scale_eps)

    keep = learned if recipe.dropped == "remove" else valid & ~masked
    return Credit(keep=keep, advantages=torch.where(learned, advantages, 0.0), rewards=reward)


def credit_groups(recipe: Recipe, groups: list[SampleGroup], max_response_tokens: int | None = None) -> Credit:
    """`credit` of a step's sample groups, samples in order of the groups."""
    samples = [sample for group in groups for sample in group.samples]
    greedy = [group.greedy for group in groups if group.greedy is not None]

    def of_groups(values: list[float]) -> Tensor:  # one value a group -> f64[S]
        return torch.tensor(
            [value for value, group in zip(values, groups, strict=True) for _ in group.samples], dtype=torch.float64
        )

    return credit(
        recipe,
        prompt_ids=torch.tensor([i for i, group in enumerate(groups) for _ in group.samples], dtype=torch.int64),
        rewards=torch.tensor([sample.correct for sample in samples], dtype=torch.bool),
        valid=torch.tensor(
            [sample.status.is_verdict and _has_baseline(recipe, group) for group in groups for sample in group.samples],
            dtype=torch.bool,
        ),
        masked=torch.tensor([is_masked(recipe, sample) for sample in samples], dtype=torch.bool),
        lengths=torch.tensor([len(sample.response_ids) for sample in samples], dtype=torch.int64),
        pool_rewards=of_groups([_pass_rate(group) for group in groups]),
        greedy_rewards=of_groups([float(answer.correct) for answer in greedy]) if len(greedy) == len(groups) else None,
        max_response_tokens=max_response_tokens,
    )


def is_masked(recipe: Recipe, sample: Sample) -> bool:
    """Whether the recipe keeps the sample out of the loss for being truncated."""
    return recipe.overlong == "mask" and sample.truncated


def is_filtered(recipe: Recipe, group: SampleGroup) -> bool:
    """Whether the recipe's group filter drops this prompt."""
    valid = torch.tensor([sample.status.is_verdict for sample in group.samples], dtype=torch.bool)
    correct = torch.tensor([sample.correct for sample in group.samples], dtype=torch.bool)
    groups = Groups(torch.zeros(len(group.samples), dtype=torch.int64), valid)
    return not valid.any() or bool(filtered_groups(recipe, groups, correct).all())


class Groups:
    """Sums and means over the valid samples of each prompt, handed back to each of its samples."""

    def __init__(self, prompt_ids: Tensor, valid: Tensor) -> None:
        self.valid = valid
        ids, self.index = torch.unique(prompt_ids, return_inverse=True)  # i64[S]
        self.count = len(ids)

    def sum(self, values: Tensor) -> Tensor:  # [S] -> f64[S]
        total = torch.zeros(self.count, dtype=torch.float64).index_add(0, self.index, values.double() * self.valid)
        return total[self.index]

    def mean(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        weights = torch.ones_like(values, dtype=torch.float64) if weights is None else weights
        total = self.sum(weights)
        return self.sum(values * weights) / torch.where(total > 0, total, 1.0)

    def std(self, values: Tensor, ddof: int) -> Tensor:
        squares = self.sum((values - self.mean(values)) ** 2)
        return (squares / (self.sum(torch.ones_like(values)) - ddof).clamp(min=1)).sqrt()


def filtered_groups(recipe: Recipe, groups: Groups, correct: Tensor) -> Tensor:
    """bool[S]: the sample's whole group is dropped by `recipe.group_filter`."""
    right, count = groups.sum(correct), groups.sum(torch.ones_like(correct))
    dropped = torch.zeros_like(correct)
    if recipe.group_filter in ("all_wrong", "both"):
        dropped = dropped | (right == 0)
    if recipe.group_filter in ("all_correct", "both"):
        dropped = dropped | (right == count)
    return dropped


def overlong_penalty(lengths: Tensor, limit: int, cache: int | None) -> Tensor:
    """f64[S] in [-1, 0]: falls linearly over the last `cache` tokens before the limit (DAPO, equation 13)."""
    cache = cache or max(limit // 5, 1)
    return ((limit - cache - lengths.double()) / cache).clamp(-1, 0)


def _first_pairs(groups: Groups, correct: Tensor, eligible: Tensor) -> Tensor:
    """f64[S]: 1 at the first correct and -1 at the first wrong sample of each group that has both, else 0."""
    pairs = torch.zeros(len(correct), dtype=torch.float64)
    for group in range(groups.count):
        members = ((groups.index == group) & eligible).nonzero().flatten()
        best, worst = members[correct[members]], members[~correct[members]]
        if len(best) and len(worst):
            pairs[best[0]], pairs[worst[0]] = 1.0, -1.0
    return pairs


def _mean_and_std(values: Tensor, weights: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
    total = weights.sum()
    mean = (values * weights).sum() / total.clamp(min=1)
    return mean, ((weights * (values - mean) ** 2).sum() / (total - ddof).clamp(min=1)).sqrt()


def _has_baseline(recipe: Recipe, group: SampleGroup) -> bool:
    """Whether the verifier could judge the greedy response, where the recipe compares with it."""
    return recipe.baseline != "greedy" or group.greedy is None or group.greedy.status.is_verdict


def _pass_rate(group: SampleGroup) -> float:
    drawn = [sample.correct for sample in group.drawn if sample.status.is_verdict]
    return sum(drawn) / len(drawn) if drawn else 0.0


def _given(value: T | None, name: str) -> T:
    if value is None:
        raise ValueError(f"this recipe needs {name}")
    return value

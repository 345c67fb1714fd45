"""The samples of one training step: a first round, and those that the recipe asks for after it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

from megarl.algorithms.credit import is_filtered, is_masked
from megarl.algorithms.recipe import Recipe
from megarl.config import Config
from megarl.data.prompts import PromptSet
from megarl.rollout.sampler import training_sampling
from megarl.types import Prompt, Rollout, Sample, SampleGroup

Draw = Callable[..., Awaitable[list[SampleGroup]]]  # prompts, `first`: index of a prompt's first sample -> its group


async def sample_step(
    config: Config, prompts: PromptSet, step: int, sample: Draw, on_response: Callable[[], object] = lambda: None
) -> Rollout:
    """A pure function of the step and of what `sample` (that of `Sampler`) draws, so resuming needs no state."""
    recipe, schedule, sampling = config.recipe, config.schedule, training_sampling(config)
    n, seconds = schedule.samples_per_prompt, defaultdict[str, float](float)
    sample = partial(sample, due=step, on_response=on_response, seconds=seconds)
    draw = partial(sample, n=recipe.samples_per_round or n, sampling=sampling, seed=("step", step))
    rollout = Rollout(await draw(prompts.at_step(step, schedule.prompts_per_step, config.run.seed)))
    if recipe.backfill == "resample":
        await resample(recipe, rollout, draw, partial(prompts.replacements, step, seed=config.run.seed))
    elif recipe.backfill == "adaptive":
        await sample_on(recipe, rollout, draw, n)
    if recipe.baseline == "greedy":  # one more response a prompt (ReMax, 2310.10505)
        asked = [group.prompt for group in rollout.groups]
        greedy = await sample(asked, n=1, sampling=replace(sampling, temperature=0.0), seed=("greedy", step))
        for group, answer in zip(rollout.groups, greedy, strict=True):
            group.greedy = answer.samples[0]
    rollout.seconds = dict(seconds)
    return rollout


async def resample(recipe: Recipe, rollout: Rollout, draw: Draw, replacements: Callable[..., list[Prompt]]) -> None:
    """Replace groups that the recipe filters by those of fresh prompts (DAPO's dynamic sampling, 2503.14476)."""
    groups = rollout.groups
    used = {group.prompt.id for group in groups}
    for _ in range(1, recipe.backfill_rounds):
        slots = [i for i, group in enumerate(groups) if is_filtered(recipe, group)]
        fresh = replacements(count=len(slots), exclude=used)
        if not fresh:
            return
        used |= {prompt.id for prompt in fresh}
        for slot, group in zip(slots, await draw(fresh), strict=False):  # the last prompts of a small set may be fewer
            rollout.replaced.append(groups[slot])
            groups[slot] = group


async def sample_on(recipe: Recipe, rollout: Rollout, draw: Draw, n: int) -> None:
    """Sample each prompt until half of n samples are correct and half wrong (Reinforce-Ada, 2510.04996).

    The group is then n samples, as balanced as those drawn allow; the others stay beside it for the baseline.
    """

    def counts(sample: Sample) -> bool:
        return sample.status.is_verdict and not is_masked(recipe, sample)

    def right_and_wrong(group: SampleGroup) -> tuple[list[Sample], list[Sample]]:
        counted = [sample for sample in group.drawn if counts(sample)]
        return [s for s in counted if s.correct], [s for s in counted if not s.correct]

    def lacks(group: SampleGroup) -> bool:
        return len(group.drawn) < n or min(map(len, right_and_wrong(group))) < n // 2

    for round in range(1, recipe.backfill_rounds):
        active = [group for group in rollout.groups if lacks(group)]
        if not active:
            break
        more = await draw([group.prompt for group in active], first=round * (recipe.samples_per_round or n))
        for group, drawn in zip(active, more, strict=True):
            group.unused += drawn.samples
    for group in rollout.groups:
        right, wrong = right_and_wrong(group)
        count = min(len(right), max(n // 2, n - len(wrong)))
        chosen = right[:count] + wrong[: n - count]
        # Samples that don't count fill up a group that lacks others, and leave the loss again.
        chosen += [sample for sample in group.drawn if not counts(sample)][: n - len(chosen)]
        indices = {sample.index for sample in chosen}
        group.unused = [sample for sample in group.drawn if sample.index not in indices]
        group.samples = chosen

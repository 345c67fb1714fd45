"""What the sections of a configuration can't mean together, each as one line that names the keys and the fix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megarl.config.sections import Config


def contradictions(config: Config) -> Iterator[str]:
    recipe, n = config.recipe, config.schedule.samples_per_prompt
    if n == 1 and recipe.compares_within_group:
        fields = ", ".join(recipe.group_fields)
        yield (
            f"schedule.samples_per_prompt=1 gives recipe {recipe.name} nothing to compare within a group "
            f"({fields}); use at least 2"
        )
    if recipe.samples_per_round and recipe.samples_per_round * recipe.backfill_rounds < n:
        yield (
            f"recipe.samples_per_round={recipe.samples_per_round} in recipe.backfill_rounds="
            f"{recipe.backfill_rounds} rounds never make schedule.samples_per_prompt={n}; raise one, or lower that"
        )
    truncated = config.rollout.top_p < 1 or config.rollout.top_k > 0
    if truncated and recipe.off_policy_fields and not config.rollout.allow_truncated_sampling:
        yield (
            f"rollout.top_p={config.rollout.top_p:g}, rollout.top_k={config.rollout.top_k}: the sampler renormalises "
            f"and the trainer does not, so the ratios of recipe {recipe.name} would be biased "
            f"({', '.join(recipe.off_policy_fields)}); use top_p=1 and top_k=0, or set "
            "rollout.allow_truncated_sampling=true"
        )
    limit, cache = config.rollout.max_response_tokens, recipe.overlong_cache_tokens
    if recipe.overlong == "soft" and cache is not None and cache > limit:
        yield (f"recipe.overlong_cache_tokens={cache} is more than rollout.max_response_tokens={limit}; use less")
    sequences = 2 if recipe.objective == "dpo" else 1  # that must share a micro-batch
    if config.learner.micro_batch_tokens < sequences * config.max_sequence_tokens:
        yield (
            f"learner.micro_batch_tokens={config.learner.micro_batch_tokens} is less than the longest "
            f"{'pair of sequences, 2 x (' if sequences == 2 else 'sequence, '}data.max_prompt_tokens + "
            f"rollout.max_response_tokens{')' if sequences == 2 else ''} = "
            f"{sequences * config.max_sequence_tokens}; use at least that"
        )
    if config.learner.share_prompts is True and not config.learner.packing:
        yield "learner.share_prompts=true packs responses behind their prompt, but learner.packing=false; use true"
    if config.critic.head_start_steps and not recipe.needs_critic:
        yield (
            f"critic.head_start_steps={config.critic.head_start_steps}, but recipe {recipe.name} has no critic; use "
            "recipe.baseline=critic, or leave it at 0"
        )
    if config.critic.head_start_steps >= config.run.steps:
        yield (
            f"critic.head_start_steps={config.critic.head_start_steps} leaves the policy none of run.steps="
            f"{config.run.steps}; use less"
        )
    yield from _stale(config)
    if config.learner.offload != "none" and not config.engines_sleep:
        cause = f"schedule.max_staleness={config.schedule.max_staleness}"
        if config.rollout.placement != "colocated":
            cause = f"rollout.placement={config.rollout.placement}"
        yield (
            f"learner.offload={config.learner.offload} lends the learner's memory to engines that take turns with it, "
            f"but under {cause} none do; use offload=none, or colocated engines with max_staleness=0"
        )
    if (m := config.schedule.minibatch_prompts) is not None and m > config.schedule.prompts_per_step:
        yield (
            f"schedule.minibatch_prompts={m} is more than schedule.prompts_per_step="
            f"{config.schedule.prompts_per_step}; use at most that"
        )


def _stale(config: Config) -> Iterator[str]:
    """What samples by an older policy can't be used for, and what acts on them alone."""
    recipe, schedule, update = config.recipe, config.schedule, config.rollout.weight_update
    behind, partial = schedule.max_staleness, schedule.partial_rollouts
    if partial is not None and not behind:
        yield (
            f"schedule.partial_rollouts={partial} carries responses over to newer weights, which "
            "schedule.max_staleness=0 excludes; use max_staleness of at least 1, or partial_rollouts=null"
        )
    if update == "in_flight" and not behind:
        yield (
            "rollout.weight_update=in_flight interrupts responses, but with schedule.max_staleness=0 none are being "
            "generated then; use max_staleness of at least 1, or weight_update=drain"
        )
    if partial is not None and update == "in_flight":
        yield (
            f"schedule.partial_rollouts={partial} is for rollout.weight_update=drain: in_flight waits for no tokens; "
            "use drain, or partial_rollouts=null"
        )
    if not behind or recipe.objective == "dpo":  # which learns from anybody's samples
        return
    if not recipe.off_policy_fields and schedule.epochs > 1:
        yield (
            f"schedule.max_staleness={behind} with schedule.epochs={schedule.epochs}: recipe {recipe.name} has no "
            "ratio to the policy that sampled; use epochs=1, max_staleness=0, or recipe.ratio=token with a clip"
        )
    if recipe.off_policy_fields and recipe.old_policy == "trainer" and recipe.mismatch == "none":
        yield (
            f"schedule.max_staleness={behind}: recipe {recipe.name} takes its ratio against the policy that begins the "
            "step, which is not the one that sampled; use recipe.old_policy=rollout, or a recipe.mismatch correction"
        )

"""A few short responses of every engine to fixed prompts: by the current weights, when other samples may be older."""

from __future__ import annotations

from dataclasses import replace

from megarl.data.prompts import PromptSet, stable_hash
from megarl.rollout.messages import Request
from megarl.rollout.sampler import Sampler, training_sampling
from megarl.types import Sample, SampleGroup

PROMPTS = 8
TOKENS = 32


async def sample_probe(sampler: Sampler, prompts: PromptSet) -> list[SampleGroup]:
    """One response an engine to each of the first prompts, with the same random numbers every time; not graded."""
    sampling = training_sampling(sampler.config)
    sampling = replace(sampling, max_tokens=min(TOKENS, sampling.max_tokens))
    asked = prompts.prompts[:PROMPTS]
    requests = [
        Request(prompt.token_ids.tolist(), stable_hash(sampler.config.run.seed, "probe", prompt.id)) for prompt in asked
    ]
    groups = [SampleGroup(prompt, []) for prompt in asked]
    for member in sampler.pool.members:
        responses = await sampler.pool.generate(requests, sampling, on=member.index)
        for group, response in zip(groups, responses, strict=True):
            sample = Sample(
                index=member.index,
                response_ids=response.token_ids,
                rollout_logprobs=response.logprobs,
                text="",
                finish_reason=response.finish_reason,
                weight_versions=response.weight_versions,
            )
            group.samples.append(sample)
    return groups

"""Prompts -> scored sample groups: the same on every rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from megarl.config import Config
from megarl.data.prompts import PromptSet, load_prompts
from megarl.learner.mesh import Mesh
from megarl.rollout.rounds import sample_step
from megarl.rollout.sampler import Sampler
from megarl.runlog import RunLog
from megarl.types import Rollout, SampleGroup, UserError


class RolloutSource:
    """Samples and verifies on rank 0, then shares the groups. Every method is collective."""

    def __init__(self, config: Config, mesh: Mesh, tokenizer: Any, tensor_names: list[str], log: RunLog) -> None:
        self.config, self.mesh = config, mesh
        self.sampler: Sampler | None = None
        if mesh.rank == 0:
            self.train_prompts, self.eval_prompts = _load_prompts(config, tokenizer, log)
            self.sampler = Sampler(config, tokenizer, tensor_names, log)

    def claim_memory(self) -> None:
        """On a GPU, return when the engines have measured it and taken their share: the learner's comes after."""
        if self.mesh.device.type == "cuda":
            if self.sampler:
                self.sampler.pool.wait_ready()
            self.mesh.barrier()

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Give the engines the learner's weights; their samples carry `version` from now on."""
        if self.sampler:
            self.sampler.pool.update_weights(tensors, version)
        else:
            for _ in tensors:  # nothing arrives here, but iterating joins rank 0's collectives
                raise AssertionError("weights arrive on rank 0 only")

    def next_rollout(self, step: int) -> Rollout:
        """The scored samples of a training step."""
        rollout = None
        if self.sampler:
            rollout = sample_step(self.config, self.train_prompts, step, self.sampler.sample)
        return self.mesh.broadcast(rollout)

    def evaluate(self) -> list[SampleGroup]:
        """Scored samples of the held-out prompts; the same random numbers every time, so that evaluations pair up."""
        groups = None
        if self.sampler:
            groups = self.sampler.evaluate(self.eval_prompts.prompts)
        return self.mesh.broadcast(groups)

    def __enter__(self) -> RolloutSource:
        return self

    def __exit__(self, *_: object) -> None:
        if self.sampler:
            self.sampler.close()


def _load_prompts(config: Config, tokenizer: Any, log: RunLog) -> tuple[PromptSet, PromptSet]:
    """Training and evaluation prompts (none without data.eval), checked against the schedule."""
    train = load_prompts(config.data, "train", tokenizer)
    held_out = load_prompts(config.data, "eval", tokenizer) if config.data.eval else PromptSet([], 0)
    for name, prompts in (("train", train), ("eval", held_out)):
        if prompts.dropped:
            log.say(f"data.{name}: dropped {prompts.dropped} prompts of over {config.data.max_prompt_tokens} tokens")
    if config.schedule.prompts_per_step > len(train.prompts):
        raise UserError(
            f"schedule.prompts_per_step={config.schedule.prompts_per_step} is more than the {len(train.prompts)} "
            "prompts of data.train that fit data.max_prompt_tokens; use at most that"
        )
    return train, held_out

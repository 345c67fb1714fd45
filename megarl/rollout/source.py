"""Prompts -> scored sample groups, on rank 0."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import statistics
from collections.abc import Callable, Coroutine, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from megarl.config import Config
from megarl.data.prompts import PromptSet, Splits, load_prompts
from megarl.models.weights import Manifest
from megarl.rollout.clock import Clock
from megarl.rollout.connection import Invitation
from megarl.rollout.engine import weights_dtype
from megarl.rollout.hosts import Host, Nodes
from megarl.rollout.probe import sample_probe
from megarl.rollout.rounds import sample_step
from megarl.rollout.sampler import Sampler
from megarl.rollout.transfer import Bucket, DamagedWeights, Message, SharedMemory, Tensors, WeightTransferError
from megarl.runlog import RunLog
from megarl.types import Rollout, SampleGroup, UserError

# The learner's: of about so many bytes a round for each of these ranks, which pack them; collective.
Weights = Callable[[int, set[int]], Iterable[Tensors]]
RESENT = 1  # times that weights are sent again which engines refuse


class Ranks(Protocol):
    """What is asked of the learner's mesh."""

    rank: int
    device: torch.device

    def broadcast(self, value: Any) -> Any: ...

    def gather(self, value: Any) -> list[Any]: ...

    def barrier(self) -> None: ...


class StalenessError(RuntimeError):
    """A sample is older than schedule.max_staleness lets it be."""


class RolloutSource:
    """Samples and verifies on rank 0, which alone gets the groups. Every method is collective.

    The samples of a step are asked for up to schedule.max_staleness steps before they are learned from, and learned
    from in the order of the steps, whichever is finished first. With 0 nothing is asked for before the weights that it
    is to come from are there.
    """

    def __init__(
        self, config: Config, ranks: Ranks, problems: Splits, tokenizer: Any, manifest: Manifest, log: RunLog
    ) -> None:
        self.config, self.ranks, self.log = config, ranks, log
        self.sampler: Sampler | None = None
        self._version: int | None = None  # of the weights served
        self._steps: dict[int, _Asked] = {}  # asked for and not learned from
        self._probe: _Asked | None = None
        self._busy = 0.0  # seconds that an engine had generated when the last step's samples were there
        self._packers = sharing_memory(ranks)
        self._buckets = [Bucket(weights_dtype(config)) for _ in range(2)]
        hosts = first_ranks(ranks)[: config.rollout.engines] if config.rollout.placement != "ray" else []
        nodes = None
        if ranks.rank == 0:
            self.train_prompts, self.eval_prompts = _load_prompts(config, problems, tokenizer, log)
            nodes = Nodes(config, len(hosts), log.say) if len(hosts) > 1 else None
            self.sampler = Sampler(config, tokenizer, manifest, log, nodes)
        invitation: Invitation | None = ranks.broadcast(nodes and nodes.invitation)
        self._host: Host | None = None
        if invitation and ranks.rank in hosts[1:]:
            self._host = start_host(config, invitation, hosts.index(ranks.rank), len(hosts))

    def claim_memory(self) -> None:
        """On a GPU, return when the engines have measured it and taken their share: the learner's comes after."""
        if self.ranks.device.type == "cuda":
            if self.sampler:
                self.sampler.pool.wait_ready()
            self._sleep()
            self.ranks.barrier()

    def update_weights(self, weights: Weights, version: int) -> None:
        """Give the engines the learner's weights; what they sample carries `version` from now on."""
        again, self._version = version == self._version, version
        for attempt in range(RESENT + 1):
            error = self.ranks.broadcast(self._send(weights, version, again))
            if not error:
                break
            if attempt == RESENT or isinstance(error, DamagedWeights) and self.config.rollout.damaged_weights == "end":
                raise error
            self.log.say(f"{error}; all weights are sent again")
        if self.sampler:
            for part, seconds in self.sampler.pool.clock.take().items():
                self.log.add_time(f"weights_{part}", seconds)
            if self.config.schedule.max_staleness and not again:
                sampler, prompts = self.sampler, self.train_prompts
                self._probe = _Asked(sampler, lambda _: sample_probe(sampler, prompts))
                self._ask_ahead(sampler, version)

    def _send(self, weights: Weights, version: int, only_stale: bool) -> WeightTransferError | None:
        """Why engines refused them, on rank 0. The other ranks pack what they keep."""
        error, rounds = None, self._rounds(weights)
        if self.sampler:
            try:
                self.sampler.pool.load(rounds, version, only_stale)
            except WeightTransferError as refused:
                error = refused
        for _ in rounds:  # the other ranks' collectives go on to the end
            pass
        return error

    def _rounds(self, weights: Weights) -> Iterator[list[Message]]:
        """What is packed in each round, and where. A bucket is packed anew when what it held is read."""
        pool = self.sampler and self.sampler.pool
        clock = pool.clock if pool else Clock()
        parts = weights(self.config.rollout.bucket_mib * 2**20, self._packers)
        for part, bucket in zip(parts, itertools.cycle(self._buckets)):
            with clock.during("pack"):
                message = bucket.pack(clock.each("gather", part))
            if pool:
                pool.settle()
            with clock.during("ranks"):
                messages = self.ranks.gather(message)
            yield [message for message in messages if message]

    def next_rollout(self, step: int, weights: Weights) -> Rollout | None:
        """The scored samples of a training step; `weights` are for an engine that has to be started again meanwhile."""
        schedule = self.config.schedule
        self._wake()
        if self.sampler:
            self._ask_ahead(self.sampler, step)
        with self.log.phase("rollout", total=schedule.prompts_per_step * schedule.samples_per_prompt) as advance:
            rollout: Rollout | None = self._result(self._steps.pop(step, None), weights, advance)
            probe: list[SampleGroup] | None = self._result(self._probe, weights) if schedule.max_staleness else None
        self._sleep()
        if self.sampler and rollout:
            rollout.probe = probe or []
            check_staleness(rollout, step, schedule.max_staleness)
            busy = statistics.mean(self.sampler.pool.busy_seconds())
            rollout.seconds["engines"], self._busy = busy - self._busy, busy
            rollout.restarts = self.sampler.pool.restarts
        return rollout

    def evaluate(self, weights: Weights) -> list[SampleGroup] | None:
        """Scored samples of the held-out prompts; the same random numbers every time, so that evaluations pair up.

        They go before those of training steps that were asked for already, which are generated beside them.
        """
        asked, total = None, 0
        self._wake()
        if self.sampler:
            sampler, prompts = self.sampler, self.eval_prompts.prompts
            asked = _Asked(sampler, lambda arrive: sampler.evaluate(prompts, lambda _: arrive()))
            total = len(prompts) * self.config.eval.samples_per_prompt
        with self.log.phase("evaluate", total=total) as advance:
            groups: list[SampleGroup] | None = self._result(asked, weights, advance)
        self._sleep()
        return groups

    def _wake(self) -> None:
        """Before something is generated: once every rank has lent its GPU."""
        if self.config.engines_sleep:
            self.ranks.barrier()
            if self.sampler:
                self.sampler.pool.wake()

    def _sleep(self) -> None:
        """After it: before a rank takes its GPU again."""
        if self.config.engines_sleep:
            if self.sampler:
                self.sampler.pool.sleep()
            self.ranks.barrier()

    def _ask_ahead(self, sampler: Sampler, version: int) -> None:
        """For the steps that may be sampled by these weights and haven't been asked for; their probe, for which the
        learner waits, has the engines to itself."""
        probe = self._probe

        async def sample(step: int, arrive: Callable[[], None]) -> Rollout:
            if probe:
                await asyncio.wrap_future(probe.future)
            return await sample_step(self.config, self.train_prompts, step, sampler.sample, arrive)

        for step in range(version, min(version + self.config.schedule.max_staleness + 1, self.config.run.steps)):
            if step not in self._steps:
                self._steps[step] = _Asked(sampler, partial(sample, step))

    def _result(self, asked: _Asked | None, weights: Weights, advance: Callable[[int], object] | None = None) -> Any:
        """What rank 0 has asked for, there; None elsewhere."""
        while not self.ranks.broadcast(asked and asked.is_done(advance)):
            assert self._version is not None
            self.update_weights(weights, self._version)
        return asked and asked.future.result()

    def __enter__(self) -> RolloutSource:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if self.sampler:
            self.sampler.close()
        if self._host:
            self._host.close(wait=error is None)
        for bucket in self._buckets:
            bucket.close()


class _Asked:
    """Something that is being sampled, and how many responses have arrived."""

    def __init__(self, sampler: Sampler, sample: Callable[[Callable[[], None]], Coroutine[Any, Any, Any]]) -> None:
        self._pool, self._arrived = sampler.pool, 0
        self._advance: Callable[[int], object] | None = None
        self.future = sampler.pool.start(sample(self._arrive))

    def is_done(self, advance: Callable[[int], object] | None) -> bool:
        """Wait for it; False where an engine needs weights meanwhile."""
        self._advance = advance
        return self._pool.is_done(self.future)

    def _arrive(self) -> None:
        self._arrived += 1
        if self._advance:
            self._advance(self._arrived)


def check_staleness(rollout: Rollout, step: int, most: int) -> None:
    """Raises StalenessError where a token is from weights more than `most` versions behind, or ahead, of the step's."""
    for sample in rollout.samples:
        oldest, newest = int(sample.weight_versions.min()), int(sample.weight_versions.max())
        if not step - most <= oldest <= newest <= step:
            raise StalenessError(
                f"step {step} got a sample of weight versions {oldest} to {newest}; schedule.max_staleness={most} lets "
                f"it have {step - most} to {step}"
            )


def first_ranks(ranks: Ranks) -> list[int]:
    """The first rank of each node, by what the launcher calls them; rank 0 alone where it doesn't say."""
    local_ranks = ranks.gather(int(os.environ.get("LOCAL_RANK") or ranks.rank))
    return [rank for rank, local in enumerate(local_ranks) if 0 in (rank, local)]


def sharing_memory(ranks: Ranks) -> set[int]:
    """The ranks whose memory rank 0, and the engines of its node, can map: those that can map rank 0's."""
    memory, secret = SharedMemory(), secrets.token_bytes(16)
    memory.grow(len(secret))
    memory.data.copy_(torch.frombuffer(bytearray(secret), dtype=torch.uint8))
    path, secret = ranks.broadcast((memory.path, secret) if ranks.rank == 0 else None)
    try:
        shares = Path(path).read_bytes() == secret
    except OSError:
        shares = False
    sharing = {rank for rank, one in enumerate(ranks.gather(shares)) if one}
    memory.close()
    return sharing


def start_host(config: Config, invitation: Invitation, node: int, nodes: int) -> Host:
    """Raises UserError where rank 0 isn't to be reached."""
    try:
        return Host(config, invitation, node, nodes)
    except OSError as error:
        raise UserError(
            f"node {node} of {nodes}: {error}; let the nodes connect to each other on any port, or keep to one engine"
        ) from None


def _load_prompts(config: Config, problems: Splits, tokenizer: Any, log: RunLog) -> tuple[PromptSet, PromptSet]:
    """Training and evaluation prompts (none without data.eval), checked against the schedule."""
    train, held_out = (
        load_prompts(config.data, split, tokenizer, problems[split]) if split in problems else PromptSet([], 0)
        for split in ("train", "eval")
    )
    for name, prompts in (("train", train), ("eval", held_out)):
        if prompts.dropped:
            log.say(f"data.{name}: dropped {prompts.dropped} prompts of over {config.data.max_prompt_tokens} tokens")
    if config.schedule.prompts_per_step > len(train.prompts):
        raise UserError(
            f"schedule.prompts_per_step={config.schedule.prompts_per_step} is more than the {len(train.prompts)} "
            "prompts of data.train that fit data.max_prompt_tokens; use at most that"
        )
    return train, held_out

"""Samples responses to prompts and has them verified, in the background; one process, no ranks."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from megarl.config import Config, RewardConfig
from megarl.data.prompts import stable_hash
from megarl.models.weights import Manifest
from megarl.processes import cores
from megarl.rewards.alarm import Alarm, nothing_to_reward
from megarl.rewards.pool import RewardPool, worker_count
from megarl.rollout.grading import Grader
from megarl.rollout.hosts import Nodes
from megarl.rollout.messages import FIRST, Request, Response, Sampling
from megarl.rollout.pool import RolloutPool
from megarl.rollout.reading import Reader
from megarl.types import Prompt, Sample, SampleGroup


class Log(Protocol):
    """Where engines leave their logs, and who is told."""

    folder: Path

    def say(self, text: str) -> None: ...


class Sampler:
    """The rollout engines and the verifier."""

    def __init__(
        self, config: Config, tokenizer: Any, manifest: Manifest, log: Log, nodes: Nodes | None = None
    ) -> None:
        self.config, self.log = config, log
        self.pool = RolloutPool(config, log.folder / "logs", manifest, log.say, nodes)
        self.rewards, self.alarm = reward_pool(config.reward), Alarm()
        self.grader = Grader(Reader(config, tokenizer), self.rewards)
        self._has_sampled = False  # for training

    async def sample(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: Sampling,
        seed: tuple[Any, ...],
        *,
        first: int = 0,
        due: int = FIRST,
        on: int | None = None,
        on_response: Callable[[], object] = lambda: None,
        seconds: defaultdict[str, float] | None = None,
    ) -> list[SampleGroup]:
        """n scored samples of each prompt, their indices beginning at `first`.

        The random numbers of a sample depend on run seed, `seed`, prompt and index alone. The time that generation
        takes, and grading beyond that, is added to `seconds`. `due` and `on` are those of the engines' requests.
        """
        grading = self.grader.begin([prompt.answer for prompt in prompts for _ in range(n)])

        def arrive(place: int, response: Response) -> None:
            grading.put(place, response)
            on_response()

        started = time.monotonic()
        requests = [
            Request(token_ids, stable_hash(self.config.run.seed, *seed, prompt.id, i), due)
            for prompt in prompts
            for token_ids in [prompt.token_ids.tolist()]
            for i in range(first, first + n)
        ]
        responses = await self.pool.generate(requests, sampling, n, arrive, on)
        generated = time.monotonic()
        graded = await grading.results()
        if seconds is not None:
            seconds["generation"] += generated - started
            seconds["grading"] += time.monotonic() - generated
        texts, verdicts = [text for text, _ in graded], [verdict for _, verdict in graded]
        if alarm := self.alarm.message(self.pool.version if due == FIRST else ("step", due), verdicts):
            self.log.say(alarm)
        if seed[0] == "step" and not self._has_sampled:
            self._has_sampled = True
            if alarm := nothing_to_reward(self.config.reward.name, verdicts, texts):
                self.log.say(alarm)
        samples = [
            Sample(
                index=first + i % n,
                response_ids=response.token_ids,
                rollout_logprobs=response.logprobs,
                text=text,
                finish_reason=response.finish_reason,
                weight_versions=response.weight_versions,
                status=verdict.status,
                extracted=verdict.extracted,
            )
            for i, (response, (text, verdict)) in enumerate(zip(responses, graded, strict=True))
        ]
        return [SampleGroup(prompt, samples[i * n : (i + 1) * n]) for i, prompt in enumerate(prompts)]

    async def evaluate(self, prompts: Sequence[Prompt], advance: Callable[[int], object]) -> list[SampleGroup]:
        """eval.samples_per_prompt scored samples of each held-out prompt, with the same random numbers every time.

        `advance` is told how many responses have arrived.
        """
        n, sampling, arrived = self.config.eval.samples_per_prompt, evaluation_sampling(self.config), itertools.count(1)
        return await self.sample(prompts, n, sampling, ("eval",), on_response=lambda: advance(next(arrived)))

    def close(self) -> None:
        self.pool.close()
        self.grader.close()
        self.rewards.close()

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def reward_pool(reward: RewardConfig) -> RewardPool:
    return RewardPool(
        workers=reward.workers or worker_count(cores()),
        cpu_seconds=reward.cpu_seconds,
        memory_bytes=reward.memory_mib << 20,
        recycle_after=reward.recycle_after,
        reward=reward.name,
        lenient=reward.lenient,
    )


def training_sampling(config: Config) -> Sampling:
    rollout = config.rollout
    return Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_response_tokens)


def evaluation_sampling(config: Config) -> Sampling:
    max_tokens = config.eval.max_response_tokens or config.rollout.max_response_tokens
    return Sampling(config.eval.temperature, top_p=1.0, top_k=0, max_tokens=max_tokens)

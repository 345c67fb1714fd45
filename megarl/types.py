"""The records that travel through the loop: Prompt -> Sample -> SampleGroup -> Rollout. Those of tensors: megarl.batch.

A grader's process imports this file, and must start fast: no torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

Metrics = dict[str, float]  # name -> value, one step


class UserError(ValueError):
    """A mistake of the user's: the message names the key, file or row and the fix. Shown without traceback."""


class RewardStatus(StrEnum):
    """What the verifier concluded. TIMEOUT and ERROR say nothing about the answer: such samples leave the loss."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    TRUNCATED = "truncated"
    TIMEOUT = "timeout"
    ERROR = "error"

    @property
    def is_verdict(self) -> bool:
        return self not in (RewardStatus.TIMEOUT, RewardStatus.ERROR)


@dataclass(frozen=True)
class Prompt:
    """One problem, tokenised once. `id` is stable across runs; `source` names the data set or task it came from."""

    id: str
    text: str
    token_ids: np.ndarray  # i32[P]
    answer: str
    source: str


@dataclass
class Sample:
    """One response of the policy to a prompt. Weight version v is that of the policy after v training steps."""

    index: int
    response_ids: np.ndarray  # i32[R], including the end-of-sequence token where there is one
    rollout_logprobs: np.ndarray  # f32[R], of the temperature-scaled distribution that was sampled from
    text: str
    finish_reason: str  # "stop" | "length"
    weight_versions: np.ndarray  # i32[R], that of the weights which sampled each token
    status: RewardStatus = RewardStatus.ERROR
    extracted: str | None = None

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def correct(self) -> bool:
        return self.status is RewardStatus.CORRECT


@dataclass
class SampleGroup:
    """All samples drawn for one prompt in one step."""

    prompt: Prompt
    samples: list[Sample]  # what is learned from
    unused: list[Sample] = field(default_factory=list)  # drawn by adaptive sampling beyond the group's size
    greedy: Sample | None = None  # the response at temperature 0, where the recipe's baseline is its reward

    @property
    def drawn(self) -> list[Sample]:
        """The samples at the training temperature, learned from or not."""
        return [*self.samples, *self.unused]


@dataclass
class Rollout:
    """The groups of one step, and those that backfill replaced because the recipe's filter drops them."""

    groups: list[SampleGroup]
    replaced: list[SampleGroup] = field(default_factory=list)
    probe: list[SampleGroup] = field(default_factory=list)  # by the current weights, where the others may not be
    seconds: Metrics = field(default_factory=dict)  # what its generation and grading took, beside other things
    restarts: int = 0  # of engines that died, so far

    @property
    def samples(self) -> list[Sample]:
        """All that were drawn for the step, learned from or not."""
        groups = [*self.groups, *self.replaced]
        return [sample for group in groups for sample in (*group.drawn, *([group.greedy] if group.greedy else ()))]

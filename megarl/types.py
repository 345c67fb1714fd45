"""The records that travel through the loop: Prompt -> Sample -> SampleGroup -> Batch -> Update.

Per-token arrays of a Batch align with the *predicted* token: entry j of a sequence describes the prediction of its
token j from the tokens before it. Entry 0 of a sequence therefore describes nothing; its mask is 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

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

    @property
    def samples(self) -> list[Sample]:
        """All that were drawn for the step, learned from or not."""
        groups = [*self.groups, *self.replaced]
        return [sample for group in groups for sample in (*group.drawn, *([group.greedy] if group.greedy else ()))]


@dataclass(frozen=True)
class Credit:
    """What each sample of a step is worth to the recipe; samples in the order of the groups."""

    keep: Tensor  # bool[S], the sample is in the loss and its denominator
    advantages: Tensor  # f64[S], 0 where not kept
    rewards: Tensor  # f64[S], what the advantages were made of


@dataclass
class Batch:
    """Sequences to learn from, flat: sequence i owns the tokens cu_seqlens[i]:cu_seqlens[i+1]. All tensors on CPU."""

    tokens: Tensor  # i64[T], prompt and response
    cu_seqlens: Tensor  # i64[S+1]
    mask: Tensor  # f32[T], 1 on response tokens
    advantages: Tensor  # f32[T]
    prompt_index: Tensor  # i64[S], which prompt of the step each sequence answers
    rollout_logprobs: Tensor | None = None  # f32[T], by the rollout engine
    weight_versions: Tensor | None = None  # i32[T], of the weights that sampled; 0 on prompts
    old_logprobs: Tensor | None = None  # f32[T], by the policy that the ratio is taken against
    ref_logprobs: Tensor | None = None  # f32[T], by the frozen reference
    values: Tensor | None = None  # f32[T], by the critic before this step's first update
    returns: Tensor | None = None  # f32[T], what the critic learns
    correction: Tensor | None = None  # f32[T], of rollout mismatch

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> Tensor:  # i64[S]
        return self.cu_seqlens.diff()

    @property
    def sequence_of_token(self) -> Tensor:  # i64[T]
        return torch.repeat_interleave(torch.arange(len(self)), self.lengths)

    @property
    def prompt_of_token(self) -> Tensor:  # i64[T]
        return self.prompt_index[self.sequence_of_token]

    def select(self, sequences: Tensor) -> Batch:
        """The batch of these sequences (i64[K]), in this order."""
        starts, lengths = self.cu_seqlens[:-1][sequences], self.lengths[sequences]
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        tokens = torch.arange(int(cu_seqlens[-1])) + torch.repeat_interleave(starts - cu_seqlens[:-1], lengths)
        of_token = {
            name: values[tokens]
            for f in fields(self)
            if (name := f.name) not in ("cu_seqlens", "prompt_index") and (values := getattr(self, name)) is not None
        }
        return Batch(cu_seqlens=cu_seqlens, prompt_index=self.prompt_index[sequences], **of_token)


@dataclass(frozen=True)
class Update:
    """What one optimizer update saw; per-token values are of the policy before it."""

    logprobs: Tensor  # f32[T]
    entropy: Tensor  # f32[T]
    loss: float
    grad_norm: float
    lr: float  # 0 where the critic learned alone
    value_loss: float | None = None
    value_grad_norm: float | None = None

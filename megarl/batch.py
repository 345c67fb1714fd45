"""A step's sequences as flat tensors: what they are worth (Credit), the Batch that is learned from, and its Update.

Per-token arrays of a Batch align with the *predicted* token: entry j of a sequence describes the prediction of its
token j from the tokens before it. Entry 0 of a sequence therefore describes nothing; its mask is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megarl.types import SampleGroup


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
    prompt_lengths: Tensor  # i64[S], tokens of that prompt, which each sequence begins with
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

    @property
    def response_tokens(self) -> Tensor:  # i64[S], how many tokens of each sequence are in the loss
        return self.of_sequences((self.mask > 0).long())

    def of_sequences(self, values: Tensor) -> Tensor:
        """The sum over each sequence's tokens, [S]."""
        return values.new_zeros(len(self)).index_add(0, self.sequence_of_token, values)

    def select(self, sequences: Tensor) -> Batch:
        """The batch of these sequences (i64[K]), in this order."""
        starts, lengths = self.cu_seqlens[:-1][sequences], self.lengths[sequences]
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        tokens = torch.arange(int(cu_seqlens[-1])) + torch.repeat_interleave(starts - cu_seqlens[:-1], lengths)
        return self._with(cu_seqlens, sequences, tokens)

    def batch(self) -> Batch:
        """Itself: nothing is to be made of it."""
        return self

    def between(self, first: int, last: int) -> Batch:
        """The sequences first <= i < last; their tensors are views of this batch's."""
        start, end = self.cu_seqlens[[first, last]].tolist()
        return self._with(self.cu_seqlens[first : last + 1] - start, slice(first, last), slice(start, end))

    def _with(self, cu_seqlens: Tensor, sequences: Tensor | slice, tokens: Tensor | slice) -> Batch:
        given = {f.name: values for f in fields(self) if (values := getattr(self, f.name)) is not None}
        del given["cu_seqlens"]
        chosen = {name: values[sequences if name in OF_SEQUENCE else tokens] for name, values in given.items()}
        return Batch(cu_seqlens=cu_seqlens, **chosen)


OF_SEQUENCE = ("prompt_index", "prompt_lengths")


class Sequences(Protocol):
    """What a step is planned from, and parts of it are sent from: a Batch, or the samples that become one."""

    @property
    def lengths(self) -> Tensor: ...  # i64[S]

    @property
    def response_tokens(self) -> Tensor: ...  # i64[S]

    prompt_lengths: Tensor  # i64[S]
    prompt_index: Tensor  # i64[S]

    def select(self, sequences: Tensor) -> Batch | Samples: ...


@dataclass(frozen=True)
class Update:
    """What one optimizer update saw. Per-token values are of the policy before it, on this rank's sequences, and 0 on
    ranks that don't hold the model's last stage."""

    logprobs: Tensor  # f32[T]
    entropy: Tensor  # f32[T]
    loss: float
    grad_norm: float
    lr: float  # 0 where the critic learned alone
    value_loss: float | None = None
    value_grad_norm: float | None = None


class Kept:
    """The kept samples of a step, in order of their groups: Sequences, of which any become a batch."""

    def __init__(self, groups: list[SampleGroup], credit: Credit) -> None:
        samples = [(i, group.prompt, sample) for i, group in enumerate(groups) for sample in group.samples]
        self._kept = [samples[i] for i in credit.keep.nonzero().flatten().tolist()]
        self._advantages = credit.advantages[credit.keep].float()
        self.prompt_index = torch.tensor([i for i, _, _ in self._kept], dtype=torch.int64)
        self.prompt_lengths = torch.tensor([len(prompt.token_ids) for _, prompt, _ in self._kept], dtype=torch.int64)
        self.response_tokens = torch.tensor([len(s.response_ids) for _, _, s in self._kept], dtype=torch.int64)

    @property
    def lengths(self) -> Tensor:
        return self.prompt_lengths + self.response_tokens

    def select(self, sequences: Tensor) -> Samples:
        """These samples (i64[K]), in this order."""
        kept = [self._kept[i] for i in sequences.tolist()]
        parts = [part for _, prompt, sample in kept for part in (prompt.token_ids, sample.response_ids)]
        return Samples(
            tokens=_joined(parts, np.int32),
            lengths=np.array([len(part) for part in parts], dtype=np.int64),
            prompt_index=self.prompt_index[sequences],
            advantages=self._advantages[sequences],
            rollout_logprobs=_joined([sample.rollout_logprobs for _, _, sample in kept], np.float32),
            weight_versions=_joined([sample.weight_versions for _, _, sample in kept], np.int32),
        )


@dataclass(frozen=True)
class Samples:
    """Samples on their way to another rank: what their batch is made of, a third of its size."""

    tokens: np.ndarray  # i32[T], prompt and response of each, end to end
    lengths: np.ndarray  # i64[2 S], of prompt and response of each
    prompt_index: Tensor  # i64[S]
    advantages: Tensor  # f32[S]
    rollout_logprobs: np.ndarray  # f32[sum of responses]
    weight_versions: np.ndarray  # i32[sum of responses]

    def batch(self) -> Batch:
        batch = _flat(self.tokens, self.lengths, self.advantages, self.prompt_index)
        response = batch.mask > 0
        batch.rollout_logprobs = torch.zeros(len(response)).masked_scatter_(
            response, torch.from_numpy(self.rollout_logprobs)
        )
        batch.weight_versions = torch.zeros(len(response), dtype=torch.int32).masked_scatter_(
            response, torch.from_numpy(self.weight_versions)
        )
        return batch


def build_batch(groups: list[SampleGroup], credit: Credit) -> Batch:
    """All kept samples of a step, in order of their groups."""
    kept = Kept(groups, credit)
    return kept.select(torch.arange(len(kept.lengths))).batch()


def build_demonstration_batch(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """Demonstrations (prompt ids, response ids), each with advantage 1."""
    parts = [part for pair in pairs for part in pair]
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    return _flat(_joined(parts, np.int32), lengths, torch.ones(len(pairs)), torch.arange(len(pairs)))


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts], dtype=dtype)


def _flat(tokens: np.ndarray, lengths: np.ndarray, advantages: Tensor, prompt_index: Tensor) -> Batch:
    """tokens i32[T], lengths i64[2 S] of prompt and response of each sequence, end to end; advantages f32[S]."""
    sizes = torch.from_numpy(lengths)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)[1::2]])
    return Batch(
        tokens=torch.from_numpy(tokens).long(),
        cu_seqlens=cu_seqlens,
        mask=torch.repeat_interleave(torch.tensor([0.0, 1.0]).repeat(len(prompt_index)), sizes),
        advantages=torch.repeat_interleave(advantages, cu_seqlens.diff()),
        prompt_index=prompt_index,
        prompt_lengths=sizes[::2],
    )

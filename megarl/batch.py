"""A step's sequences as flat tensors: what they are worth (Credit), the Batch that is learned from, and its Update.

Per-token arrays of a Batch align with the *predicted* token: entry j of a sequence describes the prediction of its
token j from the tokens before it. Entry 0 of a sequence therefore describes nothing; its mask is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from megarl.types import Prompt, SampleGroup


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


def build_batch(groups: list[SampleGroup], credit: Credit) -> Batch:
    """The kept samples of a step, in order of their groups."""
    samples = [(i, group.prompt, sample) for i, group in enumerate(groups) for sample in group.samples]
    kept = [samples[i] for i in credit.keep.nonzero().flatten().tolist()]
    batch = _flat(
        [(prompt.token_ids, sample.response_ids) for _, prompt, sample in kept],
        advantages=credit.advantages[credit.keep].float(),
        prompt_index=[i for i, _, _ in kept],
    )
    batch.rollout_logprobs = _on_responses([(p, s.rollout_logprobs) for _, p, s in kept], np.float32)
    batch.weight_versions = _on_responses([(p, s.weight_versions) for _, p, s in kept], np.int32)
    return batch


def build_demonstration_batch(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """Demonstrations (prompt ids, response ids), each with advantage 1."""
    return _flat(pairs, advantages=torch.ones(len(pairs)), prompt_index=range(len(pairs)))


def minibatches(
    batch: Batch, prompts_per_step: int, minibatch_prompts: int | None, epochs: int, pairs: bool = False
) -> Iterator[Batch]:
    """The batch of each optimizer update: whole prompts, in order, `epochs` times over.

    The step's prompts are cut, filtered ones included; with `pairs`, those that have one. A mini-batch whose samples
    were all filtered away is not yielded.
    """
    size = minibatch_prompts or prompts_per_step
    index = torch.unique(batch.prompt_index, return_inverse=True)[1] if pairs else batch.prompt_index
    for _ in range(epochs):
        for start in range(0, prompts_per_step, size):
            inside = (index >= start) & (index < start + size)
            if inside.all() and len(batch):
                yield batch
            elif inside.any():
                yield batch.select(inside.nonzero().flatten())


def _on_responses(values: list[tuple[Prompt, np.ndarray]], dtype: type) -> Tensor:
    """Values of the tokens of each response, end to end, with 0 on the prompts before them."""
    parts = [np.pad(of_response, (len(prompt.token_ids), 0)) for prompt, of_response in values]
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *parts]))


def _flat(pairs: Sequence[tuple[np.ndarray, np.ndarray]], advantages: Tensor, prompt_index: Sequence[int]) -> Batch:
    """Prompt and response of each sequence, end to end; advantages f32[S]."""
    parts = [part for pair in pairs for part in pair]
    lengths = torch.tensor([len(part) for part in parts], dtype=torch.int64)
    is_response = torch.tensor([0.0, 1.0]).repeat(len(pairs))
    ends = lengths.cumsum(0)[1::2]
    tokens = np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    return Batch(
        tokens=torch.from_numpy(tokens),
        cu_seqlens=cu_seqlens,
        mask=torch.repeat_interleave(is_response, lengths),
        advantages=torch.repeat_interleave(advantages, cu_seqlens.diff()),
        prompt_index=torch.tensor(list(prompt_index), dtype=torch.int64),
    )

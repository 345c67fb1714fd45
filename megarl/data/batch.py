"""Builds batches: from scored sample groups and their credit, or from demonstrations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from megarl.types import Batch, Credit, Prompt, SampleGroup


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


def _on_responses(values: list[tuple[Prompt, np.ndarray]], dtype: type) -> torch.Tensor:
    """Values of the tokens of each response, end to end, with 0 on the prompts before them."""
    parts = [np.pad(of_response, (len(prompt.token_ids), 0)) for prompt, of_response in values]
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *parts]))


def _flat(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], advantages: torch.Tensor, prompt_index: Sequence[int]
) -> Batch:
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

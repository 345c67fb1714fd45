"""Lays a micro-batch out: packed into one row without padding, or padded; a shared prompt once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.batch import Batch
from megarl.data.plan import Share


@dataclass(frozen=True)
class MicroBatch:
    """Inputs and targets of one forward pass; a sequence of L tokens gives L - 1 predictions.

    Packed: one row of segments, boundaries in cu_seqlens, padding a segment of its own at the end. A segment is a whole
    sequence; or a shared prompt but for its last token; or that token and a response, behind the segment `prefix`.
    Padded: one row per sequence, cu_seqlens is None.
    """

    inputs: Tensor  # i64[B, S]
    targets: Tensor  # i64[B, S]
    token: Tensor  # i64[B, S], index of the predicted token in the batch's flat arrays; -1: padding
    cu_seqlens: Tensor | None  # i32[segments + 1]
    prefix: Tensor | None = None  # i64[segments], the segment that each goes on behind; -1: none. None: all have none

    @property
    def positions(self) -> Tensor:  # i64[B, S]
        rows, columns = self.inputs.shape
        if self.cu_seqlens is None:
            return torch.arange(columns).expand(rows, columns)
        return segment_positions(self.cu_seqlens.long(), self.prefix).unsqueeze(0)

    def of_token(self, values: Tensor) -> Tensor:
        """A flat per-token array of the batch, laid out as this micro-batch, 0 on padding."""
        if not len(values):
            return torch.zeros(self.token.shape, dtype=values.dtype)
        return torch.where(self.token >= 0, values[self.token.clamp(min=0)], torch.zeros((), dtype=values.dtype))


def segment_positions(cu_seqlens: Tensor, prefix: Tensor | None) -> Tensor:
    """i64[S]: of each token in its sequence, the segment before its own counted."""
    lengths = cu_seqlens.diff()
    first = cu_seqlens[:-1] if prefix is None else cu_seqlens[:-1] - before(lengths, prefix)
    return torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device) - torch.repeat_interleave(first, lengths)


def before(lengths: Tensor, prefix: Tensor) -> Tensor:
    """i64[segments]: how many tokens each segment goes on behind."""
    return torch.where(prefix >= 0, lengths[prefix.clamp(min=0)], 0)


def lay_out(share: Share, packing: bool, multiple: int = 1) -> Iterator[MicroBatch]:
    """The share's micro-batches; never none, so that every rank joins every collective.

    The rows of a micro-batch are padded to a length divisible by `multiple`.
    """
    for sequences in share.micro_batches or [[]]:
        yield _micro_batch(share.batch, sequences, packing, multiple, share.share_prompts)


def _micro_batch(batch: Batch, sequences: list[int], packing: bool, multiple: int, share_prompts: bool) -> MicroBatch:
    if not sequences:
        return _nothing(multiple)
    chosen = torch.tensor(sequences)
    starts, counts = batch.cu_seqlens[chosen], batch.lengths[chosen] - 1
    prefix = cu_seqlens = None
    if share_prompts:
        starts, counts, prefix = _segments(batch, chosen)
    columns = torch.arange(int(counts.max()))
    valid = columns < counts[:, None]
    source = torch.where(valid, starts[:, None] + columns, -1)
    if packing:
        source = source[valid].unsqueeze(0)
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    if padding := -source.size(1) % multiple:
        source = F.pad(source, (0, padding), value=-1)
        if cu_seqlens is not None:  # a segment of its own
            cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:] + padding])
            prefix = None if prefix is None else F.pad(prefix, (0, 1), value=-1)
    real = source >= 0
    token = torch.where(real, source + 1, -1)
    return MicroBatch(
        inputs=torch.where(real, batch.tokens[source.clamp(min=0)], 0),
        targets=torch.where(real, batch.tokens[token.clamp(min=0)], 0),
        token=token,
        cu_seqlens=cu_seqlens,
        prefix=prefix,
    )


def _segments(batch: Batch, sequences: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each segment of these sequences begins in the batch's tokens, its predictions, and its prefix.

    Neighbours that answer one prompt share it; the first of them lends its tokens. A prompt of one token isn't shared:
    each response begins with it.
    """
    segments: list[tuple[int, int, int]] = []
    starts, lengths = batch.cu_seqlens[sequences].tolist(), batch.lengths[sequences].tolist()
    prompts, prompt_lengths = batch.prompt_index[sequences].tolist(), batch.prompt_lengths[sequences].tolist()
    shared = -1
    for i, (start, length, prompt) in enumerate(zip(starts, lengths, prompt_lengths, strict=True)):
        if i == 0 or prompts[i] != prompts[i - 1]:
            alone = i + 1 == len(starts) or prompts[i] != prompts[i + 1]
            if alone or prompt == 1:
                shared = -1
            else:
                shared = len(segments)
                segments.append((start, prompt - 1, -1))
            first = start
        elif not torch.equal(batch.tokens[start : start + prompt], batch.tokens[first : first + prompt]):
            raise ValueError(f"sequences of prompt {prompts[i]} begin with different tokens, so they can't share them")
        behind = prompt - 1 if shared >= 0 else 0
        segments.append((start + behind, length - 1 - behind, shared))
    return tuple(torch.tensor(values, dtype=torch.int64) for values in zip(*segments, strict=True))  # type: ignore[return-value]


def _nothing(multiple: int) -> MicroBatch:
    """As little padding as may be: a rank without sequences still runs its share of the schedule."""
    zero = torch.zeros(1, multiple, dtype=torch.int64)
    return MicroBatch(inputs=zero, targets=zero, token=zero - 1, cu_seqlens=None)

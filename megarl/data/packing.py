"""Cuts a batch into micro-batches: a data-parallel rank's share, packed without padding or padded.

The cut is a pure function of the batch, so every rank knows every rank's share without asking.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.batch import Batch


@dataclass(frozen=True)
class MicroBatch:
    """Inputs and targets of one forward pass; a sequence of L tokens gives L - 1 predictions.

    Packed: one row of all predictions, boundaries in cu_seqlens, padding a sequence of its own at the end. Padded: one
    row per sequence, cu_seqlens is None.
    """

    inputs: Tensor  # i64[B, S]
    targets: Tensor  # i64[B, S]
    token: Tensor  # i64[B, S], index of the predicted token in the batch's flat arrays; -1: padding
    cu_seqlens: Tensor | None  # i32[sequences + 1]

    @property
    def positions(self) -> Tensor:  # i64[B, S]
        rows, columns = self.inputs.shape
        if self.cu_seqlens is None:
            return torch.arange(columns).expand(rows, columns)
        starts = torch.repeat_interleave(self.cu_seqlens[:-1], self.cu_seqlens.diff())
        return (torch.arange(columns) - starts).unsqueeze(0)

    def of_token(self, values: Tensor) -> Tensor:
        """A flat per-token array of the batch, laid out as this micro-batch, 0 on padding."""
        if not len(values):
            return torch.zeros(self.token.shape, dtype=values.dtype)
        return torch.where(self.token >= 0, values[self.token.clamp(min=0)], torch.zeros((), dtype=values.dtype))


def micro_batches(
    batch: Batch, rank: int, ranks: int, max_tokens: int, packing: bool, pairs: bool = False, multiple: int = 1
) -> list[MicroBatch]:
    """The micro-batches of data-parallel rank `rank`; never none, so that every rank joins every collective.

    Sequences go longest first to the rank with the fewest tokens, then fill micro-batches of at most `max_tokens`
    tokens, padding included; neighbours are of similar length, so that padding stays small. With `pairs`, sequences of
    one prompt stay together. The rows of a micro-batch are padded to a length divisible by `multiple`.
    """
    predictions = (batch.lengths - 1).tolist()
    together: dict[int, list[int]] = {}
    for i, prompt in enumerate(batch.prompt_index.tolist()):
        together.setdefault(prompt if pairs else i, []).append(i)
    tokens = {unit: sum(predictions[i] for i in members) for unit, members in together.items()}
    load = [0] * ranks
    mine: list[list[int]] = []
    for unit in sorted(together, key=lambda unit: (-tokens[unit], unit)):
        target = min(range(ranks), key=load.__getitem__)
        load[target] += tokens[unit]
        if target == rank:
            mine.append(together[unit])

    cuts: list[list[int]] = []
    total = longest = 0  # of the last cut
    for members in mine:
        rows = len(members) + (len(cuts[-1]) if cuts else 0)
        longest = max(longest, *(predictions[i] for i in members))
        total += sum(predictions[i] for i in members)
        if not cuts or (_up(total, multiple) if packing else rows * _up(longest, multiple)) > max_tokens:
            cuts.append([])
            longest, total = max(predictions[i] for i in members), sum(predictions[i] for i in members)
        cuts[-1] += members
    return [_micro_batch(batch, sequences, packing, multiple) for sequences in cuts] or [_nothing(multiple)]


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _micro_batch(batch: Batch, sequences: list[int], packing: bool, multiple: int) -> MicroBatch:
    chosen = torch.tensor(sequences)
    starts, counts = batch.cu_seqlens[chosen], batch.lengths[chosen] - 1
    columns = torch.arange(int(counts.max()))
    valid = columns < counts[:, None]
    source = torch.where(valid, starts[:, None] + columns, -1)
    cu_seqlens = None
    if packing:
        source = source[valid].unsqueeze(0)
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    if padding := -source.size(1) % multiple:
        source = F.pad(source, (0, padding), value=-1)
        if cu_seqlens is not None:  # a sequence of its own
            cu_seqlens = torch.cat([cu_seqlens, cu_seqlens[-1:] + padding])
    real = source >= 0
    token = torch.where(real, source + 1, -1)
    return MicroBatch(
        inputs=torch.where(real, batch.tokens[source.clamp(min=0)], 0),
        targets=torch.where(real, batch.tokens[token.clamp(min=0)], 0),
        token=token,
        cu_seqlens=cu_seqlens,
    )


def _nothing(multiple: int) -> MicroBatch:
    """As little padding as may be: a rank without sequences still runs its share of the schedule."""
    zero = torch.zeros(1, multiple, dtype=torch.int64)
    return MicroBatch(inputs=zero, targets=zero, token=zero - 1, cu_seqlens=None)

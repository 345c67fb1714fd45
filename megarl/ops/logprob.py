"""Log-probability of given tokens and entropy of the distribution, from vocabulary-parallel logits or hidden states.

Every rank of the tensor-parallel group reduces its slice of the vocabulary to four numbers per token (`logit_stats`);
one all-gather and a merge in rank order make the result bitwise the same on all ranks. The backward pass computes the
gradient by the logits from the logits again, so nothing of their size is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.ops.implementation import implementation


def logprob_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    keep: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies), each f32[...], in nats, of softmax(logits / temperature).

    Args:
        logits: [..., V/tp], this rank's slice of the vocabulary, any float type.
        targets: i64[...], global token ids.
        keep: bool[...]; where it is False both are 0 and no logit is read.
        tp_group: the tensor-parallel group; None: the logits are whole.
        vocab_size: columns at or beyond it are padding and hold no probability. Default: none are.
        temperature: applied here and nowhere else in the trainer.
        in_place: the backward pass, of which there can be but one, overwrites the logits with their gradient; they
            must not be a leaf.
    """
    slice_ = VocabularySlice(logits.size(-1), tp_group, vocab_size)
    rows = logits.reshape(-1, logits.size(-1))
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    keep = None if keep is None else keep.reshape(-1)
    values = _LogprobAndEntropy.apply(rows, targets.reshape(-1), keep, slice_, 1.0 / temperature, in_place)
    return values[0].view(targets.shape), values[1].view(targets.shape)


class VocabularySlice:
    """The columns of the vocabulary that this rank holds: global ids start .. start + valid, then padding."""

    def __init__(self, columns: int, tp_group: dist.ProcessGroup | None, vocab_size: int | None) -> None:
        rank, size = (dist.get_rank(tp_group), dist.get_world_size(tp_group)) if tp_group is not None else (0, 1)
        self.group, self.size, self.start = tp_group, size, rank * columns
        self.valid = columns if vocab_size is None else max(0, min(columns, vocab_size - self.start))

    def merge(self, stats: Tensor, inv_temperature: float) -> Tensor:
        """f[T, 4] of the whole vocabulary from this rank's f[T, 4], bitwise the same on all ranks."""
        gathered = [stats]
        if self.size > 1:
            gathered = [torch.empty_like(stats) for _ in range(self.size)]
            dist.all_gather(gathered, stats.contiguous(), group=self.group)
        return implementation(stats).merge_stats(torch.stack(gathered), inv_temperature)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values


class _LogprobAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, targets, keep, slice_, inv_temperature, in_place):  # type: ignore[no-untyped-def]
        ops = implementation(logits)
        stats = ops.logit_stats(logits, targets, keep, slice_.start, slice_.valid, inv_temperature)
        stats = slice_.merge(stats, inv_temperature)
        logprob, entropy, log_s = ops.normalise(stats, keep, inv_temperature)
        ctx.save_for_backward(logits, targets, keep, stats[:, 0].clone(), log_s, entropy)
        ctx.arguments = (slice_.start, slice_.valid, inv_temperature)
        ctx.in_place, ctx.is_spent = in_place, False
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, by_logprob, by_entropy):  # type: ignore[no-untyped-def]
        logits, targets, keep, m, log_s, entropy = ctx.saved_tensors
        if ctx.is_spent:
            raise RuntimeError("a second backward pass: the first one has overwritten the logits (in_place=True)")
        ctx.is_spent = ctx.in_place
        if by_logprob is None:
            by_logprob = torch.zeros_like(log_s)
        out = logits.detach() if ctx.in_place else torch.empty_like(logits)
        grad = implementation(logits).logit_grad(
            logits, targets, keep, m, log_s, entropy, by_logprob, by_entropy, *ctx.arguments, out
        )
        return grad, None, None, None, None, None

"""Log-probs and entropies from hidden states and the output layer's weight; the logits exist a tile at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.ops.implementation import implementation
from megarl.ops.logprob import VocabularySlice
from megarl.ops.tuning import tile


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    keep: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    logits_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies), each f32[T], in nats, of softmax(hidden @ weight.T / temperature).

    The gradient by the weight is added to `weight.main_grad` where there is one (Megatron's, float32), by every
    backward pass and whatever it was asked for, and then not returned; that by the hidden states is summed over the
    tensor-parallel group. In the products of both it is rounded to the hidden states' type.

    Args:
        hidden: [T, H], the same on all ranks of the group.
        weight: [V/tp, H], this rank's rows of the output layer, of the hidden states' type.
        targets: i64[T], global token ids.
        keep: bool[T], here or on the CPU; where it is False both are 0, and nothing is computed.
        tp_group: the tensor-parallel group; None: the weight is whole.
        vocab_size: rows of the weight at or beyond it are padding and hold no probability. Default: none are.
        temperature: applied here and nowhere else in the trainer.
        logits_dtype: what the logits are rounded to. float32, whatever the weights are, keeps them as exact as the
            products; bfloat16 is faster and costs a few hundredths of a nat.

    Every product of the forward pass has one shape, so a token's log-prob does not depend on which tokens it comes with
    where the matrix product gives a row the same bits wherever it stands.
    """
    slice_ = VocabularySlice(len(weight), tp_group, vocab_size)
    logprob, entropy = _LinearLogprob.apply(hidden, weight, targets, keep, slice_, 1.0 / temperature, logits_dtype)
    return logprob, entropy


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, targets, keep, slice_, inv_temperature, logits_dtype):  # type: ignore[no-untyped-def]
        rows = None if keep is None else keep.nonzero().flatten().to(hidden.device)
        chosen, ids = _at(hidden, rows), _at(targets, rows)
        logits_dtype = torch.promote_types(logits_dtype, hidden.dtype)
        exact = torch.promote_types(logits_dtype, torch.float32)

        ops = implementation(hidden)
        height, width = tile("forward", hidden.device)
        columns = list(_cuts(slice_.valid, width)) or [slice(0, 0)]
        stats = torch.empty(len(columns), len(chosen), 4, dtype=exact, device=hidden.device)
        space = _space(height, min(width, slice_.valid), logits_dtype, hidden.device)
        for cut in _cuts(len(chosen), height):
            part, wanted = _padded(chosen[cut], height), _padded(ids[cut], height)
            for i, column in enumerate(columns):
                logits = linear_logits(part, weight[column], space)
                found = ops.logit_stats(
                    logits, wanted, None, slice_.start + column.start, logits.size(1), inv_temperature
                )
                stats[i, cut] = found[: cut.stop - cut.start]
        merged = slice_.merge(ops.merge_stats(stats, inv_temperature), inv_temperature)
        logprob, entropy, log_s = ops.normalise(merged, None, inv_temperature)

        ctx.save_for_backward(hidden, weight, ids, rows, merged[:, 0].clone(), log_s, entropy)
        ctx.slice, ctx.inv_temperature, ctx.logits_dtype = slice_, inv_temperature, logits_dtype
        ctx.set_materialize_grads(False)
        return tuple(_spread(value, rows, len(hidden)) for value in (logprob, entropy))

    @staticmethod
    def backward(ctx: Any, by_logprob, by_entropy):  # type: ignore[no-untyped-def]
        hidden, weight, ids, rows, m, log_s, entropy = ctx.saved_tensors
        chosen = _at(hidden, rows)
        by_logprob = torch.zeros_like(log_s) if by_logprob is None else _at(by_logprob, rows)
        by_entropy = None if by_entropy is None else _at(by_entropy, rows)
        of_hidden = torch.zeros(chosen.shape, dtype=log_s.dtype, device=hidden.device)
        of_weight = main_grad = getattr(weight, "main_grad", None) if ctx.needs_input_grad[1] else None
        if main_grad is None and ctx.needs_input_grad[1]:
            of_weight = torch.zeros(weight.shape, dtype=log_s.dtype, device=weight.device)

        ops, slice_ = implementation(hidden), ctx.slice
        height, width = tile("backward", hidden.device)
        space = _space(min(height, len(chosen)), min(width, slice_.valid), ctx.logits_dtype, hidden.device)
        # The products of the backward pass take the gradient in the hidden states' type.
        out_space = space if space.dtype == hidden.dtype else torch.empty_like(space, dtype=hidden.dtype)
        for column in _cuts(slice_.valid, width):
            for cut in _cuts(len(chosen), height):
                part, of_tokens = chosen[cut], (x[cut] for x in (m, log_s, entropy, by_logprob))
                logits = linear_logits(part, weight[column], space)
                grad = ops.logit_grad(
                    logits,
                    ids[cut],
                    None,
                    *of_tokens,
                    None if by_entropy is None else by_entropy[cut],
                    slice_.start + column.start,
                    logits.size(1),
                    ctx.inv_temperature,
                    out_space[: len(logits), : logits.size(1)],
                )
                _add_product(of_hidden[cut], grad, weight[column])
                if of_weight is not None:
                    _add_product(of_weight[column], grad.t(), part)
        of_hidden = slice_.sum(of_hidden.to(hidden.dtype))
        returned = of_weight.to(weight.dtype) if main_grad is None and of_weight is not None else None
        return _spread(of_hidden, rows, len(hidden)), returned, None, None, None, None, None


def _cuts(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _space(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for a tile, in rows of a multiple of 16 numbers: Triton loads from such without cutting them up."""
    return torch.empty(height, -(-width // 16) * 16, dtype=dtype, device=device)


def _padded(rows: Tensor, height: int) -> Tensor:
    return rows if len(rows) == height else torch.cat([rows, rows.new_zeros(height - len(rows), *rows.shape[1:])])


def _at(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values[rows]


def _spread(values: Tensor, rows: Tensor | None, length: int) -> Tensor:
    """The values at these rows, 0 elsewhere."""
    return values if rows is None else values.new_zeros(length, *values.shape[1:]).index_copy(0, rows, values)


def linear_logits(hidden: Tensor, weight: Tensor, space: Tensor) -> Tensor:
    """hidden @ weight.T in (the corner of) `space`, in its type, without rounding in between."""
    out = space[: len(hidden), : len(weight)]
    if hidden.dtype == out.dtype:
        return torch.mm(hidden, weight.t(), out=out)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    return torch.mm(hidden.to(out.dtype), weight.t().to(out.dtype), out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in the total's type."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))

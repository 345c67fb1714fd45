"""Log-probability of given tokens and entropy of the distribution, from vocabulary-parallel logits.

Every rank of the tensor-parallel group reduces its slice of the vocabulary to four numbers per token
(`logit_stats`: maximum m, s = sum e^(x-m), t = sum e^(x-m) (x-m), target logit z); one all-gather and a merge in rank
order make the result bitwise the same on all ranks. The gradient (`logit_grad`) is recomputed from the logits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def logprob_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies), each f32[...], in nats, of softmax(logits / temperature).

    Args:
        logits: [..., V/tp], this rank's slice of the vocabulary, any float type.
        targets: i64[...], global token ids.
        tp_group: the tensor-parallel group; None: the logits are whole.
        vocab_size: columns at or beyond it are padding and hold no probability. Default: none are.
        temperature: applied here and nowhere else in the trainer.
    """
    rank, size = (dist.get_rank(tp_group), dist.get_world_size(tp_group)) if tp_group is not None else (0, 1)
    columns = logits.size(-1)
    start = rank * columns
    valid = columns if vocab_size is None else max(0, min(columns, vocab_size - start))
    return _LogprobAndEntropy.apply(logits, targets, start, valid, 1.0 / temperature, tp_group, size)


def logit_stats(logits: Tensor, targets: Tensor, start: int, valid: int, inv_temperature: float) -> Tensor:
    """f32[4, ...]: (m, s, t, z) of this slice, z = -inf where the target lies elsewhere."""
    x = _scaled(logits, valid, inv_temperature)
    if valid == 0:  # nothing but padding here
        empty = torch.full_like(targets, -torch.inf, dtype=x.dtype)
        return torch.stack([empty, torch.zeros_like(empty), torch.zeros_like(empty), empty])
    m = x.amax(-1)
    shifted = x - torch.where(m.isfinite(), m, 0.0).unsqueeze(-1)
    e = shifted.exp()
    t = torch.where(e > 0, e * shifted, 0.0).sum(-1)
    local = targets - start
    here = (local >= 0) & (local < valid)
    z = x.gather(-1, local.clamp(0, valid - 1).unsqueeze(-1)).squeeze(-1)
    return torch.stack([m, e.sum(-1), t, torch.where(here, z, -torch.inf)])


def merge_stats(stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob, entropy, logsumexp) from the stacked statistics of all slices, f32[tp, 4, ...]."""
    m, s, t, z = stats.unbind(1)
    top = m.amax(0)
    shift = torch.where(m.isfinite(), m - top, 0.0)
    factor = torch.where(m.isfinite(), shift.exp(), 0.0)
    total = (s * factor).sum(0)
    moment = (factor * (t + s * shift)).sum(0)
    logsumexp = top + total.log()
    return z.amax(0) - logsumexp, total.log() - moment / total, logsumexp


def logit_grad(
    logits: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    start: int,
    valid: int,
    inv_temperature: float,
) -> Tensor:
    """dL/dlogits of this slice, in the logits' type: g (onehot - p) - g_H p (log p + H), over temperature."""
    x = _scaled(logits, valid, inv_temperature)
    log_p = x - logsumexp.unsqueeze(-1)
    p = log_p.exp()
    grad = -grad_logprob.unsqueeze(-1) * p
    if grad_entropy is not None:
        spread = torch.where(p > 0, p * (log_p + entropy.unsqueeze(-1)), 0.0)
        grad -= grad_entropy.unsqueeze(-1) * spread
    local = targets - start
    here = (local >= 0) & (local < valid)
    if valid:
        grad.scatter_add_(-1, local.clamp(0, valid - 1).unsqueeze(-1), (grad_logprob * here).unsqueeze(-1))
    full = torch.zeros_like(logits)
    full[..., :valid] = (grad * inv_temperature).to(logits.dtype)
    return full


def _scaled(logits: Tensor, valid: int, inv_temperature: float) -> Tensor:
    x = logits[..., :valid]
    return x.to(torch.promote_types(x.dtype, torch.float32)) * inv_temperature


class _LogprobAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, start, valid, inv_temperature, tp_group, size):  # type: ignore[no-untyped-def]
        stats = logit_stats(logits, targets, start, valid, inv_temperature)
        gathered = [stats]
        if size > 1:
            gathered = [torch.empty_like(stats) for _ in range(size)]
            dist.all_gather(gathered, stats.contiguous(), group=tp_group)
        logprob, entropy, logsumexp = merge_stats(torch.stack(gathered))
        ctx.save_for_backward(logits, targets, logsumexp, entropy)
        ctx.slice = (start, valid, inv_temperature)
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy):  # type: ignore[no-untyped-def]
        logits, targets, logsumexp, entropy = ctx.saved_tensors
        if grad_logprob is None:
            grad_logprob = torch.zeros_like(logsumexp)
        grad = logit_grad(logits, targets, logsumexp, entropy, grad_logprob, grad_entropy, *ctx.slice)
        return grad, None, None, None, None, None, None

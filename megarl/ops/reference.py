"""The ops in plain torch: what the Triton kernels are measured against, and what runs where there is no GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.ops.rules import Rule, clipped_objective, kl_estimate


def logit_stats(
    logits: Tensor, targets: Tensor, keep: Tensor | None, start: int, valid: int, inv_temperature: float
) -> Tensor:
    """f[T, 4]: what a slice of the vocabulary contributes to each token: (m, s, t, z).

    m is the largest logit, s = sum e^u and t = sum e^u u with u = (x - m) / temperature, z the target's logit; z = -inf
    where the target lies elsewhere, (-inf, 0, 0, -inf) for a slice of nothing.

    Args:
        logits: [T, v], any float type; s and t are of float32, or of float64 where the logits are.
        targets: i64[T], global token ids.
        keep: bool[T]; where it is False nothing is read, and the statistics are those of a slice of nothing.
        start: global id of the first column.
        valid: columns from here on are padding.
    """
    x = logits[:, :valid]
    exact = torch.promote_types(x.dtype, torch.float32)
    stats = torch.full((len(x), 4), -torch.inf, dtype=exact, device=x.device)
    stats[:, 1:3] = 0
    if valid == 0:
        return stats
    m = x.amax(-1).to(exact)
    u = x.to(exact) - torch.where(m.isfinite(), m, 0.0).unsqueeze(-1)
    u.mul_(inv_temperature)
    e = u.exp()
    stats[:, 0], stats[:, 1] = m, e.sum(-1)
    stats[:, 2] = e.mul_(u.masked_fill_(e == 0, 0.0)).sum(-1)
    local = targets - start
    z = x.gather(-1, local.clamp(0, valid - 1).unsqueeze(-1)).squeeze(-1).to(exact)
    stats[:, 3] = torch.where((local >= 0) & (local < valid), z, -torch.inf)
    if keep is not None:
        stats = torch.where(keep.unsqueeze(-1), stats, stats.new_tensor([-torch.inf, 0, 0, -torch.inf]))
    return stats


def merge_stats(stats: Tensor, inv_temperature: float) -> Tensor:
    """f[T, 4] of the whole from f[R, T, 4] of its slices, merged in their order."""
    m, s, t, z = stats.unbind(-1)
    top = m.amax(0)
    shift = torch.where(m.isfinite(), m - top, 0.0) * inv_temperature
    factor = shift.exp()
    return torch.stack([top, (factor * s).sum(0), (factor * (t + s * shift)).sum(0), z.amax(0)], dim=-1)


def normalise(stats: Tensor, keep: Tensor | None, inv_temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob, entropy, log s), f[T] each, in nats, from the statistics of the whole; 0 where `keep` is False."""
    m, s, t, z = stats.unbind(-1)
    log_s = s.log()
    values = ((z - m) * inv_temperature - log_s, log_s - t / s, log_s)
    if keep is None:
        return values
    return tuple(torch.where(keep, value, 0.0) for value in values)  # type: ignore[return-value]


def logit_grad(
    logits: Tensor,
    targets: Tensor,
    keep: Tensor | None,
    m: Tensor,
    log_s: Tensor,
    entropy: Tensor,
    by_logprob: Tensor,
    by_entropy: Tensor | None,
    start: int,
    valid: int,
    inv_temperature: float,
    out: Tensor,
) -> Tensor:
    """dL/dlogits of a slice, into `out` ([T, v], any float type; may be `logits` itself), which is returned.

    (g (onehot - p) - g_H p (log p + H)) / temperature, with g = dL/dlogprob and g_H = dL/dentropy, f[T] each; 0 where
    `keep` is False and on padding.
    """
    x = logits[:, :valid]
    log_p = x.to(log_s.dtype) - m.unsqueeze(-1)
    log_p.mul_(inv_temperature).sub_(log_s.unsqueeze(-1))
    p = log_p.exp()
    if by_entropy is None:
        grad = p.mul_(-by_logprob.unsqueeze(-1))
    else:
        spread = log_p.masked_fill_(p == 0, 0.0).add_(entropy.unsqueeze(-1)).mul_(by_entropy.unsqueeze(-1))
        grad = p.mul_(spread.add_(by_logprob.unsqueeze(-1)).neg_())
    if valid:
        local = targets - start
        here = (local >= 0) & (local < valid)
        grad.scatter_add_(-1, local.clamp(0, valid - 1).unsqueeze(-1), (by_logprob * here).unsqueeze(-1))
    grad.mul_(inv_temperature)
    if keep is not None:
        grad.masked_fill_(~keep.unsqueeze(-1), 0.0)
    out[:, :valid] = grad
    out[:, valid:] = 0
    return out


def policy_epilogue(
    rule: Rule,
    logprobs: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    weights: Tensor,
    correction: Tensor | None,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d/d logprob, d/d log_ratio) of each token, f[T] each: (-objective * correction + kl_coef * KL
    - entropy_coef * entropy) * weight."""
    value, by_logprob, by_log_ratio, _, _ = clipped_objective(logprobs, log_ratio, advantages, *rule.of_objective)
    scale = -weights if correction is None else -weights * correction
    loss, by_logprob, by_log_ratio = value * scale, by_logprob * scale, by_log_ratio * scale
    if ref_logprobs is not None:
        kl, slope = kl_estimate(logprobs, ref_logprobs, rule.log_ratio_limit, rule.kl_estimator)
        loss, by_logprob = loss + rule.kl_coef * kl * weights, by_logprob + rule.kl_coef * slope * weights
    if entropy is not None:
        loss = loss - rule.entropy_coef * entropy * weights
    return loss, by_logprob, by_log_ratio

"""The ops as Triton kernels; the functions at the end have the signatures of `reference.py`, which says what they do.

Everything is computed in float32, whatever is loaded. Offsets of rows are 64-bit: 50,000 tokens of a vocabulary of
151,936 exceed 32 bits. No atomics: a token's numbers depend on its own row alone.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megarl.ops import rules
from megarl.ops.reference import normalise
from megarl.ops.rules import Rule
from megarl.ops.tuning import tuned

__all__ = ["logit_grad", "logit_stats", "merge_stats", "normalise", "policy_epilogue"]


def _compiled(rule: Callable[..., Any]) -> Any:
    """The function of `rules.py` for Triton: the same lines, with `xp` = triton.language."""
    twin = types.FunctionType(rule.__code__, {**rule.__globals__, "xp": tl}, rule.__name__)
    twin.__module__ = rule.__module__
    return triton.jit(twin)


_clipped_objective = _compiled(rules.clipped_objective)
_kl_estimate = _compiled(rules.kl_estimate)


@triton.jit
def _add(m0, s0, t0, m1, s1, t1, inv_temperature):
    """(m, s, t) of two disjoint sets of logits; a set of nothing is (-inf, 0, 0)."""
    m = tl.maximum(m0, m1)
    d0 = tl.where(s0 == 0, 0.0, (m0 - m) * inv_temperature)
    d1 = tl.where(s1 == 0, 0.0, (m1 - m) * inv_temperature)
    f0 = tl.exp(d0)
    f1 = tl.exp(d1)
    return m, s0 * f0 + s1 * f1, f0 * (t0 + s0 * d0) + f1 * (t1 + s1 * d1)


@triton.jit
def _sums(x, axis: tl.constexpr, inv_temperature):
    """(m, s, t) of logits along an axis."""
    m = tl.max(x, axis)
    shift = tl.where(m == float("-inf"), 0.0, m)
    u = (x - (shift if len(x.shape) == 1 else shift[:, None])) * inv_temperature
    e = tl.exp(u)
    return m, tl.sum(e, axis), tl.sum(tl.where(e == 0, 0.0, e * u), axis)


@triton.jit
def logit_stats_kernel(
    X, TARGETS, KEEP, STATS, stride, start, valid, inv_temperature, HAS_KEEP: tl.constexpr, BLOCK_V: tl.constexpr
):
    """One program a token: X [T, v] -> STATS [T, 4], in one pass over the row."""
    row = tl.program_id(0).to(tl.int64)
    if HAS_KEEP:
        valid = tl.where(tl.load(KEEP + row) != 0, valid, 0)
    m = float("-inf")
    s = 0.0
    t = 0.0
    for first in range(0, valid, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        x = tl.load(X + row * stride + column, mask=column < valid, other=float("-inf")).to(tl.float32)
        m1, s1, t1 = _sums(x, 0, inv_temperature)
        m, s, t = _add(m, s, t, m1, s1, t1, inv_temperature)
    local = tl.load(TARGETS + row) - start
    here = (local >= 0) & (local < valid)
    z = tl.load(X + row * stride + local, mask=here, other=float("-inf")).to(tl.float32)
    tl.store(STATS + row * 4, m)
    tl.store(STATS + row * 4 + 1, s)
    tl.store(STATS + row * 4 + 2, t)
    tl.store(STATS + row * 4 + 3, z)


@triton.jit
def merge_stats_kernel(STATS, OUT, T, slices, inv_temperature, BLOCK_T: tl.constexpr):
    """STATS [slices, T, 4] -> OUT [T, 4], in the slices' order."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    known = token < T
    m = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_T,), tl.float32)
    t = tl.zeros((BLOCK_T,), tl.float32)
    z = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    for i in range(slices):
        row = STATS + (i * T + token) * 4
        m1 = tl.load(row, mask=known, other=float("-inf"))
        s1 = tl.load(row + 1, mask=known, other=0.0)
        t1 = tl.load(row + 2, mask=known, other=0.0)
        m, s, t = _add(m, s, t, m1, s1, t1, inv_temperature)
        z = tl.maximum(z, tl.load(row + 3, mask=known, other=float("-inf")))
    out = OUT + token * 4
    tl.store(out, m, mask=known)
    tl.store(out + 1, s, mask=known)
    tl.store(out + 2, t, mask=known)
    tl.store(out + 3, z, mask=known)


@triton.jit
def logit_grad_kernel(
    X,
    TARGETS,
    KEEP,
    M,
    LOG_S,
    ENTROPY,
    BY_LOGPROB,
    BY_ENTROPY,
    OUT,
    stride,
    out_stride,
    columns,
    start,
    valid,
    inv_temperature,
    HAS_KEEP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program for a token and BLOCK_V columns, each read before it is written: OUT may be X."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    if HAS_KEEP:
        valid = tl.where(tl.load(KEEP + row) != 0, valid, 0)
    inside = column < valid
    x = tl.load(X + row * stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    log_p = (x - tl.load(M + row)) * inv_temperature - tl.load(LOG_S + row)
    p = tl.exp(log_p)
    target = column == tl.load(TARGETS + row) - start
    grad = tl.load(BY_LOGPROB + row) * (tl.where(target, 1.0, 0.0) - p)
    if HAS_ENTROPY:
        grad -= tl.load(BY_ENTROPY + row) * tl.where(p == 0, 0.0, p * (log_p + tl.load(ENTROPY + row)))
    grad = tl.where(inside, grad * inv_temperature, 0.0)
    tl.store(OUT + row * out_stride + column, grad, mask=column < columns)


@triton.jit
def policy_epilogue_kernel(
    LOGPROB,
    LOG_RATIO,
    ADVANTAGE,
    WEIGHT,
    CORRECTION,
    ENTROPY,
    REF_LOGPROB,
    LOSS,
    BY_LOGPROB,
    BY_LOG_RATIO,
    T,
    low,
    high,
    dual_clip,
    sapo_tau_positive,
    sapo_tau_negative,
    ratio_cap,
    log_ratio_limit,
    kl_coef,
    entropy_coef,
    RATIO: tl.constexpr,
    CLIP: tl.constexpr,
    DUAL: tl.constexpr,
    KL: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Per-token arrays [T] -> the tokens' losses and their derivatives. KL: the estimator, or none."""
    i = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    known = i < T
    logprob = tl.load(LOGPROB + i, mask=known, other=0.0)
    log_ratio = tl.load(LOG_RATIO + i, mask=known, other=0.0)
    advantage = tl.load(ADVANTAGE + i, mask=known, other=0.0)
    weight = tl.load(WEIGHT + i, mask=known, other=0.0)
    value, by_logprob, by_log_ratio, _, _ = _clipped_objective(
        logprob,
        log_ratio,
        advantage,
        low,
        high,
        dual_clip,
        sapo_tau_positive,
        sapo_tau_negative,
        ratio_cap,
        log_ratio_limit,
        RATIO,
        CLIP,
        DUAL,
    )
    scale = -weight
    if HAS_CORRECTION:
        scale *= tl.load(CORRECTION + i, mask=known, other=0.0)
    loss = value * scale
    by_logprob *= scale
    if KL != "none":
        ref_logprob = tl.load(REF_LOGPROB + i, mask=known, other=0.0)
        kl, slope = _kl_estimate(logprob, ref_logprob, log_ratio_limit, KL)
        loss += kl_coef * kl * weight
        by_logprob += kl_coef * slope * weight
    if HAS_ENTROPY:
        loss -= entropy_coef * tl.load(ENTROPY + i, mask=known, other=0.0) * weight
    tl.store(LOSS + i, loss, mask=known)
    tl.store(BY_LOGPROB + i, by_logprob, mask=known)
    tl.store(BY_LOG_RATIO + i, by_log_ratio * scale, mask=known)


def logit_stats(
    logits: Tensor, targets: Tensor, keep: Tensor | None, start: int, valid: int, inv_temperature: float
) -> Tensor:
    assert logits.stride(1) == 1, "rows must be contiguous"
    targets = targets.contiguous()
    stats = torch.empty(len(logits), 4, dtype=torch.float32, device=logits.device)
    logit_stats_kernel[(len(logits),)](
        logits,
        targets,
        _or(keep, targets),
        stats,
        logits.stride(0),
        start,
        valid,
        inv_temperature,
        HAS_KEEP=keep is not None,
        **tuned("logit_stats"),
    )
    return stats


def merge_stats(stats: Tensor, inv_temperature: float) -> Tensor:
    slices, count, _ = stats.shape
    stats = stats.contiguous()
    out = torch.empty_like(stats[0])
    options = tuned("merge_stats")
    merge_stats_kernel[(triton.cdiv(count, options["BLOCK_T"]),)](stats, out, count, slices, inv_temperature, **options)
    return out


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
    assert logits.stride(1) == out.stride(1) == 1, "rows must be contiguous"
    count, columns = logits.shape
    options = tuned("logit_grad")
    logit_grad_kernel[(count, triton.cdiv(columns, options["BLOCK_V"]))](
        logits,
        targets.contiguous(),
        _or(keep, targets),
        m.contiguous(),
        log_s.contiguous(),
        entropy.contiguous(),
        by_logprob.contiguous(),
        _or(by_entropy, log_s),
        out,
        logits.stride(0),
        out.stride(0),
        columns,
        start,
        valid,
        inv_temperature,
        HAS_KEEP=keep is not None,
        HAS_ENTROPY=by_entropy is not None,
        **options,
    )
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
    given = (logprobs, log_ratio, advantages, weights, correction, entropy, ref_logprobs)
    arrays = [_or(array, logprobs).float().contiguous() for array in given]
    out = [torch.empty_like(arrays[0]) for _ in range(3)]
    *numbers, ratio, clip, dual = rule.of_objective
    options = tuned("policy_epilogue")
    policy_epilogue_kernel[(triton.cdiv(len(logprobs), options["BLOCK_T"]),)](
        *arrays,
        *out,
        len(logprobs),
        *numbers,
        rule.kl_coef,
        rule.entropy_coef,
        RATIO=ratio,
        CLIP=clip,
        DUAL=dual,
        KL="none" if ref_logprobs is None else rule.kl_estimator,
        HAS_CORRECTION=correction is not None,
        HAS_ENTROPY=entropy is not None,
        **options,
    )
    return out[0], out[1], out[2]


def _or(array: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel takes a pointer even for what it won't read."""
    return stand_in if array is None else array.contiguous()

"""Transformer Engine in bfloat16: its attention, packed and padded, and updates at 0.5B and 1.5B parameters."""

from __future__ import annotations

import torch

from gpu.models import GPU
from gpu.report import Report
from gpu.steps import measure
from megarl.learner.model import uses_transformer_engine


def run(report: Report) -> None:
    if uses_transformer_engine(torch.bfloat16):
        for packed in (True, False):
            with report.attempt(f"attention, {'packed' if packed else 'padded'}"):
                _attention(report, packed)
    else:
        report.skipped("attention", "needs Transformer Engine and a GPU; the layers below are the local ones")
    for size in ("0.5B", "1.5B") if GPU else ("toy", "toy, tied"):
        measure(report, size, "bf16", 0.0 if report.dry_run else min(15.0, report.seconds_left / 4))


def _attention(report: Report, packed: bool) -> None:
    """Causal, grouped queries, against torch in float32."""
    from transformer_engine.pytorch import DotProductAttention

    heads, groups, width, length, count = 12, 2, 128, 512, 4
    attention = DotProductAttention(
        heads,
        width,
        num_gqa_groups=groups,
        attention_dropout=0.0,
        attn_mask_type="padding_causal" if packed else "causal",
        qkv_format="thd" if packed else "sbhd",
    )
    rows = [torch.randn(count, length, n, width, device="cuda", dtype=torch.bfloat16) for n in (heads, groups, groups)]
    given, options = [x.transpose(0, 1).contiguous() for x in rows], {}
    if packed:
        ends = torch.arange(count + 1, device="cuda", dtype=torch.int32) * length
        given = [x.flatten(0, 1) for x in rows]
        options = dict(cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=length, max_seqlen_kv=length)
    found = attention(*given, **options)
    found = found.view(count, length, -1) if packed else found.transpose(0, 1)
    query, key, value = (x.float().transpose(1, 2) for x in rows)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    exact = exact.transpose(1, 2).flatten(2)
    error = float((found.float() - exact).norm() / exact.norm())
    report.at_most(f"attention, {'packed' if packed else 'padded'}: error", error, 1e-2)

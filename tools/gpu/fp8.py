"""fp8: a layer's products against float64, gradients against the CPU's, and updates at 0.5B and 1.5B parameters."""

from __future__ import annotations

import torch

from gpu.models import GPU
from gpu.parity import compare
from gpu.report import Report
from gpu.steps import measure
from megarl.learner.model import check_precision, token_multiple
from megarl.types import UserError


def run(report: Report) -> None:
    try:
        check_precision("fp8")
        precision, limits = "fp8", (0.35, 0.4)
        with report.attempt("product"):
            _product(report)
    except UserError as refusal:
        report.skipped("fp8", str(refusal))
        if not report.dry_run:
            return
        precision, limits = "bf16", (0.05, 0.2)
    multiple = token_multiple("fp8")
    compare(report, precision, limits, multiple)
    for size in ("0.5B", "1.5B") if GPU else ("toy",):
        measure(report, size, precision, 0.0 if report.dry_run else min(15.0, report.seconds_left / 4), multiple)


def _product(report: Report) -> None:
    """A norm and a product, forward and backward, beside the same in bfloat16."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling, Format

    tokens, width = 8192, 4096
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    layer = te.LayerNormLinear(width, width, bias=False, normalization="RMSNorm", params_dtype=torch.bfloat16)
    weight = layer.weight.detach().double()
    exact = torch.nn.functional.rms_norm(x[:512].double(), (width,), eps=layer.eps) @ weight.T
    for name, limit in (("bf16", 1e-2), ("fp8", 0.1)):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for i in range(12):
            if i == 2:
                start.record()
            leaf = x.detach().requires_grad_()
            with te.fp8_autocast(enabled=name == "fp8", fp8_recipe=DelayedScaling(fp8_format=Format.HYBRID)):
                y = layer(leaf)
            y.backward(torch.ones_like(y))
        end.record()
        end.synchronize()
        rate = 10 * 6 * tokens * width**2 / (start.elapsed_time(end) / 1e3) / 1e12
        error = float((y[:512].detach().double() - exact).norm() / exact.norm())
        report.at_most(f"product, {name}: error", error, limit)
        report.number(f"product, {name}: forward and backward", rate, "TFLOP/s")

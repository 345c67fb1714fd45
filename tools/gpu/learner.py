"""The learner on the device against the learner on the CPU: every recipe's gradient, in float32 and in bfloat16."""

from __future__ import annotations

from gpu.parity import compare
from gpu.report import Report


def run(report: Report) -> None:
    compare(report, "fp32", (2e-5, 1e-4))
    compare(report, "bf16", (0.05, 0.2))

"""The quick start on one device, in float32 and in bfloat16: it runs, the engine agrees with the learner, it learns.

Engine and learner take turns with the device; in bfloat16 the learner lends the engine all of its memory.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from gpu.report import Report
from megarl.learner.agreement import LIMITS

CONFIG = Path(__file__).resolve().parents[2] / "configs/quickstart.yaml"
STEPS, NEEDED = 30, 40
TOY = (
    "run.steps=2",
    "data.eval=null",
    "run.export=false",
    "schedule.prompts_per_step=8",
    "schedule.samples_per_prompt=4",
)


def run(report: Report) -> None:
    for precision in ("bf16",) if report.dry_run else ("fp32", "bf16"):
        if precision == "bf16" and report.seconds_left < NEEDED and not report.dry_run:
            report.skipped(precision, f"needs {NEEDED} s")
            continue
        with report.attempt(precision):
            rows = _train(report, precision)
            report.holds(f"{precision}: it ran to its end", rows[-1]["step"] == (2 if report.dry_run else STEPS))
            steps = [row for row in rows if "time/step" in row]
            mismatch = max(row["mismatch/mean"] for row in steps if "mismatch/mean" in row)
            report.at_most(f"{precision}: engine against learner", mismatch, LIMITS[precision], "nats")
            late = steps[3:] or steps
            for name in (key for key in late[-1] if key.startswith("time/")):
                report.number(f"{precision}: {name}", median(row[name] for row in late if name in row), "s")
            _memory(report, precision, late)
            if not report.dry_run:
                before, after = (
                    next(row[key] for key in row if key.startswith("eval/avg")) for row in (rows[0], rows[-1])
                )
                report.holds(f"{precision}: it learns", after > before + 0.05, f"{before:.3f} -> {after:.3f}")


def _memory(report: Report, precision: str, rows: list[dict[str, Any]]) -> None:
    """What the device holds by phase, and whether each side gives way to the other."""
    for name in (key for key in rows[-1] if key.startswith("memory/gpu_")):
        report.number(f"{precision}: {name}", median(row[name] for row in rows if name in row), "GiB")
    lent = rows[-1]["memory/lent"]
    report.holds(f"{precision}: the learner lends its memory", (lent > 0) == (precision == "bf16"), f"{lent:.3f} GiB")
    if "memory/gpu_rollout" in rows[-1]:
        generating, updating = (rows[-1][f"memory/gpu_{phase}"] for phase in ("rollout", "update"))
        report.holds(f"{precision}: the engine sleeps during updates", updating < generating / 2)


def _train(report: Report, precision: str) -> list[dict[str, Any]]:
    """The run's metrics."""
    folder = report.folder / f"quickstart_{precision}"
    shutil.rmtree(folder, ignore_errors=True)
    one = ("learner.world_size=1", "learner.tensor_model_parallel_size=1", "rollout.enforce_eager=true")
    size = TOY if report.dry_run else (f"run.steps={STEPS}",)
    command = [sys.executable, "-m", "megarl.cli", "train", str(CONFIG), *one, *size]
    lends = "all" if precision == "bf16" else "none"
    command += [f"run.dir={folder}", f"model.precision={precision}", f"learner.offload={lends}"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

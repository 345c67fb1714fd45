"""Whole training steps of megarl and of TRL's GRPOTrainer, interleaved on this machine.

    python tools/bench/step.py --trl-env ENV [--repeats 3] [--block 10] [key=value ...]

Both train the same model on the same task: 64 prompts x 8 samples x at most 24 tokens, fp32, GRPO, two cores. Both
stay loaded; while one runs a block of steps the other is stopped (SIGSTOP), so neither pays for the other. megarl is
the real `megarl train`, read through its metrics.jsonl; TRL is trl_step.py (`--setup ENV` makes its environment).
Prints medians over the repeats and writes them as JSON with --out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from blocks import ROOT, Megarl, Peak, median, phase_seconds

from megarl.data import arithmetic

MODEL = ROOT / "megarl/data/base_model"
OVERRIDES = [
    "recipe=grpo",
    "optim.lr=2e-4",
    "run.export=false",
    "data.eval=null",
    "learner.tensor_model_parallel_size=1",
    "rollout.engines=2",
]


class Trl:
    """trl_step.py --serve: idle between blocks."""

    def __init__(self, folder: Path, env: Path) -> None:
        prompts = folder / "prompts.jsonl"
        rows = [{"prompt": p.question, "answer": p.answer} for p in arithmetic.problems(0, 20_000, "train")]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        script = ROOT / "tools/bench/trl_step.py"
        command = [env / "bin/python", script, "--model", MODEL, "--prompts", prompts, "--serve"]
        self.process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.peak = Peak(self.process)
        self.block(0)

    def block(self, steps: int) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.peak.active.set()
        self.process.stdin.write(f"run {steps}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        self.peak.active.clear()
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-env", type=Path, required=True, help="environment made by trl_step.py --setup")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved blocks of each")
    parser.add_argument("--block", type=int, default=10, help="steps per block")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for megarl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ours = Megarl(Path(folder) / "run", "configs/quickstart.yaml", [*OVERRIDES, *options.overrides])
        theirs = None
        try:
            theirs = Trl(Path(folder), options.trl_env)
            pairs = []
            for repeat in range(options.repeats):
                pairs.append((ours.block(options.block), theirs.block(options.block)))
                print(f"repeat {repeat + 1}/{options.repeats} done", file=sys.stderr)
            result = {"megarl": summarise_ours(pairs, ours.peak.mib), "trl": summarise_theirs(pairs, theirs.peak.mib)}
        finally:
            ours.close()
            if theirs:
                theirs.close()
    result["step_ratio"] = [s / o for s, o in zip(result["trl"]["blocks"], result["megarl"]["blocks"], strict=True)]
    report(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def summarise_ours(pairs: list, peak: float) -> dict[str, Any]:
    blocks = [block for block, _ in pairs]
    rows = [row for block in blocks for row in block]

    phases = phase_seconds(rows)
    tokens = median(rows, "tokens/generated")
    return {
        "step_seconds": median(rows, "time/step"),
        "blocks": [statistics.median(row["time/step"] for row in block) for block in blocks],
        "samples_per_second": median(rows, "samples/generated") / median(rows, "time/step"),
        "tokens_per_step": tokens,
        "phase_seconds": phases,
        "tokens_per_second": {"generation": tokens / phases["rollout"], "update": tokens / phases["update"]},
        "peak_mib": peak,
    }


def summarise_theirs(pairs: list, peak: float) -> dict[str, Any]:
    blocks = [block for _, block in pairs]
    seconds = [s for block in blocks for s in block["step_seconds"]]
    tokens = statistics.median(t for block in blocks for t in block["generated_tokens"])
    phases = {k: statistics.median(block["phase_seconds"][k] for block in blocks) for k in blocks[0]["phase_seconds"]}
    update = phases["loss_forward"] + phases["backward_and_optimizer"]
    return {
        "step_seconds": statistics.median(seconds),
        "blocks": [statistics.median(block["step_seconds"]) for block in blocks],
        "samples_per_second": 512 / statistics.median(seconds),
        "tokens_per_step": tokens,
        "phase_seconds": phases,
        "tokens_per_second": {"generation": tokens / phases["generation"], "update": tokens / update},
        "peak_mib": peak,
        "versions": blocks[0]["versions"],
    }


def report(result: dict[str, Any]) -> None:
    print(f"{'':24}{'megarl':>12}{'TRL':>12}")
    for key in ("step_seconds", "samples_per_second", "tokens_per_step", "peak_mib"):
        print(f"{key:24}{result['megarl'][key]:12.2f}{result['trl'][key]:12.2f}")
    for key in ("generation", "update"):
        row = [result[name]["tokens_per_second"][key] for name in ("megarl", "trl")]
        print(f"{key + ' tokens/s':24}{row[0]:12.0f}{row[1]:12.0f}")
    for name in ("megarl", "trl"):
        print(f"{name} phases: " + ", ".join(f"{k} {v:.3f} s" for k, v in result[name]["phase_seconds"].items()))
    print("TRL's step over megarl's, per repeat: " + ", ".join(f"{ratio:.2f}" for ratio in result["step_ratio"]))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

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
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from megarl.data import arithmetic

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "megarl/data/base_model"
OVERRIDES = [
    "recipe=grpo",
    "optim.lr=2e-4",
    "run.export=false",
    "data.eval=null",
    "learner.tensor_model_parallel_size=1",
    "rollout.engines=2",
]
WARMUP = 3


class Peak(threading.Thread):
    """The largest proportional set size of a process tree while it runs its blocks, in MiB."""

    def __init__(self, process: subprocess.Popen) -> None:
        super().__init__(daemon=True)
        self.process, self.mib, self.active = process, 0.0, threading.Event()
        self.start()

    def run(self) -> None:
        while self.process.poll() is None:
            self.active.wait()
            sizes = 0
            for member in tree(self.process.pid):
                try:
                    sizes += member.memory_full_info().pss
                except psutil.Error:
                    continue
            self.mib = max(self.mib, sizes / 2**20)
            time.sleep(1.0)


def tree(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


class Megarl:
    """`megarl train`, stopped between blocks."""

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self.metrics = folder / "run/metrics.jsonl"
        arguments = ["train", str(ROOT / "configs/quickstart.yaml"), f"run.dir={folder / 'run'}", "run.steps=1000000"]
        command = [sys.executable, "-m", "megarl.cli", *arguments, *OVERRIDES, *overrides]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        self.peak = Peak(self.process)
        self._wait_for(WARMUP)
        self._signal(signal.SIGSTOP)

    def block(self, steps: int) -> list[dict[str, float]]:
        """Metrics of `steps` whole steps; the one that the stop cut in two doesn't count."""
        self._signal(signal.SIGCONT)
        self.peak.active.set()
        start = len(self._rows()) + 1
        self._wait_for(start + steps)
        self.peak.active.clear()
        self._signal(signal.SIGSTOP)
        return self._rows()[start : start + steps]

    def close(self) -> None:
        self._signal(signal.SIGKILL)

    def _rows(self) -> list[dict[str, float]]:
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        return [json.loads(line) for line in lines]

    def _wait_for(self, rows: int) -> None:
        while len(self._rows()) < rows:
            if self.process.poll() is not None:
                sys.exit("megarl ended early; run the same command by hand to see why")
            time.sleep(0.05)

    def _signal(self, number: signal.Signals) -> None:
        for member in tree(self.process.pid):
            member.send_signal(number)


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
        ours = Megarl(Path(folder), options.overrides)
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

    def median(key: str) -> float:
        return statistics.median(row[key] for row in rows)

    phases = {k.removeprefix("time/"): median(k) for k in rows[0] if k.startswith("time/") and k != "time/step"}
    tokens = median("tokens/generated")
    return {
        "step_seconds": median("time/step"),
        "blocks": [statistics.median(row["time/step"] for row in block) for block in blocks],
        "samples_per_second": median("samples/generated") / median("time/step"),
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

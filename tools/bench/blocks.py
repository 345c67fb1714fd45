"""Runs of `megarl train` that take turns on this machine: each is stopped (SIGSTOP) while others have their steps."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
WARMUP = 3
Row = dict[str, float]  # of metrics.jsonl


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
    """`megarl train CONFIG`, without an end, stopped between blocks."""

    def __init__(self, folder: Path, config: str, overrides: list[str]) -> None:
        self.metrics = folder / "metrics.jsonl"
        arguments = ["train", config, f"run.dir={folder}", "run.steps=1000000", *overrides]
        command = [sys.executable, "-m", "megarl.cli", *arguments]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        self.peak = Peak(self.process)
        self._wait_for(WARMUP)
        self._signal(signal.SIGSTOP)

    def block(self, steps: int) -> list[Row]:
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

    def _rows(self) -> list[Row]:
        text = self.metrics.read_text() if self.metrics.exists() else ""
        return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]  # without one half written

    def _wait_for(self, rows: int) -> None:
        while len(self._rows()) < rows:
            if self.process.poll() is not None:
                sys.exit("megarl ended early; run the same command by hand to see why")
            time.sleep(0.05)

    def _signal(self, number: signal.Signals) -> None:
        for member in tree(self.process.pid):
            member.send_signal(number)


def median(rows: list[Row], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def phase_seconds(rows: list[Row]) -> dict[str, float]:
    return {k.removeprefix("time/"): median(rows, k) for k in rows[0] if k.startswith("time/") and k != "time/step"}

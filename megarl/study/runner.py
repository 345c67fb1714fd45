"""Runs the rows of a study one at a time, each as `megarl train` in a process of its own, and says how far it is.

A row's folder says how it stands: `row.json` is written when its process has ended. A row that has not finished goes
on from its checkpoint, or from its first step where there is none.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from megarl.config import dump_config
from megarl.files import locked, write_whole
from megarl.preflight import check_run
from megarl.processes import python_command, python_path
from megarl.resume import check_inputs
from megarl.study.config import Row, Study
from megarl.types import UserError

POLL_SECONDS = 0.5
STOP_SECONDS = 60  # what an interrupted row gets to end by itself


@dataclass(frozen=True)
class Outcome:
    """How a row's process ended, and the seconds that all its attempts took."""

    finished: bool
    seconds: float
    error: str | None = None


def run_study(study: Study) -> list[str]:
    """Run every row that has not finished; returns one line for each that failed."""
    console = Console(highlight=False, soft_wrap=True)
    pending = [row for row in study.rows if not is_finished(row)]
    skipped = len(study.rows) - len(pending)
    console.print(f"{len(study.rows)} rows in {study.folder}" + (f", {skipped} finished before" if skipped else ""))
    if not pending:
        return []
    _check(study, pending)
    failures = []
    with locked(study.folder, "study.dir", "a study") as lock, _terminated_like_interrupted():
        for position, row in enumerate(pending):
            outcome = _run(row, lock, Progress(study, pending[position:], console))
            if outcome.finished:
                end = "finished" + _result(row)
            else:
                failures.append(f"{row.name}: {outcome.error}")
                end = f"failed: {outcome.error}"
            progress = Progress(study, pending[position + 1 :], console)
            console.print(f"{progress.count(row)}  {row.name}  {end}  {_span(outcome.seconds)}; {progress.times()}")
    return failures


def is_finished(row: Row) -> bool:
    return (outcome := read_outcome(row)) is not None and outcome.finished


def read_outcome(row: Row) -> Outcome | None:
    """None: never started, running, killed together with the study, or its record cannot be read."""
    try:
        return Outcome(**json.loads((row.folder / "row.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def last_step(row: Row) -> int:
    """The last step that the row's metrics record; 0 before the first."""
    return max((int(metrics["step"]) for metrics in read_metrics(row)), default=0)


def read_metrics(row: Row) -> list[dict[str, float]]:
    """The rows of metrics.jsonl, without one that is being written."""
    file = row.folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


class Progress:
    """Which row of how many, the time the study has used, and about how much is left."""

    def __init__(self, study: Study, unfinished: list[Row], console: Console) -> None:
        self.study, self.unfinished, self.console = study, unfinished, console
        outcomes = [outcome for row in study.rows if (outcome := read_outcome(row))]
        self._used = sum(outcome.seconds for outcome in outcomes)
        finished = [outcome.seconds for outcome in outcomes if outcome.finished]
        self._usual = sum(finished) / len(finished) if finished else None

    def count(self, row: Row) -> str:
        return f"row {self.study.rows.index(row) + 1}/{len(self.study.rows)}"

    def times(self, running: float = 0.0, fraction: float = 0.0) -> str:
        """`running`: seconds and `fraction` of the first unfinished row, as far as it is."""
        usual, used, rows = self._usual, self._used + running, len(self.unfinished)
        if fraction > 0:
            whole = running / fraction
            left: float | None = whole - running + (rows - 1) * (usual or whole)
        else:
            left = None if usual is None else max(rows * usual - running, 0)
        return f"used {_span(used)}, left " + ("?" if left is None else "about " + _span(left))


def _check(study: Study, pending: list[Row]) -> None:
    """Refuses before anything starts what a row of any recipe would be refused for.

    Also where any row, one that has finished too, was made from other files than those that are there now.
    """
    firsts = {row.recipe: row for row in reversed(pending)}
    known: dict[str, dict[str, str] | None] = {}  # what is read -> its fingerprints
    for row in study.rows:
        config = row.config
        read = str((config.model, config.data, config.reward.name))
        try:
            if firsts.get(row.recipe) is row:
                check_run(config, "train", resume=True)
            if (row.folder / "inputs.json").is_file():
                known[read] = check_inputs(config, now=known.get(read))
        except UserError as error:
            raise UserError(f"{row.name}: {error}") from None


def _run(row: Row, lock: int, progress: Progress) -> Outcome:
    """One attempt at a row. On an interrupt, ends the row's process and raises KeyboardInterrupt."""
    before = read_outcome(row)
    earlier = before.seconds if before else 0.0
    row.folder.mkdir(parents=True, exist_ok=True)
    config = row.folder / "config.yaml"
    write_whole(config, dump_config(row.config))
    (row.folder / "row.json").unlink(missing_ok=True)
    log, begun_at, started = row.folder / "train.log", last_step(row), time.monotonic()
    command = python_command("megarl.cli", "train", str(config), "--resume")
    with log.open("w") as output:
        # A session of its own: Ctrl-C reaches the study alone, which then ends the row. The row holds the study's lock
        # too, so that no second study starts beside a row that outlives a killed one.
        process = subprocess.Popen(
            command,
            env=os.environ | python_path(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock],
        )
        error: str | None = "interrupted"
        try:
            _wait(process, row, progress, begun_at, started)
            error = None if process.returncode == 0 else _last_error(log, process.returncode)
            if error is None and last_step(row) < row.config.run.steps:
                error = f"stopped after step {last_step(row)} of {row.config.run.steps}"
        finally:
            _end(process)
            outcome = Outcome(error is None, earlier + time.monotonic() - started, error)
            write_whole(row.folder / "row.json", json.dumps(asdict(outcome)) + "\n")
    return outcome


def _wait(process: subprocess.Popen[bytes], row: Row, progress: Progress, begun_at: int, started: float) -> None:
    """Until the process ends; shows a line that moves where there is a terminal."""
    console, steps = progress.console, row.config.run.steps
    if not console.is_terminal:
        process.wait()
        return
    with Live(console=console, transient=True, refresh_per_second=2) as live:
        while process.poll() is None:
            step, running = last_step(row), time.monotonic() - started
            fraction = (step - begun_at) / max(steps - begun_at, 1)
            times = progress.times(running, fraction)
            live.update(Text(f"{progress.count(row)}  {row.name}  step {step}/{steps}  {times}"))
            time.sleep(POLL_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()  # an interrupt may be ignored: background jobs of scripts inherit that
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()  # its ranks die with it
            process.wait()


def _last_error(log: Path, status: int) -> str:
    said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("megarl: error: ")]
    return said[-1].removeprefix("megarl: error: ") if said else f"exit status {status}, see {log}"


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _result(row: Row) -> str:
    """Held-out results before and after, where the row was evaluated."""
    name = f"avg@{row.config.eval.samples_per_prompt}"
    values = [metrics[f"eval/{name}"] for metrics in read_metrics(row) if f"eval/{name}" in metrics]
    return f"  {name} {values[0]:.3f} -> {values[-1]:.3f}" if values else ""


def _span(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"

"""The folder of an evaluation: per-problem results that survive a crash, what they were made from, progress.

config.yaml      complete; model.path is the folder or checkpoint that was evaluated
versions.json
inputs.json      fingerprints of what the keys only name: the model's files, the sets' problems, a reward of one's own
problems.jsonl   one line a problem, in order: its samples with their verdicts. Written a batch at a time
eval.json        avg@k and pass@k of each set with intervals
lock             held by the evaluation that runs
logs/            of the engines
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megarl.config import Config, dump_config
from megarl.data.problems import told
from megarl.files import locked, write_whole, writing
from megarl.inputs import inputs
from megarl.resume import HELD, check_is_folder, held_by, recorded_config
from megarl.types import Prompt, RewardStatus, SampleGroup, UserError
from megarl.versions import package_versions

GO_ON = "then run the same command again: it loses nothing"
Row = dict[str, Any]  # a line of problems.jsonl
TOLD = ("set", "id", "problem", "answer")  # of a row, about its problem
# What the numbers don't depend on: the rest must be as it was for an evaluation to go on. A model may lie elsewhere.
INDIFFERENT: tuple[str, ...] = ("run.", "learner.", "recipe.", "schedule.", "optim.", "critic.", "reward.workers")
INDIFFERENT += ("model.path", "data.train", "rollout.temperature", "rollout.top_", "rollout.allow_")
INDIFFERENT += ("rollout.max_logprob",)


class _SavedSample(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    index: int
    status: RewardStatus
    extracted: str | None
    finish_reason: str
    tokens: int
    response: str


class _SavedRow(BaseModel):
    """A line of problems.jsonl as `append` writes it."""

    model_config = ConfigDict(strict=True, extra="forbid")
    set: str
    id: str
    problem: str
    answer: str
    correct: int
    samples: list[_SavedSample]


class EvaluationFolder:
    """What has been evaluated and what is left. Batches are whole or absent, so a resumed run repeats a whole one's
    requests: its samples are those of an uninterrupted run, bit for bit. Use as a context manager: one process at a
    time is inside. What can't be written is a UserError.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.folder = config, Path(config.run.dir)
        self.console = Console(highlight=False, soft_wrap=True)
        self.rows: list[Row] = []
        self._end = 0  # bytes of `rows` in problems.jsonl
        self._progress: Progress | None = None
        self._total = self._reported = 0
        self._started = time.monotonic()
        self._held = ExitStack()
        self.lock = -1  # file descriptor, for children that are to keep others out

    @property
    def path(self) -> Path:
        return self.folder / "problems.jsonl"

    def open(self, prompts: Sequence[Prompt], model: Path) -> None:
        """Take over what an earlier run has left; `model` is the Hugging Face folder that is evaluated.

        All is checked before a byte changes. Raises UserError naming what differs, or the row that is damaged.
        """
        check_continues(self.config)
        lines, batch = _whole_lines(self.path), self.config.eval.problems_per_batch
        rows = [self._read(number, line) for number, line in enumerate(lines, 1)]
        made_from, versions = inputs(self.config, model, {"data.eval": prompts}), package_versions()
        if rows:
            self._check_rows(rows, prompts)
            self._check_record("inputs.json", made_from)
            if len(rows) < len(prompts):
                self._check_record("versions.json", versions)
        kept = len(rows) if len(rows) == len(prompts) else len(rows) // batch * batch
        self.rows, self._end = rows[:kept], sum(len(line) + 1 for line in lines[:kept])
        if kept < len(prompts):
            self.write("config.yaml", dump_config(self.config))
            self.write("versions.json", json.dumps(versions, indent=2) + "\n")
            self.write("inputs.json", json.dumps(made_from, indent=2) + "\n")
        self._total = len(prompts) * self.config.eval.samples_per_prompt
        if self.rows:
            self.say(f"{len(self.rows)} of {len(prompts)} problems are in {self.path}, going on behind them")
        if self.console.is_terminal and len(self.rows) < len(prompts):
            self._progress = Progress(
                TextColumn("samples"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self._progress.add_task("", total=self._total, completed=self._finished, note="starting")
            self._progress.start()
        self._started, self._reported = time.monotonic(), self._finished

    @property
    def _finished(self) -> int:
        return len(self.rows) * self.config.eval.samples_per_prompt

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """As a run's log: yields what takes how many samples of a batch are done, generated or graded."""

        def advance(done: int) -> None:
            if self._progress:
                (task,) = self._progress.tasks
                self._progress.update(task.id, completed=max(task.completed, self._finished + done))

        yield advance

    def append(self, groups: list[SampleGroup]) -> None:
        """Save a batch, durably, and say how far the evaluation is."""
        rows = [_row(group) for group in groups]
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        with writing(self.path, GO_ON):
            self.path.touch()
            with self.path.open("r+b") as file:
                file.truncate(self._end)  # what a crash has left of this batch
                file.seek(self._end)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        self._end += len(content)
        self.rows += rows
        n = self.config.eval.samples_per_prompt
        right = sum(row["correct"] for row in self.rows) / (len(self.rows) * n)
        if self._progress:
            note = f"{right:.3f} right so far"
            self._progress.update(self._progress.task_ids[0], completed=self._finished, note=note)
            return
        elapsed = time.monotonic() - self._started
        left = elapsed / (self._finished - self._reported) * (self._total - self._finished)
        self.say(
            f"{len(self.rows)}/{self._total // n} problems  {right:.3f} right so far  "
            f"{_duration(elapsed)}, about {_duration(left)} left"
        )

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def show(self, renderable: Any) -> None:
        self._stop()
        self.console.print(renderable)

    def _stop(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None

    def write(self, name: str, text: str) -> None:
        """Replace a small file, whole or not at all."""
        with writing(self.folder / name, GO_ON):
            write_whole(self.folder / name, text)

    def __enter__(self) -> EvaluationFolder:
        with writing(self.folder, GO_ON):
            self.lock = self._held.enter_context(locked(self.folder, "run.dir", "an evaluation"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._held.close()

    def _read(self, number: int, line: bytes) -> Row:
        """Raises UserError for a row that `append` did not write."""
        n = self.config.eval.samples_per_prompt
        try:
            row = _SavedRow.model_validate_json(line).model_dump()
        except ValidationError as error:
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
        else:
            statuses = [sample["status"] for sample in row["samples"]]
            if len(statuses) == n and statuses.count(RewardStatus.CORRECT) == row["correct"]:
                return row
            what = f"{len(statuses)} samples, {statuses.count(RewardStatus.CORRECT)} of them right"
        raise UserError(
            f"{self.path}:{number} is damaged ({what}); remove this line and all behind it, to do them again, or name "
            "another run.dir"
        )

    def _check_rows(self, rows: list[Row], prompts: Sequence[Prompt]) -> None:
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=False), 1):
            if [row[key] for key in TOLD] != told(prompt):
                raise UserError(
                    f"{self.path}:{number} is problem {row['id']}, but data.eval has {prompt.id} there, or another "
                    "text or answer; restore the data, or name another run.dir"
                )

    def _check_record(self, name: str, now: dict[str, str]) -> None:
        try:
            before = json.loads((self.folder / name).read_text(encoding="utf-8"))
            keys = [*now, *before.keys() - now.keys()]
        except (OSError, ValueError, AttributeError):
            raise UserError(
                f"{self.folder / name} is missing or damaged: what the rows of problems.jsonl were made from can't be "
                "checked; restore it, or name another run.dir"
            ) from None
        for key in keys:
            _check_same(self.folder, key, now.get(key), before.get(key))


def check_continues(config: Config) -> None:
    """Raises UserError where run.dir is no place for this evaluation: a run's, or begun with other keys."""
    folder = Path(config.run.dir)
    check_is_folder(folder)
    held = held_by(folder)
    if held not in (None, "eval"):
        raise UserError(f"run.dir={folder} already holds {HELD[held]}; name another folder")
    if not _whole_lines(folder / "problems.jsonl"):
        return
    before = recorded_config(folder).model_dump()
    for section, values in config.model_dump().items():
        for key, value in values.items() if isinstance(values, dict) else ():
            name = f"{section}.{key}"
            if name == "run.seed" or not name.startswith(INDIFFERENT):
                _check_same(folder, name, value, before[section][key])


def _check_same(folder: Path, name: str, now: object, before: object) -> None:
    if now != before:
        raise UserError(
            f"{name}={now!r}, but the evaluation in run.dir={folder} has {before!r}; keep it, or name another folder"
        )


def _row(group: SampleGroup) -> Row:
    samples = [
        {
            "index": sample.index,
            "status": str(sample.status),
            "extracted": sample.extracted,
            "finish_reason": sample.finish_reason,
            "tokens": len(sample.response_ids),
            "response": sample.text,
        }
        for sample in group.samples
    ]
    return {
        **dict(zip(TOLD, told(group.prompt), strict=True)),
        "correct": sum(sample.correct for sample in group.samples),
        "samples": samples,
    }


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of problems.jsonl without the one that a crash tore off; none where there is no file."""
    try:
        return path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"

"""The run folder and what the person watching sees: console, metrics.jsonl, TensorBoard, samples, phase times."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from megarl.config import Config, dump_config
from megarl.files import write_whole
from megarl.memory import give_back, gpu_used
from megarl.phases import Watch, phase
from megarl.resume import set_aside
from megarl.types import Metrics, Rollout, SampleGroup
from megarl.versions import package_versions

SHOWN = {
    "reward/pass_rate": "pass {:.3f}",
    "groups/mixed": "mixed {:.2f}",
    "samples/kept": "kept {:.0f}",
    "response/length": "length {:.0f}",
    "policy/entropy": "entropy {:.3f}",
    "optim/loss": "loss {:.4f}",
    "optim/grad_norm": "grad {:.2f}",
    "mismatch/mean": "mismatch {:.0e}",
    "time/step": "{:.1f} s",
}


class RunLog:
    """Writes on rank 0; on other ranks only the clock runs. Use as a context manager."""

    def __init__(self, config: Config, *, leads: bool, start: int = 0) -> None:
        self.folder = Path(config.run.dir)
        self.console = Console(quiet=not leads, highlight=False, soft_wrap=True)
        self.stop_file = self.folder / "STOP"
        self._leads, self._steps = leads, config.run.steps
        self._times: dict[str, float] = {}
        self._gpu: dict[str, float] = {}
        self._taken = time.perf_counter()
        self._progress: Progress | None = None
        self._step_task: TaskID | None = None
        self._phase_task: TaskID | None = None
        if not leads:
            return
        self._watch = Watch(self.say)
        if aside := set_aside(self.folder, start):
            self.say(f"what this run held beyond step {start} is in {aside}")
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "config.yaml", dump_config(config))
        write_whole(self.folder / "versions.json", json.dumps(package_versions(), indent=2) + "\n")
        self._metrics = (self.folder / "metrics.jsonl").open("a")
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start + 1)
        self._wandb = None
        if config.run.wandb_project:
            import wandb

            self._wandb = wandb.init(project=config.run.wandb_project, dir=self.folder, config=config.model_dump())
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self._progress.start()
            self._step_task = self._progress.add_task("step", total=self._steps, completed=start, note="")
            self._phase_task = self._progress.add_task("starting", total=None, note="")

    @property
    def stop_requested(self) -> bool:
        """Whether somebody (a person, a batch script near its time limit) has put a file STOP into the run folder."""
        return self.stop_file.exists()

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Time a phase of the step, then give back its memory; yields a function that takes how many of `total` are
        done."""
        if self._progress and self._phase_task is not None:
            self._progress.reset(self._phase_task, description=name, total=total)

        def advance(done: int) -> None:
            running.advance(done)
            if self._progress and self._phase_task is not None:
                self._progress.update(self._phase_task, completed=done)

        with phase(name, total) as running:
            yield advance
            give_back()
        if (used := gpu_used()) is not None:
            self._gpu[name] = used
        self.add_time(name, running.seconds)

    def add_time(self, name: str, seconds: float) -> None:
        """To what is recorded of a phase, or of a part of one."""
        self._times[name] = self._times.get(name, 0.0) + seconds

    def take_times(self) -> Metrics:
        """Seconds of each phase since the last call, as time/<phase>, and all time since then as time/step.

        On a GPU also memory/gpu_<phase>: GiB of this rank's that all its processes held at the phase's end.
        """
        times = {f"time/{name}": seconds for name, seconds in self._times.items()}
        times |= {f"memory/gpu_{name}": gib for name, gib in self._gpu.items()}
        self._times.clear()
        self._gpu.clear()
        now = time.perf_counter()
        elapsed, self._taken = now - self._taken, now
        return {**times, "time/step": elapsed}

    def step(self, step: int, metrics: Metrics, rollout: Rollout | None = None) -> None:
        """Record the metrics and samples of step number `step` (from 1; 0: the evaluation before)."""
        if not self._leads:
            return
        self._metrics.write(json.dumps({"step": step, **metrics}) + "\n")
        self._metrics.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(metrics, step=step)
        if rollout:
            self.samples(f"step_{step:06d}", [*rollout.groups, *rollout.replaced])
        line = "  ".join(text.format(metrics[name]) for name, text in SHOWN.items() if name in metrics)
        if self._progress and self._step_task is not None:
            self._progress.update(self._step_task, completed=step, note=line)
        elif step:
            self.console.print(f"step {step}/{self._steps}  {line}")

    def total(self, name: str) -> float:
        """The sum of a metric over all steps on record, those before a resumption too; on rank 0."""
        if not self._leads:
            return 0.0
        rows = (self.folder / "metrics.jsonl").read_text().splitlines()
        return sum(json.loads(row).get(name, 0.0) for row in rows)

    def samples(self, name: str, groups: list[SampleGroup]) -> None:
        """Every sample, one JSON line each, in samples/<name>.jsonl."""
        if not self._leads:
            return
        with (self.folder / "samples" / f"{name}.jsonl").open("w") as file:
            for group in groups:
                for sample in [*group.drawn, *([group.greedy] if group.greedy else [])]:
                    row = {
                        "prompt_id": group.prompt.id,
                        "sample": "greedy" if sample is group.greedy else sample.index,
                        "prompt": group.prompt.text,
                        "response": sample.text,
                        "answer": group.prompt.answer,
                        "extracted": sample.extracted,
                        "status": sample.status,
                        "finish_reason": sample.finish_reason,
                        "tokens": len(sample.response_ids),
                        "weight_versions": [int(sample.weight_versions[i]) for i in (0, -1)],
                    }
                    file.write(json.dumps(row) + "\n")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def show(self, renderable: Any) -> None:
        """Print the last thing of a run, below the progress bars."""
        if self._progress:
            self._progress.stop()
            self._progress = None
        self.console.print(renderable)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()
        if self._leads:
            self._watch.close()
            self._metrics.close()
            self._board.close()
            if self._wandb:
                self._wandb.finish()


def summary(config: Config, before: Metrics, after: Metrics, samples: float, seconds: float) -> Table:
    """The last thing a run prints: held-out results before and after, and what it took."""
    table = Table(title=f"{config.recipe.name} on {config.data.train}", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    k = config.eval.samples_per_prompt
    for name in (f"avg@{k}", f"pass@{k}"):
        if f"eval/{name}" in before.keys() & after.keys():
            table.add_row(
                f"{name} on {before['eval/prompts']:.0f} held-out prompts",
                *(f"{m[f'eval/{name}']:.3f}" for m in (before, after)),
            )
    if before and after:
        table.add_row("response tokens", *(f"{m['eval/response_length']:.1f}" for m in (before, after)))
        table.add_section()
    table.add_row("steps", "", str(config.run.steps))
    table.add_row("samples", "", f"{samples:,.0f}")
    table.add_row("wall time", "", f"{int(seconds // 60)} min {seconds % 60:.0f} s")
    table.add_row("run folder", "", config.run.dir)
    return table

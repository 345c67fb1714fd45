"""The folder of a run: whether it may begin or go on there, what it was begun from, and what a resume leaves behind.

lock            held by rank 0, or by the evaluation or study that runs there
inputs.json     which command began it, and fingerprints of what it reads
history/001/    what lay beyond the checkpoint that a run was resumed from: metrics, samples, checkpoints
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megarl.config import Config, load_config
from megarl.data.prompts import Splits, load_splits
from megarl.files import locked, write_whole
from megarl.inputs import inputs
from megarl.models.find_checkpoint import latest_checkpoint, step_folders, step_of
from megarl.types import UserError

# What may differ from the run that is resumed: where it lies, how long it is, what it saves and shows, and how the work
# is spread, on which gradients don't depend. Any other key, a new one too, makes another run.
CHANGEABLE = (
    "run.dir",
    "run.steps",  # under a constant learning rate
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.evaluate_every",
    "run.export",
    "run.wandb_project",
    "learner.world_size",
    "learner.tensor_model_parallel_size",
    "learner.pipeline_model_parallel_size",
    "learner.packing",
    "learner.micro_batch_tokens",
    "learner.recompute",
    "learner.offload",
    "rollout.engines",
    "rollout.placement",
    "rollout.tensor_parallel_size",
    "rollout.max_sequences",
    "rollout.gpu_memory_utilization",
    "rollout.enforce_eager",
    "rollout.kv_cache_gib",
    "rollout.bucket_mib",
    "rollout.verify_every",
    "rollout.damaged_weights",
    "rollout.stall_seconds",
    "rollout.max_logprob_difference",
    "reward.workers",
    "reward.recycle_after",
    "eval.problems_per_batch",
)
HELD = {"train": "a run", "sft": "a run of sft", "eval": "an evaluation", "study": "a study"}
_RECORDED = re.compile(r"(?:step|eval)_(\d+)\.jsonl")


def check_run_folder(config: Config, command: str, resume: bool) -> None:
    """Raises UserError where the folder holds something else, or a run that can't be gone on with as asked."""
    folder = Path(config.run.dir)
    check_is_folder(folder)
    held = held_by(folder)
    if held is None:
        return
    if not resume or held != command:
        instead = ", or go on with --resume" if held == command == "train" else ""
        raise UserError(f"run.dir={folder} already holds {HELD[held]}; name another folder{instead}")
    before = recorded_config(folder)
    if changed := differing(config, before, CHANGEABLE):
        key, now, old = changed[0]
        raise UserError(f"{key}={now!r}, but the run to resume has {old!r}; keep it, or start another run")
    schedule = config.optim.lr_schedule
    if config.run.steps != before.run.steps and schedule != "constant":
        raise UserError(
            f"run.steps={config.run.steps}, but the run to resume has {before.run.steps}, over which its "
            f"optim.lr_schedule={schedule} falls; keep it, or start another run"
        )
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint and config.run.steps < step_of(checkpoint):
        raise UserError(f"run.steps={config.run.steps}, but {checkpoint} is behind that; use at least its step")


def check_inputs(
    config: Config, problems: Splits | None = None, now: dict[str, str] | None = None
) -> dict[str, str] | None:
    """Raises UserError where what the run to resume reads has changed. Says so where that was not recorded.

    `problems`, and `now`, the fingerprints: where they are known; returns the latter where they are then.
    """
    folder = Path(config.run.dir)
    if held_by(folder) is None:
        return now
    record = _record(folder)
    if record is None:
        print(f"megarl: {folder} has no inputs.json: whether what it reads is the same is not checked", file=sys.stderr)
        return now
    now = now or _inputs(config, "train", problems)
    for name in [*now, *record.keys() - now.keys() - {"command"}]:
        if now.get(name) != record.get(name):
            what = "is new" if name not in record else "is gone" if name not in now else "has changed"
            was, found = (values.get(name, "nothing") for values in (record, now))
            raise UserError(
                f"{name} {what} since {folder} was begun ({found:.40}, not {was:.40}); restore it, or start another "
                "run in another run.dir"
            )
    return now


@contextmanager
def run_folder(config: Config, command: str, resume: bool, problems: Splits | None = None) -> Iterator[None]:
    """Holds the run's folder, and records what the run is begun from. On rank 0, after all checks.

    `problems`: those that the command uses, where they have been read.
    """
    folder = Path(config.run.dir)
    with locked(folder, "run.dir", f"megarl {command}"):
        check_run_folder(config, command, resume)  # again: another run may have ended since
        if held_by(folder) is None or _record(folder) is None:
            text = json.dumps({"command": command, **_inputs(config, command, problems)}, indent=2, ensure_ascii=False)
            write_whole(folder / "inputs.json", text + "\n")
        yield


def set_aside(folder: Path, start: int) -> Path | None:
    """Moves to history/ what a run that goes on behind step `start` would write again; the new folder there, if any."""
    metrics = folder / "metrics.jsonl"
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.is_file() else ""
    kept = "".join(f"{row}\n" for row in text.split("\n") if (step := _step(row)) is not None and 0 < start >= step)
    samples = (folder / "samples").glob("*.jsonl")
    beyond = [file for file in samples if (found := _RECORDED.fullmatch(file.name)) and not 0 < start >= int(found[1])]
    beyond += [path for path in step_folders(folder / "checkpoints") if step_of(path) > start]
    if kept == text and not beyond:
        return None
    history = folder / "history"
    aside = history / f"{max([0, *(int(path.name) for path in history.glob('[0-9]*'))]) + 1:03d}"
    aside.mkdir(parents=True)
    for name in ("metrics.jsonl", "config.yaml", "versions.json"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, aside / name)
    for path in beyond:
        target = aside / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        shutil.move(path, target)
    write_whole(metrics, kept)
    return aside


def held_by(folder: Path) -> str | None:
    """The command whose results the folder holds; None where there are none."""
    if _is_filled(folder / "problems.jsonl"):
        return "eval"
    if (folder / "results.json").exists() or any(folder.glob("*/seed_*/config.yaml")):
        return "study"
    results = [folder / "hf", *step_folders(folder / "checkpoints"), *(folder / "samples").glob("*.jsonl")]
    if _is_filled(folder / "metrics.jsonl") or any(path.exists() for path in results):
        return (_record(folder) or {}).get("command", "train")
    return None


def check_is_folder(folder: Path) -> None:
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"run.dir={folder}: {path} is a file; name a folder")


def recorded_config(folder: Path) -> Config:
    """The config that the folder's results were made with."""
    try:
        return load_config(folder / "config.yaml")
    except (OSError, UserError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"run.dir={folder}: {folder / 'config.yaml'} can't be read ({reason}); name another") from None


def differing(now: Config, before: Config, free: Iterable[str]) -> list[tuple[str, Any, Any]]:
    """(section.key, value now, value before) of the keys that differ, but for those that are `free` to."""
    changed, old = [], before.model_dump()
    for section, values in now.model_dump(exclude={"setting"}).items():  # its values are in the sections
        for key, value in values.items():
            if value != old[section][key] and f"{section}.{key}" not in free:
                changed.append((f"{section}.{key}", value, old[section][key]))
    return changed


def _inputs(config: Config, command: str, problems: Splits | None) -> dict[str, str]:
    problems = load_splits(config.data, command) if problems is None else problems
    return inputs(config, Path(config.model.path), {f"data.{split}": members for split, members in problems.items()})


def _record(folder: Path) -> dict[str, str] | None:
    try:
        return dict(json.loads((folder / "inputs.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / 'inputs.json'} is damaged ({error}); restore it, or name another run.dir") from None


def _step(row: str) -> int | None:
    """The step of a line of metrics.jsonl; None for one that a crash cut short."""
    try:
        return int(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _is_filled(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0

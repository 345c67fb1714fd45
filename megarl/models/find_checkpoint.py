"""Finds the Megatron checkpoint that a path means, without importing Megatron."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megarl.types import UserError


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def step_folders(folder: Path) -> list[Path]:
    """What is named as a checkpoint, complete or not, in the order of the steps."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if re.fullmatch(r"step_\d+", path.name)), key=step_of)


def complete_checkpoints(folder: Path) -> list[Path]:
    """In the order of their steps."""
    return [path for path in step_folders(folder) if _lacks(path) is None]


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `folder`/LATEST names, without it the newest complete one; None where there is none.

    Raises UserError where LATEST names none, or where all that there is is incomplete.
    """
    pointer, complete = folder / "LATEST", complete_checkpoints(folder)
    if pointer.is_file():
        path = folder / (pointer.read_text(errors="replace").strip() or "nothing")
        if path in complete:
            return path
        raise UserError(
            f"{pointer} names {path.name}, which is not a complete checkpoint ({_lacks(path)}); "
            + (f"{_choose(complete)}, or remove LATEST: the newest counts" if complete else _none_left(folder))
        )
    if complete:
        return complete[-1]
    if broken := step_folders(folder):
        raise UserError(f"{broken[-1]} is not a complete checkpoint ({_lacks(broken[-1])}); {_none_left(folder)}")
    return None


def instead_of(checkpoint: Path) -> str:
    """What to do where a checkpoint that seemed complete can't be read."""
    others = [path for path in complete_checkpoints(checkpoint.parent) if path != checkpoint]
    return _choose(others) if others else _none_left(checkpoint.parent)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that is meant: the folder itself, or the latest of a run folder or of its checkpoints folder."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; expected a Megatron checkpoint or a run folder")
    if (path / "metadata.json").is_file():
        return path
    found = latest_checkpoint(path) or latest_checkpoint(path / "checkpoints")
    if found is None:
        raise UserError(f"{path} holds neither a Megatron checkpoint (metadata.json) nor a run's checkpoints")
    return found


def _lacks(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint that no run resumes from."""
    if not checkpoint.is_dir():
        return "it does not exist"
    if not (checkpoint / "metadata.json").is_file():
        return "it has no metadata.json"
    try:
        state = json.loads((checkpoint / "state.json").read_text())
    except FileNotFoundError:
        return "it has no state.json"
    except (OSError, ValueError) as error:
        return f"its state.json can't be read: {str(error).splitlines()[0]}"
    return None if isinstance(state, dict) and state.get("step") == step_of(checkpoint) else "its state.json is damaged"


def _choose(complete: list[Path]) -> str:
    names = ", ".join(path.name for path in reversed(complete))
    return f"write the name of a complete one into {complete[0].parent / 'LATEST'} ({names})"


def _none_left(folder: Path) -> str:
    return f"no other is complete: restore it, or move {folder} away and --resume starts at the first step"

"""Checkpoints: Megatron distributed checkpoints, committed atomically, resumed exactly.

    checkpoints/step_000040/   model and optimizer shards, state.json, hf/ (model configuration and tokenizer);
                               critic/ (the critic's shards, where the recipe has one)
    checkpoints/LATEST         name of the newest complete one

A checkpoint is written under a temporary name, made durable, renamed, and only then named in LATEST: a crash at any
point leaves the previous one in force. Which one a run resumes from is said in models/find_checkpoint.py.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megarl.files import NotWritten, refusal
from megarl.learner.mesh import Mesh
from megarl.learner.trainable import Trainable
from megarl.models.find_checkpoint import complete_checkpoints, instead_of, latest_checkpoint, step_of
from megarl.models.hugging_face import copy_model_files
from megarl.types import UserError

# Megarl saves synchronously, so results stay in this process; Megatron's default queue is a process of its own, which
# would outlive a killed rank.
filesystem_async._results_queue = queue.Queue()
# Passed as a copy: Megatron adds the current layout's process group to it.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,  # gathered by one data-parallel rank, not by each
    "singleton_local_shards": False,
}


class CheckpointStore:
    """The checkpoints of one run folder. `save` and `load` are collective."""

    def __init__(self, folder: Path, mesh: Mesh, keep: int) -> None:
        self.folder, self.mesh, self.keep = folder, mesh, keep

    def latest(self) -> Path | None:
        """The checkpoint that LATEST names, else the newest complete one, as rank 0 sees it."""
        return self.mesh.broadcast(latest_checkpoint(self.folder) if self.mesh.rank == 0 else None)

    def _partial(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.partial"

    def save(self, step: int, models: dict[str, Trainable], hf_folder: str | Path, state: dict[str, Any]) -> Path:
        """Write the checkpoint of `step` and make it the latest. state must be JSON."""
        self.write(step, models, hf_folder, state)
        return self.commit(step)

    def write(self, step: int, models: dict[str, Trainable], hf_folder: str | Path, state: dict[str, Any]) -> None:
        """Everything but naming it: until `commit`, the previous checkpoint is in force."""
        partial = self._partial(step)
        if self.mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            for name in models:
                _folder_of(name, partial).mkdir(parents=True, exist_ok=True)
        self.mesh.barrier()
        for name, trainable in models.items():
            _save(_sharded_state(trainable), _folder_of(name, partial))
        self.mesh.barrier()
        if self.mesh.rank == 0:
            copy_model_files(hf_folder, partial / "hf")
            (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=2))
            _make_durable(partial)

    def commit(self, step: int) -> Path:
        """Make the written checkpoint of `step` the latest; of the complete ones before it, `keep` - 1 stay."""
        target = self.folder / f"step_{step:06d}"
        if self.mesh.rank == 0:
            self._partial(step).rename(target)
            pointer = self.folder / "LATEST.partial"
            pointer.write_text(target.name + "\n")
            _make_durable(pointer)
            pointer.replace(self.folder / "LATEST")
            _sync(self.folder)
            complete = [path for path in complete_checkpoints(self.folder) if step_of(path) <= step]
            for other in complete[: -self.keep]:
                (other / "state.json").unlink()  # first: what is left of it is no checkpoint
                shutil.rmtree(other)
        self.mesh.barrier()
        return target

    def load(self, path: Path, models: dict[str, Trainable]) -> dict[str, Any]:
        """Restore models and optimizers in place, on this layout whatever layout wrote them; the saved state."""
        for name, trainable in models.items():
            try:
                with _quiet():
                    state = _sharded_state(trainable, is_loading=True)
                    loaded = dist_checkpointing.load(state, str(_folder_of(name, path)))
            except (CheckpointException, CheckpointingException) as error:
                raise UserError(f"{path} can't be loaded: {_first_cause(error)}; {instead_of(path)}") from None
            trainable.module.load_state_dict(loaded["model"])
            trainable.optimizer.load_state_dict(loaded["optimizer"])
        return json.loads((path / "state.json").read_text())


def save_model(model: Any, mesh: Mesh, folder: Path, hf_folder: str | Path) -> None:
    """Only the model and hf/, no optimizer: what `load_model` reads but no run resumes from. Collective."""
    if mesh.rank == 0:
        copy_model_files(hf_folder, folder / "hf")
    mesh.barrier()
    _save({"model": model.sharded_state_dict(metadata=dict(METADATA))}, folder)


def _save(state: dict[str, Any], folder: Path) -> None:
    """Raises NotWritten, in one line, where a rank could not write."""
    try:
        with _quiet():
            dist_checkpointing.save(state, str(folder), content_metadata=dict(METADATA))
    except CheckpointException as error:  # no Exception, which other code would see
        raise NotWritten(refusal(error, folder) or f"{folder} can't be written: {_first_cause(error)}") from None


def load_model(model: Any, mesh: Mesh, folder: Path) -> None:
    """Fill the model from a checkpoint of any layout, with or without an optimizer's state. Collective.

    Raises UserError, on all ranks, where the checkpoint lacks tensors, has unknown ones or does not fit or read.
    """
    state = {"model": model.sharded_state_dict(metadata=dict(METADATA))}
    try:
        with _quiet():
            loaded, unread, lacking = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RETURN_ALL)
    except (CheckpointException, CheckpointingException) as error:
        raise UserError(f"{folder} can't be loaded: {_first_cause(error)}") from None
    lacking = set().union(*mesh.gather(lacking))  # each rank asks for other names
    for what, names in (("lacks", lacking), ("has unknown tensors", unread)):
        if weights := sorted(filter(_is_weight, names)):
            raise UserError(f"{folder} {what}: {', '.join(weights)}")
    # Not strict: extra states may be absent, and all else was checked by name.
    model.load_state_dict(loaded["model"], strict=False)


def stored_dtypes(folder: Path) -> set[torch.dtype]:
    """The types of the model's tensors in a checkpoint."""
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    return {tensor.dtype for name, tensor in stored.items() if _is_weight(name)}


def _is_weight(name: str) -> bool:
    """Whether a tensor is the model's: not the optimizer's, and not what Transformer Engine keeps beside a weight."""
    return not name.startswith("optimizer.") and not name.endswith("_extra_state")


def _first_cause(error: BaseException) -> str:
    """One line of what the first rank met; torch's own message holds every rank's traceback."""
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    return (str(causes[0]).splitlines() or [type(causes[0]).__name__])[0]


def _folder_of(name: str, checkpoint: Path) -> Path:
    """Where a model's shards lie: the policy's in the checkpoint itself, another's in a folder of its name."""
    return checkpoint if name == "policy" else checkpoint / name


def _sharded_state(trainable: Trainable, is_loading: bool = False) -> dict[str, Any]:
    model_state = trainable.module.sharded_state_dict(metadata=dict(METADATA))
    return {
        "model": model_state,
        "optimizer": trainable.optimizer.sharded_state_dict(
            model_state, is_loading=is_loading, metadata=dict(METADATA)
        ),
    }


def _make_durable(path: Path) -> None:
    """Flush a file, or a folder with all it holds, to disk."""
    for entry in [path, *path.rglob("*")]:
        _sync(entry)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _quiet() -> Any:
    """Megatron and torch log every sharding decision, and warn of the calls that Megatron makes to torch."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # of all loggers, whatever their own levels; what fails is raised
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.disable(before)

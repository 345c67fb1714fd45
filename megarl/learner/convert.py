"""Converts a model between a Hugging Face folder and a Megatron distributed checkpoint, in one process."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megarl.config import LearnerConfig, Precision
from megarl.files import NotWritten
from megarl.learner.checkpoint import load_model, save_model, stored_dtypes
from megarl.learner.mesh import Mesh
from megarl.learner.model import build_model, transformer_config
from megarl.learner.weights import WeightStream, load_hf_weights
from megarl.models.family import architecture, read_hf_config
from megarl.models.find_checkpoint import find_checkpoint
from megarl.models.hugging_face import HuggingFaceFiles, save_hf_model
from megarl.models.weights import hf_names
from megarl.types import UserError

PRECISIONS: dict[torch.dtype, Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def to_megatron(source: Path, out: Path, precision: Precision | None, mesh: Mesh) -> str:
    """Write a Megatron checkpoint; says what was written."""
    hf_config = read_hf_config(source)
    arch = architecture(hf_config)
    files = HuggingFaceFiles(source)
    files.check_names(arch, source)
    precision = precision or _precision_of(source, {tensor.dtype for _, tensor in files.tensors(arch)})
    model = build_model(hf_config, transformer_config(hf_config, LearnerConfig(), precision), mesh)
    load_hf_weights(model, arch, mesh, source)
    with _written_whole(out) as partial:
        save_model(model, mesh, partial, source)
    not_read = f"; not read: {', '.join(files.unread)}" if files.unread else ""
    return _summary(out, len(hf_names(arch)), model, precision) + not_read


def to_hf(source: Path, out: Path, precision: Precision | None, mesh: Mesh) -> str:
    """Write a Hugging Face folder; says what was written."""
    checkpoint = find_checkpoint(source)
    hf_folder = checkpoint / "hf"
    hf_config = read_hf_config(hf_folder)
    arch = architecture(hf_config)
    precision = precision or _precision_of(checkpoint, stored_dtypes(checkpoint))
    model = build_model(hf_config, transformer_config(hf_config, LearnerConfig(), precision), mesh)
    load_model(model, mesh, checkpoint)
    with _written_whole(out) as partial:
        save_hf_model(partial, hf_folder, WeightStream(model, arch, mesh).tensors())
    return _summary(out, len(hf_names(arch)), model, precision)


COMMANDS = {"to-megatron": to_megatron, "to-hf": to_hf}


def convert(command: str, source: Path, out: Path, precision: Precision | None, mesh: Mesh) -> str:
    """Run a command, once it is known that `out` can be written. Raises UserError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; name another")
    try:
        return COMMANDS[command](source, out, precision, mesh)
    except UserError as error:
        raise UserError(str(error).replace("model.path=", "")) from None  # the name of a setting that isn't here


def _precision_of(source: Path, dtypes: set[torch.dtype]) -> Precision:
    """What the tensors are stored in, where that is one type and Megatron trains in it."""
    if len(dtypes) == 1 and (dtype := next(iter(dtypes))) in PRECISIONS:
        return PRECISIONS[dtype]
    stored = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "no tensors of a model"
    raise UserError(f"{source} holds {stored}; choose what to write with --dtype fp32 or bf16")


@contextmanager
def _written_whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` at the end; nothing stays of a conversion that fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".convert_") as temporary:
        partial = Path(temporary) / "partial"
        partial.mkdir()
        yield partial
        partial.rename(out)


def _summary(out: Path, tensors: int, model: Any, precision: Precision) -> str:
    parameters = sum(param.numel() for param in model.parameters())
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return f"{out}: {tensors} Hugging Face tensors, {parameters:,} parameters in {precision}, {size:,} bytes on disk"


def main() -> None:
    """python -m megarl.learner.convert CHECKPOINT OUT: to_hf, as stored, for a process that mustn't import Megatron."""
    source, out = (Path(argument) for argument in sys.argv[1:])
    mesh = Mesh(LearnerConfig(world_size=1))
    try:
        print(convert("to-hf", source, out, None, mesh))
    except (UserError, NotWritten, OSError) as error:
        sys.exit(str(error))
    mesh.close()


if __name__ == "__main__":
    main()

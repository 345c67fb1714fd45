"""Convert a model between a Hugging Face folder and a Megatron distributed checkpoint, in one process."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megarl.config import LearnerConfig, Precision
from megarl.learner.checkpoint import latest_checkpoint, load_model, save_model, stored_dtypes
from megarl.learner.mesh import Mesh
from megarl.learner.model import build_model, transformer_config
from megarl.learner.weights import WeightStream, load_hf_weights
from megarl.models.family import architecture, read_hf_config
from megarl.models.files import HuggingFaceFiles, save_hf_model
from megarl.models.weights import hf_names
from megarl.types import UserError

EXAMPLES = """\
examples:
  python tools/convert_checkpoint.py to-megatron models/qwen2.5-0.5b checkpoints/qwen2.5-0.5b
  python tools/convert_checkpoint.py to-hf runs/x exported                  # the run's latest checkpoint
  python tools/convert_checkpoint.py to-hf runs/x/checkpoints/step_000040 exported --dtype bf16

A Megatron checkpoint loads at any tensor- and pipeline-parallel size. Its folder hf/ holds the configuration and the
tokenizer, as in a run's checkpoints, so it converts back by itself.
"""
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
    return _summary(out, len(hf_names(arch)), model, precision)


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


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that is meant: the folder itself, or the latest of a run folder or of its checkpoints folder."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; expected a Megatron checkpoint or a run folder")
    if (path / "metadata.json").is_file():
        return path
    found = latest_checkpoint(path) or latest_checkpoint(path / "checkpoints")
    if found is None:
        raise UserError(f"{path} holds neither a Megatron checkpoint (metadata.json) nor a run's checkpoints (LATEST)")
    return found


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
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, source, text in (
        ("to-megatron", "HF_FOLDER", "write HF_FOLDER, a Hugging Face model, as a Megatron distributed checkpoint"),
        ("to-hf", "CHECKPOINT", "write CHECKPOINT, or the latest one of a run folder, as a Hugging Face model"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("source", type=Path, metavar=source)
        command.add_argument("out", type=Path, metavar="OUT", help="folder to write; complete or absent")
        command.add_argument("--dtype", choices=PRECISIONS.values(), help="precision to write (default: as stored)")
    options = parser.parse_args()
    try:
        mesh = Mesh(LearnerConfig(world_size=1))
        print(convert(options.command, options.source, options.out, options.dtype, mesh))
        mesh.close()
    except (UserError, OSError) as error:
        for line in str(error).splitlines():
            print(f"convert_checkpoint: error: {line}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":  # Megatron may start processes that import this file
    main()

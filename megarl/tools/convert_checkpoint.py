"""Convert a model between a Hugging Face folder and a Megatron distributed checkpoint, in one process."""

from __future__ import annotations

import argparse
import sys

from megarl.config import LearnerConfig
from megarl.files import NotWritten, path
from megarl.learner.convert import PRECISIONS, convert
from megarl.learner.mesh import Mesh
from megarl.types import UserError

EXAMPLES = """\
examples:
  megarl convert to-megatron models/qwen2.5-0.5b checkpoints/qwen2.5-0.5b
  megarl convert to-hf runs/x exported                  # the run's latest checkpoint
  megarl convert to-hf runs/x/checkpoints/step_000040 exported --dtype bf16

A Megatron checkpoint loads at any tensor- and pipeline-parallel size. Its folder hf/ holds the configuration and the
tokenizer, as in a run's checkpoints, so it converts back by itself.
"""


def main(arguments: list[str] | None = None, name: str = "convert_checkpoint") -> None:
    """`name` stands before a mistake."""
    parser = argparse.ArgumentParser(
        prog=name,
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for direction, source, text in (
        ("to-megatron", "HF_FOLDER", "write HF_FOLDER, a Hugging Face model, as a Megatron distributed checkpoint"),
        ("to-hf", "CHECKPOINT", "write CHECKPOINT, or the latest one of a run folder, as a Hugging Face model"),
    ):
        command = commands.add_parser(
            direction,
            help=text,
            description=text,
            epilog=EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("source", type=path, metavar=source)
        command.add_argument("out", type=path, metavar="OUT", help="folder to write; complete or absent")
        command.add_argument("--dtype", choices=PRECISIONS.values(), help="precision to write (default: as stored)")
    options = parser.parse_args(arguments)
    try:
        mesh = Mesh(LearnerConfig(world_size=1))
        print(convert(options.command, options.source, options.out, options.dtype, mesh))
        mesh.close()
    except (UserError, NotWritten, OSError) as error:
        for line in str(error).splitlines():
            print(f"{name}: error: {line}", file=sys.stderr)
        sys.exit(2)

"""The command line: megarl train | sft | eval CONFIG [section.key=value ...]."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable

from megarl.config import Config, load_config
from megarl.launcher import USER_ERROR, launch
from megarl.preflight import check_run, check_run_folder
from megarl.types import UserError


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        resume = getattr(options, "resume", False)
        if options.command in ON_RANKS and not _under_launcher():
            check_run(config, options.command, resume)
            launch(config, sys.argv[1:] if arguments is None else arguments)
        else:
            if int(os.environ.get("RANK", 0)) == 0:
                check_run_folder(config, resume)
            COMMANDS[options.command](config, resume)
    except UserError as error:
        _fail(str(error), USER_ERROR)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        if not type(error).__module__.startswith("megarl."):
            traceback.print_exc()
        _fail(f"{type(error).__name__}: {error}", 1)


def _train(config: Config, resume: bool) -> None:
    from megarl.train import train

    train(config, resume)


def _sft(config: Config, resume: bool) -> None:
    from megarl.sft import sft

    sft(config)


def _eval(config: Config, resume: bool) -> None:
    from megarl.evaluate import evaluate

    evaluate(config)


COMMANDS: dict[str, Callable[[Config, bool], None]] = {"train": _train, "sft": _sft, "eval": _eval}
ON_RANKS = ("train", "sft")  # commands that run on several ranks; eval is one process and its engines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megarl", description="Reinforcement learning for LLM reasoning on Megatron-Core."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        (
            "train",
            "train a policy with verifiable rewards; starts its ranks itself, or joins those of torchrun or srun",
        ),
        ("sft", "fine-tune on demonstrations (prompt and response columns of data.train)"),
        ("eval", "avg@k and pass@k of a model on data.eval"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", help="YAML file, e.g. configs/quickstart.yaml")
        command.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. recipe=grpo optim.lr=2e-4")
        if name == "train":
            command.add_argument("--resume", action="store_true", help="go on from the run's latest checkpoint, if any")
    return parser


def _under_launcher() -> bool:
    """torchrun, or srun with torchrun's variables, has started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _fail(message: str, status: int) -> None:
    """One line a mistake, from rank 0 only, and an exit status."""
    if int(os.environ.get("RANK", 0)) == 0 or status == 1:
        for line in message.splitlines():
            print(f"megarl: error: {line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # other ranks may be gone: no collective teardown


if __name__ == "__main__":
    main()

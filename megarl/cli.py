"""The command line: megarl train | sft | eval | study CONFIG [section.key=value ...], and megarl recipes."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from megarl.config import Config, load_config
from megarl.files import refusal
from megarl.launcher import USER_ERROR, join_launcher, launch, launched_by_megarl, leave_last_words
from megarl.preflight import check_run
from megarl.resume import run_folder
from megarl.types import UserError


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = argparse.Namespace()
    try:
        options = _parse(arguments)
        if options.command not in ON_RANKS:
            leave_launcher()
        if options.command in RUNS:
            _run(options, arguments)
        else:
            COMMANDS[options.command](options)
    except UserError as error:
        _fail(str(error), USER_ERROR)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        expected = type(error).__module__.startswith("megarl.")
        if not expected and (why := refusal(error, getattr(options, "folder", None))):
            _fail(why, 1)
        _fail(f"{type(error).__name__}: {error}", 1, "" if expected else traceback.format_exc())


def _run(options: argparse.Namespace, arguments: list[str]) -> None:
    """A command with the config of one run, on the ranks it needs."""
    config = load_config(options.config, options.overrides)
    options.folder = Path(config.run.dir)  # what is written to
    resume = getattr(options, "resume", False)
    raise_file_limit()
    is_rank = options.command in ON_RANKS and join_launcher()
    with ExitStack() as held:
        if options.command in ON_RANKS and (not is_rank or os.environ["RANK"] == "0"):
            if not launched_by_megarl():
                check_run(config, options.command, resume)
            if not is_rank:
                launch(config, arguments)
                return
            held.enter_context(run_folder(config, options.command, resume))
        RUNS[options.command](config, resume)


def _train(config: Config, resume: bool) -> None:
    from megarl.train import train

    train(config, resume)


def _sft(config: Config, resume: bool) -> None:
    from megarl.sft import sft

    sft(config)


def _eval(config: Config, resume: bool) -> None:
    from megarl.evaluate import evaluate

    evaluate(config)


def _study(options: argparse.Namespace) -> None:
    from megarl.study.study import study

    study(options.config, options.scale, options.overrides, report_only=options.report)


def _recipes(options: argparse.Namespace) -> None:
    from rich.console import Console

    from megarl.algorithms.listing import compare, list_all, show

    console = Console(highlight=False)
    match options.words:
        case []:
            console.print(list_all())
        case ["diff", left, right]:
            console.print(compare(left, right))
        case [name] if name != "diff":
            console.print(show(name))
        case _:
            raise UserError("expected megarl recipes, megarl recipes NAME, or megarl recipes diff NAME NAME")


RUNS: dict[str, Callable[[Config, bool], None]] = {"train": _train, "sft": _sft, "eval": _eval}
ON_RANKS = (
    "train",
    "sft",
)  # commands that run on several ranks; eval is one process, its engines and its own checks
COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {"study": _study, "recipes": _recipes}


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
        ("eval", "avg@k and pass@k of model.path (Hugging Face folder or checkpoint) on data.eval; again: goes on"),
        ("study", "train every recipe of a study with every seed, then write its report; resumes where it was"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", help="YAML file, e.g. configs/quickstart.yaml")
        command.add_argument(
            "overrides", nargs="*", default=[], metavar="section.key=value", help="e.g. recipe=grpo optim.lr=2e-4"
        )
        if name == "train":
            command.add_argument("--resume", action="store_true", help="go on from the run's latest checkpoint, if any")
        if name == "study":
            command.add_argument("--scale", metavar="NAME", help="a size under study.scales, e.g. smoke")
            command.add_argument("--report", action="store_true", help="run nothing, write the report of what has run")
    recipes = commands.add_parser("recipes", help="list the recipes; NAME: all of one; diff NAME NAME: what differs")
    recipes.add_argument("words", nargs="*", metavar="NAME", help="e.g. grpo, or diff grpo grpo:minimal_rl")
    return parser


def _parse(arguments: list[str]) -> argparse.Namespace:
    """argparse takes no overrides behind an option such as --resume; they are recognised by their equals sign."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = [argument for argument in rest if "=" in argument and not argument.startswith("-")]
    if len(overrides) < len(rest) or (overrides and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if overrides:
        options.overrides = [*options.overrides, *overrides]
    return options


def _fail(message: str, status: int, details: str = "") -> None:
    """End with one line a mistake, after `details`."""
    say_last_words(message, details)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # other ranks may be gone: no collective teardown


if __name__ == "__main__":
    main()

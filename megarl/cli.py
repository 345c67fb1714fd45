"""The command line: megarl train | sft | eval | study CONFIG [section.key=value ...], and what goes with them."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from megarl.config import Config, load_config
from megarl.config.shipped import CONFIGS, copy_config
from megarl.data.prompts import Splits
from megarl.faults import raise_file_limit
from megarl.files import refusal
from megarl.launcher import USER_ERROR, found_by_launch, launch
from megarl.preflight import check_run
from megarl.rank import join_launcher, launched_by_megarl, leave_launcher, say_last_words
from megarl.resume import run_folder
from megarl.types import UserError


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = argparse.Namespace()
    try:
        if arguments[:1] and arguments[0] in TOOLS:
            leave_launcher()
            return importlib.import_module(TOOLS[arguments[0]]).main(arguments[1:], f"megarl {arguments[0]}")
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
    is_rank = options.command in ON_RANKS and join_launcher()
    config = load_config(options.config, options.overrides)
    options.folder = Path(config.run.dir)  # what is written to
    resume = getattr(options, "resume", False)
    raise_file_limit()
    problems: Splits = {}  # of ranks that don't need them
    with ExitStack() as held:
        if options.command in ON_RANKS and (not is_rank or os.environ["RANK"] == "0"):
            problems = found_by_launch() if launched_by_megarl() else check_run(config, options.command, resume)
            if not is_rank:
                launch(config, arguments, problems)
                return
            held.enter_context(run_folder(config, options.command, resume, problems))
        RUNS[options.command](config, resume, problems)


def _train(config: Config, resume: bool, problems: Splits) -> None:
    from megarl.train import train

    train(config, problems, resume)


def _sft(config: Config, resume: bool, problems: Splits) -> None:
    from megarl.sft import sft

    sft(config, problems)


def _eval(config: Config, resume: bool, problems: Splits) -> None:
    from megarl.evaluate import evaluate

    evaluate(config)


def _study(options: argparse.Namespace) -> None:
    from megarl.study.study import study

    study(options.config, options.scale, options.overrides, report_only=options.report)


def _init(options: argparse.Namespace) -> None:
    print(f"{copy_config(options.name)} is here to edit; its first lines say how to run it")


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


RUNS: dict[str, Callable[[Config, bool, Splits], None]] = {"train": _train, "sft": _sft, "eval": _eval}
ON_RANKS = (
    "train",
    "sft",
)  # commands that run on several ranks; eval is one process, its engines and its own checks
COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {"study": _study, "recipes": _recipes, "init": _init}
TOOLS = {  # read their own arguments
    "prepare-data": "megarl.tools.prepare_data",
    "convert": "megarl.tools.convert_checkpoint",
    "fetch-smollm2": "megarl.tools.fetch_smollm2",
}


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
        command.add_argument("config", help=f"YAML file, or one of megarl's own: {', '.join(CONFIGS)}")
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
    init = commands.add_parser("init", help="copy one of megarl's configs here, to edit it")
    init.add_argument("name", help=", ".join(CONFIGS))
    for name, text in (
        ("prepare-data", "read, deduplicate, decontaminate and split training data"),
        ("convert", "convert a model between a Hugging Face folder and a Megatron checkpoint"),
        ("fetch-smollm2", "get SmolLM2-135M-Instruct, a small real model, as a Hugging Face folder"),
    ):
        commands.add_parser(name, help=text, add_help=False)
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
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a full disk is what the message is about
            stream.flush()
    os._exit(status)  # other ranks may be gone: no collective teardown


if __name__ == "__main__":
    main()

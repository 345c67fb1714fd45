"""Prepare training data: read, deduplicate, decontaminate, drop over-long prompts, split, and account for every row."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from contextlib import suppress
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from megarl.config import DataConfig, load_config
from megarl.config.published import SETTINGS
from megarl.config.sections import place
from megarl.data.benchmarks import BOXED, EVALUATION_SETS, LIST, TRAINING_SETS, Layout, ProblemSet
from megarl.data.overlap import NGRAM
from megarl.data.prepare import REASONS, Preparation, prepare
from megarl.data.sources import is_file_name
from megarl.files import path
from megarl.types import UserError

EXAMPLES = """\
examples:
  megarl prepare-data numina --out data/numina.jsonl --config configs/x.yaml \\
      --decontaminate math500 minerva olympiadbench                        # the paper's set, from the hub
  megarl prepare-data gsm8k_train.jsonl --preset gsm8k --out data/gsm8k.jsonl \\
      --decontaminate gsm8k=gsm8k_test.jsonl math500=math500.jsonl --eval-fraction 0.02
  megarl prepare-data problems.parquet --out data/mine.jsonl --problem-column text --answer-column solution \\
      --answer-rule boxed --tokenizer models/llama-3.2-3b-instruct --setting paper

FILE.jsonl trains as it is: megarl train CONFIG data.train=FILE.jsonl. Beside it lie FILE.manifest.json,
FILE.dropped.jsonl (every dropped row and why) and, with --eval-fraction, FILE.eval.jsonl.
"""


def main(arguments: list[str] | None = None, name: str = "prepare_data") -> None:
    """`name` stands before a mistake."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up, as when interrupted
    options = _parser(name).parse_args(arguments)
    try:
        job = _job(options)
        with _Watch() as watch:
            manifest = prepare(job, watch.advance)
        _show(job, manifest, options.config)
    except (UserError, OSError) as error:
        for line in str(error).splitlines():
            print(f"{name}: error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted; nothing was written")


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser(name: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=name, description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    presets = ", ".join(TRAINING_SETS)
    parser.add_argument(
        "source", type=place, metavar="SOURCE", help=f"file, folder or pattern of files, hub set, or {presets}"
    )
    parser.add_argument("--out", type=path, required=True, metavar="FILE.jsonl")
    read = parser.add_argument_group("reading")
    read.add_argument("--preset", choices=[*TRAINING_SETS, "generic"], help="columns of a known set (default: generic)")
    read.add_argument("--subset", help="configuration name of a hub data set")
    read.add_argument("--split", help="split of a hub data set (default: train)")
    read.add_argument("--problem-column", help="default: question")
    read.add_argument("--answer-column", help="default: answer")
    read.add_argument("--answer-rule", help="boxed (the last \\boxed), list, or a regular expression with a group")
    read.add_argument("--limit", type=_positive, metavar="N", help="read the first N rows")
    drop = parser.add_argument_group("dropping")
    drop.add_argument("--config", help="take tokenizer, prompt template and max_prompt_tokens from a megarl config")
    drop.add_argument("--setting", choices=SETTINGS, help="the prompt template and limit of a published setting")
    drop.add_argument(
        "--tokenizer", type=place, metavar="MODEL", help="folder or hub name of the model whose tokens count"
    )
    drop.add_argument("--max-prompt-tokens", type=_positive, metavar="N", help="drop longer prompts (default: 1024)")
    drop.add_argument(
        "--decontaminate",
        nargs="+",
        default=[],
        metavar="SET",
        help=f"evaluation sets, as in data.eval: {', '.join(EVALUATION_SETS)}, NAME=FILE, or a file",
    )
    drop.add_argument("--ngram", type=_positive, default=NGRAM, help=f"shared words that tell (default: {NGRAM})")
    split = parser.add_argument_group("splitting")
    split.add_argument("--eval-fraction", type=_fraction, default=0.0, metavar="F", help="share to hold out")
    split.add_argument("--seed", type=int, default=0, help="of the split")
    return parser


def _job(options: argparse.Namespace) -> Preparation:
    if options.out.suffix != ".jsonl":
        raise UserError(f"--out {options.out}: should end in .jsonl")
    named = options.source in TRAINING_SETS
    for option in ("subset", "split"):
        if getattr(options, option) and is_file_name(options.source):
            raise UserError(
                f"--{option} {getattr(options, option)}: {options.source} is a file; that is for hub data sets"
            )
    preset = options.preset or (options.source if named else "generic")
    columns = (options.problem_column, options.answer_column, options.answer_rule)
    if preset == "generic":
        rule = BOXED if options.answer_rule == "boxed" else options.answer_rule
        layout = Layout((options.problem_column or "question",), options.answer_column or "answer", rule)
        if rule not in (None, BOXED, LIST):
            _check_pattern(rule)
        problem_set = ProblemSet(options.source, options.subset, options.split or "train", (layout,))
    elif any(columns):
        raise UserError(f"--preset {preset} knows the columns; use --preset generic to name your own")
    else:
        known = TRAINING_SETS[preset]
        subset = options.subset or (known.subset if named else None)
        problem_set = ProblemSet(known.hub, subset, options.split or known.split, known.layouts)
    prompts, tokenizer = _prompts(options)
    return Preparation(
        source=problem_set.hub if named else options.source,
        out=options.out,
        problem_set=problem_set,
        limit=options.limit,
        decontaminate=tuple(options.decontaminate),
        ngram=options.ngram,
        eval_fraction=options.eval_fraction,
        seed=options.seed,
        prompts=prompts,
        tokenizer=tokenizer,
    )


def _check_pattern(pattern: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise UserError(f"--answer-rule {pattern}: not a regular expression ({error})") from None
    if not groups:
        raise UserError(f"--answer-rule {pattern}: needs one group, e.g. '#### (.*)'")


def _prompts(options: argparse.Namespace) -> tuple[DataConfig | None, str | None]:
    """How a problem becomes a prompt, and in whose tokens it is measured."""
    if options.config and options.setting:
        raise UserError("--setting is part of a config; give --config or --setting")
    tokenizer = options.tokenizer
    if options.config:
        config = load_config(options.config)
        prompts, tokenizer = config.data, tokenizer or config.model.path
    else:
        published = SETTINGS[options.setting]["data"] if options.setting else {}
        prompts = DataConfig(train=options.source, **published)
    if not tokenizer:
        if options.setting or options.max_prompt_tokens:
            raise UserError("--tokenizer is required to measure prompts (--setting, --max-prompt-tokens)")
        return None, None
    if options.max_prompt_tokens:
        prompts = prompts.model_copy(update={"max_prompt_tokens": options.max_prompt_tokens})
    return prompts, tokenizer


class _Watch:
    """Progress with the time left: a bar on a terminal, else a line every 20 seconds."""

    EVERY = 20.0

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._started = self._said = time.monotonic()
        columns = (BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._bar = Progress(TextColumn("{task.description}"), *columns, console=self._console, transient=True)
        self._task = self._bar.add_task("reading", total=None)

    def advance(self, rows: int, done: int, total: int | None) -> None:
        if self._console.is_terminal:
            if rows % 100 == 0:
                self._bar.update(self._task, description=f"{rows:,} rows", completed=done, total=total)
        elif (now := time.monotonic()) - self._said > self.EVERY:
            self._said, elapsed = now, now - self._started
            left = f", about {elapsed / done * (total - done):.0f} s left" if total and done else ""
            self._console.print(f"{rows:,} rows, {elapsed:.0f} s{left}")

    def __enter__(self) -> _Watch:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()


def _show(job: Preparation, manifest: dict, config: str | None) -> None:
    counts = manifest["counts"]
    table = Table(title=f"{job.source} -> {job.out}", title_justify="left", show_header=False)
    table.add_row("read", f"{counts['read']:,}")
    for reason in REASONS:
        table.add_row(reason.replace("_", " "), f"{counts[reason]:,}")
    table.add_section()
    for kind in ("train", "eval"):
        table.add_row(kind, f"{counts[kind]:,}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    if manifest["duplicates_with_another_answer"]:
        console.print(f"{manifest['duplicates_with_another_answer']} duplicates have another answer than the first one")
    console.print(f"train with data.train={job.out}{_overrides(config)}", markup=False)


def _overrides(config: str | None) -> str:
    """What else a config needs so that it reads the columns written here."""
    if not config:
        return ""
    data = load_config(config).data
    plain = {key: DataConfig.model_fields[key].default for key in ("prompt_key", "answer_key", "answer_pattern")}
    changed = {key: value for key, value in plain.items() if getattr(data, key) != value}
    return "".join(f" data.{key}={'null' if value is None else value}" for key, value in changed.items())


def _positive(text: str) -> int:
    with suppress(ValueError):
        if (value := int(text)) >= 1:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} should be a whole number of at least 1")


def _fraction(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (value := float(text)) < 1:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} should be a number from 0 to below 1")

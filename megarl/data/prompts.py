"""Problems become prompts: loading, templates, tokenisation, and the seeded order in which a run sees them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from megarl.config import DataConfig, EvalSet
from megarl.data import arithmetic
from megarl.data.benchmarks import EVALUATION_SETS, Layout, ProblemSet
from megarl.data.columns import Turn
from megarl.data.sources import Rows
from megarl.data.templates import chat_of, fill, render
from megarl.types import Prompt, UserError

Split = Literal["train", "eval"]
ARITHMETIC_SEED = 0  # the problems are the same in every run; run.seed orders them
ARITHMETIC_SIZES = {"train": 20_000, "eval": 128}


@dataclass(frozen=True)
class Problem:
    """A row of a data set: the problem's text and its reference answer (or, for sft, the response)."""

    id: str
    text: str
    answer: str
    source: str  # data.train, or the name of an evaluation set
    turns: tuple[Turn, ...] = ()  # where the row is a conversation, of which `text` is all that is said


def load_problems(data: DataConfig, split: Split) -> list[Problem]:
    """All problems of a split, in the order of their source; of the evaluation sets, one after the other.

    Raises UserError naming the file and row for what can't be read.
    """
    if split == "eval":
        return [problem for chosen in data.eval_sets for problem in _evaluation_problems(data, chosen)]
    rows = Rows("data.train", data.train, data.subset, data.train_split)
    return _problems(data, "train", data.train, rows, data.train_limit)


def _evaluation_problems(data: DataConfig, chosen: EvalSet) -> list[Problem]:
    known = EVALUATION_SETS.get(chosen.name) if chosen.is_named else None
    subset, split = (known.subset, known.split) if known else (data.subset, data.eval_split)
    source = known.hub if known and chosen.source == chosen.name else chosen.source
    setting = f"data.eval.{chosen.name}" if chosen.is_named else "data.eval"
    rows = Rows(setting, source, subset, split)
    found = _problems(data, "eval", chosen.name, rows, data.eval_limit, known)
    if not chosen.is_named:
        return found
    return [replace(problem, id=f"{chosen.name}:{i}") for i, problem in enumerate(found, 1)]


def _problems(
    data: DataConfig, split: Split, source: str, rows: Rows, limit: int | None, known: ProblemSet | None = None
) -> list[Problem]:
    """The first `limit` problems of a source, read as the known set that they are, else as the data section says."""
    if rows.name == "arithmetic":
        found = arithmetic.problems(
            ARITHMETIC_SEED, limit or ARITHMETIC_SIZES[split], "train" if split == "train" else "test"
        )
        return [Problem(f"arithmetic/{i}", p.question, p.answer, source) for i, p in enumerate(found)]
    layout = Layout(
        (data.prompt_key,),
        data.answer_key,
        data.answer_pattern,
        " (data.prompt_key)",
        " (data.answer_key)",
        "data.answer_pattern",
    )
    problems = []
    for where, row in rows:
        columns = known.layout_of(row) if known else layout
        text, answer = columns.read(where, row)
        turns = columns.turns(where, row)
        _check_turns(data, where, turns)
        problems.append(Problem(rows.id_of(where), text, answer, source, turns))
        if limit and len(problems) == limit:
            break
    if not problems:
        raise UserError(f"{rows.setting}={rows.name} has no rows")
    return problems


def _check_turns(data: DataConfig, where: str, turns: Sequence[Turn]) -> None:
    roles = [turn["role"] for turn in turns]
    if data.system_prompt and "system" in roles:
        raise UserError(f"{where} has a system message of its own beside data.system_prompt; set that to null")
    if not data.chat_template and roles not in ([], ["user"], ["system", "user"]):
        raise UserError(f"{where} is a conversation of {', '.join(roles)}; it needs data.chat_template=true")


@dataclass(frozen=True)
class PromptSet:
    """Tokenised prompts of a split, and how many were over the limit."""

    prompts: list[Prompt]
    dropped: int

    def at_step(self, step: int, count: int, seed: int) -> list[Prompt]:
        """The prompts of a training step: a pure function of its arguments, so resuming needs no cursor.

        Every epoch is a fresh shuffle; its last few prompts, too few for a step, wait for the next one. No prompt is in
        a step twice.
        """
        epoch, position = divmod(step, len(self.prompts) // count)
        order = _epoch_order(len(self.prompts), seed, epoch)
        return [self.prompts[i] for i in order[position * count : (position + 1) * count]]

    def replacements(self, step: int, count: int, seed: int, exclude: set[str]) -> list[Prompt]:
        """Up to `count` prompts to put in place of filtered ones: drawn at random, none whose id is in `exclude`."""
        rng = random.Random(stable_hash(seed, "replacements", step, len(exclude)))
        drawn = rng.sample(self.prompts, min(len(self.prompts), count + len(exclude)))
        return [prompt for prompt in drawn if prompt.id not in exclude][:count]


@lru_cache(maxsize=1)
def _epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(stable_hash(seed, "prompt order", epoch)).shuffle(order)
    return order


def load_prompts(data: DataConfig, split: Split, tokenizer: Any) -> PromptSet:
    """Load, template and tokenise a split; prompts over max_prompt_tokens are dropped and counted."""
    problems = load_problems(data, split)
    encoded = encode_prompts(data, problems, tokenizer)
    for problem, ids in zip(problems, encoded, strict=True):
        if not ids:
            raise UserError(f"{problem.id} (data.{split}) has no tokens; this model's tokenizer drops all of its text")
    prompts = [
        Prompt(
            problem.id,
            problem.text,
            np.array(ids, dtype=np.int32),
            problem.answer,
            problem.source,
        )
        for problem, ids in zip(problems, encoded, strict=True)
        if len(ids) <= data.max_prompt_tokens
    ]
    if not prompts:
        raise UserError(
            f"data.max_prompt_tokens={data.max_prompt_tokens}: all {len(problems)} prompts of data.{split} are longer "
            f"(the shortest has {min(map(len, encoded))} tokens)"
        )
    return PromptSet(prompts, dropped=len(problems) - len(prompts))


def encode_prompts(data: DataConfig, problems: Sequence[Problem | str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each prompt, templates applied."""
    texts = prompt_texts(data, problems, tokenizer)
    return tokenizer(texts, add_special_tokens=not data.chat_template)["input_ids"] if texts else []


def prompt_texts(data: DataConfig, problems: Sequence[Problem | str], tokenizer: Any) -> list[str]:
    """The text of each prompt, templates applied."""
    rows = [Problem("", row, "", "") if isinstance(row, str) else row for row in problems]
    if data.chat_template:
        return [render(tokenizer, chat_of(data, row.text, row.turns), row.id) for row in rows]
    prefix = f"{data.system_prompt}\n" if data.system_prompt else ""
    return [prefix + fill(data, row.text) for row in rows]


def stable_hash(*parts: Any) -> int:
    """A 63-bit hash that is the same in every process and version of Python."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

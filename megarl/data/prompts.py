"""Problems become prompts: loading, templates, tokenisation, and the seeded order in which a run sees them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, overload

import numpy as np

from megarl.config import DataConfig, EvalSet
from megarl.data import arithmetic
from megarl.data.benchmarks import EVALUATION_SETS, Layout, ProblemSet
from megarl.data.columns import Turn
from megarl.data.problems import BLOCK, Problem, Problems
from megarl.data.sources import Rows
from megarl.data.templates import chat_of, fill, render_all
from megarl.data.token_counts import TokenCounter
from megarl.types import Prompt, UserError

Split = Literal["train", "eval"]
Splits = Mapping[Split, Problems]  # those that a command uses
ARITHMETIC_SEED = 0  # the problems are the same in every run; run.seed orders them
ARITHMETIC_SIZES = {"train": 20_000, "eval": 128}


def load_splits(data: DataConfig, command: str) -> Splits:
    """As `load_problems`."""
    held_out: Splits = {"eval": load_problems(data, "eval")} if data.eval and command != "sft" else {}
    train: Splits = {"train": load_problems(data, "train")} if command != "eval" else {}
    return {**train, **held_out}


def load_problems(data: DataConfig, split: Split) -> Problems:
    """All problems of a split, in the order of their source; of the evaluation sets, one after the other.

    Raises UserError naming the file and row for what can't be read.
    """
    if split == "eval":
        return Problems(problem for chosen in data.eval_sets for problem in _evaluation_problems(data, chosen))
    rows = Rows("data.train", data.train, data.subset, data.train_split)
    return Problems(_problems(data, "train", data.train, rows, data.train_limit))


def _evaluation_problems(data: DataConfig, chosen: EvalSet) -> Iterator[Problem]:
    known = EVALUATION_SETS.get(chosen.name) if chosen.is_named else None
    subset, split = (known.subset, known.split) if known else (data.subset, data.eval_split)
    source = known.hub if known and chosen.source == chosen.name else chosen.source
    setting = f"data.eval.{chosen.name}" if chosen.is_named else "data.eval"
    rows = Rows(setting, source, subset, split)
    for i, problem in enumerate(_problems(data, "eval", chosen.name, rows, data.eval_limit, known), 1):
        yield replace(problem, id=f"{chosen.name}:{i}") if chosen.is_named else problem


def _problems(
    data: DataConfig, split: Split, source: str, rows: Rows, limit: int | None, known: ProblemSet | None = None
) -> Iterator[Problem]:
    """The first `limit` problems of a source, read as the known set that they are, else as the data section says."""
    if rows.name == "arithmetic":
        found = arithmetic.problems(
            ARITHMETIC_SEED, limit or ARITHMETIC_SIZES[split], "train" if split == "train" else "test"
        )
        yield from (Problem(f"arithmetic/{i}", p.question, p.answer, source) for i, p in enumerate(found))
        return
    layout = Layout(
        (data.prompt_key,),
        data.answer_key,
        data.answer_pattern,
        " (data.prompt_key)",
        " (data.answer_key)",
        "data.answer_pattern",
    )
    count = 0
    for where, row in rows:
        columns = known.layout_of(row) if known else layout
        text, answer = columns.read(where, row)
        turns = columns.turns(where, row)
        _check_turns(data, where, turns)
        yield Problem(rows.id_of(where), text, answer, source, turns)
        count += 1
        if count == limit:
            break
    if not count:
        raise UserError(f"{rows.setting}={rows.name} has no rows")


def _check_turns(data: DataConfig, where: str, turns: Sequence[Turn]) -> None:
    roles = [turn["role"] for turn in turns]
    if data.system_prompt and "system" in roles:
        raise UserError(f"{where} has a system message of its own beside data.system_prompt; set that to null")
    if not data.chat_template and roles not in ([], ["user"], ["system", "user"]):
        raise UserError(f"{where} is a conversation of {', '.join(roles)}; it needs data.chat_template=true")


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a split, and how many were over the limit."""

    prompts: Sequence[Prompt]
    dropped: int

    def at_step(self, step: int, count: int, seed: int) -> list[Prompt]:
        """The prompts of a training step: a pure function of its arguments, so resuming needs no cursor.

        Every epoch is a fresh shuffle; its last few prompts, too few for a step, wait for the next one. No prompt is in
        a step twice.
        """
        epoch, position = divmod(step, len(self.prompts) // count)
        order = _epoch_order(len(self.prompts), seed, epoch)
        return _chosen(self.prompts, order[position * count : (position + 1) * count])

    def replacements(self, step: int, count: int, seed: int, exclude: set[str]) -> list[Prompt]:
        """Up to `count` prompts to put in place of filtered ones: drawn at random, none whose id is in `exclude`."""
        rng = random.Random(stable_hash(seed, "replacements", step, len(exclude)))
        drawn = rng.sample(range(len(self.prompts)), min(len(self.prompts), count + len(exclude)))
        return [prompt for prompt in _chosen(self.prompts, drawn) if prompt.id not in exclude][:count]


def _chosen(prompts: Sequence[Prompt], places: Sequence[int]) -> list[Prompt]:
    return prompts.at(places) if isinstance(prompts, Prompts) else [prompts[place] for place in places]


@lru_cache(maxsize=1)
def _epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(stable_hash(seed, "prompt order", epoch)).shuffle(order)
    return order


class Prompts(Sequence[Prompt]):
    """Some of a split's problems, by their rows; each is tokenised when it is asked for."""

    def __init__(self, data: DataConfig, problems: Sequence[Problem], rows: np.ndarray, tokenizer: Any) -> None:
        self._data, self._problems, self._rows, self._tokenizer = data, problems, rows, tokenizer  # rows: i64[N]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: Any) -> Any:
        return self.at(range(len(self))[index]) if isinstance(index, slice) else self.at([index])[0]

    def at(self, places: Sequence[int]) -> list[Prompt]:
        """Several, tokenised together."""
        problems = [self._problems[int(self._rows[place])] for place in places]
        encoded = encode_prompts(self._data, problems, self._tokenizer)
        assert all(0 < len(ids) <= self._data.max_prompt_tokens for ids in encoded), "counted otherwise"
        return [
            Prompt(problem.id, problem.text, np.array(ids, dtype=np.int32), problem.answer, problem.source)
            for problem, ids in zip(problems, encoded, strict=True)
        ]


def load_prompts(
    data: DataConfig,
    split: Split,
    tokenizer: Any,
    problems: Problems | None = None,
    fits: Callable[[list[Problem]], list[bool]] | None = None,
) -> PromptSet:
    """The prompts of a split's problems, or of its `problems`; those over max_prompt_tokens, and those which the
    caller says don't fit, are dropped and counted.
    """
    problems = load_problems(data, split) if problems is None else problems
    count, limit = TokenCounter(tokenizer, not data.chat_template), data.max_prompt_tokens
    rows: list[np.ndarray] = []
    shortest = np.iinfo(np.int64).max
    for start in range(0, len(problems), BLOCK):
        block = problems[start : start + BLOCK]
        counts = np.array(count(prompt_texts(data, block, tokenizer), limit))
        if not counts.all():
            problem = block[int(counts.argmin())]
            raise UserError(f"{problem.id} (data.{split}) has no tokens; this model's tokenizer drops all of its text")
        shortest = min(shortest, int(counts.min()))
        chosen = counts <= limit
        if fits:
            chosen &= np.array(fits(block))
        rows.append(start + chosen.nonzero()[0])
    if shortest > limit:
        raise UserError(
            f"data.max_prompt_tokens={limit}: all {len(problems)} prompts of data.{split} are longer "
            f"(the shortest has {shortest} tokens)"
        )
    prompts = Prompts(data, problems, np.concatenate(rows), tokenizer)
    dropped = len(problems) - len(prompts)
    return PromptSet(prompts[:] if split == "eval" else prompts, dropped)  # evaluations are of all of them


def encode_prompts(data: DataConfig, problems: Sequence[Problem | str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each prompt, templates applied."""
    texts = prompt_texts(data, problems, tokenizer)
    return tokenizer(texts, add_special_tokens=not data.chat_template)["input_ids"] if texts else []


def prompt_texts(data: DataConfig, problems: Sequence[Problem | str], tokenizer: Any) -> list[str]:
    """The text of each prompt, templates applied."""
    rows = [Problem("", row, "", "") if isinstance(row, str) else row for row in problems]
    if data.chat_template:
        return render_all(tokenizer, [chat_of(data, row.text, row.turns) for row in rows], [row.id for row in rows])
    prefix = f"{data.system_prompt}\n" if data.system_prompt else ""
    return [prefix + fill(data, row.text) for row in rows]


def stable_hash(*parts: Any) -> int:
    """A 63-bit hash that is the same in every process and version of Python."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

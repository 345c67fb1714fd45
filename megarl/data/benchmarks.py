r"""Public problem sets by name: where they are, and where a row keeps the problem and its reference answer.

`EVALUATION_SETS` are the names that `data.eval` and `prepare_data --decontaminate` know, `TRAINING_SETS` the presets of
`prepare_data`. A set may lie as a local file or on the hub under other column names: the first layout whose columns a
row has is the one that counts.
"""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass
from typing import NoReturn

from megarl.data.columns import Row, Turn, has, names_of, scalar_of, turns_of, value_of
from megarl.rewards.extraction import boxed_answer
from megarl.types import UserError

BOXED = r"\boxed"  # the answer is the content of the last \boxed
LIST = "list"  # the answers are a list; all of them are wanted, in any order


class UnusableRow(UserError):
    """A row of the right form without a problem or without an answer."""


@dataclass(frozen=True)
class Layout:
    """The columns of a row. `rule` says what of the answer column counts.

    None: all of it; BOXED; LIST: its parts, joined by commas; else a regular expression, its group 1. The settings are
    what errors name beside a column. A conversation may stand for the problem: all of it up to the user's last turn;
    if the answer's column is the same, the reply to it is the answer.
    """

    problem: tuple[str, ...]  # joined by a space
    answer: str
    rule: str | None = None
    problem_setting: str = ""
    answer_setting: str = ""
    rule_setting: str = ""

    def fits(self, row: Row) -> bool:
        return all(has(row, column) for column in (*self.problem, self.answer))

    def read(self, where: str, row: Row) -> tuple[str, str]:
        """Problem and reference answer. Raises UserError for a missing column, UnusableRow for an empty one."""
        for column in (*self.problem, self.answer):
            if not has(row, column):
                setting = self.answer_setting if column == self.answer else self.problem_setting
                raise UserError(f"{where} has no column '{column}'{setting}; it has: {', '.join(names_of(row))}")
        problem = " ".join(self._problem(where, row, column) for column in self.problem)
        answer = self._answer(where, row)
        if self.rule == BOXED:
            found = boxed_answer(answer)
        elif self.rule in (None, LIST):
            found = answer
        else:
            match = re.search(str(self.rule), answer)
            found = match[1] if match else None
        if not (found or "").strip():
            rule = f"{self.rule_setting}={self.rule!r}" if self.rule_setting else str(self.rule)
            raise UnusableRow(f"{where}: {rule} finds nothing in column '{self.answer}'")
        return problem, str(found).strip() if self.rule else str(found)

    def turns(self, where: str, row: Row) -> tuple[Turn, ...]:
        """The conversation that the problem is, if it is one; its last turn is the user's. Raises UserError."""
        found = turns_of(value_of(row, self.problem[0])) if len(self.problem) == 1 else ()
        if len(found) > 1 and self.problem[0] == self.answer and found[-1]["role"] == "assistant":
            found = found[:-1]
        if found and found[-1]["role"] != "user":
            raise UserError(
                f"{where}: column '{self.problem[0]}'{self.problem_setting} ends with a turn of the "
                f"{found[-1]['role']}; a prompt ends with the user's"
            )
        return found

    def _problem(self, where: str, row: Row, column: str) -> str:
        text = scalar_of(value_of(row, column)) or "\n".join(turn["content"] for turn in self.turns(where, row))
        return text or self._refuse(where, row, column, self.problem_setting)

    def _answer(self, where: str, row: Row) -> str:
        value = value_of(row, self.answer)
        turns = turns_of(value)
        if turns and turns[-1]["role"] == "assistant":
            return turns[-1]["content"]
        is_list = self.rule == LIST and isinstance(value, list)
        texts = [scalar_of(part) for part in value] if is_list else [scalar_of(value)]
        if not all(texts) and texts:
            self._refuse(where, row, self.answer, self.answer_setting)
        return ", ".join(texts)

    def _refuse(self, where: str, row: Row, column: str, setting: str) -> NoReturn:
        shown = reprlib.repr(value_of(row, column))
        raise UnusableRow(f"{where}: column '{column}'{setting} is empty or not text: {shown}")


@dataclass(frozen=True)
class ProblemSet:
    """A public set: its place on the hub and the layouts under which it goes around."""

    hub: str
    subset: str | None
    split: str
    layouts: tuple[Layout, ...]

    def layout_of(self, row: Row) -> Layout:
        """The first that fits; the first of all where none does, so that an error names its columns."""
        return next((layout for layout in self.layouts if layout.fits(row)), self.layouts[0])


_GSM8K = (Layout(("question",), "answer", "#### (.*)"), Layout(("problem",), "answer", "#### (.*)"))
_NUMBERS = (Layout(("problem",), "answer"), Layout(("question",), "answer"))

EVALUATION_SETS = {
    "math500": ProblemSet("HuggingFaceH4/MATH-500", None, "test", _NUMBERS),
    "minerva": ProblemSet(
        "math-ai/minervamath",
        None,
        "test",
        (  # the original file answers with a whole solution; the hub's set has the answer alone
            Layout(("problem",), "solution", BOXED),
            Layout(("problem",), "answer", BOXED),
            Layout(("question",), "answer"),
        ),
    ),
    "olympiadbench": ProblemSet(
        "Hothan/OlympiadBench",
        "OE_TO_maths_en_COMP",
        "train",
        (Layout(("question",), "final_answer", LIST), Layout(("problem",), "answer", LIST)),
    ),
    "gsm8k": ProblemSet("openai/gsm8k", "main", "test", _GSM8K),
    "aime24": ProblemSet("HuggingFaceH4/aime_2024", None, "train", _NUMBERS),
    "aime25": ProblemSet("math-ai/aime25", None, "test", _NUMBERS),
    "amc23": ProblemSet("math-ai/amc23", None, "test", _NUMBERS),
}

TRAINING_SETS = {
    "numina": ProblemSet(  # what the paper trained on: Numina-Math problems with extracted answers
        "RLHFlow/numia_prompt_dpo1",
        None,
        "train",
        (Layout(("problem",), "gt"), Layout(("problem",), "solution", BOXED)),  # the second: AI-MO/NuminaMath-CoT
    ),
    "math": ProblemSet(
        "DigitalLearningGmbH/MATH-lighteval", "default", "train", (Layout(("problem",), "solution", BOXED),)
    ),
    "gsm8k": ProblemSet("openai/gsm8k", "main", "train", _GSM8K),
}

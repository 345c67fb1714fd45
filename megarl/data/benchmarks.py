r"""Public problem sets by name: where they are, and where a row keeps the problem and its reference answer.

`EVALUATION_SETS` are the names that `data.eval` and `prepare_data --decontaminate` know, `TRAINING_SETS` the presets of
`prepare_data`. A set may lie as a local file or on the hub under other column names: the first layout whose columns a
row has is the one that counts.
"""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

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
    what errors name beside a column.
    """

    problem: tuple[str, ...]  # joined by a space
    answer: str
    rule: str | None = None
    problem_setting: str = ""
    answer_setting: str = ""
    rule_setting: str = ""

    def fits(self, row: dict[str, Any]) -> bool:
        return all(column in row for column in (*self.problem, self.answer))

    def read(self, where: str, row: dict[str, Any]) -> tuple[str, str]:
        """Problem and reference answer. Raises UserError for a missing column, UnusableRow for an empty one."""
        settings = {column: self.problem_setting for column in self.problem} | {self.answer: self.answer_setting}
        for column, setting in settings.items():
            if column not in row:
                raise UserError(f"{where} has no column '{column}'{setting}; it has: {', '.join(map(str, row))}")
        problem = " ".join(self._text(where, row, column) for column in self.problem)
        answer = self._text(where, row, self.answer)
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

    def _text(self, where: str, row: dict[str, Any], column: str) -> str:
        value = row[column]
        is_list = column == self.answer and self.rule == LIST and isinstance(value, list)
        texts = [_scalar(part) for part in value] if is_list else [_scalar(value)]
        if not all(texts) and texts:
            setting = self.answer_setting if column == self.answer else self.problem_setting
            raise UnusableRow(f"{where}: column '{column}'{setting} is empty or not text: {reprlib.repr(value)}")
        return ", ".join(texts)


def _scalar(value: Any) -> str:
    """A text, or a finite number in digits (3 for 3.0, no exponent); empty for anything else."""
    if isinstance(value, str):
        return value if value.strip() else ""
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        return ""
    exact = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
    digits = format(exact, "f")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) if exact.is_finite() else ""


@dataclass(frozen=True)
class ProblemSet:
    """A public set: its place on the hub and the layouts under which it goes around."""

    hub: str
    subset: str | None
    split: str
    layouts: tuple[Layout, ...]

    def layout_of(self, row: dict[str, Any]) -> Layout:
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

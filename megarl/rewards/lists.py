r"""Several answers in one: `1, 2`, `x = 1 \text{ or } x = 2`, `\{1, 2\}`, `\pm 1`. Their order doesn't matter."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

MAX_ANSWERS = 256  # more are compared as one

_TOKEN = re.compile(
    r"(?P<ignored>\\(?:left|right)(?![A-Za-z])\s*\.?|\\[()\[\]])"
    r"|(?P<conjunction>\\(?:text|mbox|textbf|mathrm)\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))"
    r"|(?P<open>\\\{|[{(\[⟨]|\\(?:begin|langle)(?![A-Za-z]))"
    r"|(?P<close>\\\}|[})\]⟩]|\\(?:end|rangle)(?![A-Za-z]))"
    r"|(?P<comma>[,;])"
    r"|\\[A-Za-z]+|\\.",
    re.DOTALL,
)
DOTS = re.compile(r"\.{2,}|…|\\(?:[lc]?dots|dots[bcmio])(?![A-Za-z])")  # and so on
_THOUSANDS_BEFORE = re.compile(r"(?:^|[^0-9.])[0-9]{1,3}(?:,[0-9]{3})*$")
_THOUSANDS_AFTER = re.compile(r",(?:\\!\s*)?[0-9]{3}(?![0-9])")
_WRAPPED = re.compile(r"\\(?:text|mbox|textbf|mathrm)\s*\{([^{}]*)\}")
_SAID = re.compile(
    r"(?<=[0-9}]) ?\\text\s*\{([^{}]*?[A-Za-z][^{}]*?),? (?:and|or) ?([^{}]*)\}(?= ?[0-9\\])"
)  # 3 red and 5 blue
_BRACES = re.compile(
    r"(?:(?:[A-Za-z]+|\\text\{[^{}]*\})\s*(?:\\in(?![A-Za-z])|=)\s*)?\\(?:left\s*\\)?\{(.*)\\\}", re.DOTALL
)
_NO_LIST = re.compile(
    r"\\mid(?![A-Za-z])|[|:]|\s*(?:\\(?:emptyset|varnothing)|∅)\s*$"
)  # a set by a condition, or of the empty one


def split_answers(text: str) -> list[str]:
    r"""The parts of a list that stands in no brackets, or in the braces of a set; a single answer is a list of one.

    A comma between digits groups thousands where three digits follow it without a space, so lists are best written
    with ", ". \pm stands for two answers.
    """
    text = _SAID.sub(r"\\text{\1} and \\text{\2}", text)
    text = DOTS.sub(r"\\ldots ", text).strip().strip("$").strip().removesuffix(".")
    if text.startswith((r"\(", r"\[")) and text.endswith((r"\)", r"\]")):
        text = text[2:-2].strip()
    if wrapped := _WRAPPED.fullmatch(text):
        parts = _split(wrapped[1])
        return [rf"\text{{{part}}}" for part in parts] if len(parts) > 1 else [text]
    braces = _BRACES.fullmatch(re.sub(r"\\(?:left|right)(?=\\[{}])", "", text))
    if braces and not _NO_LIST.search(braces[1]) and _is_balanced(braces[1]) and braces[1].strip():
        text = braces[1]
    parts = [sign for part in _split(text) for sign in _both_signs(part)]
    return parts if 1 <= len(parts) <= MAX_ANSWERS else [text]


def split_at(pattern: re.Pattern[str], text: str) -> list[str]:
    """The parts of a text between matches of the pattern that stand in no brackets."""
    parts, depth, start = [], 0, 0
    separators = {match.start(): match.end() for match in pattern.finditer(text)}
    brackets = {match.start(): match for match in _TOKEN.finditer(text)}
    for position in sorted(separators.keys() | brackets.keys()):
        if position in separators and depth == 0:
            parts.append(text[start:position])
            start = separators[position]
        elif position in brackets and position >= start:
            depth = max(depth + bool(brackets[position]["open"]) - bool(brackets[position]["close"]), 0)
    return [*parts, text[start:]]


def _split(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for token in _TOKEN.finditer(text):
        if token["open"]:
            depth += 1
        elif token["close"]:
            depth = max(depth - 1, 0)
        elif depth == 0 and (token["conjunction"] or (token["comma"] and not groups_digits(text, token.start()))):
            parts.append(text[start : token.start()])
            start = token.end()
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip(" $.\n") or DOTS.fullmatch(part.strip(" $\n"))]


def groups_digits(text: str, comma: int) -> bool:
    return bool(_THOUSANDS_AFTER.match(text, comma) and _THOUSANDS_BEFORE.search(text[max(0, comma - 40) : comma]))


def _is_balanced(text: str) -> bool:
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += bool(token["open"]) - bool(token["close"])
        if depth < 0:
            return False
    return depth == 0


def _both_signs(part: str) -> list[str]:
    if not re.search(r"\\pm(?![A-Za-z])|±", part):
        return [part]
    plus = re.sub(r"\\pm(?![A-Za-z])|±", "+", re.sub(r"\\mp(?![A-Za-z])|∓", "-", part))
    minus = re.sub(r"\\pm(?![A-Za-z])|±", "-", re.sub(r"\\mp(?![A-Za-z])|∓", "+", part))
    return [plus, minus]


def match_lists(
    given: list[str], wanted: list[str], equal: Callable[[str, str], bool | None], rank: Callable[[str], Any]
) -> bool | None:
    """Whether every answer given is one that is wanted and none is missing; None where `equal` leaves it open.

    Lists of one length pair up. Several spellings of a single answer are right if all are: `1/2 or 0.5`. `rank` is what
    equal answers mostly share: whom to compare first, so that a right list takes few comparisons. It decides nothing.
    """
    if len(wanted) == 1:
        return all_of(equal(answer, wanted[0]) for answer in given)
    if len(given) != len(wanted):
        return False
    common = Counter(given) & Counter(wanted)
    given, wanted = list((Counter(given) - common).elements()), list((Counter(wanted) - common).elements())
    left, undecided = sorted((rank(reference), reference) for reference in wanted), False
    for answer in given:
        place = bisect_left(left, (rank(answer), ""))
        for near in [*range(place, len(left)), *range(place - 1, -1, -1)]:
            verdict = equal(answer, left[near][1])
            if verdict is not False:
                break
        else:
            return False
        if verdict:
            left.pop(near)
        else:
            undecided = True
    return None if undecided else True


def all_of(verdicts: Iterable[bool | None]) -> bool | None:
    """False where any is, else None where any is undecided."""
    undecided = False
    for verdict in verdicts:
        if verdict is False:
            return False
        undecided |= verdict is None
    return None if undecided else True

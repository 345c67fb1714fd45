r"""Sets of real numbers with rational ends: `x > 0, x \ne 1` is `(0,1) \cup (1,\infty)`."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from megarl.rewards.lists import split_answers, split_at
from megarl.rewards.normalise import spell
from megarl.rewards.relations import as_intervals, coordinates

_WITHOUT = re.compile(r"\\(?:setminus|backslash|smallsetminus)(?![A-Za-z]) ?")
_AND = re.compile(r",|;|\\(?:land|wedge)(?![A-Za-z]) ?|(?:\\text\{ ?)?(?<![A-Za-z])and(?![A-Za-z]) ?\}? ?")
_FINITE = re.compile(r"\\\{(.*)\\\}")

Bound = tuple[Fraction | float, int]  # where, and on which side of it: -1 just below, 0, 1 just above
Piece = tuple[Bound, Bound]  # from a bound to a bound, both as cuts between numbers
Rational = Callable[[str], Fraction | None]


def real_set(text: str, rational: Rational) -> tuple[str, list[Piece]] | None:
    """The variable ("" if none is named) and the set's pieces, joined and in order; None for anything else."""
    parts = split_at(_WITHOUT, spell(text))
    conditions = [condition for condition in split_at(_AND, parts[0]) if condition.strip()]
    variables: set[str] = set()
    pieces: list[Piece] = [((float("-inf"), 0), (float("inf"), 0))]
    for condition in conditions:
        found = as_intervals(condition)
        if found is None:
            return None
        cut = [_piece(interval, rational) for interval in found[1]]
        if None in cut:
            return None
        variables |= {found[0]} - {""}
        pieces = _common(pieces, [piece for piece in cut if piece])
    for taken in parts[1:]:
        if not (finite := _FINITE.fullmatch(taken.strip())):
            return None
        for point in split_answers(finite[1]):
            if (value := rational(point)) is None:
                return None
            pieces = _common(pieces, [((float("-inf"), 0), (value, -1)), ((value, 1), (float("inf"), 0))])
    if not conditions or not pieces or len(variables) > 1:
        return None
    return (variables.pop() if variables else ""), _joined(pieces)


def _piece(interval: str, rational: Rational) -> Piece | None:
    ends = coordinates(interval)
    values = [_end(end, rational) for end in ends]
    if len(values) != 2 or values[0] is None or values[1] is None:
        return None
    below = (values[0], -1 if interval[0] == "[" else 1)
    above = (values[1], 1 if interval[-1] == "]" else -1)
    return tuple((value, 0) if abs(value) == float("inf") else (value, side) for value, side in (below, above))  # type: ignore[return-value]


def _end(text: str, rational: Rational) -> Fraction | float | None:
    text = text.strip().removeprefix("+")
    return {r"\infty": float("inf"), r"-\infty": float("-inf")}.get(text) or rational(text)


def _common(left: list[Piece], right: list[Piece]) -> list[Piece]:
    cuts = [(max(a[0], b[0]), min(a[1], b[1])) for a in left for b in right]
    return [(below, above) for below, above in cuts if below < above]


def _joined(pieces: list[Piece]) -> list[Piece]:
    joined: list[Piece] = []
    for below, above in sorted(pieces):
        if joined and below <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], above))
        else:
            joined.append((below, above))
    return joined

"""Equality by computer algebra: math-verify's parser and sympy. May take unbounded time: run it where it can be killed.

math-verify's own alarm-based timeouts are off: they need the main thread, and don't interrupt C code. What is raised is
MemoryError only.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cache
from typing import Any

from megarl.rewards.relations import split_sides

DECIMAL = re.compile(r"(-?[0-9]*\.?([0-9]*))(?:(?:\\times|\\cdot) ?10\^\{?(-?[0-9]{1,3})\}?)?")
TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_DEGREES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\^\\circ")


def equal(answer: str, reference: str) -> bool:
    r"""Equality of normalised answers or of two equations; behind \approx the reference is a decimal that may round."""
    from math_verify import verify

    if reference.startswith(r"\approx"):
        return _is_rounded_by(answer, reference.removeprefix(r"\approx "))
    given_sides, wanted_sides = split_sides(answer), split_sides(reference)
    if len(given_sides) == len(wanted_sides) == 2:
        return _same_up_to_a_factor(given_sides, wanted_sides)
    wanted, given = _parse(reference), _parse(answer)
    for gold in wanted:
        for target in given:
            try:
                if verify(gold, target, timeout_seconds=None, raise_on_error=True) and not _only_rounded(gold, target):
                    return True
            except MemoryError:
                raise
            except Exception:  # sympy raises anything on expressions that it can't compare: these don't match
                continue
    return False


def _is_rounded_by(answer: str, decimal: str) -> bool:
    """Whether the decimal is the answer to half a unit of its last digit."""
    match = DECIMAL.fullmatch(decimal)
    meanings = _parse(answer)
    if match is None or not meanings:
        return False
    unit = Fraction(10) ** (int(match[3] or 0) - len(match[2]))
    try:
        number = Fraction(str(meanings[0].evalf(30)))
        rounded = Fraction(match[1]) * Fraction(10) ** int(match[3] or 0)
    except (AttributeError, ValueError):
        return False
    return abs(number - rounded) <= unit / 2


def _same_up_to_a_factor(given: list[str], wanted: list[str]) -> bool:
    """Whether two equations, both brought to the form numerator = 0, differ by a number as factor only."""
    from sympy import fraction, simplify, together

    try:
        (a, b), (c, d) = ([_parse(side)[0] for side in sides] for sides in (given, wanted))
        ratio = simplify(fraction(together(a - b))[0] / fraction(together(c - d))[0])
        return bool(ratio.is_number and ratio.is_finite and ratio.is_nonzero)
    except MemoryError:
        raise
    except Exception:  # what can't be read, subtracted or divided is no equal equation
        return False


@cache
def _extraction() -> list[Any]:
    """math-verify's LaTeX reading of one answer: no search in prose, and no stripping of `2h` to 2 as a unit."""
    from math_verify import LatexExtractionConfig, LatexNormalizationConfig

    spelling = LatexNormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last"
    )
    return [LatexExtractionConfig(False, boxed_match_priority=0, normalization_config=spelling)]


def _parse(answer: str) -> list[Any]:
    """What the answer can mean: a sympy object, or text, or both; empty if math-verify can't read it."""
    from math_verify import parse

    if TRIGONOMETRIC.search(answer):
        answer = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", answer)
    try:
        meanings = parse(f"\\boxed{{{answer}}}", _extraction(), parsing_timeout=None, raise_on_error=True)
        return [_with_imaginary_unit(meaning) for meaning in meanings]
    except MemoryError:
        raise
    except Exception:  # its parser raises anything on malformed LaTeX
        return []


def _with_imaginary_unit(meaning: Any) -> Any:
    """math-verify reads i as a variable, so that (1+i)^2 would not be 2i."""
    from sympy import Expr, I

    units = [symbol for symbol in getattr(meaning, "free_symbols", ()) if symbol.name == "i"]
    return meaning.subs(units[0], I) if units and isinstance(meaning, Expr) else meaning


def _only_rounded(gold: Any, target: Any) -> bool:
    """True for unequal numbers so small that math-verify, which rounds floats to six decimals, takes both for zero."""
    try:
        wanted, given = complex(gold.evalf()), complex(target.evalf())
    except (AttributeError, TypeError, ValueError, OverflowError):
        return False
    size = max(abs(wanted), abs(given))
    return size < 1e-3 and abs(wanted - given) > 1e-6 * size

r"""Exact values of numbers: integers, decimals, `0.\overline{3}`, `a/b`, `\frac{a}{b}`, mixed numbers, percentages."""

from __future__ import annotations

import re
from fractions import Fraction
from math import gcd

MAX_DIGITS = 100
MIN_DIGITS = 6  # of a decimal that stands for a fraction

DECIMAL = re.compile(r"(-?[0-9]*\.?([0-9]*))(?:(?:\\times|\\cdot) ?10\^\{?(-?[0-9]{1,3})\}?)?")
_NUMBER = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
_REPEATING = (
    r"(?P<before>[0-9]*)\.(?P<once>[0-9]*)"
    r"(?P<period>\\(?:overline|bar)\{?[0-9]+\}?|\\dot\{?[0-9]\}?(?:[0-9]*\\dot\{?[0-9]\}?)?)"
)
_RATIONAL = re.compile(
    rf"(?P<sign>-?)(?:(?P<number>{_NUMBER})|{_REPEATING}"
    r"|(?:(?P<whole>[0-9]+)(?: |(?=\\)))?"
    r"(?:(?P<a>[0-9]+)\.?/(?P<b>[0-9]+)|\\frac\{(?P<minus>-?)(?P<n>[0-9]+)\}\{(?P<d>[0-9]+)\}))"
)


def rational(text: str) -> Fraction | None:
    r"""The exact value of an integer, decimal, a/b, \frac{a}{b} or mixed number; None for anything else."""
    match = _RATIONAL.fullmatch(text) if len(text) <= MAX_DIGITS else None
    if match is None:
        return None
    if match["number"]:
        value = Fraction(match["number"].rstrip("."))
    elif match["period"]:
        once, period = match["once"], re.sub("[^0-9]", "", match["period"])
        value = Fraction(f"{match['before'] or 0}.{once or 0}")
        value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(once))
    else:
        denominator = int(match["b"] or match["d"])
        if denominator == 0 or (match["minus"] and match["whole"]):
            return None
        value = int(match["whole"] or 0) + Fraction(int(match["a"] or match["n"]), denominator)
        value = -value if match["minus"] else value
    return -value if match["sign"] else value


def _is_written_out_by(value: Fraction, decimal: str) -> bool:
    """Whether the decimal gives a fraction that has no end to all of its digits, of which there are enough to tell."""
    match = DECIMAL.fullmatch(decimal)
    if match is None or match[3] or len(match[2].lstrip("0")) < MIN_DIGITS:
        return False
    endless = value.denominator // gcd(value.denominator, 10 ** len(match[2])) > 1
    return endless and abs(value - Fraction(decimal)) * 10 ** len(match[2]) * 2 <= 1


def same_rational(answer: str, reference: str) -> bool | None:
    """Whether two exact numbers are equal, a percentage also to its number; None where one side is no such number."""
    given, wanted = rational(answer.removesuffix("%")), rational(reference.removesuffix("%"))
    if given is None or wanted is None:
        return None
    if answer.endswith("%") != reference.endswith("%"):
        percent, number = (given, wanted) if answer.endswith("%") else (wanted, given)
        return number in (percent, percent / 100)
    return given == wanted or _is_written_out_by(given, reference)


def same_ratio(given: list[str], wanted: list[str]) -> bool:
    """Of three or more parts, which computer algebra would divide in turn. What is no number must be spelled alike."""
    left, right = [rational(part) for part in given], [rational(part) for part in wanted]
    if len(left) != len(right) or None in left or None in right:
        return False
    return all(a * right[0] == b * left[0] for a, b in zip(left, right, strict=True))  # type: ignore[operator]

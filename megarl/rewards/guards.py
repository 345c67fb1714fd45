"""What must not reach a computer algebra system: constructs that cost unbounded time or memory, and no answers."""

from __future__ import annotations

import re
from math import prod

from megarl.rewards.lists import split_answers
from megarl.rewards.normalise import MAX_CHARACTERS, normalise

MAX_LIST_CHARACTERS = 4096  # of a list of shorter answers
MAX_NESTING = 16
MAX_EXPONENT_DIGITS = 4
MAX_EXPONENTS = 10**7  # all integers in exponents multiplied, as in ((9^99)^99)^99
MAX_POWER_OF_SUM = 64
OUTWEIGHING = 3  # times the reference's weight

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_FACTORIAL = re.compile(r"(?<!\\)!(?!=)|[0-9]!")
_SMALL_FACTORIAL = re.compile(  # of a number or a symbol, not a power, and not taken again
    r"(?:(?<![0-9.^!])[0-9]{1,3}|(?<![A-Za-z\\^])[a-z]|\([0-9]?[a-z](?:[+-][0-9])?\))!(?![!^)])|(?<=\()[0-9]{1,2}!(?=\)(?![!^]))"
)
_OPERATOR = re.compile(r"\\(?:i{1,3}nt|oint|sum|prod|coprod|lim|limsup|liminf)(?![A-Za-z])")
_CODE = re.compile(r"__|(?<![A-Za-z\\])(?:import|lambda|eval|exec|open ?\()(?![A-Za-z])")
_HUGE_FUNCTION = re.compile(r"\\(?:[dt]?binom|choose|Gamma|zeta)(?![A-Za-z])")
_LARGE_NUMBER = re.compile(r"[0-9]{5}")
_BARE_BRACES = re.compile(r"\{{4}")  # the parser's time doubles with each
_SUM_TO_A_POWER = re.compile(r"[+-][^()]*\)(?:\^|\*\*)[{(]?([0-9]+)")
_UNKNOWN_OR_ROOT = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])|\\sqrt")
_POWER = re.compile(r"\^|\*\*")
_LETTER_TO_A_DIGIT = re.compile(r"(?<![A-Za-z\\])[A-Za-z]\^[0-9](?![0-9])")
_ONE_TOKEN = re.compile(r"[+-]?(?:\\[A-Za-z]+|[0-9.]+|.)?", re.DOTALL)


def guard(answer: str) -> str | None:
    """Why the answer must not reach a computer algebra system, or None. It then counts only if equal as a string.

    These are constructs that cost unbounded time or memory to evaluate, and text that is no answer at all.
    """
    if len(answer) > MAX_CHARACTERS:
        parts = split_answers(answer) if len(answer) <= MAX_LIST_CHARACTERS else []
        if len(parts) < 2:
            return f"longer than {MAX_CHARACTERS} characters"
        return next(filter(None, map(guard, parts)), None)
    if _CONTROL.search(answer):
        return "control character"
    text = normalise(answer)
    if _nesting(text) > MAX_NESTING:
        return f"nested deeper than {MAX_NESTING}"
    for pattern, reason in (
        (_CODE, "code"),
        (_FACTORIAL, "factorial"),
        (_BARE_BRACES, "braces in braces"),
        (_OPERATOR, "sum, product, integral or limit"),
        (re.compile(r"(?<!\\log_)[0-9] [0-9]"), "numbers with only a space between them"),
    ):
        if pattern.search(_SMALL_FACTORIAL.sub("1", text) if reason == "factorial" else text):
            return reason
    if _HUGE_FUNCTION.search(text) and (_LARGE_NUMBER.search(text) or re.search(r"[0-9]\^\{?[0-9]", text)):
        return "binomial, gamma or zeta function of a large number"
    return _power_guard(text)


def outweighs(answer: str, reference: str) -> bool:
    """Whether the answer is so much more than the reference that its author, not the question, makes it slow."""
    return any(
        own > OUTWEIGHING * max(other, 1) for own, other in zip(_weights(answer), _weights(reference), strict=True)
    )


def _weights(text: str) -> tuple[int, int, int]:
    """Length, nesting, and all integers in exponents multiplied."""
    text = normalise(text)
    exponents = [int(integer) for power in _POWER.finditer(text) for integer in _integers_in_exponent(text, power)]
    return len(text), _nesting(text), prod(max(integer, 1) for integer in exponents)


def _integers_in_exponent(text: str, power: re.Match[str]) -> list[str]:
    exponent = text[power.end() : _exponent_end(text, power.end())]
    return re.findall(r"(?<![0-9.])[0-9]+(?![0-9.])", exponent)


def _nesting(text: str) -> int:
    """The deepest nesting of brackets of any kind, also of those never closed."""
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]" and depth > 0)
        deepest = max(deepest, depth)
    return deepest


def _power_guard(text: str) -> str | None:
    """Refuses huge exponents, and powers of powers except a letter's small one, as in the Gaussian e^{-x^2}."""
    product = 1
    for power in _POWER.finditer(text):
        end = _exponent_end(text, power.end())
        exponent = text[power.end() : end]
        if re.search(rf"(?<![0-9.])[0-9]{{{MAX_EXPONENT_DIGITS + 1}}}", exponent):
            return f"exponent of more than {MAX_EXPONENT_DIGITS} digits"
        if _POWER.search(_LETTER_TO_A_DIGIT.sub("", exponent)) or _POWER.match(text, end):
            return "tower of exponents"
        for integer in _integers_in_exponent(text, power):
            product *= max(int(integer), 1)
    if product > MAX_EXPONENTS:
        return f"exponents that multiply to over {MAX_EXPONENTS}"
    if _UNKNOWN_OR_ROOT.search(text):
        for power in _SUM_TO_A_POWER.finditer(text):
            if int(power[1]) > MAX_POWER_OF_SUM:
                return f"sum to a power over {MAX_POWER_OF_SUM}"
    return None


def _exponent_end(text: str, start: int) -> int:
    """Where the exponent that starts here ends: a bracketed group, else one token."""
    if text[start : start + 1] not in ("{", "("):
        token = _ONE_TOKEN.match(text, start)
        assert token is not None
        return token.end()
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] in "{(") - (text[position] in "})")
        if depth == 0:
            return position + 1
    return len(text)

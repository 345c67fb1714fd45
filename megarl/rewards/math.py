r"""The math reward: the last \boxed answer of a response against a reference. Pure functions of text, no processes.

An answer goes through `fast_verdict` (equal strings, exact rationals), then `guard` (what must not reach a computer
algebra system), then `math_verify_verdict`. Of these only the last can be slow; megarl.rewards.pool runs it in
processes that it can kill. Text of a model is parsed, never evaluated.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cache
from typing import Any

MAX_CHARACTERS = 512
MAX_NESTING = 32
MAX_DIGITS = 100
MAX_EXPONENT_DIGITS = 4

_BRACE_OR_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def extract_answer(text: str) -> str | None:
    r"""The content of the last balanced `\boxed{...}` or `\fbox{...}`; None if there is none. One pass over the text.

    Last means opened last, so `\boxed{x = \boxed{5}}` answers 5. Escaped braces don't count.
    """
    open_braces: list[int | None] = []  # where the content of a box starts; None for any other brace
    start = end = -1
    for token in _BRACE_OR_BOX.finditer(text):
        symbol = token.group()
        if symbol == "{":
            open_braces.append(None)
        elif symbol == "}":
            opened = open_braces.pop() if open_braces else None
            if opened is not None and opened > start:
                start, end = opened, token.start()
        elif len(symbol) > 2:
            open_braces.append(token.end())
    return None if start < 0 else text[start:end].strip()


_TEXT = r"\\text\{([^{}]*)\}"
_UNITS = (
    "mm|cm|km|meters?|metres?|centimeters?|kilometers?|inch(?:es)?|foot|feet|ft|yards?|miles?|mph|grams?|kg|pounds?|lbs?|"
    "ounces?|seconds?|sec|minutes?|min|hours?|hrs?|days?|weeks?|months?|years?|dollars?|cents?|degrees?|liters?|litres?|"
    "(?:square |cubic )?units?"
)

# In this order. Spaces survive only between letters and digits, where dropping them would change the meaning.
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("−", "-"),
        ("°", r"^\\circ"),
        (r"\\\$|[$€£¥]|(?<!\\)\\[()\[\]!]|\\displaystyle(?![A-Za-z])", ""),
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s", " "),
        (r"\\(?:left|right)(?![A-Za-z])\s*\.?|\\[Bb]igg?[lr]?(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:text(?:bf|it|rm|normal)|math(?:rm|bf|it)|mbox)\s*\{", r"\\text{"),
        (r"\{,\}", ","),
        (r"\\?%", "%"),
        (r" +", " "),
        (rf"^ ?{_TEXT}[ .]*$", r"\1"),
        (r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", ""),
        (r"\\frac ?([0-9])|\\frac ([A-Za-z])", r"\\frac{\1\2}"),
        (r"(\\frac\{[^{}]*\}) ?([0-9A-Za-z])", r"\1{\2}"),
        (r"\\sqrt ?([0-9])|\\sqrt ([A-Za-z])", r"\\sqrt{\1\2}"),
        (r"([\^_])\{([0-9A-Za-z])\}(?![0-9A-Za-z])", r"\1\2"),
        (r"(?<=.)\.$", ""),
        (r"(?<=[0-9]) ?(?:\\text\{ ?)?(?:percent|pct)\}?$", "%"),
        (rf"(?<=[0-9)}}])(?:\\text\{{[A-Za-z /.]+\}}| ?(?:{_UNITS}))(?:\^[23])?$", ""),
        (r"(?<=.)\^(?:\\circ|\{\\circ\})$", ""),
        (r"^\+", ""),
    )
)
_THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:[, ][0-9]{3})+(?:\.[0-9]+)?%?")


def normalise(answer: str) -> str:
    """One spelling for answers that differ in typesetting only: spacing, delimiters, units, `1,234`, a final period."""
    for pattern, replacement in _REWRITES:
        answer = pattern.sub(replacement, answer)
    if _THOUSANDS.fullmatch(answer):
        answer = answer.replace(",", "").replace(" ", "")
    return answer


_NUMBER = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
_RATIONAL = re.compile(
    rf"(?P<sign>-?)(?:(?P<number>{_NUMBER})"
    r"|(?:(?P<whole>[0-9]+)(?: |(?=\\)))?"
    r"(?:(?P<a>[0-9]+)/(?P<b>[0-9]+)|\\frac\{(?P<minus>-?)(?P<n>[0-9]+)\}\{(?P<d>[0-9]+)\}))"
)
_WORD = re.compile(r"\(?([A-Za-z][A-Za-z '-]*)\)?")
_TEXT_ONLY = re.compile(r"\s*\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox)\s*\{[^{}]*\}[\s.]*")
_IN_BASE = re.compile(r"([0-9][0-9A-F]*)_(?:([0-9])|\{([0-9]+)\})")


def fast_verdict(answer: str, reference: str) -> bool | None:
    """The verdict where strings or exact arithmetic settle it; None where they don't.

    Rationals are compared exactly (0.333 is not 1/3). A percentage matches its number and its fraction. What is set
    as text is a word, not a product of letters. A base subscript may be left out but not be another.
    """
    if answer.strip() == reference.strip():
        return True
    if max(len(answer), len(reference)) > MAX_CHARACTERS:
        return None
    answer_is_text, reference_is_text = _TEXT_ONLY.fullmatch(answer), _TEXT_ONLY.fullmatch(reference)
    answer, reference = normalise(answer), normalise(reference)
    if answer == reference:
        return True
    given, wanted = _WORD.fullmatch(answer), _WORD.fullmatch(reference)
    if wanted and (reference_is_text or (given and answer_is_text)):
        return given is not None and given[1].casefold() == wanted[1].casefold()
    given, wanted = _IN_BASE.fullmatch(answer), _IN_BASE.fullmatch(reference)
    if given or wanted:
        if given and wanted:
            return False
        return (given[1] if given else answer) == (wanted[1] if wanted else reference) or None
    given_value, wanted_value = _rational(answer.removesuffix("%")), _rational(reference.removesuffix("%"))
    if given_value is None or wanted_value is None:
        return None
    if answer.endswith("%") != reference.endswith("%"):
        percent, number = (given_value, wanted_value) if answer.endswith("%") else (wanted_value, given_value)
        return number in (percent, percent / 100)
    return given_value == wanted_value


def _rational(text: str) -> Fraction | None:
    r"""The exact value of an integer, decimal, a/b, \frac{a}{b} or mixed number; None for anything else."""
    match = _RATIONAL.fullmatch(text) if len(text) <= MAX_DIGITS else None
    if match is None:
        return None
    if match["number"]:
        value = Fraction(match["number"].rstrip("."))
    else:
        denominator = int(match["b"] or match["d"])
        if denominator == 0 or (match["minus"] and match["whole"]):
            return None
        value = int(match["whole"] or 0) + Fraction(int(match["a"] or match["n"]), denominator)
        value = -value if match["minus"] else value
    return -value if match["sign"] else value


_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_FACTORIAL = re.compile(r"(?<!\\)!(?!=)")
_OPERATOR = re.compile(r"\\(?:i{1,3}nt|oint|sum|prod|coprod|lim|limsup|liminf)(?![A-Za-z])")
_CODE = re.compile(r"__|(?<![A-Za-z\\])(?:import|lambda|eval|exec|open ?\()(?![A-Za-z])")
_POWER = re.compile(r"\^|\*\*")
_LETTER_TO_A_DIGIT = re.compile(r"(?<![A-Za-z\\])[A-Za-z]\^[0-9](?![0-9])")
_ONE_TOKEN = re.compile(r"[+-]?(?:\\[A-Za-z]+|[0-9.]+|.)?", re.DOTALL)


def guard(answer: str) -> str | None:
    """Why the answer must not reach a computer algebra system, or None. It then counts only if equal as a string.

    These are constructs that cost unbounded time or memory to evaluate, and text that is no answer at all.
    """
    if len(answer) > MAX_CHARACTERS:
        return f"longer than {MAX_CHARACTERS} characters"
    if _CONTROL.search(answer):
        return "control character"
    text = normalise(answer)
    if _nesting(text) > MAX_NESTING:
        return f"nested deeper than {MAX_NESTING}"
    for pattern, reason in (
        (_CODE, "code"),
        (_FACTORIAL, "factorial"),
        (_OPERATOR, "sum, product, integral or limit"),
        (re.compile(r"[0-9] [0-9]"), "numbers with only a space between them"),
    ):
        if pattern.search(text):
            return reason
    return _power_guard(text)


def _nesting(text: str) -> int:
    """The deepest nesting of brackets of any kind, also of those never closed."""
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]" and depth > 0)
        deepest = max(deepest, depth)
    return deepest


def _power_guard(text: str) -> str | None:
    """Refuses huge exponents, and powers of powers except a letter's small one, as in the Gaussian e^{-x^2}."""
    for power in _POWER.finditer(text):
        end = _exponent_end(text, power.end())
        exponent = text[power.end() : end]
        if re.search(rf"(?<![0-9.])[0-9]{{{MAX_EXPONENT_DIGITS + 1}}}", exponent):
            return f"exponent of more than {MAX_EXPONENT_DIGITS} digits"
        if _POWER.search(_LETTER_TO_A_DIGIT.sub("", exponent)) or _POWER.match(text, end):
            return "tower of exponents"
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


def math_verify_verdict(answer: str, reference: str) -> bool:
    """math-verify's verdict. May take unbounded time: run it where it can be killed. Raises MemoryError only, and only
    where math-verify doesn't itself count one as inequality.

    Its own alarm-based timeouts are off: they need the main thread, and don't interrupt C code.
    """
    from math_verify import verify

    wanted, given = _parse(normalise(reference)), _parse(normalise(answer))
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

    try:
        return parse(f"\\boxed{{{answer}}}", _extraction(), parsing_timeout=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:  # its parser raises anything on malformed LaTeX
        return []


def _only_rounded(gold: Any, target: Any) -> bool:
    """True for unequal numbers so small that math-verify, which rounds floats to six decimals, takes both for zero."""
    try:
        wanted, given = complex(gold.evalf()), complex(target.evalf())
    except (AttributeError, TypeError, ValueError, OverflowError):
        return False
    size = max(abs(wanted), abs(given))
    return size < 1e-3 and abs(wanted - given) > 1e-3 * size

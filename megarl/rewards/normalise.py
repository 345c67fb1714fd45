"""One spelling for answers that differ in typesetting only, without the units that they carry."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from math import factorial
from unicodedata import normalize

from megarl.rewards.lists import DOTS
from megarl.rewards.units import split_unit, unit_named

MAX_CHARACTERS = 512  # a longer answer counts only if equal as a string
MAX_WRAPPINGS = 2  # of a whole answer, such as \underline{{5}}

_CHARACTERS = {
    "−–": "-",
    "×": r"\times ",
    "÷": r"\div ",
    "·⋅": r"\cdot ",
    "±": r"\pm ",
    "≈": r"\approx ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}",
    "π": r"\pi ",
    "θ": r"\theta ",
    "α": r"\alpha ",
    "β": r"\beta ",
    "λ": r"\lambda ",
    "°": r"^\circ ",
    "’′": "'",
    "”″": '"',
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
}
_UNICODE = str.maketrans({character: latex for characters, latex in _CHARACTERS.items() for character in characters})
_UNICODE |= {ord(c): r"\frac{{{}}}{{{}}}".format(*normalize("NFKC", c).split("⁄")) for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
_SUPERSCRIPTS = re.compile(r"(?<=[A-Za-z0-9)\]}])[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")

_TEXT = r"\\text\{([^{}]*)\}"
_SYMBOL = r"\\(?:pi|alpha|beta|gamma|theta|lambda|mu|omega|phi|sigma|rho|tau)(?![A-Za-z])"
_NUMBER = r"-?[0-9][0-9.,/:]*"


def _flat_units(match: re.Match[str]) -> str:
    r"""Exponents in text behind it: \text{m s^{-1}} as \text{m s}^{-1}."""
    outside = re.sub(r"(\^\{-?[0-9]\})", r"}\1\\text{", match[1])
    return re.sub(r"\\text\{ *\}", "", rf"\text{{{outside}}}")


def _primes(match: re.Match[str]) -> str:
    return "'" * len(re.findall(r"\\prime|'", match[0]))


# In this order. Spaces survive only between letters and digits, where dropping them would change the meaning.
_SPELLING: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"√\s*(?:\(([^()]*)\)|([0-9.]+|[A-Za-z]))", r"\\sqrt{\1\2}"),
        (r"∛\s*(?:\(([^()]*)\)|([0-9.]+|[A-Za-z]))", r"\\sqrt[3]{\1\2}"),
        (r"\^\s*\{\s*\\circ\s*\}", r"^\\circ"),
        (r"\^\s*(?:\{((?:\s*(?:\\prime(?![A-Za-z])|'))+)\s*\}|(\\prime(?![A-Za-z])))", _primes),
        (DOTS.pattern, r"\\ldots "),
        (r"(?:\\\\|\\newline)\s*$", ""),
        (r"(?<=[0-9])''", '"'),
        (r"(?<=[0-9]),\\!\s*(?=[0-9]{3})", ""),
        (r"\\\$|[$€£¥]|(?<!\\)\\[()\[\]!]|\\(?:display|text|script)style(?![A-Za-z])", ""),
        (r"\\\\\[-?[0-9.]+ ?(?:mm|cm|pt|ex|em|in)\]", r"\\\\"),
        (r"\\degree(?![A-Za-z])", r"^\\circ"),
        (r"(?<=[0-9]) ?[xX] ?(?=10 ?\^)", r"\\times "),
        (r"\^ ?-([0-9]+)(?![0-9.])", r"^{-\1}"),
        (r"¢", r"\\text{ cents}"),
        (r"\\text ?\{[^{}\x00-\x7f]+\}$|[一-鿿]+$", ""),
        (
            r"^\(?([0-9A-F]+)\)?(?:\s|\\[ ,])*(?:\\text\s*\{)?\s*\(?(?:in )?base(?:\s|\\[ ,])*([0-9]+)\)?\s*\}?$",
            r"\1_{\2}",
        ),
        (r"^(?:\\text\s*\{|\()([0-9A-F]+)[})] ?_ ?(\{?[0-9]+\}?)$", r"\1_\2"),
        (r"^([0-9A-F]+) ?_ ?\{(?: ?\\text\s*\{)? ?(?:\(|base ?)\}?([0-9]+)\)?\}?\}$", r"\1_{\2}"),
        (r"\\sqrt ?\[([^\[\]]*)\] ?([0-9A-Za-z])", r"\\sqrt[\1]{\2}"),
        (r"\\lg(?![A-Za-z])", r"\\log_{10}"),
        (r"\\log_ ?\{?e\}?(?![A-Za-z])", r"\\ln "),
        (r"(\\log_ ?(?:\{[^{}]*\}|[0-9a-z])) ?([0-9]+)(?= ?\\(?:cdot|times))", r"\1(\2)"),
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s", " "),
        (r"\\(?:left|right)(?![A-Za-z])\s*\.?|\\[Bb]igg?[lr]?(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:text(?:bf|it|rm|sf|tt|normal)|math(?:rm|bf|it|sf|tt)|emph|mbox)\s*\{", r"\\text{"),
        (r"\\text\{([^{}]*\^\{-?[0-9]\}(?:[^{}]|\^\{-?[0-9]\})*)\}", _flat_units),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\\(l|r)angle(?![A-Za-z])", lambda match: "(" if match[1] == "l" else ")"),
        (r"\\(le|ge|ne)q(?:q|slant)?(?![A-Za-z])", r"\\\1 "),
        (r"\\lt(?![A-Za-z])|\\gt(?![A-Za-z])", lambda match: "<" if match[0] == r"\lt" else ">"),
        (r"<=|>=|(?<![0-9])!=", lambda match: {"<": r"\le ", ">": r"\ge ", "!": r"\ne "}[match[0][0]]),
        (r"\{,\}", ","),
        (r"\\?%", "%"),
        (r" +", " "),
        (rf"^ ?\\text\{{ ?({_NUMBER}) ?([A-Za-z][^{{}}0-9]*)\}}[ .]*$", r"\1\\text{\2}"),
        (rf"^ ?{_TEXT}[ .]*$", r"\1"),
        (r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", ""),
        (r"(?<=[0-9])\(([A-Za-z][A-Za-z ]{3,})\)$", r"\\text{\1}"),
        (r"^(?:\\(?:approx|therefore|Rightarrow|Longrightarrow|implies)(?![A-Za-z])|[=∴⇒]) ?", ""),
        (r"^\\\{\\\}$", r"\\emptyset"),
        (rf"\\(frac|sqrt) ?({_SYMBOL}) ?", r"\\\1{\2}"),
        (r"\\frac ?([0-9])|\\frac ([A-Za-z])", r"\\frac{\1\2}"),
        (rf"(\\frac\{{[^{{}}]*\}}) ?({_SYMBOL})", r"\1{\2}"),
        (r"(\\frac\{[^{}]*\}) ?([0-9A-Za-z])", r"\1{\2}"),
        (r"\\sqrt ?([0-9])|\\sqrt ([A-Za-z])", r"\\sqrt{\1\2}"),
        (r"\\sqrt\[([0-9]*[13579])\]\{-((?:[^{}+-]|\{[^{}]*\})+)\}", r"(-\\sqrt[\1]{\2})"),
        (r"([\^_])\{([0-9A-Za-z])\}(?![0-9A-Za-z])", r"\1\2"),
        (r"(?<=.)\.$", ""),
        (r"^([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))[eE]([+-]?[0-9]{1,4})(?=$| ?\\text\{| [A-Za-z])", r"\1\\times10^{\2}"),
        (r"(?<=[0-9]) ?(?:\\text\{ ?)?(?:percent|pct)\}?$", "%"),
    )
)
_LOOKS = re.compile(
    r"\\[hv]?phantom ?\{[^{}]*\}|\\(?:textcolor|color|colorbox) ?\{[^{}]*\}"
    r"|\\(?:bf|it|rm|sf|tt|large|Large|LARGE|huge|Huge|small|normalsize|boldmath|bfseries)(?![A-Za-z])"
)
_CHOOSE = re.compile(r"\{\s*([^{}]*?)\s*\\choose(?![A-Za-z])\s*([^{}]*?)\s*\}")
_BOLD = re.compile(r"\s*\*\*([^*]+)\*\*\s*")
_FACTORIAL = re.compile(r"(?<![\^0-9.,])(1[0-9]|20|[0-9])!(?!!)")
_CURRENCY = re.compile(r"\\\$|[€£]")
_ONLY_TEXT = re.compile(r"[\s$]*\\(?:text|math)[a-z]*\s*\{[^{}]*\}[\s$.]*")
_THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:[, ][0-9]{3})+(?:\.[0-9]+)?%?")
_WRAPPED = re.compile(
    r"[\s$]*(?:\\(?:underline|boldsymbol|bm|text(?:bf|it|rm)?|math(?:rm|bf|it))\s*)?\{(.*)\}[\s$.]*", re.DOTALL
)


def normalise(answer: str, unit: str = "") -> str:
    """One spelling for answers that differ in typesetting only: spacing, delimiters, units, `1,234`, a final period.

    With `unit`, bare letters that make this unit are one too: the m of `5 m`, which else is a variable.
    """
    answer = split_unit(spell(answer), unit)[0].removeprefix("+")
    answer = _FACTORIAL.sub(lambda match: _computed(match, whole=match[0] == answer), answer)
    if _THOUSANDS.fullmatch(answer):
        answer = answer.replace(",", "").replace(" ", "")
    return answer


def _computed(factorial_: re.Match[str], whole: bool) -> str:
    value = str(factorial(int(factorial_[1])))
    return value if whole else f"({value})"


def unit_of(answer: str, expected: str = "") -> str:
    """The one spelling of the answer's unit, such as cm^2 or mi/h; empty where it has none."""
    unit = split_unit(spell(answer), expected)[1]
    if currency := _CURRENCY.search(answer):
        per = unit[unit.find("/") :] if "/" in unit else ""
        return f"{unit_named(currency[0].removeprefix(chr(92)))}{per}"
    return unit


@lru_cache(maxsize=1024)  # asked for by several steps about the same answer
def spell(answer: str) -> str:
    """One spelling for what differs in typesetting only, units kept."""
    answer = _CHOOSE.sub(r"\\binom{\1}{\2}", _LOOKS.sub("", answer))
    if bold := _BOLD.fullmatch(answer):
        answer = bold[1]
    for _ in range(MAX_WRAPPINGS):
        wrapped = _WRAPPED.fullmatch(answer)
        if wrapped and _is_group(wrapped[1]) and not _ONLY_TEXT.fullmatch(answer):
            answer = wrapped[1]
    answer = _SUPERSCRIPTS.sub(lambda match: f"^{{{match[0].translate(_SUPERSCRIPT)}}}", answer).translate(_UNICODE)
    for pattern, replacement in _SPELLING:
        answer = pattern.sub(replacement, answer)
    return _ungrouped(answer)


def _ungrouped(text: str) -> str:
    """Digits without the commas of thousands inside an expression; in brackets only of ,000."""
    if "," not in text or _THOUSANDS.fullmatch(text):
        return text
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"[(\[]|[)\]]|(?<![0-9.,_^])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])", text):
        if match[0] in "([":
            depth += 1
        elif match[0] in ")]":
            depth -= 1
        elif depth == 0 or (",000" in match[0] and not re.fullmatch(r"[(\[]-?[0-9,]+[)\]]", text)):
            parts.append(text[start : match.start()] + match[0].replace(",", ""))
            start = match.end()
    return "".join(parts) + text[start:]


def _is_group(text: str) -> bool:
    """Whether every brace in the text has its partner in it."""
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += (brace == "{") - (brace == "}")
        if depth < 0:
            return False
    return depth == 0

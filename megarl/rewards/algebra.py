"""Equality by computer algebra: math-verify's parser and sympy. May take unbounded time: run it where it can be killed.

math-verify's own alarm-based timeouts are off: they need the main thread, and don't interrupt C code. What is raised is
MemoryError only.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

from megarl.rewards.identity import differ, same_value
from megarl.rewards.rational import DECIMAL
from megarl.rewards.relations import split_sides

RANKED_DIGITS = 40
TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_MIXED = re.compile(r"(?<![A-Za-z0-9.)}\]^_])([0-9]+) ?(\\frac\{[0-9]+\}\{[0-9]+\})")
# Where the parser, which takes 2(6) for the mixed number 2 + 6, must be told that it is a product.
_PRODUCT = re.compile(
    r"(?<=\))(?=[0-9(]|\\frac)|(?<![A-Za-z0-9_^.])(?P<factor>[0-9.]+) ?(?=\(|\\frac|\{)"
    r"|(?P<fraction>\\(?:frac|[dt]?binom)\{[^{}]*\}\{[^{}]*\}) ?(?=\(|\\frac|[0-9{])"
)
_FACTOR_BEHIND = re.compile(  # sin x (y+1), of which the parser takes all for the argument
    rf"({TRIGONOMETRIC.pattern}(?:\^(?:[0-9]|\{{[0-9]\}}))?) ?(\\(?:theta|phi|alpha|beta|omega|varphi)|[a-z]) ?(?=\()"
)
_DEGREES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\^\\circ")


def equal(answer: str, reference: str) -> bool:
    r"""Equality of normalised answers or of two equations; behind \approx the reference is a decimal that may round."""
    from math_verify import verify
    from sympy import Set

    if reference.startswith(r"\approx"):
        return _is_rounded_by(answer, reference.removeprefix(r"\approx "))
    given_sides, wanted_sides = split_sides(answer), split_sides(reference)
    if len(given_sides) == len(wanted_sides) == 2:
        return _same_up_to_a_factor(given_sides, wanted_sides)
    is_real = not (_is_complex(answer) or _is_complex(reference))
    wanted, given = _parse(reference, is_real), _parse(answer, is_real)
    for gold in wanted:
        for target in given:
            try:
                verdict = same_value(target, gold)
                if verdict is None and not differ(target, gold):
                    target, gold = (side.doit() if isinstance(side, Set) else side for side in (target, gold))
                    verdict = verify(gold, target, timeout_seconds=None, raise_on_error=True)
                if verdict:
                    return True
            except MemoryError:
                raise
            except Exception:  # sympy raises anything on expressions that it can't compare: these don't match
                continue
    return False


def number(answer: str) -> tuple[Fraction, Fraction] | None:
    """Real and imaginary part to RANKED_DIGITS, unknowns taken at a fixed point; None for what is no number there."""
    from sympy import Rational

    try:
        value = _parse(answer)[0]
        symbols = sorted(value.free_symbols, key=str)
        point = {symbol: Rational(place + 3, 2 * place + 7) for place, symbol in enumerate(symbols)}
        parts = value.subs(point).evalf(RANKED_DIGITS + 10).as_real_imag()
        return tuple(round(Fraction(str(part)), RANKED_DIGITS) for part in parts)  # type: ignore[return-value]
    except MemoryError:
        raise
    except Exception:  # sympy raises anything on what it can't evaluate
        return None


def forget() -> None:
    """Empty sympy's cache, so that no answer's time and so no verdict depends on the answers before it."""
    from sympy.core.cache import clear_cache

    clear_cache()
    _parse.cache_clear()


def _is_rounded_by(answer: str, decimal: str) -> bool:
    """Whether the decimal is the answer to half a unit of its last digit."""
    match = DECIMAL.fullmatch(decimal)
    meanings = _parse(answer, not _is_complex(answer))
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
        is_real = not any(map(_is_complex, given + wanted))
        (a, b), (c, d) = ([_parse(side, is_real)[0] for side in sides] for sides in (given, wanted))
        ratio = simplify(fraction(together(a - b))[0] / fraction(together(c - d))[0])
        return bool(ratio.is_number and ratio.is_finite and ratio.is_nonzero)
    except MemoryError:
        raise
    except Exception:  # what can't be read, subtracted or divided is no equal equation
        return False


@cache
def _spelling() -> Any:
    """What math-verify repairs in LaTeX before it reads it: not `2h`, which it would take for 2 of a unit."""
    from math_verify import LatexNormalizationConfig

    return LatexNormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last")


@lru_cache(maxsize=512)  # a list compares each part with several
def _parse(answer: str, is_real: bool = True) -> list[Any]:
    """What the answer can mean: a sympy object, or text, or both; empty if math-verify's parser can't read it.

    Of two answers both must be read as real, or neither: a real x and a complex one are different symbols.
    """
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy, normalize_latex

    if TRIGONOMETRIC.search(answer):
        answer = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", answer)
        answer = _FACTOR_BEHIND.sub(r"(\1 \2)\\cdot ", answer)
    try:
        answer = _with_figures(_DERIVATIVE.sub(_derivative, answer))
        named = _with_names(_PRODUCT.sub(r"\g<factor>\g<fraction>\\cdot ", _MIXED.sub(r"(\1+\2)", answer)))
        if _UNREADABLE.search(named):
            return []
        text = normalize_latex(f"\\boxed{{{named}}}", config=_spelling())
        case_sensitive = ConversionConfig(lowercase_symbols=False)
        meaning = latex2sympy(text, is_real=is_real, normalization_config=None, conversion_config=case_sensitive)
        return [_with_imaginary_unit(meaning), text]
    except MemoryError:
        raise
    except Exception:  # its parser raises anything on malformed LaTeX
        return []


def _is_complex(text: str) -> bool:
    from math_verify.grader import should_treat_as_complex

    return bool(should_treat_as_complex(text))


# What the parser would drop or reorder: a prime or transpose of more than a name, zeros in front, as in (1,000), an
# operator d/dx, and a cross product.
_UNREADABLE = re.compile(
    r"\\frac\{(?:d|\\partial)(?:\^[0-9])?\}|\\times ?\\(?:vec|overrightarrow|hat|variable|nabla)"
    r"|['\"]|\\prime|(?<!matrix\})\^\{?(?:T|\\top|\\intercal|\\dagger)(?![A-Za-z])|,0[0-9]"
)
_COMMAND = r"\\(?:begin|end|variable|operatorname|mathbb|mathcal|mathfrak)\{[^{}]*\}|\\text\{[^{}]{2,}\}"
_LETTER = (
    r"\\text\{(?P<roman>[A-Za-z])\}"
    r"|\\(?:(?:var)?(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon"
    r"|phi|chi|psi|omega)|Delta|Theta|Lambda|Xi|Sigma|Upsilon|Phi|Psi|Omega|ell)(?![A-Za-z])|[A-Za-z]"
)
_ACCENT = r"\\(?:bar|overline|vec|overrightarrow|hat|tilde|widetilde|dot|ddot)\{[A-Za-z ]+\}"
_SUBSCRIPT = r"_(?:\{(?:[^{}]|\{[^{}]*\})*\}|\\[A-Za-z]+|[0-9A-Za-z])"
_TRANSPOSE = r"\^(?:\{(?:T|\\top|\\intercal|\\dagger)\}|(?:T|\\top|\\intercal|\\dagger)(?![A-Za-z]))"
_NAME = re.compile(
    rf"{_COMMAND}|(?P<letter>{_ACCENT}|{_LETTER})(?P<under>{_SUBSCRIPT})?"
    rf"(?P<marks>'+|(?P<transpose>{_TRANSPOSE})|\^\{{\([0-9]\)\}})?(?P<behind>{_SUBSCRIPT})?"
    r"(?P<argument>\((?:[0-9]+|[A-Za-z])\))?|\\(?:[A-Za-z]+|.)",
    re.DOTALL,
)
_DIFFERENTIAL = re.compile(r"(?<![A-Za-z])d ?$")


def _with_names(text: str) -> str:
    r"""The text with a variable's name for each name that the parser or math-verify would take for another.

    They drop primes and transposes, take I for the imaginary unit and compare long names in lower case.
    """
    return _NAME.sub(_name, text)


def _name(match: re.Match[str]) -> str:
    letter, marks, argument = match["roman"] or match["letter"], match["marks"] or "", match["argument"] or ""
    if not letter:
        return match[0]
    before = match.string[max(0, match.start() - 16) : match.start()]
    under = re.sub(r"\\text|[^A-Za-z0-9+*/=<>,-]", "", (match["under"] or "") + (match["behind"] or ""))
    if letter == "e" and match["transpose"]:
        return f"e^{{{_variable('T')}}}{match['behind'] or ''}{argument}"
    if not (marks or under):
        is_small = letter != r"\gamma" and letter.lstrip("\\")[0].islower() and not re.fullmatch(_ACCENT, letter)
        if is_small or (argument and letter not in "EI") or _DIFFERENTIAL.search(before):
            return match[0]
        if letter == "T" and before.endswith((r"matrix}^", r"matrix}^{")):
            return match[0]
    name = _variable(f"{letter}{'^T' if match['transpose'] else marks}{'_' if under else ''}{under}{argument}")
    return f"{{{name}}}" if before.endswith(("^", "_")) else name


_OF = r"(?:[A-Za-z]|\\[a-z]+|\\[A-Z][a-z]+)(?:_(?:[A-Za-z0-9]|\{[^{}]*\}))?"
_D = r"(?:(?<![A-Za-z\\])d|\\partial|\\text\{d\}) ?"
_DERIVATIVE = re.compile(
    rf"\\frac\{{{_D}(?P<twice>\^2 ?)?(?P<of>{_OF})\}}\{{{_D}(?P<by>{_OF})(?:\^2)?\}}"
    rf"|{_D}(?P<line>{_OF}) ?/ ?d(?P<along>{_OF})(?![A-Za-z])|\\(?P<dots>d?dot)\{{(?P<dotted>{_OF})\}}"
)
_FIGURE = re.compile(r"\\(?P<kind>(?:measured)?angle|triangle) ?(?P<points>(?:[A-Z](?:_[0-9]|_\{[0-9]\})? ?){1,4})")
_POINT = re.compile(r"[A-Z][_0-9]*")
_SEGMENTS = re.compile(r"(?<![A-Za-z\\])[A-Z]{2}(?![A-Za-z])")


def _derivative(match: re.Match[str]) -> str:
    r"""A name for a derivative, which the parser would evaluate to 0; a dot is one by t."""
    twice = match["twice"] or match["dots"] == "ddot"
    of, by = match["of"] or match["line"] or match["dotted"], match["by"] or match["along"] or "t"
    return _variable(f"d{'2' if twice else ''}{of}/d{by}".replace(" ", ""))


def _figure(match: re.Match[str]) -> str:
    points = _POINT.findall(re.sub("[{}]", "", match["points"]))
    return _variable(f"{match['kind'][-5:]} {' '.join(min(points, points[::-1]))}")


def _with_figures(text: str) -> str:
    """Angles and, where there are no other letters, lengths AB as one name each, the same for BA."""
    text = _FIGURE.sub(_figure, text)
    rest = re.sub(r"\\variable\{[^{}]*\}|\\[A-Za-z]+", "", text)
    if len(_SEGMENTS.findall(rest)) > 1 and not re.search("[A-Za-z]", _SEGMENTS.sub("", rest)):
        text = _SEGMENTS.sub(lambda match: _variable("".join(sorted(match[0]))), text)
    return text


def _variable(name: str) -> str:
    return rf"\variable{{v{name.encode().hex()}}}"


def _with_imaginary_unit(meaning: Any) -> Any:
    """The parser reads i as a variable, so that (1+i)^2 would not be 2i."""
    from sympy import Expr, I

    units = [symbol for symbol in getattr(meaning, "free_symbols", ()) if symbol.name == "i"]
    return meaning.subs(units[0], I) if units and isinstance(meaning, Expr) else meaning

"""Whether two sympy expressions have the same value: exact for rationals, else to 60 digits at several points.

math-verify subtracts floats, for which 1 - 2^-99 and 1 - 2^-100 are the same number. Here a difference counts against
the size of what is compared, and is computed with as many digits as it takes to see it.
"""

from __future__ import annotations

from typing import Any

DIGITS = 60  # that equal values share
WORKING_DIGITS = 400  # to which a difference may cancel
MIN_SIGNIFICANT = 4  # digits of a decimal that stands for an irrational number
ROUNDED_TO = 6  # decimal places of it
REALS = frozenset("xyz")  # of either sign; every other symbol is a positive quantity
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def same_value(answer: Any, reference: Any) -> bool | None:
    """The verdict on two expressions; None where they are no such, or have no value at enough points."""
    from sympy import Derivative, Expr, Float, Integral, MatrixBase, Product, Sum, nan, oo, zoo
    from sympy.core.function import AppliedUndef

    sides = (answer, reference)
    if not all(isinstance(side, Expr) and not isinstance(side, MatrixBase) for side in sides):
        return None
    if any(side.has(nan, zoo) for side in sides):
        return False
    if any(side.has(oo, -oo, Derivative, Integral, Sum, Product, AppliedUndef) for side in sides):
        return None
    answer, reference = (side.doit() for side in sides)
    has_decimals = answer.has(Float) or reference.has(Float)
    exact = [_without_decimals(side) for side in (answer, reference)]
    symbols = sorted(exact[0].free_symbols | exact[1].free_symbols, key=str)
    if not symbols:
        verdict = _same_number(*exact)
        if verdict is False and has_decimals:
            return _is_rounded(*exact)
        return verdict
    if exact[0].free_symbols != exact[1].free_symbols and has_decimals:
        return None
    verdicts = [_same_at(dict(point), *exact) for point in _points(symbols)]
    if False in verdicts:
        return None if has_decimals and not any(side.is_number for side in exact) else False
    return True if verdicts.count(True) > 1 else None


def differ(answer: Any, reference: Any) -> bool:
    """Whether a value of one side, or of its parts, is none of the other's: elements, entries, ends of intervals."""
    from sympy import FiniteSet, MatrixBase, Set, Tuple

    sides = (answer, reference)
    if all(isinstance(side, MatrixBase) for side in sides):
        return answer.shape != reference.shape or any(map(differ, answer, reference))
    if all(isinstance(side, Tuple) for side in sides) or all(isinstance(side, FiniteSet) for side in sides):
        return any(all(differ(part, other) for other in reference.args) for part in answer.args)
    if all(isinstance(side, Set) for side in sides):
        return differ(*(side.doit().boundary for side in sides))
    return same_value(answer, reference) is False


def _points(symbols: list[Any]) -> list[list[tuple[Any, Any]]]:
    """Two where all are positive, and two where real unknowns are not."""
    from sympy import Rational

    points = []
    for turn in range(4):
        point = []
        for place, symbol in enumerate(symbols):
            prime = _PRIMES[(place + 3 * turn) % len(_PRIMES)]
            value = Rational(prime * 7 + turn + place, 2 * prime + 5)
            point.append((symbol, -value if turn > 1 and symbol.name in REALS and (place + turn) % 2 == 0 else value))
        points.append(point)
    if any(symbol.name in REALS for symbol in symbols):
        points += [[(symbol, -value if symbol.name in REALS else value) for symbol, value in points[0]]]
    return points


def _same_at(point: dict[Any, Any], answer: Any, reference: Any) -> bool | None:
    """Whether the values at a point are equal; None where a root or logarithm has no real argument there."""
    from sympy import Pow, log

    for side in (answer, reference):
        inner = [power.base for power in side.atoms(Pow) if not power.exp.is_integer]
        inner += [logarithm.args[0] for logarithm in side.atoms(log)]
        if any(_is_negative(argument.subs(point)) for argument in inner if argument.free_symbols):
            return None
    return _same_number(answer.subs(point), reference.subs(point))


def _is_negative(value: Any) -> bool:
    number = value.evalf(15)
    return not number.is_real or bool(number < 0)


def _same_number(answer: Any, reference: Any) -> bool | None:
    from sympy import nan, zoo

    if answer == reference:
        return not answer.has(nan, zoo)
    if answer.is_Rational and reference.is_Rational:
        return False
    size = max(abs(answer.evalf(15, maxn=WORKING_DIGITS)), abs(reference.evalf(15, maxn=WORKING_DIGITS)))
    difference = abs((answer - reference).evalf(15, maxn=WORKING_DIGITS))
    if not (size.is_Float or size.is_Rational) or not (difference.is_Float or difference.is_Rational):
        return None
    if size == 0:
        return True
    return bool(difference <= size * type(size)(10) ** -DIGITS)


def _without_decimals(expression: Any) -> Any:
    """With each float as the fraction that its shortest decimal names."""
    from sympy import Float, Rational

    return expression.xreplace({number: Rational(str(number)) for number in expression.atoms(Float)})


def _is_rounded(answer: Any, reference: Any) -> bool:
    """Whether a decimal of several digits gives the other side, an irrational number, to six places."""
    if answer.is_Rational and reference.is_Rational:
        return False
    decimal = next((side for side in (answer, reference) if side.is_Rational), None)
    if decimal is not None:
        digits = str(abs(decimal.p) * 10**40 // decimal.q).strip("0")
        if len(digits) < MIN_SIGNIFICANT:
            return False
    error, size = abs((answer - reference).evalf(15, maxn=WORKING_DIGITS)), abs(reference.evalf(15))
    return bool(error <= min(1, size) * 10**-ROUNDED_TO * 0.5) if error.is_Float else False

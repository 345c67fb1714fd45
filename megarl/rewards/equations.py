r"""Chains of equations and what they answer: `m+n = 5`, `x = \frac{10}{4} = 2.5`, `\sqrt{2} \approx 1.414`."""

from __future__ import annotations

from collections.abc import Callable

from megarl.rewards.lists import all_of
from megarl.rewards.normalise import normalise, spell, unit_of
from megarl.rewards.rational import DECIMAL
from megarl.rewards.relations import is_name, names_quantity

Compare = Callable[[str, str], bool | None]  # of sides as they stand, or of normalised ones


def same_equations(given: list[str], wanted: list[str], same: Compare, value: Compare, is_rounded: bool) -> bool | None:
    """Chains of sides. One that answers a value is right where every side names it or equals it; one that answers an
    equation where it gives the same name the same value, has the same sides, or differs from it by a factor.
    """
    if len(wanted) == 1:
        units = {unit_of(side) for side in given}
        if len(units) == len(given) and "" not in units:
            given = given[-1:]  # 1 hour = 60 minutes converts
        sides = [side for side in given if not names_quantity(side, wanted[0])]
        return _all_equal([(side, wanted[0]) for side in sides], same, value, is_rounded)
    if len(given) == 1:
        if all(map(is_name, wanted)):
            return False
        sides = [side for side in wanted if not (is_name(side) and names_quantity(side, given[0]))]
        return _all_equal([(given[0], side) for side in sides], same, value, is_rounded)
    (names, values), (wanted_names, wanted_values) = _definition(given), _definition(wanted)
    if names & wanted_names and values and wanted_values:
        return all_of(same(side, wanted_values[-1]) for side in values)
    if names and wanted_names and values and wanted_values and any("(" in name for name in names | wanted_names):
        return False
    if len(given) != 2 or len(wanted) != 2:
        return False
    pairings = [all_of(map(same, given, sides)) for sides in (wanted, wanted[::-1])]
    if True in pairings:
        return True
    return value("=".join(map(normalise, given)), "=".join(map(normalise, wanted)))


def _definition(sides: list[str]) -> tuple[set[str], list[str]]:
    """The names among the sides of a chain, in one spelling, and its other sides."""
    return {spell(side) for side in sides if is_name(side)}, [side for side in sides if not is_name(side)]


def _all_equal(pairs: list[tuple[str, str]], same: Compare, value: Compare, is_rounded: bool) -> bool | None:
    """Whether all are equal; with `is_rounded` all but one may be so to the digits that they give."""
    verdicts = [same(answer, reference) for answer, reference in pairs]
    if all(verdict is False for verdict in verdicts):
        return False
    if is_rounded:
        verdicts = [
            _rounds(*pair, value) if verdict is False else verdict
            for pair, verdict in zip(pairs, verdicts, strict=True)
        ]
    return all_of(verdicts)


def _rounds(answer: str, reference: str, value: Compare) -> bool | None:
    """Whether one of two unequal values is a decimal that rounds the other."""
    answer, reference = normalise(answer), normalise(reference)
    verdicts = [
        value(exact, rf"\approx {decimal}")
        for exact, decimal in ((answer, reference), (reference, answer))
        if DECIMAL.fullmatch(decimal)
    ]
    return True if True in verdicts else None if None in verdicts else False

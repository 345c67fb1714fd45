r"""The math reward: an answer against a reference. Pure functions of text, no processes.

An answer goes through `fast_verdict` (equal strings, exact rationals), then `guards.guard` (what must not reach a
computer algebra system), then `math_verify_verdict`. Of these only the last can be slow; megarl.rewards.pool runs it in
processes that it can kill. Text of a model is parsed, never evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from megarl.rewards.algebra import TRIGONOMETRIC, equal, forget, number
from megarl.rewards.choices import choice
from megarl.rewards.equations import same_equations
from megarl.rewards.library import objects, same_by_math_verify
from megarl.rewards.lists import DOTS, all_of, match_lists, split_answers
from megarl.rewards.normalise import MAX_CHARACTERS, normalise, spell, unit_of
from megarl.rewards.prose import bare, phrase, same_phrase
from megarl.rewards.rational import rational, same_ratio, same_rational
from megarl.rewards.relations import (
    APPROXIMATELY,
    as_point,
    as_set,
    coordinates,
    is_name,
    named_parts,
    split_sides,
)

_WORD = re.compile(r"\(?([A-Za-z][A-Za-z '-]*)\)?")
_HYPHENATED = re.compile(
    r"[A-Za-z ']{4,}(?:-[A-Za-z ']{4,})+"
)  # of shorter parts it is a difference, unless set as text
_TEXT_ONLY = re.compile(r"\s*\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox)\s*\{[^{}]*\}[\s.]*")
_FUNCTION = re.compile(rf"{TRIGONOMETRIC.pattern}|\\det|\(")
_IN_BASE = re.compile(r"([0-9][0-9A-F]*)_(?:([0-9])|\{([0-9]+)\})")
_DATE = re.compile(r"[0-9]{4}([-/])[01]?[0-9]\1[0-3]?[0-9]|[0-3]?[0-9]([-/])[0-3]?[0-9]\2[0-9]{4}")
_TRUTH = re.compile(r"t|f|true|false|y|n|yes|no", re.IGNORECASE)
_INEQUALITY = re.compile(
    r"[<>≤≥≠∪]|\\(?:le|ge|lt|gt|ne)(?:q|qslant)?(?![A-Za-z])|\\cup(?![A-Za-z])|\\in(?:fty)?(?![A-Za-z])|∈|setminus"
)

_NATURAL = re.compile(r"\\(?:ln|log ?_ ?(?:e|\{e\}))(?![A-Za-z])")
_LOGARITHM = re.compile(r"\\log(?![A-Za-z]| ?_)")
_NUMBERED = re.compile(r"([A-Za-z])_\{?[0-9]\}?=(.*)")
_ENCLOSED = re.compile(r"[(\[].+[)\]]")
_BRACKETED = re.compile(r"\([^()]*\)")
_HALVES = ("am", "pm")
_CLOCK = re.compile(r"([0-9]{1,2})(?::([0-9]{2}))?")

Rank = tuple[int, Fraction | int, Fraction | int, str]
Number = Callable[[str], tuple[Fraction, Fraction] | None]  # normalised answer -> its value; None: it has none
Value = Callable[[str, str], bool | None]  # normalised answer and reference -> equal; None: undecided


def fast_verdict(answer: str, reference: str) -> bool | None:
    """The verdict where strings or exact arithmetic settle it; None where they don't.

    Rationals are compared exactly (0.333 is not 1/3). A percentage matches its number and its fraction. What is set
    as text is a word, not a product of letters. A base subscript or a unit may be left out but not be another.
    A reference of several answers (`split_answers`) wants all of them, in any order.
    """
    if answer.strip() == reference.strip():
        return True
    if max(len(answer), len(reference)) > MAX_CHARACTERS:
        return None
    verdict = compare(answer, reference, lambda *_: None, lambda _: None)
    return None if verdict is False and not _is_final(answer, reference) else verdict


def _is_final(answer: str, reference: str) -> bool:
    """Whether our own False stands: two numbers, or what math-verify must not be asked about."""
    are_numbers = all(rational(normalise(side)) is not None for side in (answer, reference))
    return are_numbers or objects(answer, reference)


def compare(answer: str, reference: str, value: Value, number: Number) -> bool | None:
    """By what stands on both sides: intervals, points, or lists, whose parts `_single` compares."""
    if answer.strip() == reference.strip():
        return True
    answer, reference = bare(answer), bare(reference)
    if _NATURAL.search(reference):
        answer = _LOGARITHM.sub(r"\\ln", answer)

    def same(left: str, right: str) -> bool | None:
        return _single(left, right, value)

    def ranked(part: str) -> list[Rank]:
        part = spell(split_sides(part)[-1])
        return [_rank(end, number) for end in (coordinates(part) if _ENCLOSED.fullmatch(part) else [part])]

    if _INEQUALITY.search(answer) or _INEQUALITY.search(reference):
        given_set, wanted_set = as_set(answer), as_set(reference)
        if given_set and wanted_set:
            if given_set[0] and wanted_set[0] and given_set[0] != wanted_set[0]:
                return False
            return given_set[1] == wanted_set[1] or value(given_set[1], wanted_set[1])
    given, wanted = split_answers(answer), split_answers(reference)
    if len(given) == len(wanted) == 1:
        return same(given[0], wanted[0])
    if (named_parts(given) and len(wanted) == 1) or (named_parts(wanted) and not named_parts(given)):
        ordered = as_point(answer) or given, as_point(reference) or wanted
        return len(ordered[0]) == len(ordered[1]) and all_of(map(same, *ordered))
    if _is_sequence(given) and _is_sequence(wanted):
        return len(given) == len(wanted) and all_of(map(same, given, wanted))
    verdict = match_lists(_unnumbered(given), _unnumbered(wanted), same, ranked)
    if verdict is False and len(given) != len(wanted) and _INEQUALITY.search(answer + reference):
        return value(answer, reference)  # two inequalities may be one interval
    return verdict


def _rank(part: str, number: Number) -> Rank:
    """What equal answers mostly share: a number's value, else the spelling."""
    part = normalise(part)
    exact = rational(part)
    value = (exact, 0) if exact is not None else number(part)
    return (0, *value, "") if value else (1, 0, 0, _tight(part).casefold())


def _unnumbered(parts: list[str]) -> list[str]:
    """x_1 = 1, x_2 = 2 as x = 1, x = 2: numbered solutions of one unknown."""
    numbered = [_NUMBERED.fullmatch(spell(part)) for part in parts]
    if len(parts) > 1 and all(numbered) and len({match[1] for match in numbered if match}) == 1:
        return [f"{match[1]}={match[2]}" for match in numbered if match]
    return parts


def _is_sequence(parts: list[str]) -> bool:
    """Whether these are truth values, or what goes on in dots: their order matters."""
    spelled = [spell(part) for part in parts]
    return any(map(DOTS.fullmatch, spelled)) or all(map(_TRUTH.fullmatch, spelled))


def _single(answer: str, reference: str, value: Value) -> bool | None:
    """One answer each: an equation, a choice's letter and what it chooses, or a value."""
    if answer.strip() == reference.strip():
        return True
    given, wanted = split_sides(answer), split_sides(reference)
    if len(given) > 1 or len(wanted) > 1:
        is_rounded = bool(APPROXIMATELY.search(answer + reference))
        return same_equations(given, wanted, lambda left, right: _plain(left, right, value), value, is_rounded)
    (letter, given_text), (wanted_letter, wanted_text) = choice(answer), choice(reference)
    if letter and wanted_letter and letter != wanted_letter:
        return False
    if letter and wanted_letter and not (given_text and wanted_text):
        return True
    if (letter and not given_text) or (wanted_letter and not wanted_text):
        return _plain(answer, reference, value)
    return _plain(given_text, wanted_text, value)


def _plain(answer: str, reference: str, value: Value) -> bool | None:
    """Two values, neither of them a list, a relation or a choice."""
    if answer.strip() == reference.strip():
        return True
    answer_unit, reference_unit = unit_of(answer, unit_of(reference)), unit_of(reference, unit_of(answer))
    if {answer_unit, reference_unit} in ({"°", ""}, {"°", "rad"}) and r"\pi" in spell(answer + reference):
        answer, reference = (
            rf"({normalise(side)})\cdot\frac{{\pi}}{{180}}" if unit == "°" else normalise(side)
            for side, unit in ((answer, answer_unit), (reference, reference_unit))
        )
        return value(answer, reference)
    if answer_unit and reference_unit and answer_unit != reference_unit:
        return False
    if answer_unit in _HALVES or reference_unit in _HALVES or (answer_unit == reference_unit == ""):
        times = [_CLOCK.fullmatch(normalise(side)) for side in (answer, reference)]
        if all(times) and (answer_unit or reference_unit):
            return len({(int(time[1]), int(time[2] or 0)) for time in times if time}) == 1
    said, wanted_said = _phrase(answer), _phrase(reference)
    if (said or wanted_said) and not (_TEXT_ONLY.fullmatch(answer) and not said):
        spoken, wanted_spoken = phrase(answer), phrase(reference)
        if spoken and wanted_spoken:
            return same_phrase(spoken, wanted_spoken, lambda a, b: _plain(a, b, value))
        if said and wanted_said:
            return same_phrase(said, wanted_said, lambda a, b: _plain(a, b, value))
        if len((said or wanted_said)[1]) > 1:  # type: ignore[index]
            return False
    answer_is_text, reference_is_text = _TEXT_ONLY.fullmatch(answer), _TEXT_ONLY.fullmatch(reference)
    answer, reference = normalise(answer, reference_unit), normalise(reference, answer_unit)
    if _tight(answer) == _tight(reference):
        return True
    if (answer_unit and reference.endswith("%")) or (reference_unit and answer.endswith("%")):
        return False
    given, wanted = (_word(side, bool(answer_is_text or reference_is_text)) for side in (answer, reference))
    if wanted and (reference_is_text or _is_word(wanted[1])):
        return given is not None and _same_word(given[1], wanted[1], bool(reference_is_text or answer_is_text))
    if given and wanted and (answer_is_text or _is_word(given[1])):
        return _same_word(given[1], wanted[1], bool(answer_is_text))
    if is_name(answer) and is_name(reference) and not _FUNCTION.match(answer):
        return False
    given, wanted = _IN_BASE.fullmatch(answer), _IN_BASE.fullmatch(reference)
    if given or wanted:
        if given and wanted:
            return False
        return (given[1] if given else answer) == (wanted[1] if wanted else reference) or None
    tuples = [coordinates(side) if _BRACKETED.fullmatch(side) else [] for side in (answer, reference)]
    if min(map(len, tuples)) > 1 and not any(re.match(r"-?0[0-9]", part) for parts in tuples for part in parts):
        return len(tuples[0]) == len(tuples[1]) and all_of(_single(a, b, value) for a, b in zip(*tuples, strict=True))
    dates = _DATE.fullmatch(answer), _DATE.fullmatch(reference)
    if all(dates) or (any(dates) and re.search("[-/]0", answer + reference)):
        return False
    if max(answer.count(":"), reference.count(":")) > 1:
        return same_ratio(answer.split(":"), reference.split(":"))
    verdict = same_rational(answer, reference)
    return value(answer, reference) if verdict is None else verdict


def _phrase(text: str) -> tuple[list[str], list[str]] | None:
    """Words and values in turn, where the text isn't one value and its unit."""
    value = normalise(text)
    return phrase(spell(text) if r"\text" in value else value)


def _tight(text: str) -> str:
    """Without spaces that change nothing: between a digit and a letter, and at a factorial's mark."""
    return re.sub(r"(?<=[0-9]) (?=[A-Za-z])|(?<=[a-z]) (?=[(0-9])| (?=!)|(?<=!) ", "", text)


def _word(text: str, is_text: bool) -> re.Match[str] | None:
    word = _WORD.fullmatch(text)
    return word if word and (is_text or "-" not in text or _HYPHENATED.fullmatch(word[1])) else None


def _is_word(text: str) -> bool:
    """Whether letters without any mark are a word or a figure's name. Two small letters are a product."""
    return len(text) > 2 or (len(text) == 2 and not text.islower())


def _same_word(answer: str, reference: str, is_text: bool) -> bool:
    answer, reference = answer.replace(" ", ""), reference.replace(" ", "")
    return answer == reference or ((is_text or len(answer) > 3) and answer.casefold() == reference.casefold())


def math_verify_verdict(answer: str, reference: str) -> bool:
    """math-verify's verdict. May take unbounded time: run it where it can be killed. Raises MemoryError only, and only
    where math-verify doesn't itself count one as inequality.
    """
    forget()
    if compare(answer, reference, equal, number):
        return True
    return not _is_final(answer, reference) and same_by_math_verify(answer, reference)


def prepare() -> None:
    """Imports and builds what the first answers would have to pay for."""
    for answer, reference in (
        (r"\frac{1}{2}", "x"),
        (r"\sqrt{8}\sin x^2", r"2\log_2 x"),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\{3,4\}"),
        ("2x+y=1", "y=x"),
    ):
        math_verify_verdict(answer, reference)

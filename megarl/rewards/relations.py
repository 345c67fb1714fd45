r"""What a relation answers: `m+n = 5` the value 5, `x \ge 2` the interval [2, oo), `x = 2, y = 3` the point (2, 3)."""

from __future__ import annotations

import re

from megarl.rewards.lists import split_answers, split_at
from megarl.rewards.normalise import spell

APPROXIMATELY = re.compile(r"\\(?:approx|simeq|doteq)(?![A-Za-z])|≈|≃")
_EQUALS = re.compile(rf"(?<![<>:=])(?<![^0-9]!)=(?!=)|{APPROXIMATELY.pattern}")

_GREEK = (
    r"\\(?:var)?(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi|omega"
    r"|Gamma|Delta|Theta|Lambda|Xi|Sigma|Phi|Psi|Omega|ell)(?![A-Za-z])"
)
_ATOM = r"-?(?:[0-9][0-9./]*|[A-Za-z]|\\[a-z]+|\\frac\{[^{}]*\}\{[^{}]*\}|[a-z]\([0-9A-Za-z]+\))"
_MARKS = (
    r"(?:'+|\^\\prime|\^\{(?:\\prime)+\}|\^\{-1\}(?=\())?(?:_(?:\{(?:[^{}]|\{[^{}]*\})*\}|\\?[A-Za-z]+|[0-9]))?"
    rf"(?:\({_ATOM}(?:,{_ATOM})*\)|(?<=[A-Z])\([^()]*\))?"
)
_LETTER = re.compile(rf"(?P<letter>{_GREEK}|\\text\{{[^{{}}]*\}}|[A-Z]+|[a-z])(?P<marks>{_MARKS})")
_FUNCTIONS = "sin|cos|tan|cot|sec|csc|det"
_SYMBOL = rf"(?:[A-Za-z]|{_GREEK})"
_OF_A_FIGURE = re.compile(  # not of an unknown: that is an equation to solve
    rf"\\(?:angle|measuredangle|triangle|{_FUNCTIONS}) ?(?:[A-Z]+|{_GREEK})|m\\angle ?[A-Z]+"
    rf"|\\(?:{_FUNCTIONS})\((?:[A-Z]+|{_GREEK}|\\angle ?[A-Z]+)\)|\\Pr ?(?:\([^()]*\)|\[[^\[\]]*\])"
    r"|[|\[][A-Z]{2,}[|\]]|\|(?:[zwA-Z])\||\|?\\(?:overline|bar|vec|overrightarrow|hat)\{[A-Za-z]+\}\|?"
    rf"|\\frac\{{(?:d|\\partial) ?{_SYMBOL}\}}\{{(?:d|\\partial) ?{_SYMBOL}\}}"
    r"|\\text\{[^{}]*\}[A-Z]+|[A-Za-z]{4,}|[A-Za-z]+(?: [A-Za-z]+)+"
)
_ARGUMENT = re.compile(r"^[^(]*")  # all but it
_COMMAND = re.compile(rf"(?!{_GREEK}|\\text\{{)\\(?:(?:begin|end)\{{[a-z]+\}}|[A-Za-z]+ ?)")
_CONSTANTS = {"e", "i"}


def split_sides(text: str) -> list[str]:
    r"""The sides of a chain of equations, also of approximate ones; a text that is none is one side."""
    return [side.strip() for side in split_at(_EQUALS, text) if side.strip(" $")]


def is_name(side: str) -> bool:
    r"""Whether this names one quantity: x, x_1, f(2), AB, \angle A, \sin A, \text{area}, (x,y)."""
    side = spell(side)
    if side.startswith("(") and side.endswith(")") and "," in side:
        names = side[1:-1].split(",")
        return all(map(is_name, names)) and names == sorted(names, key=_order)
    letter = _LETTER.fullmatch(side)
    if letter:
        return letter["letter"] not in _CONSTANTS and letter["letter"] not in _names(_ARGUMENT.sub("", side))[0]
    return bool(_OF_A_FIGURE.fullmatch(side))


def _order(name: str) -> tuple[bool, str]:
    """The alphabet, then Greek letters as they stand: (r, \\theta)."""
    return (True, "") if name.startswith("\\") else (False, name)


def names_quantity(side: str, value: str) -> bool:
    r"""Whether a side of an equation only names what has the value, and doesn't occur in it.

    That is a name, or an expression of several names without numbers: m+n, xy, AB/CD. `2x` and `x^2` are none: their
    equations are still to be solved.
    """
    if spell(side).casefold() == spell(value).casefold():
        return False
    names, rest = ({spell(side)}, "") if is_name(side) else _names(side)
    if names & _names(value)[0]:
        return False
    return is_name(side) or (len(names) > 1 and not re.search(r"[0-9<>,]", rest))


def _names(text: str) -> tuple[set[str], str]:
    """The names of which an expression is made, and what remains of it."""
    text = _COMMAND.sub(" ", spell(text))
    return {name[0] for name in _LETTER.finditer(text)} - _CONSTANTS, _LETTER.sub("", text)


_VARIABLE = rf"(?:[A-Za-z]|{_GREEK})(?:_(?:[0-9A-Za-z]|\{{[^{{}}]*\}}))?"
_ORDER = re.compile(r"(<|>|\\(?:le|ge|ne)(?![A-Za-z])) ?")
_OR = re.compile(r"\\cup(?![A-Za-z]) ?|\\lor(?![A-Za-z]) ?|(?:\\text\{ ?)?(?<![A-Za-z])or(?![A-Za-z]) ?\}? ?")
_AND = re.compile(r"[,;]|\\(?:land|wedge)(?![A-Za-z]) ?|(?:\\text\{ ?)?(?<![A-Za-z])and(?![A-Za-z]) ?\}? ?")
_WITHOUT = re.compile(r"\\(?:setminus|backslash|smallsetminus)(?![A-Za-z]) ?")
_SET_BUILDER = re.compile(rf"\\\{{({_VARIABLE})(?:\\in ?\\(?:mathbb|text) ?\{{?R\}}?)?(?:\\mid ?|[|:])(.*)\\\}}")
_MEMBER = re.compile(rf"({_VARIABLE})\\in(?![A-Za-z]) ?")
_INTERVAL = re.compile(r"[(\[].*[)\]]")
_TUPLE = re.compile(r"\(.*\)")
_REALS = re.compile(r"\\(?:mathbb|text) ?\{?R\}?")


def as_set(text: str) -> tuple[str, str] | None:
    r"""The variable ("" if none is named) and the set that inequalities, intervals and what joins them leave it.

    `x < 1 or x \ge 2` is x and (-\infty,1)\cup[2,\infty). None for anything else.
    """
    text = spell(text)
    builder = _SET_BUILDER.fullmatch(text)
    variables = {builder[1]} if builder else set()
    alternatives = []
    for alternative in split_at(_OR, builder[2] if builder else text):
        found = [_of_condition(condition.strip()) for condition in split_at(_AND, alternative)]
        variables |= {condition[0] for condition in found if condition and condition[0]}
        if None in found or len(variables) > 1:
            return None
        alternatives.append(_joined(r"\cap ", [condition[1] for condition in found if condition]))
    return (variables.pop() if variables else ""), _joined(r"\cup ", alternatives)


def _joined(sign: str, sets: list[str]) -> str:
    if len(sets) == 1:
        return sets[0]
    return sign.join(f"({part})" if re.search(r"\\cup|\\cap|\\setminus", part) else part for part in sets)


def _of_condition(text: str) -> tuple[str, str] | None:
    """The variable and the set of one interval or inequality, perhaps without some points."""
    text, *taken = split_at(_WITHOUT, text)
    without = "".join(rf"\setminus {points}" for points in taken)
    variable = ""
    if member := _MEMBER.match(text):
        variable, text = member[1], text[member.end() :]
    if _REALS.fullmatch(text):
        return variable, r"(-\infty,\infty)" + without
    if _INTERVAL.fullmatch(text) and len(coordinates(text)) == 2:
        return variable, text + without
    sides = _ORDER.split(text)
    if len(sides) not in (3, 5) or variable:
        return None
    place = 2 if len(sides) == 5 or re.fullmatch(_VARIABLE, sides[2]) else 0
    variable, below, above = sides[place], [], []
    if not re.fullmatch(_VARIABLE, variable):
        return None
    for i in range(1, len(sides), 2):
        sign, bound = sides[i], sides[i + 1 if i > place else i - 1]
        if not bound or variable in _names(bound)[0]:
            return None
        if sign == r"\ne":
            return (variable, rf"(-\infty,{bound})\cup({bound},\infty)" + without) if len(sides) == 3 else None
        closed = sign in (r"\le", r"\ge")
        if (sign in ("<", r"\le")) == (i > place):
            above.append(bound + ("]" if closed else ")"))
        else:
            below.append(("[" if closed else "(") + bound)
    if len(below) > 1 or len(above) > 1:
        return None
    return variable, ",".join([*(below or [r"(-\infty"]), *(above or [r"\infty)"])]) + without


def coordinates(text: str) -> list[str]:
    """What stands in the brackets of an interval or tuple. A single comma separates, so (1,200) are two."""
    inside = text[1:-1]
    return inside.split(",") if inside.count(",") == 1 else split_answers(inside)


def as_point(text: str) -> list[str] | None:
    r"""The coordinates of (1,2) in order, and of x = 1, y = 2 in the order of the names; None for anything else."""
    parts = split_answers(text)
    if len(parts) == 1:
        tuple_ = spell(text)
        return coordinates(tuple_) if _TUPLE.fullmatch(tuple_) else None
    named = named_parts(parts)
    return [value for _, value in sorted(named)] if named else None


def named_parts(parts: list[str]) -> list[tuple[str, str]] | None:
    """Name and value of each of several equations such as x = 1, y = 2; None unless all are for different names."""
    sides = [split_sides(part) for part in parts]
    if len(parts) < 2 or any(len(pair) != 2 or not re.fullmatch(r"[A-Za-z]", spell(pair[0])) for pair in sides):
        return None
    named = [(spell(name), value) for name, value in sides]
    return named if len({name for name, _ in named}) == len(named) else None

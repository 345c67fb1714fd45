"""What math-verify makes of two answers by itself: the last word where our own comparison finds no equality.

It reads more spellings than ours, but drops what it doesn't know (marks, words, bases, the case of letters), takes
points for sets and equates what rounds alike. So it is asked about plain mathematics only, of the same letters on both
sides.
"""

from __future__ import annotations

import re

from megarl.rewards.identity import differ
from megarl.rewards.lists import split_answers
from megarl.rewards.normalise import spell

_COMMANDS = (
    "frac|sqrt|cdot|times|div|pi|infty|cup|cap|setminus|in|emptyset|mathbb|binom|log|ln|exp|sin|cos|tan|arcsin"
    "|arccos|arctan|alpha|beta|delta|epsilon|theta|lambda|mu|nu|xi|rho|sigma|tau|phi|omega|mid|begin|end"
)
_PLAIN = re.compile(
    rf"(?:[0-9.,;+\-*/^_()\[\]{{}}|!& ]|\\\\|\\[{{}}]|\\(?:{_COMMANDS})(?![A-Za-z])|matrix|pmatrix|bmatrix"
    r"|(?<![A-Za-z])[A-Za-z]|(?<=[a-z])(?<![A-Za-z]{2})[a-z](?![A-Za-z]))*"
)
_MISREAD = re.compile(  # 2(6), bases, 4.5e33, (1,007), 20, 160, x^{(2)}, derivatives
    r"[0-9)}] ?\(|\) ?[0-9]|[0-9)}A-Z]_|[0-9]e|(?<![0-9.])0[0-9]|[0-9],[0-9]{3}(?![0-9])|[0-9] [0-9]|\^\{?\(|\\frac\{d"
)
_LETTER = re.compile(r"\\[A-Za-z]+|(?<![A-Za-z])[A-Za-z]{1,2}(?![A-Za-z])")
_OF_LETTERS = re.compile(r"\\(?:alpha|beta|delta|epsilon|theta|lambda|mu|nu|xi|rho|sigma|tau|phi|omega)")
_CURRENCY = re.compile(r"\\\$|[€£¥]")
_POINT = re.compile(r"[(\[][^()\[\]]*,")


def objects(answer: str, reference: str) -> bool:
    """Whether math-verify must not be asked."""
    sides = spell(answer).strip('"'), spell(reference).strip('"')
    if _CURRENCY.search(answer + reference) or any(not _PLAIN.fullmatch(s) or _MISREAD.search(s) for s in sides):
        return True
    letters, others = map(_letters, sides)
    if letters != others or any(letter.isupper() and letter.lower() in letters for letter in letters):
        return True
    if bool(_POINT.search(sides[0])) != bool(_POINT.search(sides[1])):
        return True
    parts = map(split_answers, sides)
    return any(len(set(own)) < len(own) or all(map(str.isalpha, own)) for own in parts)


def _letters(text: str) -> set[str]:
    found = {token for token in _LETTER.findall(text) if token[0] != "\\" or _OF_LETTERS.fullmatch(token)}
    return {letter for token in found for letter in ([token] if token[0] == "\\" else token)}


def same_by_math_verify(answer: str, reference: str) -> bool:
    """math-verify's verdict, unless values that it read differ exactly. May take unbounded time."""
    from math_verify import parse, verify

    try:
        sides = (rf"\boxed{{{spell(side).strip(chr(34))}}}" for side in (answer, reference))
        target, gold = (parse(side, parsing_timeout=None, raise_on_error=True)[0] for side in sides)
        if isinstance(target, str) or isinstance(gold, str) or differ(target, gold):
            return False
        return bool(verify(gold, target, timeout_seconds=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:  # it raises anything on what it can't read or compare
        return False

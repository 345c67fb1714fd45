r"""An answer that is a choice: `B`, `Option B`, `(B) 5`, `\textbf{(B) } 5`, `B: none of these`."""

from __future__ import annotations

import re

from megarl.rewards.normalise import spell

_WITH_CONTENT = re.compile(
    r"\\text\{(?:\((?P<a>[A-J])\)|(?P<b>[A-J])[).:])\}(?P<behind>.+)"
    r"|(?:\((?P<c>[A-J])\)|(?P<d>[A-J])[).])(?P<plain>(?:[0-9$]|\\(?:frac|sqrt|text|pi)).*)"
)
_LABEL = re.compile(r"\([A-J]\)|(?<![A-Za-z])[A-J][.):]")
_LETTER = re.compile(
    r"\(?(?P<a>[A-J])\)?|(?i:(?:option|choice|answer)s? ?\(?)(?P<b>[A-Ja-j])\)?"
    r"|\(?(?P<c>[A-Ja-j])\)?(?:[:.)]| ?-) ?[A-Za-z][A-Za-z ,'-]*"
)


def choice(text: str) -> tuple[str, str]:
    """The letter, and what it chooses if that is said; no letter and the text where this is no choice."""
    found = _WITH_CONTENT.fullmatch(spell(text))
    if found and not _LABEL.search(content := found["behind"] or found["plain"], 1):  # else all of the options
        return found["a"] or found["b"] or found["c"] or found["d"], content
    letter = _LETTER.fullmatch(re.sub(r"\\text\{([^{}]*)\}", r"\1", spell(text)).strip())
    return ((letter["a"] or letter["b"] or letter["c"]).upper(), "") if letter else ("", text)

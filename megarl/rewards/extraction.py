r"""Finds the answer in a response: the last `\boxed`, or leniently the last expression. One pass, no evaluation."""

from __future__ import annotations

import re

_BRACE_OR_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
# Between the boxes of one answer: what joins them, among delimiters, spacing and a short name of what comes.
_JOINING = (
    r"[,;/]|\\(?:lor|land|vee|wedge)(?![A-Za-z])"
    r"|(?<![A-Za-z\\])(?:and|or|either|nor|else|also|alternatively|possibly|perhaps|maybe|equivalently|resp)(?![A-Za-z])"
)
_CONNECTED = re.compile(
    rf"(?=.*?(?:{_JOINING}))(?:{_JOINING}"
    r"|[\s$*_~(){}.:]|\\(?:text|mbox|textbf|mathrm) ?\{|\\q?quad(?![A-Za-z])|\\[()\[\],;:! ]"
    r"|\\?[A-Za-z]{1,8}'*(?:_\{?[A-Za-z0-9]{1,4}\}?)?(?:\([A-Za-z0-9,]{1,5}\))?\s*=)*",
    re.IGNORECASE | re.DOTALL,
)
MAX_GAP = 64  # characters between two boxes of one answer


def boxed_answer(text: str) -> str | None:
    r"""The content of the last balanced `\boxed{...}` or `\fbox{...}`; None if there is none.

    Last means opened last, so `\boxed{x = \boxed{5}}` answers 5. Escaped braces don't count. Boxes with only a comma,
    "and", "or" or the like between them are one answer: `\boxed{2} and \boxed{3}` answers "2, 3", so naming several is
    no way to guess one.
    """
    open_braces: list[tuple[int, int] | None] = []  # where a box and its content start; None for any other brace
    boxes: list[tuple[int, int, int, int]] = []  # start of the content, its end, start and end of the box
    for token in _BRACE_OR_BOX.finditer(text):
        symbol = token.group()
        if symbol == "{":
            open_braces.append(None)
        elif symbol == "}":
            opened = open_braces.pop() if open_braces else None
            if opened:
                boxes.append((opened[1], token.start(), opened[0], token.end()))
        elif len(symbol) > 2:
            open_braces.append((token.start(), token.end()))
    if not boxes:
        return None
    boxes.sort()
    answer = [boxes.pop()]
    while boxes and 0 < answer[-1][2] - boxes[-1][3] <= MAX_GAP:
        if not _CONNECTED.fullmatch(text[boxes[-1][3] : answer[-1][2]]):
            break
        answer.append(boxes.pop())
    return ", ".join(text[start:end].strip() for start, end, *_ in reversed(answer))


TAIL = 4096  # characters at the end of a response in which a final expression is looked for
LONGEST = 256  # characters of such an expression

_NUMBER = r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|-?\.[0-9]+"
_EXPRESSION = re.compile(
    rf"(?<![\\$])\$\$(?P<display>[^$]{{1,{LONGEST}}})\$\$"
    rf"|(?<!\\)\\\[(?P<bracket>(?:[^\\]|\\(?!\])){{1,{LONGEST}}})\\\]"
    rf"|(?<![\\0-9$])\$(?P<dollar>(?:\\\$|[^\n$]){{1,{LONGEST}}})(?<!\\)\$"
    rf"|(?<!\\)\\\((?P<paren>(?:[^\\\n]|\\(?!\))){{1,{LONGEST}}})\\\)"
    rf"|(?P<fraction>-?\\frac\{{-?[0-9.]{{1,20}}\}}\{{-?[0-9.]{{1,20}}\}})"
    rf"|(?:^|(?<=[\s=*:($€£¥]))(?P<plain>(?:{_NUMBER})(?:[ ]?[*/^+×÷-][ ]?\(?(?:{_NUMBER})\)?)*)(?P<percent>\s?\\?%)?"
)
_ANCHORS = tuple(
    (re.compile(pattern, re.IGNORECASE), reach)
    for pattern, reach in (
        (r"final answer(?:[^\n]{0,100}?\bis\b)?[:\s*]*", 50),
        (r"answer\s*(?:\*\*)?\s*:", 50),
        (r"answer", 100),
    )
)


def lenient_answer(text: str) -> str | None:
    """The boxed answer if there is one, else the last expression: after "answer" where that word is, else the last.

    What math-verify's default extraction takes, on which the paper's grader is built: a formula in $, $$, \\( or \\[,
    or a bare number or arithmetic expression. Written anew because that extraction evaluates the text with sympy.
    """
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed
    tail = text[-TAIL:]
    found = list(_EXPRESSION.finditer(tail))
    for anchor, reach in _ANCHORS:
        for match in reversed(list(anchor.finditer(tail))):
            near = [e for e in found if 0 <= e.start() - match.end() <= reach]
            if near:
                return _content(_after_equals(tail, match.end(), near))
    return _content(found[-1]) if found else None


def _after_equals(text: str, start: int, found: list[re.Match[str]]) -> re.Match[str]:
    """The first of these expressions, or in a line such as `answer: 2 + 3 = 5` the one behind the last equals sign."""
    line = text[start:].split("\n", 1)[0]
    equals = start + line.rfind("=")
    behind = [match for match in found if match.start() > equals and "=" in line]
    return behind[0] if behind and found[0]["plain"] else found[0]


def _content(match: re.Match[str]) -> str:
    content = next(group for name, group in match.groupdict().items() if group and name != "percent")
    return content.strip().rstrip("*") + ("%" if match["percent"] else "")

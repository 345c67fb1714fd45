r"""What stands around an answer: `Answer: 5`, `f(x) = cx \text{ for any } c`, `5 \text{ (days)}`, a system in cases."""

from __future__ import annotations

import re
from collections.abc import Callable

from megarl.rewards.lists import all_of

_TEXT = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it)|mbox)\s*\{"
_BLANK = r"(?:\s|\\[,;:! ]|\\q?quad(?![A-Za-z])|~)*"
_LABEL = re.compile(
    rf"^{_BLANK}(?:{_TEXT})?\s*(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*[:=]?\s*\}}?\s*[:=]?", re.IGNORECASE
)
_DOMAIN = (
    r"[A-Za-z](?:\s*,\s*[A-Za-z])*\s*(?:\\in(?![A-Za-z])|∈)\s*"
    r"(?:\\(?:mathbb|mathbf|text|Bbb)\s*\{?\s*[NZQRC]\s*\}?|[ℕℤℚℝℂNZQRC])(?:\s*[\^_]\s*(?:\{[^{}]*\}|[+*0-9]))*"
)
_QUALIFIER = re.compile(
    rf"{_BLANK}(?:"
    rf"{_TEXT}\s*,?\s*(?:for|where|with)\s+(?:any|all|every|each|some|arbitrary|an?|integers?|constants?|real|natural|[A-Za-z]\s)(?!.*=).*"
    rf"|(?<![A-Za-z])for\s+(?:any|all|every|some|each)\s.*"
    rf"|,{_BLANK}(?:\\forall\s*)?{_DOMAIN}"
    rf"|[\[(]\s*(?:\\forall\s*)?{_DOMAIN}\s*[\])]"
    rf"|(?:\\forall)\s*{_DOMAIN}"
    r")\.?\s*\$?$",
    re.IGNORECASE | re.DOTALL,
)
_ENVIRONMENT = re.compile(
    r"(?:\\left\s*(?:\\\{|\.))?\s*\\begin\{(cases|array|aligned|gathered)\}(?:\{[lcr|]*\})?(?P<rows>.*?)\\end\{\1\}\s*(?:\\right\s*\.?)?",
    re.DOTALL,
)
_NUMBER = r"-?(?:[0-9]+(?:\.[0-9]+)?|[0-9]*\\[dt]?frac\s*(?:\{[^{}]*\}\s*\{[^{}]*\}|[0-9]{2})|[0-9]+/[0-9]+)"
_RESTATED = re.compile(
    rf"(?P<first>{_NUMBER}){_BLANK}(?:{_TEXT}\s*)?\(\s*(?:or|i\.e\.,?|=|\\approx)?\s*(?:\}}\s*)?(?P<second>{_NUMBER})\s*(?:\\?\))(?:\s*\}})?"
)
_REMARK = re.compile(
    rf"^(?P<value>.*[0-9)}}]){_BLANK}{_TEXT}\s*\(\s*(?P<unit>[A-Za-z][A-Za-z ]*)\)\s*\.?\s*\}}$", re.DOTALL
)
_SPOKEN_SETS = (
    (
        re.compile(r"(?:there (?:is|are) )?no (?:real )?solutions?(?: exists?)?|(?:the )?empty set", re.IGNORECASE),
        r"\emptyset",
    ),
    (re.compile(r"(?:all|any|every) reals?(?: numbers?)?(?: [a-z])?", re.IGNORECASE), r"(-\infty,\infty)"),
)
_PLAIN_FUNCTION = re.compile(
    r"(?<![A-Za-z\\])(sin|cos|tan|cot|sec|csc|log|ln|arcsin|arccos|arctan)"
    r"(?= ?[(^]|_| [0-9\\]| [a-z](?![A-Za-z])| (?:alpha|beta|gamma|theta|omega)(?![A-Za-z]))"
)
_PLAIN_CALL = re.compile(r"(?<![A-Za-z\\])(sqrt|exp|abs)(?= ?\()")
_AS_CALLED = {"sqrt": r"\sqrt{%s}", "exp": "e^{%s}", "abs": "|%s|"}
_PLAIN_ROOT = re.compile(r"(?<![A-Za-z\\])sqrt ?([0-9]+)(?![0-9.])")
_PLAIN_GREEK = re.compile(r"(?<![A-Za-z\\])(pi|theta|alpha|beta|gamma|omega|sigma|rho|tau|lambda)(?![A-Za-z])")
_LIBRARY = re.compile(r"(?<![A-Za-z])(?:np|numpy|math)\.(?=[a-z])")
_PIECE = re.compile(rf"{_TEXT}(?P<words>[^{{}}]*)\}}|(?<![A-Za-z\\])(?P<bare>[A-Za-z]{{3,}})(?![A-Za-z(])")
_OPEN, _CLOSED = re.compile(r"(?<!\\)\{"), re.compile(r"(?<!\\)\}")
_SPOKEN = re.compile(r"[A-Za-z]{2,}|\([a-z]\)")


def bare(text: str) -> str:
    """The answer without labels, qualifiers and quotes, its plain functions in LaTeX, a system's rows as a list."""
    text = text.strip().strip("$").strip()
    if (label := _LABEL.match(text)) and text[label.end() :].strip(" }"):
        text = text[label.end() :].strip()
    if (qualifier := _QUALIFIER.search(text)) and re.search(r"[0-9A-Za-z]", text[: qualifier.start()]):
        text = text[: qualifier.start()]
    if system := _ENVIRONMENT.fullmatch(text.strip()):
        rows = [row.replace("&", "").strip().rstrip(",.") for row in re.split(r"\\\\(?:\[[^\]]*\])?", system["rows"])]
        text = ", ".join(row for row in rows if row)
    if (remark := _REMARK.match(text)) and len(text) < 200:
        text = rf"{remark['value']}\text{{ {remark['unit']}}}"
    restated = _RESTATED.fullmatch(text.strip())
    if restated and re.search(r"[./]|frac", text) and not re.search(r"[0-9}]\(", text):
        text = f"{restated['first']} or {restated['second']}"
    spoken = re.sub(rf"{_TEXT}([^{{}}]*)\}}", r"\1", text).strip(" .")
    for pattern, meaning in _SPOKEN_SETS:
        if pattern.fullmatch(spoken):
            return meaning
    return _in_latex(text)


def _in_latex(text: str) -> str:
    """Calls such as sqrt(2x), sin(x) and products 2*x as LaTeX has them."""
    text = re.sub(r"(?<=[0-9A-Za-z)}]) ?\*\* ?(?=[0-9A-Za-z({])", "^", text)
    if "*" in text and "**" not in text:
        text = re.sub(r"(?<=[0-9A-Za-z)}\]]) ?\* ?(?=[0-9A-Za-z(\\-])", r" \\cdot ", text)
    if r"\text" not in text and (re.search(r"[0-9^/+=(\\]", text) or _PLAIN_GREEK.fullmatch(text)):
        text = _PLAIN_ROOT.sub(r"\\sqrt{\1}", _PLAIN_FUNCTION.sub(r"\\\1", _LIBRARY.sub("", text)))
        text = _PLAIN_GREEK.sub(r"\\\1 ", text)
    position = 0
    while call := _PLAIN_CALL.search(text, position):
        start = text.index("(", call.end())
        end = _closing(text, start)
        if end is None:
            break
        text = text[: call.start()] + _AS_CALLED[call[1]] % text[start + 1 : end] + text[end + 1 :]
        position = call.start() + 1
    return text


def _closing(text: str, start: int) -> int | None:
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position
    return None


def phrase(text: str) -> tuple[list[str], list[str]] | None:
    r"""The words and the values between them, in order, of `3 \text{ hours } 20 \text{ minutes}`; None without both."""
    if r"\begin" in text:
        return None
    words: list[str] = []
    values: list[str] = []
    start, last_was_word = 0, False
    several = text.count("\\text") > 1
    for piece in _PIECE.finditer(text):
        said = piece["words"] if piece["words"] is not None else piece["bare"]
        if not (_SPOKEN.search(said) or (several and piece["words"] and said.strip().isalpha())):
            continue
        if len(_OPEN.findall(text, 0, piece.start())) != len(_CLOSED.findall(text, 0, piece.start())):
            continue  # it names something, as in v_{\text{max}}
        if before := text[start : piece.start()].strip(" ,.$"):
            values.append(before)
            last_was_word = False
        inner = re.sub(r"([0-9]+)", r" \1 ", said).casefold().split()
        for word in inner:
            if word.isdigit():
                values.append(word)
                last_was_word = False
            else:
                singular = re.sub(r"e?s$", "", word.strip(",.;:")) if len(word) > 3 else word.strip(",.;:")
                words[len(words) - last_was_word :] = [f"{words[-1]} {singular}" if last_was_word else singular]
                last_was_word = True
        start = piece.end()
    if rest := text[start:].strip(" ,.$"):
        values.append(rest)
    return (words, values) if words and values else None


def same_phrase(
    answer: tuple[list[str], list[str]],
    reference: tuple[list[str], list[str]],
    same: Callable[[str, str], bool | None],
) -> bool | None:
    """Words alike, values equal, all in order: 3 of 2 is not 2 of 3."""
    (words, values), (wanted_words, wanted_values) = answer, reference
    if words != wanted_words or len(values) != len(wanted_values):
        return False
    return all_of(map(same, values, wanted_values))

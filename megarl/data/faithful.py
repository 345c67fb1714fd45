"""Whether prompts are the problems: what templates and tokenizer make of real rows, checked before a run starts."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from heapq import nlargest
from typing import Any, Literal
from unicodedata import normalize

from megarl.config import DataConfig
from megarl.data.columns import Turn
from megarl.data.problems import Problem
from megarl.data.prompts import encode_prompts, prompt_texts
from megarl.data.templates import CLOCK, chat_of, check_opens_turn, fill, frame, special_ids
from megarl.types import UserError

SPREAD = 32  # rows all over the set
LONGEST = 8  # what is cut off shows on them
CHARACTERS = 512  # rows that have a character for the first time
BAD_SHARE = 0.25  # of the rows looked at: so many that the tokenizer changes are no exceptions
REPEATED = 64  # prompts that are made again, to see whether they differ
GONE = "…"  # stands where a message was
SHOWN = 24  # characters around the place where a text is lost
RESTORE = (
    "its files, or tokenizer_class in tokenizer_config.json, are not those that the model was trained with "
    "(PreTrainedTokenizerFast takes tokenizer.json as it is)"
)


def check_prompts(
    data: DataConfig, problems: Sequence[Problem], tokenizer: Any, vocabulary: int, with_responses: bool = False
) -> list[str]:
    """Raises UserError, naming the row and what to set; returns warnings. `vocabulary` is the size of the embedding.

    All but the control tokens is looked for in some of the rows. `with_responses`: in sft's too.
    """
    rows = sample_rows(problems)
    texts, prompts = prompt_texts(data, rows, tokenizer), encode_prompts(data, rows, tokenizer)
    if data.chat_template:
        check_opens_turn(tokenizer, chat_of(data, rows[0].text, rows[0].turns), rows[0].id)
    repeats = 1 + REPEATED // len(rows)
    same_text = texts * repeats == prompt_texts(data, rows * repeats, tokenizer)
    if not same_text or prompts * repeats != encode_prompts(data, rows * repeats, tokenizer):
        what, fix = ("tokenizer", "dropout in tokenizer.json") if same_text else ("chat template", "random part")
        raise UserError(f"this model's {what} draws, so a resumed run would have other prompts; remove the {fix}")
    changes: dict[str, bool] = {}  # what the tokenizer does to a row -> whether more than the form of characters
    for row, text, ids in zip(rows, texts, prompts, strict=True):
        _check_row(data, row, text, ids, tokenizer, vocabulary)
        if change := _change(data, row, _read(tokenizer, ids), "NFC"):
            changes[change] = bool(_change(data, row, _read(tokenizer, ids), "NFKC"))
    told = [f"{next(iter(changes))} ({len(changes)} of {len(rows)} rows looked at)"] if changes else []
    if sum(changes.values()) >= BAD_SHARE * len(rows):
        raise UserError(f"{told[0]}; {RESTORE}")
    if with_responses:
        check_responses(rows, tokenizer)
    first: dict[tuple[int, ...], Problem] = {}
    for row, ids in zip(rows, prompts, strict=True):
        same = first.setdefault(tuple(ids), row)
        if normalize("NFKC", same.text).strip() != normalize("NFKC", row.text).strip():
            raise UserError(f"{same.id} and {row.id} are different problems, but become the same prompt")
    return told + _warnings(data, problems, texts[0], prompts[0], tokenizer)


def check_responses(rows: Sequence[Problem], tokenizer: Any) -> None:
    """The responses of sft, which are answers, against what the tokenizer gives back of them."""
    for row in rows:
        said = _read(tokenizer, tokenizer(row.answer, add_special_tokens=False)["input_ids"])
        if normalize("NFKC", row.answer).strip() not in normalize("NFKC", said):
            raise UserError(
                f"{row.id}: this model's tokenizer changes the response: {_difference(row.answer, said)}; {RESTORE}"
            )


def sample_rows(problems: Sequence[Problem]) -> list[Problem]:
    """Spread over the set, the longest, and those with characters that no row before them has."""
    count = len(problems)
    chosen = {i * (count - 1) // (SPREAD - 1) for i in range(SPREAD)}
    characters: set[str] = set()
    found, lengths = 0, array("q")
    for i, problem in enumerate(problems):
        lengths.append(len(problem.text))
        if found < CHARACTERS and not characters.issuperset(problem.text):
            characters.update(problem.text)
            chosen.add(i)
            found += 1
    chosen |= set(nlargest(LONGEST, range(count), key=lengths.__getitem__))
    return [problems[i] for i in sorted(chosen)]


def _check_row(data: DataConfig, row: Problem, text: str, ids: list[int], tokenizer: Any, vocabulary: int) -> None:
    """A prompt's text has the system message and the problem (white space around them may go), its tokens no more."""
    turns, left = _turns(data, row), text
    for turn in sorted(turns, key=lambda turn: -len(turn["content"])):  # a short one may be part of a longer one
        if (content := turn["content"].strip()) not in left:
            of, instead = "problem", "use data.chat_template=false"
            if turn["role"] == "system":
                of, instead = "system message", "put it into data.prompt_template"
            lost = _difference(content, left)
            raise UserError(f"{row.id}: this model's chat template changes or drops the {of}: {lost}; {instead}")
        left = left.replace(content, GONE, 1)
    if not ids:
        raise UserError(f"{row.id} has no tokens; this model's tokenizer drops all of its text")
    if max(ids) >= vocabulary:
        raise UserError(
            f"{row.id} has token {max(ids)} ({tokenizer.convert_ids_to_tokens(max(ids))!r}), but the model has "
            f"{vocabulary} embeddings; take the tokenizer that it was trained with"
        )
    last, said = normalize("NFC", turns[-1]["content"]).strip(), normalize("NFC", _read(tokenizer, ids))
    behind, expected = ("".join(each.rpartition(last)[2].split()) for each in (said, normalize("NFC", text)))
    is_ended = ids[-1] == tokenizer.eos_token_id and not text.rstrip().endswith(tokenizer.eos_token)
    if is_ended or last in said and behind != expected:
        raise UserError(
            f"{row.id}: this model's tokenizer ends the prompt with {behind[-40:]!r} instead of {expected[-40:]!r}; "
            "set add_eos_token=false in tokenizer_config.json, or change the post_processor in tokenizer.json"
        )
    if (twice := [tokenizer.bos_token_id] * 2) == ids[:2]:
        where = "the chat template" if data.chat_template else "data.prompt_template"
        if not data.chat_template and tokenizer("1")["input_ids"][:2] == twice:
            where = "the post_processor in tokenizer.json"
        raise UserError(f"{row.id}: the prompt begins with {tokenizer.bos_token!r} twice; take it out of {where}")


def _change(data: DataConfig, row: Problem, decoded: str, form: Literal["NFC", "NFKC"]) -> str | None:
    """What of the system message and the problem isn't in the text of the tokens, up to the form of characters."""
    said = normalize(form, decoded)
    for turn in _turns(data, row):
        if (content := normalize(form, turn["content"]).strip()) not in said:
            return f"{row.id}: this model's tokenizer changes the prompt: {_difference(content, said)}"
    return None


def _turns(data: DataConfig, row: Problem) -> list[Turn]:
    """What must be in a prompt."""
    if data.chat_template:
        return chat_of(data, row.text, row.turns)
    system = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    return [*system, {"role": "user", "content": fill(data, row.text)}]


def _warnings(data: DataConfig, problems: Sequence[Problem], text: str, ids: list[int], tokenizer: Any) -> list[str]:
    """What is right for some models and a mistake with others. `text` and `ids` are a prompt's."""
    found = []
    bos, plain = tokenizer.bos_token, tokenizer("1")["input_ids"][:1]
    if data.chat_template and plain == [tokenizer.bos_token_id] and ids[:1] != plain:
        found.append(
            f"prompts don't begin with {bos!r}, for the chat template doesn't write it, as the tokenizer would"
        )
    closing = tokenizer(frame(data, tokenizer).closing, add_special_tokens=False)["input_ids"]
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id, *(special_ids(tokenizer) & set(closing))}
    if ids[-1] in ends:
        found.append(
            f"prompts end with {tokenizer.convert_ids_to_tokens(ids[-1])!r}, as a finished turn does; take it out of "
            + ("the chat template's end" if data.chat_template else "data.prompt_template")
        )
    control = {tokenizer.eos_token, tokenizer.pad_token, bos} - {None}
    control |= {token for i in special_ids(tokenizer) if (token := tokenizer.convert_ids_to_tokens(i)) in text}
    pattern = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or r"(?!)")
    marked = [(row.id, match[0]) for row in problems if (match := pattern.search(row.text))]
    if marked:
        row_id, token = marked[0]
        found.append(f"{len(marked)} problems contain control tokens of this model, e.g. {row_id} {token!r}")
    if data.chat_template and re.search(r"\bstrftime_now\b", str(tokenizer.chat_template)):
        found.append(
            f"the chat template writes the date: it is {CLOCK:%d %b %Y} in every prompt, whenever the run goes on"
        )
    return found


def _read(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _difference(content: str, text: str) -> str:
    """Where `content` first differs from what there is of it in `text`."""
    low, high = 0, len(content)  # content[:low] is in the text
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if content[:middle] in text else (low, middle - 1)
    start = max(low - SHOWN // 2, 0)
    place = text.find(content[:low]) + start
    return f"{text[place : place + SHOWN]!r} for {content[start : start + SHOWN]!r}"

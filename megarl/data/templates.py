"""What stands around a problem in a prompt, the same at any time, and what of a response it has already written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from megarl.config import DataConfig
from megarl.data.columns import Turn
from megarl.types import UserError

CLOCK = datetime(2024, 7, 26)  # for a chat template that writes the date: Llama 3's own where it has no clock
ANSWER = "4megarl2"  # stands for an assistant's answer
# At the end of a prompt: tags and boxes that a response is to fill. Tags that name who speaks are none.
OPENINGS = re.compile(r"(?:(?:<(?!(?:assistant|model|bot|ai|gpt|s|bos)>)[A-Za-z]\w*>|\\f?box(?:ed)?\{)\s*)+\Z")


class Frame(NamedTuple):
    """What a prompt has already written of the response, and what ends the assistant's turn behind it."""

    opened: str
    closing: str


def chat_of(data: DataConfig, text: str, turns: Sequence[Turn] = ()) -> list[Turn]:
    """The conversation that the model is asked to go on with; a row's own, or one of the problem's text."""
    *before, last = turns or ({"role": "user", "content": text},)
    system = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    return [*system, *before, last | {"content": fill(data, last["content"])}]


def fill(data: DataConfig, text: str) -> str:
    return data.prompt_template.replace("{problem}", text)


def render(tokenizer: Any, chat: Sequence[Turn], where: str = "", add_generation_prompt: bool = True) -> str:
    """Raises UserError, naming the row `where` the chat comes from, for what the template can't or won't render."""
    templates = tokenizer.chat_template
    if not templates or isinstance(templates, dict) and "default" not in templates:
        named = f"none named default, but {', '.join(templates)}" if templates else "no chat template"
        raise UserError(f"data.chat_template=true but this model's tokenizer has {named}; use false, or add one")
    try:
        return _rendered(tokenizer, chat, add_generation_prompt)
    except Exception as error:  # a template is a program: jinja's errors, Python's, and those that it raises itself
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fix = "use data.chat_template=false, or mend the template"
        if chat[0]["role"] == "system" and _can_render(tokenizer, chat[1:]):
            fix = "put the system message (data.system_prompt) into data.prompt_template"
        at = f"{where}: " if where else ""
        raise UserError(f"{at}this model's chat template fails: {reason}; {fix}") from None


def render_all(tokenizer: Any, chats: Sequence[list[Turn]], places: Sequence[str]) -> list[str]:
    """As `render` does one by one, in less time."""
    try:
        return _rendered(tokenizer, chats, True)
    except Exception:  # as in `render`, which says what is wrong and where
        return [render(tokenizer, chat, where) for chat, where in zip(chats, places, strict=True)]


def _rendered(tokenizer: Any, chat: Sequence[Any], add_generation_prompt: bool) -> Any:
    """Of a chat its text, of a list of chats theirs."""
    return tokenizer.apply_chat_template(
        list(chat), add_generation_prompt=add_generation_prompt, tokenize=False, strftime_now=CLOCK.strftime
    )


def _can_render(tokenizer: Any, chat: Sequence[Turn]) -> bool:
    try:
        return bool(_rendered(tokenizer, chat, True))
    except Exception:  # as in `render`
        return False


def frame(data: DataConfig, tokenizer: Any) -> Frame:
    """Of a response, as the prompt template says, or the chat template by how it would write an answer given to it."""
    if not data.chat_template:
        return Frame(_openings(data.prompt_template.rpartition("{problem}")[2]), "")
    chat = chat_of(data, "1")
    prompt = render(tokenizer, chat)
    before, closing = _around_answer(tokenizer, chat)
    if before and prompt.startswith(before.rstrip()):
        return Frame(prompt[len(before.rstrip()) :].lstrip(), closing)
    asked = render(tokenizer, chat, add_generation_prompt=False)
    return Frame(_openings(prompt.removeprefix(asked)), closing)


def check_opens_turn(tokenizer: Any, chat: Sequence[Turn], where: str) -> None:
    """Raises UserError for a template that ignores add_generation_prompt, unless an answer would begin right there."""
    asked = render(tokenizer, chat, where)
    before, _ = _around_answer(tokenizer, chat)
    if (
        asked == render(tokenizer, chat, where, add_generation_prompt=False)
        and before
        and before.strip() != asked.strip()
    ):
        raise UserError(
            f"{where}: this model's chat template ignores add_generation_prompt: {before.removeprefix(asked)!r} is "
            "missing before a response; add it to the template, or use data.chat_template=false"
        )


def special_ids(tokenizer: Any) -> set[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *added}


def _around_answer(tokenizer: Any, chat: Sequence[Turn]) -> tuple[str, str]:
    """What the template writes before and behind an assistant's answer to a chat."""
    whole = render(tokenizer, [*chat, {"role": "assistant", "content": ANSWER}], add_generation_prompt=False)
    before, _, behind = whole.rpartition(ANSWER)
    return before, behind if before else ""


def _openings(text: str) -> str:
    found = OPENINGS.search(text)
    return found[0] if found else ""

"""Response ids -> the text that rewards judge and samples keep: what one reads there in the whole conversation."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megarl.config import Config
from megarl.data.templates import frame, special_ids
from megarl.rewards import reward_named
from megarl.types import UserError


class Reader:
    """Puts what the prompt has already written of a response (a `<think>`) before it, and keeps its special tokens,
    but for padding and those that end the turn."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.opened, closing = frame(config.data, tokenizer)
        ends = tokenizer(closing, add_special_tokens=False)["input_ids"] if closing else []
        self._hidden = {tokenizer.pad_token_id, *_ends_of_turn(Path(config.model.path), tokenizer)}
        self._hidden |= special_ids(tokenizer) & set(ends)

    def read(self, responses: Iterable[Iterable[int]]) -> list[str]:
        shown = [[int(i) for i in response if i not in self._hidden] for response in responses]
        texts = self.tokenizer.batch_decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [self.opened + text for text in texts]

    def check(self, config: Config) -> None:
        """Raises UserError where no response can be right: one that the reward accepts isn't what it will read."""
        name = config.reward.name
        if ":" in name:
            return
        reward, read = reward_named(name, config.reward.lenient), ""
        for response, reference in reward.accepts:
            asked = response.removeprefix(self.opened.strip()) if self.opened.strip() else response
            read = self.read([self.tokenizer(asked, add_special_tokens=False)["input_ids"]])[0]
            answer = reward.extract_answer(read)
            if answer and reward.fast_verdict(answer, reference):
                return
        raise UserError(
            f"reward.name={name} can't be won: a response {response!r} reads as {read!r} with this model's tokenizer "
            "and the prompt's templates; change data.prompt_template, data.chat_template or the tokenizer"
        )


def _ends_of_turn(model: Path, tokenizer: Any) -> set[int]:
    """At which the engine stops: of the tokenizer, config.json and generation_config.json."""
    ends = {tokenizer.eos_token_id}
    for name in ("config.json", "generation_config.json"):
        if (model / name).is_file():
            found = json.loads((model / name).read_text(encoding="utf-8")).get("eos_token_id")
            ends |= set(found) if isinstance(found, list) else {found}
    return ends - {None}

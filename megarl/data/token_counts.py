"""How many tokens texts have, where a limit asks: that most of them fit is known without tokenising them.

Byte-level BPE (GPT-2's, Llama 3's, Qwen's) starts from at most a token a byte, and only ever merges them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any
from unicodedata import normalize

FORMS: tuple[Any, ...] = ("NFC", "NFD", "NFKC", "NFKD")  # that a tokenizer may bring texts into
PRINTABLE = [chr(i) for i in range(33, 127)]  # a byte-level vocabulary writes these as they are


class TokenCounter:
    """Of texts as `tokenizer` makes tokens of them; add_special_tokens is its argument."""

    def __init__(self, tokenizer: Any, add_special_tokens: bool) -> None:
        self._encode, self._special = tokenizer, add_special_tokens
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._is_known = bool(backend) and _is_byte_level(backend)
        if self._is_known:
            (self._form,) = [form["type"] for form in _parts(backend.normalizer, "normalizers")] or [None]
            self._added = backend.num_special_tokens_to_add(False) if add_special_tokens else 0
            known = "".join(re.escape(char) for char in PRINTABLE if backend.model.token_to_id(char) is not None)
            self._token = re.compile(f"[{known}]" if known else r"(?!)")  # what is a token, if not a part of one

    def __call__(self, texts: Sequence[str], limit: int) -> list[int]:
        """Exact, except that a text which surely has a token and not more than `limit` may have fewer than this."""
        counts = [self._most(text) or limit + 1 for text in texts]
        unsure = [i for i, count in enumerate(counts) if count > limit]
        if unsure:
            encoded = self._encode([texts[i] for i in unsure], add_special_tokens=self._special)["input_ids"]
            for i, ids in zip(unsure, encoded, strict=True):
                counts[i] = len(ids)
        return counts

    def _most(self, text: str) -> int | None:
        """Tokens that a text doesn't have more of, where that is known and it surely has any."""
        if not self._is_known:
            return None
        read = text if self._form is None or text.isascii() else normalize(self._form, text)
        return self._added + max(len(text.encode()), len(read.encode())) if self._token.search(read) else None


def _is_byte_level(backend: Any) -> bool:
    """BPE on the bytes of whole texts, in at most one normal form."""
    from tokenizers.models import BPE

    model, steps = backend.model, _parts(backend.pre_tokenizer, "pretokenizers")
    forms = _parts(backend.normalizer, "normalizers")
    if not isinstance(model, BPE) or len(forms) > 1 or any(form["type"] not in FORMS for form in forms):
        return False
    if model.byte_fallback or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    return all(map(_keeps_bytes, steps)) and [step["type"] for step in steps].count("ByteLevel") == 1


def _keeps_bytes(step: dict[str, Any]) -> bool:
    match step["type"]:
        case "ByteLevel":
            return not step["add_prefix_space"]
        case "Split":
            return step["behavior"] != "Removed"
        case kind:
            return kind == "Digits"


def _parts(step: Any, plural: str) -> list[dict[str, Any]]:
    """A normaliser or pre-tokeniser as what it consists of."""
    state: dict[str, Any] = json.loads(step.__getstate__()) if step else {"type": "Sequence", plural: []}
    parts: list[dict[str, Any]] = state[plural] if state["type"] == "Sequence" else [state]
    return parts

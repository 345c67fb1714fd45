"""How many tokens texts have, where a limit asks: that most of them fit is known without tokenising them.

Byte-level BPE (GPT-2's, Llama 3's, Qwen's) starts from at most a token a byte, and only ever merges them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

# A normal form has at most so many times the bytes of a text (Unicode annex 15, expansion factors in UTF-8), and leaves
# ASCII as it is, but for a character before a combining one.
GROWTH = {None: 1, "NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11}
PRINTABLE = [chr(i) for i in range(33, 127)]  # a byte-level vocabulary writes these as they are


class TokenCounter:
    """Of texts as `tokenizer` makes tokens of them; add_special_tokens is its argument."""

    def __init__(self, tokenizer: Any, add_special_tokens: bool) -> None:
        self._encode, self._special = tokenizer, add_special_tokens
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._growth = _growth(backend) if backend else None
        if self._growth:
            self._added = backend.num_special_tokens_to_add(False) if add_special_tokens else 0
            known = "".join(re.escape(char) for char in PRINTABLE if backend.model.token_to_id(char) is not None)
            self._token = re.compile(rf"[{known}](?=[\x00-\x7f]|\Z)" if known else r"(?!)")  # surely is, or is in, one

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
        if not self._growth or not self._token.search(text):
            return None
        return self._added + (len(text) if text.isascii() else self._growth * len(text.encode()))


def _growth(backend: Any) -> int | None:
    """How many times the bytes of a text there may be tokens of it; None where that isn't known."""
    from tokenizers.models import BPE

    model, steps = backend.model, _parts(backend.pre_tokenizer, "pretokenizers")
    normalizers = _parts(backend.normalizer, "normalizers") or [{"type": None}]
    if not isinstance(model, BPE) or len(normalizers) > 1 or not all(map(_keeps_bytes, steps)):
        return None
    if model.byte_fallback or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    return GROWTH.get(normalizers[0]["type"]) if [step["type"] for step in steps].count("ByteLevel") == 1 else None


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

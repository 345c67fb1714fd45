"""The tokenizer of a Hugging Face folder, as transformers loads it, or the reason why it can't be used, in one line."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megarl.files import read_json, refuse_pointer
from megarl.types import UserError

VOCABULARIES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
FILES = (
    *(name for names in VOCABULARIES for name in names),
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "config.json",
)
SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}


def load_tokenizer(path: str | Path, setting: str = "model.path=") -> Any:
    """The tokenizer at `path`, a folder or a hub name. It has an end-of-sequence token and makes up none of its own.

    Raises UserError, which calls the path `setting` + path.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    is_local = folder.is_dir()
    if is_local:
        _check_files(folder, setting)
    try:
        with _errors_only():  # what transformers says before it fails fills a screen
            tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=is_local, trust_remote_code=False)
            probe = tokenizer("1")["input_ids"]
    except Exception as error:  # transformers raises a type of its own for each way in which this fails
        reason = _missing_packages(folder) or " ".join((str(error) or type(error).__name__).split())[:300]
        raise UserError(f"{setting}{path}: the tokenizer can't be loaded: {reason}") from None
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.added_tokens_decoder):
        raise UserError(f"{setting}{path}: the tokenizer reads nothing: its vocabulary is missing; save it again")
    known = _declared_tokens(folder) if is_local else None
    if not _is_known(tokenizer, tokenizer.eos_token, known):
        of_class = f" ({tokenizer.eos_token} is not in its files)" if tokenizer.eos_token else ""
        raise UserError(
            f"{setting}{path}: the tokenizer has no end-of-sequence token{of_class}; "
            "set eos_token in tokenizer_config.json to the token that ends a response"
        )
    for token in tokenizer.convert_ids_to_tokens(probe):
        if not _is_known(tokenizer, token, known):
            raise UserError(
                f"{setting}{path}: the tokenizer puts {token} into every prompt, but it is not in its files; "
                "set bos_token in tokenizer_config.json, or null"
            )
    return tokenizer


def check_vocabulary(tokenizer: Any, rows: int, path: str | Path) -> None:
    """Raises UserError where the tokenizer has ids that the embedding's `rows` don't reach."""
    last, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= rows:
        raise UserError(
            f"model.path={path}: the tokenizer needs {highest + 1} rows (its last token is {last!r}), the model's "
            f"embedding has {rows} (vocab_size); resize the embedding and train it, or save the model's own tokenizer"
        )


def _check_files(folder: Path, setting: str) -> None:
    if not any(all((folder / name).is_file() for name in names) for names in VOCABULARIES):
        raise UserError(f"{setting}{folder} has no tokenizer (tokenizer.json); save one with the model")
    for name in FILES:
        refuse_pointer(folder / name)
    if _json(folder / "tokenizer_config.json").get("auto_map"):
        raise UserError(
            f"{setting}{folder}: tokenizer_config.json asks for code of the model's own (auto_map), which is never "
            "run; remove auto_map where transformers' own class fits, or use another model"
        )


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _declared_tokens(folder: Path) -> set[str]:
    """The added tokens that the folder's files name."""
    added = [*_json(folder / "tokenizer.json").get("added_tokens", ())]
    added += _json(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).values()
    return {token["content"] for token in added} | set(_json(folder / "added_tokens.json"))


def _is_known(tokenizer: Any, token: str | None, declared: set[str] | None) -> bool:
    """Whether the files hold the token: a tokenizer's class adds those of its own defaults that they don't hold."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if token is None or declared is None or backend is None:
        return token is not None
    return token in declared or backend.model.token_to_id(token) is not None


def _missing_packages(folder: Path) -> str | None:
    """What transformers needs to read tokenizer.model and doesn't find."""
    file = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file() or not file.is_file():
        return None
    head = file.read_bytes()[:64]
    packages = {"tiktoken": "tiktoken"} if head.isascii() and b" " in head.split(b"\n")[0] else SENTENCEPIECE
    missing = [package for module, package in packages.items() if not _is_installed(module)]
    if not missing:
        return None
    return f"tokenizer.model needs {' and '.join(missing)}; pip install {' '.join(missing)}, or save tokenizer.json"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # its parent package is missing, or it was made unavailable
        return False


@contextmanager
def _errors_only() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)

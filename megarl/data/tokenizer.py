"""The tokenizer of a Hugging Face folder, as transformers loads it, or the reason why it can't be used, in one line."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megarl.files import read_json, refuse_broken_links, refuse_pointer
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
    """The tokenizer at `path`, a folder or a hub name. It has an end-of-sequence token that its files know.

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
    except Exception as error:  # transformers raises a type of its own for each way in which this fails
        reason = _missing_packages(folder) or " ".join((str(error) or type(error).__name__).split())[:300]
        raise UserError(f"{setting}{path}: the tokenizer can't be loaded: {reason}") from None
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.added_tokens_decoder):
        raise UserError(f"{setting}{path}: the tokenizer reads nothing: its vocabulary is missing; save it again")
    if not _is_known(tokenizer, tokenizer.eos_token, _added_tokens(folder) if is_local else None):
        of_class = f" ({tokenizer.eos_token} is not in its files)" if tokenizer.eos_token else ""
        raise UserError(
            f"{setting}{path}: the tokenizer has no end-of-sequence token{of_class}; "
            "set eos_token in tokenizer_config.json to the token that ends a response"
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


def check_stop_tokens(tokenizer: Any, hf_config: Any, path: str | Path) -> None:
    """Raises UserError where vLLM would end responses at a token that is none to end at.

    Besides the tokenizer's, it ends at those of generation_config.json; without that file, at the model's.
    """
    file = Path(path) / "generation_config.json"
    found = read_json(file).get("eos_token_id") if file.is_file() else hf_config.eos_token_id
    name = "generation_config.json" if file.is_file() else "config.json"
    for token in found if isinstance(found, list) else [found]:
        if token in (None, tokenizer.eos_token_id) or token in tokenizer.added_tokens_decoder:
            continue
        text = tokenizer.convert_ids_to_tokens(token) if token in tokenizer.get_vocab().values() else None
        what = "no token" if text is None else f"{text!r}, an ordinary token, at which every response would end,"
        raise UserError(
            f"model.path={path}: eos_token_id={token} of {name} is {what} of this tokenizer; "
            f"set it to {tokenizer.eos_token_id} ({tokenizer.eos_token})"
        )


def _check_files(folder: Path, setting: str) -> None:
    refuse_broken_links(folder)
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


def _added_tokens(folder: Path) -> set[str]:
    """The added tokens that the folder's files name."""
    added = [*(_json(folder / "tokenizer.json").get("added_tokens") or ())]
    added += (_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}).values()
    return {token["content"] for token in added} | set(_json(folder / "added_tokens.json"))


def _is_known(tokenizer: Any, token: str | None, added: set[str] | None) -> bool:
    """Whether the files hold the token: a tokenizer's class adds those of its own defaults that they don't hold."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if token is None or added is None or backend is None:
        return token is not None
    return token in added or backend.model.token_to_id(token) is not None


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

"""Files on disk: their hash, and what goes wrong with them as one line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megarl.types import UserError


def sha256(path: Path) -> str:
    """Of the file's bytes. Raises UserError where they can't be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None


@contextmanager
def writing(path: Path, fix: str) -> Iterator[None]:
    """Makes a UserError of what the system refuses meanwhile: a full disk, a folder without permission."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}; see to it, {fix}") from None

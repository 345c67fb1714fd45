"""Rows of a data set, one at a time and each with where it stands: JSONL and Parquet files, hub data sets."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megarl.types import UserError

Row = dict[str, Any]
FILES = (".jsonl", ".parquet")


def is_file_name(name: str) -> bool:
    """Whether a source is a file, present or not; anything else is a data set of the hub."""
    return name.endswith((*FILES, ".gz")) or Path(name).is_file()


class Rows:
    """Iterates over (where, row) of a source; `done` of `total` says how far it is (bytes or rows; None: unknown).

    `setting` is what errors call the source, e.g. data.train. With `streaming`, a hub data set is read as it downloads,
    without a copy on disk. Nothing is held but a row, or a batch of rows of a Parquet file.
    """

    def __init__(
        self, setting: str, name: str, subset: str | None = None, split: str = "train", streaming: bool = False
    ) -> None:
        self.setting, self.name, self.subset, self.split = setting, name, subset, split
        self.streaming = streaming
        self.done = 0
        self.total: int | None = None

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        if not is_file_name(self.name):
            return self._of_hub()
        path = Path(self.name)
        kind = ".parquet file" if path.suffix == ".parquet" else ".jsonl file, a hub data set, or arithmetic"
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise UserError(f"{self.setting}={path} {what}; expected a {kind}")
        return self._of_parquet(path) if path.suffix == ".parquet" else self._of_jsonl(path)

    def _of_jsonl(self, path: Path) -> Iterator[tuple[str, Row]]:
        try:
            lines = path.open("rb")
        except OSError as error:
            raise UserError(f"{self.setting}={path} can't be read: {error.strerror}") from None
        with lines:
            self.done, self.total = 0, path.stat().st_size
            for number, line in enumerate(lines, 1):
                self.done += len(line)
                yield f"{path}:{number}", _row(f"{path}:{number}", line if number > 1 else _beginning(path, line))

    def _of_parquet(self, path: Path) -> Iterator[tuple[str, Row]]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                self.done, self.total = 0, file.metadata.num_rows
                for batch in file.iter_batches(batch_size=1024):
                    for row in batch.to_pylist():
                        self.done += 1
                        yield f"{path}:{self.done}", row
        except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that isn't UTF-8
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path} is not a readable Parquet file: {reason} (behind row {self.done})") from None

    def _of_hub(self) -> Iterator[tuple[str, Row]]:
        import datasets
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # of its attempts; the last one's error is the user's
        try:
            rows = datasets.load_dataset(self.name, self.subset, split=self.split, streaming=self.streaming)
            splits = rows.info.splits or {}
            self.done, self.total = 0, splits[self.split].num_examples if self.split in splits else None
            for number, row in enumerate(rows):
                self.done += 1
                yield f"{self.name}[{self.split}]:{number}", row
        except Exception as error:  # the hub client raises dozens of types; all mean that this name can't be had
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{self.setting}={self.name}: neither a file nor a data set that could be loaded "
                f"(split {self.split}): {reason}"
            ) from None


def _beginning(path: Path, line: bytes) -> bytes:
    """The first line of a file, without a byte order mark. Raises UserError for a compressed file."""
    if line.startswith(b"\x1f\x8b"):
        raise UserError(f"{path} is compressed; unpack it with gunzip")
    return line.removeprefix(codecs.BOM_UTF8)


def _row(where: str, line: bytes) -> Row:
    """Raises UserError for what is no JSON object, or can't be written as text again."""
    try:
        row = json.loads(line.decode())
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8 text; save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise UserError(f"{where} has half a character, an escape of \\ud800 to \\udfff alone; remove it") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply; expected an object of texts and numbers") from None
    except json.JSONDecodeError as error:
        what = "is empty" if not line.strip() else f"is not JSON ({error.msg} at column {error.colno})"
        raise UserError(f"{where} {what}; expected one JSON object per line") from None
    except ValueError:  # of int(), which takes so many digits and no more
        digits = sys.get_int_max_str_digits()
        raise UserError(f"{where} has an integer of more than {digits} digits; write it as a string") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object; expected one per line")
    return row

"""Rows of a data set, one at a time and each with where it stands: files, folders and patterns of files, hub sets."""

from __future__ import annotations

import codecs
import glob
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from megarl.data.columns import Row
from megarl.files import refuse_broken_links, refuse_pointer
from megarl.types import UserError

FILES = (".jsonl", ".parquet")
PATTERN = re.compile(r"[*?[]")
SHARD = re.compile(r"\d+(-of-(\d+)\.)")  # train-00000-of-00003.parquet
SPLIT_NAMES = {
    "train": "train",
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "eval"), "test"),
    "dropped": "dropped",  # what tools/prepare_data.py leaves out
}


def is_file_name(name: str) -> bool:
    """Whether a source is a file, present or not, a folder or a pattern of some; else it is a data set of the hub."""
    path = Path(name)
    return bool(path.is_file() or PATTERN.search(name) or (path.is_dir() and _inside(path))) or name.endswith(
        (*FILES, ".gz")
    )


def files_of(setting: str, name: str) -> list[Path]:
    """The files of a source that is_file_name, in the order of their names. `setting` is what errors call it."""
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir() and (files := _inside(path)):
        _check_shards(setting, path, files)
        return files
    if PATTERN.search(name):
        if found := [file for match in sorted(glob.glob(name, recursive=True)) if (file := Path(match)).is_file()]:
            return found
        raise UserError(f"{setting}={name} matches no file; expected .jsonl or .parquet files")
    kind = ".parquet file" if path.suffix == ".parquet" else ".jsonl file, a hub data set, or arithmetic"
    what = "is not a file" if path.exists() else "does not exist"
    raise UserError(f"{setting}={path} {what}; expected a {kind}")


def _inside(folder: Path) -> list[Path]:
    """The data files of a folder, not those of folders in it."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return [folder / name for name in names if name.endswith((*FILES, *(f"{kind}.gz" for kind in FILES)))]


def _check_shards(setting: str, folder: Path, files: list[Path]) -> None:
    """Raises UserError for a folder whose files can't be shards of one set, of several kinds or splits, or not all."""
    refuse_broken_links(folder)
    kinds: dict[tuple[str, str], Path] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.name.lower())
        split = next((SPLIT_NAMES[word] for word in reversed(words) if word in SPLIT_NAMES), "train")
        kinds.setdefault((split, file.name.removesuffix(".gz").rpartition(".")[2]), file)
    if len(kinds) > 1:
        first, second = list(kinds.values())[:2]
        raise UserError(
            f"{setting}={folder} holds {first.name} and {second.name}, which are not shards of one set; name a "
            f"file or a pattern, e.g. {folder}/{first.name[:5]}*{first.suffix}"
        )
    named = [(file.name, SHARD.search(file.name)) for file in files]
    shards = Counter((SHARD.sub(r"*\1", name), int(found[2])) for name, found in named if found)
    for (pattern, count), found in shards.items():
        if found < count:
            raise UserError(f"{setting}={folder} holds {found} of the {count} shards {pattern}; get the others")


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
        return self._of_files(files_of(self.setting, self.name)) if is_file_name(self.name) else self._of_hub()

    def id_of(self, where: str) -> str:
        """A row's name, the same wherever its files lie: what a pattern or folder leaves open, and the row's number."""
        return where.removeprefix(f"{self._folder}/") if self._folder else where.rpartition("/")[2]

    @cached_property
    def _folder(self) -> Path | None:
        """Under which all files of the source lie; None for the hub."""
        path = Path(self.name)
        if not is_file_name(self.name) or path.is_dir():
            return path if path.is_dir() else None
        return path.parent if path.is_file() else Path(f"{PATTERN.split(self.name)[0]}*").parent

    def _of_files(self, files: list[Path]) -> Iterator[tuple[str, Row]]:
        for file in files:
            refuse_pointer(file)
        self.done, self.total = 0, sum(map(_size, files))
        for file in files:
            yield from self._of_parquet(file) if file.suffix == ".parquet" else self._of_jsonl(file)

    def _of_jsonl(self, path: Path) -> Iterator[tuple[str, Row]]:
        try:
            lines = path.open("rb")
        except OSError as error:
            raise UserError(f"{self.setting}={path} can't be read: {error.strerror}") from None
        blank: int | None = None
        with lines:
            for number, line in enumerate(lines, 1):
                self.done += len(line)
                if not line.strip():
                    blank = blank or number  # none of them, unless a row follows
                    continue
                if blank:
                    raise UserError(f"{path}:{blank} is empty; expected one JSON object per line")
                yield f"{path}:{number}", _row(f"{path}:{number}", line if number > 1 else _beginning(path, line))

    def _of_parquet(self, path: Path) -> Iterator[tuple[str, Row]]:
        import pyarrow
        import pyarrow.parquet

        number = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1024):
                    for row in batch.to_pylist():
                        number += 1
                        self.done += 1
                        yield f"{path}:{number}", row
        except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that isn't UTF-8
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path} is not a readable Parquet file: {reason} (behind row {number})") from None

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


def _size(path: Path) -> int:
    """Bytes of a JSONL file, rows of a Parquet file; 0 where reading will say what is wrong."""
    if path.suffix != ".parquet":
        return path.stat().st_size
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path).num_rows
    except (pyarrow.ArrowException, OSError):
        return 0


def _beginning(path: Path, line: bytes) -> bytes:
    """The first line of a file, without a byte order mark. Raises UserError for a compressed file."""
    if line.startswith(b"\x1f\x8b"):
        raise UserError(f"{path} is compressed; unpack it with gunzip")
    return line.removeprefix(codecs.BOM_UTF8)


class _RepeatedKey(ValueError):
    """A JSON object says two things of one key."""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKey(next(name for name in names if names.count(name) > 1))
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _row(where: str, line: bytes) -> Row:
    """Raises UserError for what is no JSON object, or can't be written as text again."""
    try:
        row = _DECODER.decode(line.decode())
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8 text; save the file as UTF-8") from None
    except UnicodeEncodeError:
        raise UserError(f"{where} has half a character, an escape of \\ud800 to \\udfff alone; remove it") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply; expected an object of texts and numbers") from None
    except json.JSONDecodeError as error:
        what = f"is not JSON ({error.msg} at column {error.colno})"
        raise UserError(f"{where} {what}; expected one JSON object per line") from None
    except _RepeatedKey as error:
        raise UserError(f"{where} has the key {error.args[0]!r} twice; keep one") from None
    except ValueError:  # of int(), which takes so many digits and no more
        digits = sys.get_int_max_str_digits()
        raise UserError(f"{where} has an integer of more than {digits} digits; write it as a string") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object; expected one per line")
    return row

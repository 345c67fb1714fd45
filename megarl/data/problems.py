"""The rows of a data set, read once and kept in a file; memory holds the places of them."""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, overload

from megarl.data.columns import Turn
from megarl.files import writing
from megarl.types import Prompt

BLOCK = 1024  # rows that are written, and read by who asks for all of them, at a time
Told = list[str]  # what a problem is: its source, id, text and answer


@dataclass(frozen=True)
class Problem:
    """A row of a data set: the problem's text and its reference answer (or, for sft, the response)."""

    id: str
    text: str
    answer: str
    source: str  # data.train, or the name of an evaluation set
    turns: tuple[Turn, ...] = ()  # where the row is a conversation, of which `text` is all that is said


class Problems(Sequence[Problem]):
    """All of a split, in order, and a digest of each source.

    They lie in a file without a name in TMPDIR, which is gone when the last process that reads it is. Pickled, they are
    the way to that file: for as long as this process holds it, another one on this machine can open it too.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self._ends = array("q", [0])
        digests: dict[str, Digest] = {}
        waiting: list[bytes] = []

        def write() -> None:
            block = b"".join(waiting)
            waiting.clear()
            with writing(Path(tempfile.gettempdir()), "or set TMPDIR to a folder with more room"):
                while block:
                    block = block[file.write(block) :]

        with tempfile.TemporaryFile(buffering=0) as file:
            for problem in problems:
                record = pickle.dumps((problem.id, problem.text, problem.answer, problem.source, problem.turns), -1)
                self._ends.append(self._ends[-1] + len(record))
                digests.setdefault(problem.source, Digest()).add(problem)
                waiting.append(record)
                if len(waiting) == BLOCK:
                    write()
            write()
            self._hold(os.dup(file.fileno()))
        self.digests = {source: str(digest) for source, digest in digests.items()}

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: Any) -> Any:
        places = range(len(self))[index]
        if isinstance(places, int):
            return next(self._read(places, places + 1))
        return list(self._read(places.start, places.stop)) if places.step == 1 else [self[i] for i in places]

    def __iter__(self) -> Iterator[Problem]:
        for start in range(0, len(self), BLOCK):
            yield from self._read(start, min(start + BLOCK, len(self)))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": f"/proc/{os.getpid()}/fd/{self._file}", "ends": self._ends, "digests": self.digests}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._ends, self.digests = state["ends"], state["digests"]
        self._hold(os.open(state["path"], os.O_RDONLY | os.O_CLOEXEC))

    def _hold(self, file: int) -> None:
        self._file = file
        weakref.finalize(self, os.close, file)

    def _read(self, start: int, stop: int) -> Iterator[Problem]:
        ends = self._ends[start : max(stop, start) + 1]
        block = memoryview(os.pread(self._file, ends[-1] - ends[0], ends[0]))
        for i in range(len(ends) - 1):
            yield Problem(*pickle.loads(block[ends[i] - ends[0] : ends[i + 1] - ends[0]]))


def digests(problems: Iterable[Problem | Prompt]) -> dict[str, str]:
    """Of the problems of each source."""
    if isinstance(problems, Problems):
        return problems.digests
    found: dict[str, Digest] = {}
    for problem in problems:
        found.setdefault(problem.source, Digest()).add(problem)
    return {source: str(digest) for source, digest in found.items()}


class Digest:
    """Of the problems of a set: tells whether they are those that a run or an evaluation was begun with."""

    def __init__(self) -> None:
        self._count, self._hash = 0, hashlib.sha256(b"[")

    def add(self, problem: Problem | Prompt) -> None:
        row = ", ".join(map(encode_basestring_ascii, told(problem)))  # as json.dumps writes the list of all rows
        self._hash.update(f"{', ' if self._count else ''}[{row}]".encode())
        self._count += 1

    def __str__(self) -> str:
        whole = self._hash.copy()
        whole.update(b"]")
        return f"{self._count} problems, sha256 {whole.hexdigest()}"


def told(problem: Problem | Prompt) -> Told:
    return [problem.source, problem.id, problem.text, problem.answer]

"""What a process is at: for how long and how far, in words where it takes long, and where a test lets it die.

MEGARL_FAILPOINT="rank 1 update 4": rank 1 is killed as it begins the phase update for the fourth time.
"engine 0.1 generation 9": so is rollout engine 0, in the first of its processes, before its ninth step of generation.
Several are separated by commas.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

VARIABLE = "MEGARL_FAILPOINT"
PROCESS = "MEGARL_PROCESS"  # what this process is, where it is no rank
FIRST_WORDS_SECONDS = 60.0  # of a phase that doesn't get on; the next come after double the time
LOOK_SECONDS = 1.0
_reached: Counter[str] = Counter()
_running: list[Phase] = []


class Phase:
    """Something that takes time; `total` is how many of something have to be done in it."""

    def __init__(self, name: str, total: int | None = None) -> None:
        self.name, self.total, self.done, self.seconds = name, total, 0, 0.0
        self.began = self.moved = time.monotonic()
        self.patience = FIRST_WORDS_SECONDS

    def advance(self, done: int) -> None:
        """So many are done."""
        if done != self.done:
            self.done, self.moved, self.patience = done, time.monotonic(), FIRST_WORDS_SECONDS

    def end(self) -> None:
        self.seconds = time.monotonic() - self.began

    def words(self) -> str | None:
        """Of one that hasn't got on for a while, once in a while."""
        if (silent := time.monotonic() - self.moved) < self.patience:
            return None
        self.patience *= 2
        return f"waiting {silent:.0f} s for {self.name}" + (f": {self.done} of {self.total} done" if self.total else "")


@contextmanager
def phase(name: str, total: int | None = None) -> Iterator[Phase]:
    """While the block runs; its `seconds` are there afterwards."""
    _reached[name] += 1
    process = os.environ.get(PROCESS) or f"rank {os.environ.get('RANK', 0)}"
    if f"{process} {name} {_reached[name]}" in os.environ.get(VARIABLE, "").split(","):
        os.kill(os.getpid(), signal.SIGKILL)
    running = Phase(name, total)
    _running.append(running)
    try:
        yield running
    finally:
        running.end()
        _running.remove(running)


class Watch:
    """Says what this process waits for, on a thread of its own, until it is closed."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say, self._closed = say, threading.Event()
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _look(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            for running in list(_running):
                if words := running.words():
                    self._say(words)

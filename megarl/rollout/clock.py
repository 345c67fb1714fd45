"""Where the time of something goes that has several parts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
_END: Any = object()


class Clock:
    """Seconds by what they are spent on: what one part spends within another counts for it alone."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner = 0.0  # seconds within what is under way that count for other parts

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        began, inner = time.monotonic(), self._inner
        self._inner = 0.0
        try:
            yield
        finally:
            took = time.monotonic() - began
            self.seconds[part] += took - self._inner
            self._inner = inner + took

    def each(self, part: str, items: Iterable[T]) -> Iterator[T]:
        """The items; what it takes to come by them is this part's."""
        iterator = iter(items)
        while True:
            with self.during(part):
                item = next(iterator, _END)
            if item is _END:
                return
            yield item

    def take(self) -> dict[str, float]:
        """What has been spent since the last call."""
        seconds, self.seconds = self.seconds, defaultdict(float)
        return dict(seconds)

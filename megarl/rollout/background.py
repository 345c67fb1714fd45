"""An asyncio event loop on a thread of its own: what goes on while this process computes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """Coroutines given to it begin in the order in which they are given. Child processes that they start live as long
    as the thread does (PR_SET_PDEATHSIG follows it): until `close`."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Its result; raises what it raises."""
        return self.start(coroutine).result()

    def close(self, last: Callable[[], None] = lambda: None) -> None:
        """Cancel what is unfinished, do the `last` thing on this thread, and end."""
        if not self.loop.is_closed():
            self.run(_cancel_others())
            self.loop.call_soon_threadsafe(last)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)

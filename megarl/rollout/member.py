"""An engine of the pool through all of its processes: what it is good for, and what it owes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from megarl.rollout.engine import Engine
from megarl.rollout.messages import Done, Request, Response, Sampling


class State(StrEnum):
    """What an engine is good for."""

    STARTING = "starting"
    STALE = "stale"  # without weights, or refused the last ones: serves nothing before a complete update
    HEALTHY = "healthy"
    SUSPECT = "suspect"  # owes something and has been silent for half of what is allowed
    DEAD = "dead"  # and will not be started again


@dataclass
class Work:
    """A request on its way to a response."""

    number: int
    request: Request
    sampling: Sampling
    response: asyncio.Future[Response]


@dataclass(eq=False)
class Member:
    """An engine of the pool, through all of its processes."""

    index: int
    log_path: Path
    state: State = State.STARTING
    engine: Engine | None = None
    work: dict[int, Work] = field(default_factory=dict)  # given to it and not answered
    reply: asyncio.Future[Done] | None = None  # to a command
    witnesses: bool = False  # what it holds can be verified
    verified: int = 0  # the last of its processes whose weights were
    heard: float = 0.0  # when it last said something, or was given something after it owed nothing
    tokens: int = 0  # of its unfinished responses, when it last told
    busy: float = 0.0  # seconds of generation, of all its processes
    busy_before: float = 0.0  # of those that died
    lives: int = 0  # processes so far
    deaths: int = 0  # since it last finished a response
    last_words: str = ""  # of its last process that died

    @property
    def owes(self) -> bool:
        return bool(self.work) or self.reply is not None

    def of(self, what: object) -> str:
        """In words: which engine, what of it, and where to read more."""
        return f"rollout engine {self.index}: {what} (log: {self.log_path})"

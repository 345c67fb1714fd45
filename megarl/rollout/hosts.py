"""Engines on other nodes: a host on each starts and kills them at rank 0's word. Each is itself connected to rank 0."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from megarl.config import Config
from megarl.processes import describe_exit
from megarl.rollout.background import Background
from megarl.rollout.connection import Door, Invitation, Stream
from megarl.rollout.engine import EngineDied, Here, Place, StreamEngine, start_worker
from megarl.rollout.messages import Ended, Kill, Launch

JOIN_SECONDS = 300.0  # for a host to connect to rank 0, and what it launches after it
END_SECONDS = 10.0  # for a host to say how an engine ended whose connection is lost
POLL_SECONDS = 0.1  # between two looks at whether a child lives


class Host:
    """On a node without rank 0: its engines, until `close` or until rank 0 is gone. Raises OSError where it isn't to be
    reached."""

    def __init__(self, config: Config, invitation: Invitation, node: int, nodes: int) -> None:
        self._config, self._invitation, self._node, self._nodes = config, invitation, node, nodes
        self._launched: dict[int, asyncio.Task[None]] = {}
        self._background = Background("rollout host")
        try:
            self._stream = self._background.run(self._join())
        except BaseException:
            self._background.close()
            raise
        self._served = self._background.start(self._serve())

    def close(self, wait: bool) -> None:
        """Kill them; with `wait`, once rank 0 needs them no more."""
        if wait:
            self._served.result()
        self._background.close()

    async def _join(self) -> Stream:
        return await Stream.open(await self._invitation.accept(self._node))

    async def _serve(self) -> None:
        try:
            while True:
                match await self._stream.receive():
                    case Launch() as launch:
                        self._launched[launch.number] = asyncio.create_task(self._run(launch))
                    case Kill(number):
                        self._launched[number].cancel()
        except EOFError:  # rank 0 is gone, or at its end
            pass
        finally:
            for task in self._launched.values():
                task.cancel()
            await asyncio.gather(*self._launched.values(), return_exceptions=True)

    async def _run(self, launch: Launch) -> None:
        """An engine, from its beginning to its end."""
        number, path = launch.number, Path(launch.log_path)
        try:
            connected = await self._invitation.accept(number)
            process = start_worker(self._config, launch.index, launch.life, path, connected, self._nodes)
        except OSError as error:
            self._stream.send(Ended(number, f"it could not be started: {error}"))
            return
        try:
            while process.poll() is None:
                await asyncio.sleep(POLL_SECONDS)
        finally:
            process.kill()
            self._stream.send(Ended(number, f"its process {describe_exit(process.wait())}"))


class RemoteEngine(StreamEngine):
    """A child process of another node's host."""

    def __init__(self, stream: Stream, end: asyncio.Future[str], kill: Callable[[], None]) -> None:
        super().__init__(stream)
        self._end, self._kill = end, kill

    def kill(self) -> None:
        self._stream.close()
        self._kill()

    async def _how_it_ended(self) -> str:
        await asyncio.wait([self._end], timeout=END_SECONDS)
        return self._end.result() if self._end.done() else "its connection is lost"


class Node:
    """Another node, as rank 0 sees it."""

    def __init__(self, door: Door, node: int, numbers: Iterator[int]) -> None:
        self._door, self._node, self._numbers = door, node, numbers
        self._host: Stream | None = None
        self._ends: dict[int, asyncio.Future[str]] = {}  # of what was launched

    async def meet(self) -> None:
        """Its host. Raises EngineDied where that doesn't come."""
        try:
            connected = await asyncio.wait_for(self._door.expect(self._node), JOIN_SECONDS)
        except TimeoutError:
            raise EngineDied(f"node {self._node} has not connected within {JOIN_SECONDS:.0f} s") from None
        self._host = await Stream.open(connected)
        self._hearing = asyncio.create_task(self._hear(self._host))

    async def start(self, index: int, life: int, log_path: Path) -> RemoteEngine:
        if not self._host:
            raise EngineDied(self._lost)
        number = next(self._numbers)
        arrival, end = self._door.expect(number), asyncio.get_running_loop().create_future()
        self._ends[number] = end
        self._host.send(Launch(number, index, life, str(log_path)))
        await asyncio.wait([arrival, end], timeout=JOIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if not arrival.done():
            arrival.cancel()
            self._kill(number)
            raise EngineDied(end.result() if end.done() else f"it has not connected within {JOIN_SECONDS:.0f} s")
        return RemoteEngine(await Stream.open(arrival.result()), end, lambda: self._kill(number))

    def close(self) -> None:
        if self._host:
            self._host.close()

    @property
    def _lost(self) -> str:
        return f"node {self._node} is gone"

    def _kill(self, number: int) -> None:
        if self._host and number in self._ends:
            self._host.send(Kill(number))

    async def _hear(self, host: Stream) -> None:
        try:
            with suppress(EOFError):
                while True:
                    ended = await host.receive()
                    self._ends.pop(ended.number).set_result(ended.how)
        finally:  # whatever the cause, nothing more is heard of what it launched
            self._host = None
            for end in self._ends.values():
                end.set_result(self._lost)
            self._ends.clear()


class Nodes:
    """The nodes that engines are on: this one, if it is one of them, and others that come through a door. Engine i is
    for place i % count."""

    def __init__(self, config: Config, count: int, say: Callable[[str], object], here: bool = True) -> None:
        self._door = Door(say)
        numbers = itertools.count(count)  # of connections: those of hosts are those of their nodes
        self._others = [Node(self._door, node, numbers) for node in range(int(here), count)]
        self.places: list[Place] = [*([Here(config, count)] if here else []), *self._others]

    @property
    def invitation(self) -> Invitation:
        return self._door.invitation

    async def meet(self) -> None:
        """Let all hosts in. Raises EngineDied."""
        meetings = [asyncio.create_task(node.meet()) for node in self._others]
        self._listening = asyncio.create_task(self._door.listen())
        await asyncio.gather(*meetings)

    def close(self) -> None:
        """The hosts take it as the word to end."""
        for node in self._others:
            node.close()
        self._door.close()

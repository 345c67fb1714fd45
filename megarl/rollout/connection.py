"""Messages over a socket, and the port of rank 0: who knocks proves that it knows the run's secret, or is refused.

The proof goes both ways and comes before anything is unpickled. What follows it is not encrypted.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import pickle
import secrets
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

LONG = 0x7FFFFFFF  # bytes, from which on multiprocessing's connections announce a message by a longer header
KNOCK_SECONDS = 10.0  # for a stranger to prove that it is none
HOST, RANK_0 = b"host", b"rank 0"  # who says what: no proof can be sent back to the one that gave it


class Stream:
    """Pickled messages, as multiprocessing's connections send them. Opened in an event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, connected: socket.socket) -> Stream:
        return cls(*await asyncio.open_connection(sock=connected))

    def send(self, message: Any) -> None:
        """Never waits; what the other end doesn't take is kept for it."""
        content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        header = struct.pack("!i", len(content)) if len(content) <= LONG else struct.pack("!iQ", -1, len(content))
        self._writer.writelines((header, content))

    async def receive(self) -> Any:
        """The next message. Raises EOFError where the other end is gone."""
        try:
            (size,) = struct.unpack("!i", await self._reader.readexactly(4))
            if size == -1:
                (size,) = struct.unpack("!Q", await self._reader.readexactly(8))
            return pickle.loads(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, OSError):
            raise EOFError from None

    def close(self) -> None:
        """At once: what wasn't taken is lost."""
        self._writer.transport.abort()


@dataclass(frozen=True)
class Invitation:
    """What it takes to connect to rank 0; for its other ranks alone."""

    addresses: list[str]  # names of its node, tried one after another
    port: int
    secret: bytes = field(repr=False)

    async def accept(self, number: int) -> socket.socket:
        """A connection to rank 0, which knows by the number what it is for. Raises OSError."""
        loop, reasons = asyncio.get_running_loop(), []
        for address in self.addresses:
            try:
                connected = await asyncio.to_thread(socket.create_connection, (address, self.port), KNOCK_SECONDS)
                try:
                    _watch(connected)
                    async with asyncio.timeout(KNOCK_SECONDS):
                        await _prove(connected, self.secret, HOST, RANK_0)
                        await loop.sock_sendall(connected, struct.pack("!q", number))
                    return connected
                except BaseException:
                    connected.close()
                    raise
            except OSError as error:
                reasons.append(f"{address}:{self.port} ({error or type(error).__name__})")
        raise ConnectionError(f"rank 0 isn't to be reached at {' or '.join(reasons)}")


class Door:
    """A port of this process. Whoever knows the secret and is expected comes in; anybody else is refused, and told of
    by `say`. One that dawdles keeps nobody waiting."""

    def __init__(self, say: Callable[[str], object]) -> None:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._socket = socket.create_server(("", 0), family=family, backlog=128, dualstack_ipv6=both)
        self._socket.setblocking(False)
        self._say = say
        self._expected: dict[int, asyncio.Future[socket.socket]] = {}
        self._knocking: set[asyncio.Task[None]] = set()
        names = [os.environ.get("MASTER_ADDR", ""), socket.gethostname()]
        port, secret = self._socket.getsockname()[1], secrets.token_bytes(32)
        self.invitation = Invitation([name for name in names if name], port, secret)

    def expect(self, number: int) -> asyncio.Future[socket.socket]:
        """The connection of this number, once it is there."""
        self._expected[number] = asyncio.get_running_loop().create_future()
        return self._expected[number]

    async def listen(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connected, address = await loop.sock_accept(self._socket)
            except OSError:  # out of descriptors, or it hung up already
                await asyncio.sleep(1)
                continue
            self._knocking.add(task := loop.create_task(self._admit(connected, address[0])))
            task.add_done_callback(self._knocking.discard)

    def close(self) -> None:
        self._socket.close()

    async def _admit(self, connected: socket.socket, address: str) -> None:
        try:
            _watch(connected)
            async with asyncio.timeout(KNOCK_SECONDS):
                await _prove(connected, self.invitation.secret, RANK_0, HOST)
                (number,) = struct.unpack("!q", await _read(connected, 8))
            expected = self._expected.pop(number, None)
            if expected is None or expected.done():
                raise PermissionError("nobody expects it")
        except OSError as error:
            connected.close()
            reason = "it said nothing in time" if isinstance(error, TimeoutError) else error
            self._say(f"refused a connection from {address.removeprefix('::ffff:')}: {reason}")
        else:
            expected.set_result(connected)


async def _prove(connected: socket.socket, secret: bytes, we: bytes, they: bytes) -> None:
    """Each end makes up a number, and answers the other's by what only the secret makes of both. Raises OSError."""
    ours = secrets.token_bytes(32)
    connected.setblocking(False)
    send = asyncio.get_running_loop().sock_sendall
    await send(connected, ours)
    theirs = await _read(connected, 32)
    await send(connected, hmac.digest(secret, we + theirs + ours, "sha256"))
    if not hmac.compare_digest(await _read(connected, 32), hmac.digest(secret, they + ours + theirs, "sha256")):
        raise PermissionError("it doesn't know the secret of this run")


async def _read(connected: socket.socket, size: int) -> bytes:
    loop, content = asyncio.get_running_loop(), b""
    while len(content) < size:
        if not (more := await loop.sock_recv(connected, size - len(content))):
            raise ConnectionError("it hung up")
        content += more
    return content


def _watch(connected: socket.socket) -> None:
    """Have the kernel notice within half a minute that the other machine is gone; and send small messages at once."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
        connected.setsockopt(socket.IPPROTO_TCP, option, value)

"""Who gets in at rank 0's port: no stranger, whatever it says, and nobody has to wait for one."""

import asyncio
import os
import pickle
import socket
import struct
from contextlib import suppress
from dataclasses import replace

import pytest

from megarl.rollout import connection
from megarl.rollout.connection import Door, Stream

NUMBER = 5


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def with_door(client):
    """What `client(door, expected)` returns, and what the door has said."""
    said = []

    async def run():
        door = Door(said.append)
        listening = asyncio.create_task(door.listen())
        result = await client(door, door.expect(NUMBER))
        while door._knocking:
            await asyncio.sleep(0.01)
        listening.cancel()
        door.close()
        return result

    return asyncio.run(run()), said


async def get_in(door, expected):
    """One of the run's own comes in and is understood."""
    theirs = await Stream.open(await door.invitation.accept(NUMBER))
    ours = await Stream.open(await asyncio.wait_for(expected, 5))
    theirs.send({"hello": list(range(100_000))})
    assert len((await ours.receive())["hello"]) == 100_000
    ours.send("and back")
    assert await theirs.receive() == "and back"
    theirs.close()
    with pytest.raises(EOFError):
        await ours.receive()
    ours.close()


def knock(door):
    return socket.create_connection(("127.0.0.1", door.invitation.port), timeout=10)


def test_one_that_knows_the_secret_gets_in():
    _, said = with_door(get_in)
    assert said == []


@pytest.mark.parametrize("say", ["garbage", "a pickle", "nothing", "what it hears"])
def test_a_stranger_without_the_secret_is_refused_and_nothing_it_sends_is_unpickled(say, tmp_path):
    trap = pickle.dumps(Trap(tmp_path / "sprung"))

    async def stranger(door, expected):
        with knock(door) as connected, suppress(ConnectionError):
            if say == "what it hears":
                for _ in range(2):
                    connected.sendall(await asyncio.to_thread(connected.recv, 32))
                connected.sendall(struct.pack("!q", NUMBER))
            else:
                sent = {"garbage": os.urandom(4096), "a pickle": struct.pack("!i", len(trap)) + trap, "nothing": b""}
                connected.sendall(sent[say])
            connected.shutdown(socket.SHUT_WR)
            while await asyncio.to_thread(connected.recv, 4096):
                pass
        assert not expected.done()
        await get_in(door, expected)

    _, said = with_door(stranger)
    assert len(said) == 1 and said[0].startswith("refused a connection from 127.0.0.1: ")
    assert not (tmp_path / "sprung").exists()


def test_a_wrong_secret_is_refused_by_both_ends():
    async def stranger(door, expected):
        with pytest.raises(ConnectionError, match=f"127.0.0.1:{door.invitation.port} .*secret"):
            await replace(door.invitation, secret=bytes(32), addresses=["127.0.0.1"]).accept(NUMBER)
        assert not expected.done()
        await get_in(door, expected)

    _, said = with_door(stranger)
    assert said == ["refused a connection from 127.0.0.1: it doesn't know the secret of this run"]


def test_one_that_knows_the_secret_and_is_not_expected_is_refused():
    async def late(door, expected):
        connected = await door.invitation.accept(NUMBER + 1)
        assert await asyncio.get_running_loop().sock_recv(connected, 1) == b""
        connected.close()

    _, said = with_door(late)
    assert said == ["refused a connection from 127.0.0.1: nobody expects it"]


def test_silent_strangers_keep_nobody_waiting_and_are_refused_in_time(monkeypatch):
    async def silent(door, expected):
        strangers = [knock(door) for _ in range(100)]
        await get_in(door, expected)
        assert len(door._knocking) == 100, "they were refused before their time"
        monkeypatch.setattr(connection, "KNOCK_SECONDS", 0.1)
        with knock(door) as last:
            while await asyncio.to_thread(last.recv, 32):
                pass
        for stranger in strangers:
            stranger.close()

    _, said = with_door(silent)
    assert said[0] == "refused a connection from 127.0.0.1: it said nothing in time"
    assert len(said) == 101 and all(line.startswith("refused a connection") for line in said)

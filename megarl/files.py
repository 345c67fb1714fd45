"""Files on disk: what tells their contents apart, who may write to a folder, what goes wrong with them as one line."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megarl.types import UserError

GIT_LFS = b"version https://git-lfs.github.com/spec/"
BLOCK, BLOCKS = 1 << 20, 64  # bytes read at so many places of a larger file to tell it apart
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
# What the system refuses whatever the program does, and what helps.
REFUSALS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EROFS: "name a place that can be written",
    errno.EACCES: "see to its permissions, or name another place",
    errno.EPERM: "see to its permissions, or name another place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs: the machine has no open file left",
    errno.EIO: "look at the disk",
    errno.ELOOP: "look at where its links lead",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ESTALE: "look at the network file system",
    errno.ENOMEM: "leave more memory to it",
}
COMMON = (errno.EACCES, errno.EPERM, errno.ENOMEM)  # programs meet these and go on: no cause of what comes later
# Torch's and Megatron's, which lose the system's error.
_WRITERS = re.compile(r"inline_container|unexpected pos \d+ vs \d+|caught while starting worker \d+")


class NotWritten(RuntimeError):
    """What a run makes could not be saved; the message says why."""


def path(text: str) -> Path:
    """A path of the command line; ~ is the home folder."""
    return Path(text).expanduser()


def write_whole(path: Path, text: str) -> None:
    """Whatever ends this, the file is as it was or complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def sha256(path: Path) -> str:
    """Of the file's bytes. Raises UserError where they can't be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None


def fingerprint(path: Path) -> str:
    """Tells contents apart: the hash of all bytes, or, of a file that is larger, its size and the hash of 64 MiB of it.

    Of those the first and the last are two; training moves them all. The time of the last change says nothing about
    contents: a copy has another, a restored file may have the old one.
    """
    try:
        size = path.stat().st_size
        if size <= BLOCK * BLOCKS:
            return f"sha256 {sha256(path)}"
        digest = hashlib.sha256()
        with path.open("rb") as file:
            for i in range(BLOCKS):
                file.seek((size - BLOCK) * i // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    return f"{size} bytes, sampled sha256 {digest.hexdigest()}"


@contextmanager
def locked(folder: Path, key: str, holder: str) -> Iterator[int]:
    """Holds the folder, which `key` names, for `holder`; yields the lock's file descriptor.

    A process that inherits it keeps others out for as long as it lives. Whatever ends the last of them, the kernel
    lets go. Raises UserError where another holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            held = lock.read().strip() or holder
            raise UserError(f"{key}={folder}: {held} is running there; wait for it, or name another") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"megarl: {folder} is on a file system without locks: start nothing else there", file=sys.stderr)
        lock.seek(0)
        if lock.read() != holder:
            lock.truncate(0)
            lock.write(holder)
            lock.flush()
        yield lock.fileno()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where there is none to read."""
    refuse_pointer(path)
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except ValueError as error:  # not JSON, not UTF-8
        raise UserError(f"{path} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def refuse_broken_links(folder: Path) -> None:
    """Raises UserError for a link to nothing: whoever looks for the file would take it for one that was never there."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path} links to {path.readlink()}, which is not there; restore that, or remove the link")


def refuse_pointer(path: Path) -> None:
    """Raises UserError for the few lines that git leaves in place of a large file."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(GIT_LFS)) == GIT_LFS
    except OSError:  # absent or unreadable: whoever reads it says so
        return
    if is_pointer:
        raise UserError(f"{path} is a git-lfs pointer, not the file itself; fetch it with git lfs pull")


@contextmanager
def writing(path: Path, fix: str) -> Iterator[None]:
    """Makes a UserError of what the system refuses meanwhile: a full disk, a folder without permission."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}; see to it, {fix}") from None


def refusal(error: BaseException, folder: Path | None = None) -> str | None:
    """What the system refused as one line with what helps, where that is what `error` comes from; else None.

    Looks through causes, through what other libraries make of the system's error, and, where torch's writer lost it,
    tries to write to `folder`, the one that was written to.
    """
    for cause in _causes(error):
        number = cause.errno if isinstance(cause, OSError) else _number(str(cause))
        if number in REFUSALS and (cause is error or number not in COMMON):
            named = getattr(cause, "filename", None) or folder
            return f"{f'{named}: ' if named else ''}{os.strerror(number)}; {REFUSALS[number]}"
        if folder and _WRITERS.search(str(cause)):
            return _try_to_write(folder) or f"{folder}: a file could not be written whole; see whether the disk is full"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and all that it was raised from, or while handling, or that its ranks met."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        cause = waiting.pop(0)
        if cause is None or any(cause is other for other in seen):
            continue
        seen.append(cause)
        yield cause
        failures = getattr(cause, "failures", None)  # of torch's CheckpointException: rank -> (error, its traceback)
        of_ranks = [pair[0] for pair in failures.values()] if isinstance(failures, dict) else []
        waiting += [*of_ranks, cause.__cause__, cause.__context__]


def _number(text: str) -> int | None:
    """The system's error number in another library's words."""
    if found := re.search(r"(?:os error |\[?[Ee]rrno:? )(\d+)", text):
        return int(found[1])
    return next((number for number in REFUSALS if os.strerror(number) in text), None)


def _try_to_write(folder: Path) -> str | None:
    trial = folder / f".megarl-{os.getpid()}"
    try:
        with trial.open("wb") as file:
            file.write(bytes(BLOCK))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return refusal(error, folder)
    finally:
        trial.unlink(missing_ok=True)
    return None

"""Fingerprints tell contents apart; what the system refuses becomes one line, whatever it was wrapped in."""

import errno
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.distributed.checkpoint.api import CheckpointException

from megarl.files import BLOCK, BLOCKS, NotWritten, fingerprint, path, refusal, write_whole

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def largest_file(size):
    """What is written beyond `size` bytes of a file is refused, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_small_file_is_known_by_all_of_it(tmp_path):
    file = tmp_path / "small"
    file.write_bytes(bytes(5000))
    before = fingerprint(file)
    os.utime(file, (1, 1))
    assert fingerprint(file) == before and before.startswith("sha256 ")
    file.write_bytes(bytes(2500) + b"\1" + bytes(2499))
    assert fingerprint(file) != before


@pytest.mark.parametrize("position", [0, BLOCK - 1, (2 * BLOCKS * BLOCK - 1), BLOCKS * BLOCK + 3 * BLOCK // 2])
def test_a_large_file_is_known_by_its_size_and_by_places_all_over_it(tmp_path, position):
    file = tmp_path / "large"
    with file.open("wb") as sparse:
        sparse.truncate(2 * BLOCKS * BLOCK)
    before = fingerprint(file)
    assert before.startswith(f"{2 * BLOCKS * BLOCK} bytes, sampled sha256 ")
    with file.open("r+b") as sparse:
        sparse.seek(position - position % 2 if position < BLOCK else position)
        sparse.write(b"\1" * (2 * BLOCK))
    assert fingerprint(file) != before


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    assert path("~/runs") == Path("/home/anna/runs") and path("a~b") == Path("a~b")


def raised_from(cause, error):
    try:
        raise error from cause
    except type(error) as raised:
        return raised


def raised_while_handling(context, error):
    try:
        try:
            raise context
        except type(context):
            raise error  # noqa: B904
    except type(error) as raised:
        return raised


WRAPPED = {
    "itself": FULL,
    "a cause": raised_from(FULL, ValueError("bad")),
    "a context": raised_while_handling(FULL, KeyError("bad")),
    "a rank's": CheckpointException("write", {3: (raised_from(FULL, RuntimeError("Worker failure")), None)}),
    "in Rust": ValueError('Error while serializing: IoError(Os { code: 28, message: "No space left on device" })'),
    "by number": RuntimeError("I/O error: something (os error 28)"),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_full_disk_is_named_whatever_it_was_wrapped_in(tmp_path, how):
    assert refusal(WRAPPED[how], tmp_path) == f"{tmp_path}: No space left on device; free some space"


def test_the_file_is_named_where_the_system_names_it(tmp_path):
    with pytest.raises(OSError) as caught:
        Path("/proc/nothing/here").write_text("")
    assert refusal(caught.value, tmp_path) is None, "a missing file is another mistake"
    error = OSError(errno.EMFILE, "Too many open files", "/a/file")
    assert refusal(error, tmp_path) == "/a/file: Too many open files; raise the limit of open files (ulimit -n)"
    with pytest.raises(OSError) as caught:
        (tmp_path / ("a" * 300)).exists()
    assert refusal(caught.value).endswith("a: File name too long; use a shorter name")
    assert refusal(error).startswith("/a/file: ") and refusal(FULL) == "No space left on device; free some space"


def test_what_a_program_met_and_went_on_from_is_no_cause(tmp_path):
    denied = PermissionError(errno.EACCES, "Permission denied", "/root/x")
    assert refusal(raised_while_handling(denied, KeyError("bad")), tmp_path) is None
    assert refusal(denied, tmp_path).startswith("/root/x: Permission denied")
    assert refusal(ValueError("bad"), tmp_path) is None and refusal(AssertionError(), tmp_path) is None


def test_a_cause_that_torchs_writer_has_lost_is_found_by_writing(tmp_path):
    tensors = {"weight": torch.ones(100_000)}
    with largest_file(50_000):
        with pytest.raises(RuntimeError, match="unexpected pos") as caught:
            torch.save(tensors, tmp_path / "shard")
        why = refusal(RuntimeError(str(caught.value)), tmp_path)
    assert why == f"{tmp_path}: File too large; raise the limit of a file's size (ulimit -f)"
    assert [file.name for file in tmp_path.iterdir()] == ["shard"]
    why = refusal(RuntimeError("Worker failure: unexpected pos 704 vs 598"), tmp_path)
    assert why == f"{tmp_path}: a file could not be written whole; see whether the disk is full"


def test_an_export_that_the_system_refuses_is_named(tmp_path):
    with largest_file(50_000), pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.torch.save_file({"weight": torch.ones(100_000)}, tmp_path / "model.safetensors")
    assert refusal(caught.value, tmp_path).startswith(f"{tmp_path}: File too large")


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    write_whole(tmp_path / "config.yaml", "before")
    with largest_file(1000), pytest.raises(OSError, match="File too large"):
        write_whole(tmp_path / "config.yaml", "x" * 5000)
    assert (tmp_path / "config.yaml").read_text() == "before"


def test_what_could_not_be_saved_is_no_mistake_in_the_config():
    assert not issubclass(NotWritten, ValueError)

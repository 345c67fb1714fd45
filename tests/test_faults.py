"""Limits of the machine, met before a run starts."""

import resource
import subprocess
import sys

import pytest

from megarl.faults import raise_file_limit
from megarl.processes import python_command, python_path


def test_as_many_files_may_be_open_as_the_user_may_have():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        raise_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(hard, 65536)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.processes
def test_shared_memory_that_cannot_be_written_is_refused_by_name():
    program = "from megarl.faults import check_shared_memory as check; check()"
    mount = 'mount -t tmpfs -o ro none /dev/shm && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-c", program]
    if subprocess.run([*command[:5], "sh", "true"], capture_output=True).returncode:
        pytest.skip("no mount can be made here")
    done = subprocess.run(command, env=python_path(), capture_output=True, text=True)
    assert "UserError: /dev/shm can't be used (Read-only file system); mount it writable" in done.stderr


@pytest.mark.processes
def test_a_full_disk_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        command = python_command("megarl.cli", "recipes")
        done = subprocess.run(command, env=python_path(), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("megarl: error: No space left on device; ")

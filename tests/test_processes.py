"""Python processes of our own: what they import, and how their death is told."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megarl.processes import ROOT, cores, describe_exit, memory_kills, memory_limit, python_command, python_path

SHADOWS = ("queue", "random", "types", "json", "select")


@pytest.mark.processes
def test_files_named_like_modules_in_the_working_folder_are_not_imported(tmp_path):
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')")
    children = (
        "import subprocess, sys, queue, random, megarl; subprocess.run([sys.executable, '-m', 'queue'], check=True)"
    )
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/probe.py").write_text(children)
    environment = os.environ | python_path()
    environment["PYTHONPATH"] += f"{os.pathsep}{tmp_path / 'outside'}"
    done = subprocess.run(python_command("probe"), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.processes
@pytest.mark.parametrize("prefix", [["-m"], ["-P", "-m"]])
def test_the_command_starts_beside_a_file_named_queue(tmp_path, prefix):
    (tmp_path / "queue.py").write_text("raise SystemExit('shadowed')")
    done = subprocess.run(
        [sys.executable, *prefix, "megarl.cli", "recipes", "diff", "grpo", "raft"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "grpo" in done.stdout, done.stderr


@pytest.mark.processes
def test_children_find_megarl_where_it_is_not_installed(tmp_path):
    program = "import sys, megarl; print(megarl.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-S", "-c", program], cwd=tmp_path, env=python_path(), capture_output=True, text=True
    )
    assert done.stdout.strip() == str(ROOT / "megarl/__init__.py"), done.stderr


def test_the_path_that_the_user_gave_comes_after_megarl(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    assert python_path()["PYTHONPATH"] == f"{ROOT}{os.pathsep}/theirs"


def test_a_death_is_told_by_its_cause():
    assert describe_exit(3) == "exited with 3"
    assert describe_exit(-signal.SIGTERM) == "was killed by SIGTERM"
    assert memory_kills() >= 0 and 2**28 < memory_limit() < 2**50


@pytest.mark.processes
def test_a_process_that_the_kernel_ends_for_memory_is_said_to_have_run_out_of_it(tmp_path):
    """In a control group of its own, where this machine lets us make one."""
    program = (
        "import subprocess, sys\nfrom megarl.processes import describe_exit\n"
        "print(describe_exit(subprocess.run([sys.executable, '-c', 'b\"1\" * 10**9']).returncode))"
    )
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    names = [line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory"]
    group = f"/sys/fs/cgroup/memory{names[0] if names else ''}/megarl-test-{os.getpid()}"
    try:
        os.mkdir(group)
        Path(group, "memory.limit_in_bytes").write_text(str(200 * 2**20))
    except OSError:
        pytest.skip("no control group can be made here")
    try:
        shell = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$0" -P -c "$1"', sys.executable, program]
        done = subprocess.run(shell, env=os.environ | python_path(), capture_output=True, text=True)
    finally:
        os.rmdir(group)
    assert "was killed by SIGKILL, probably out of memory (of 0.2 GiB): lower" in done.stdout, done.stderr


def test_cores_are_those_that_the_process_may_run_on():
    allowed = os.sched_getaffinity(0)
    assert 1 <= cores() <= len(allowed)
    os.sched_setaffinity(0, list(allowed)[:1])
    try:
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)

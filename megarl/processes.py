"""How this program starts Python processes of its own, and what their death means in words."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]  # the checkout, or the folder that megarl is installed in


def python_command(module: str, *arguments: str) -> list[str]:
    """Runs a module without the working folder on its path: a file queue.py there is nobody's standard library."""
    return [sys.executable, "-P", "-m", module, *arguments]


def python_path() -> dict[str, str]:
    """Environment in which `python_command` and its own children find megarl, installed or not."""
    path = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    if ROOT.name not in ("site-packages", "dist-packages"):  # whose modules mustn't come before Python's own
        path = [str(ROOT), *path]
    return {"PYTHONSAFEPATH": "1"} | ({"PYTHONPATH": os.pathsep.join(path)} if path else {})


def describe_exit(code: int) -> str:
    """How a child ended, from subprocess's return code: "was killed by SIGKILL, ..."."""
    if code >= 0:
        return f"exited with {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was killed by {name}{why_killed(code)}"


def why_killed(code: int) -> str:
    """For a return code of SIGKILL: that the kernel has ended processes for want of memory, if it has."""
    if code != -signal.SIGKILL or memory_kills() <= _KILLS_BEFORE:
        return ""
    return (
        f", probably out of memory (of {memory_limit() / 2**30:.1f} GiB): lower learner.micro_batch_tokens, "
        "rollout.engines or rollout.kv_cache_gib, or give it more"
    )


def memory_kills() -> int:
    """How many processes the kernel has ended for want of memory: of this control group, else of the machine."""
    for file in _group_files("memory.events", "memory.oom_control"):
        if (count := _field(file, "oom_kill")) is not None:
            return count
    return _field(Path("/proc/vmstat"), "oom_kill") or 0


def memory_limit() -> int:
    """Bytes that this process and those beside it may have together."""
    limits = [psutil.virtual_memory().total]
    for file in _group_files("memory.max", "memory.limit_in_bytes"):
        text = _read(file).strip()
        limits += [int(text)] if text.isdigit() else []  # or "max"
    return min(limits)


def cores() -> int:
    """Those that this process and its children may run on, and no more than the share of its control group."""
    counts = [len(os.sched_getaffinity(0))]
    for file in _group_files("cpu.max", "cpu.max"):  # version 1 has no such file
        time, _, period = _read(file).strip().partition(" ")
        counts += [int(time) // int(period)] if time.isdigit() else []  # or "max"
    return max(min(counts), 1)


def _group_files(version2: str, version1: str) -> Iterator[Path]:
    """A file of this process's control group and of those around it, innermost first."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup", controllers)
        for folder in (group := root / name.lstrip("/"), *group.parents):
            if folder.is_relative_to(root) and (file := folder / (version1 if controllers else version2)).exists():
                yield file


def _field(file: Path, name: str) -> int | None:
    """The number behind `name` in a file of names and numbers."""
    fields = dict(line.split(maxsplit=1) for line in _read(file).splitlines() if " " in line)
    return int(fields[name]) if name in fields else None


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # another kernel, or a container that hides it
        return ""


_KILLS_BEFORE = memory_kills()

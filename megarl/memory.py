"""Memory of this run's processes: what they hold, and how they give back what they no longer need.

glibc keeps freed blocks for later ones of the same size. A step's tensors have sizes of their own, so the blocks of one
step rarely serve the next and a process grows until it is killed; `give_back` returns them to the system.
"""

from __future__ import annotations

import ctypes
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import psutil

from megarl.types import Metrics

if TYPE_CHECKING:
    from megarl.learner.mesh import Mesh

GIB = 2**30
MEASURE_SECONDS = 10.0
CHILDREN = {"megarl.rollout.worker": "engines", "megarl.rewards.worker": "graders"}


def give_back() -> None:
    """Return the freed memory of this process to the system, where the C library knows how to (glibc)."""
    if trim := _malloc_trim():
        trim(0)


def gpu_used() -> float | None:
    """GiB of this process's GPU that all processes hold at this moment; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def memory_of_ranks(mesh: Mesh, lent_bytes: int = 0) -> Metrics:
    """memory/*: GiB held by all ranks, by the largest, by engines and graders; the largest rank's peak so far; and what
    all ranks lend the engines. Memory that several processes share counts once among them. Collective."""
    everyone = mesh.gather(_of_this_process() | {"lent": lent_bytes / GIB})
    total = {name: sum(one[name] for one in everyone) for name in everyone[0]}
    return {
        "memory/ranks": total["rank"],
        "memory/engines": total["engines"],
        "memory/graders": total["graders"],
        "memory/lent": total["lent"],
        "memory/rank_max": max(one["rank"] for one in everyone),
        "memory/rank_peak": max(one["peak"] for one in everyone),
    }


def _of_this_process() -> dict[str, float]:
    """GiB of this process, at its peak, and of the engines and graders that it started; any other child is its own."""
    return _measured(int(time.monotonic() / MEASURE_SECONDS))


@lru_cache(maxsize=1)
def _measured(period: int) -> dict[str, float]:
    """Once a period: a process stands still while the kernel counts its pages, 50 ms for each 2 GiB."""
    process = psutil.Process()
    held = {"rank": _held(process), "engines": 0.0, "graders": 0.0}
    for child in process.children():
        with suppress(psutil.Error):  # it may have just ended
            kind = next((kind for module, kind in CHILDREN.items() if module in child.cmdline()), "rank")
            held[kind] += sum(map(_held, [child, *child.children(recursive=True)]))
    return held | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}


def _held(process: psutil.Process) -> float:
    return process.memory_full_info().pss / GIB

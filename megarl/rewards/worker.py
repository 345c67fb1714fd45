"""A process that runs a reward's slow check: one JSON request per line in, one JSON reply per line out.

megarl.rewards.pool starts it and kills it over its CPU budget. It imports no torch, so it starts in under a second.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import select
import sys
import time
from typing import TextIO

from megarl.rewards import reward_named
from megarl.rewards.user import Unusable

READY = b"ready\n"
STARTUP_SECONDS = 120.0
PARENT_CHECK_SECONDS = 1.0
CPU_SLACK_SECONDS = 1
MAX_ERROR = 300  # characters; a reply always fits PIPE_BUF, so it arrives whole


def main(reward: str, lenient: bool, cpu_seconds: float, memory_bytes: int, parent: int) -> None:
    """Serve requests {"answer", "reference"} until the pipe closes or the parent is gone.

    Replies {"verdict": bool or null, "cpu": seconds, "error": str, "worn": bool}; a null verdict comes with an error,
    and a worn worker should be replaced. One that can't start replies {"refused": str} instead of READY.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    logging.disable(logging.CRITICAL)
    # What a reward reads or prints is nobody's business, and must not get between requests and replies.
    nothing = os.open(os.devnull, os.O_RDWR)
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.dup(1)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    rules = reward_named(reward, lenient)
    _limit_cpu(STARTUP_SECONDS)
    try:
        rules.prepare()
    except Unusable as reason:
        os.write(replies, json.dumps({"refused": str(reason)[:MAX_ERROR]}).encode() + b"\n")
        return
    os.dup2(nothing, 2)
    os.write(replies, READY)
    while _request_arrives(requests, parent) and (request := requests.readline()):
        item = json.loads(request)
        _limit_cpu(cpu_seconds + CPU_SLACK_SECONDS)
        start = _cpu_seconds()
        verdict, error, worn = None, "", False
        try:
            verdict = rules.slow_verdict(item["answer"], item["reference"])
        except MemoryError:
            error, worn = "out of memory", True
        except (Exception, SystemExit) as raised:  # a user's function may raise anything
            error = f"{type(raised).__name__}: {' '.join(str(raised).split())}"[:MAX_ERROR]
        reply = {"verdict": verdict, "cpu": _cpu_seconds() - start, "error": error, "worn": worn}
        os.write(replies, json.dumps(reply).encode() + b"\n")


def _cpu_seconds() -> float:
    """CPU time of this process and of its ended children."""
    return sum(os.times()[:4])


def _request_arrives(requests: TextIO, parent: int) -> bool:
    """Wait for a request; False once the parent is gone. A closed pipe isn't enough: its forks may hold it open."""
    while os.getppid() == parent:
        if select.select([requests], [], [], PARENT_CHECK_SECONDS)[0]:
            return True
    return False


def _limit_cpu(seconds: float) -> None:
    """Have the kernel end this process after so much more CPU time, should the parent not be there to do it."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


if __name__ == "__main__":
    name, is_lenient, seconds, memory, parent_pid = sys.argv[1:]
    main(name, is_lenient == "lenient", float(seconds), int(memory), int(parent_pid))

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

from megarl.rewards import REWARDS

READY = b"ready\n"
PARENT_CHECK_SECONDS = 1.0
CPU_SLACK_SECONDS = 1


def main(reward: str, cpu_seconds: float, memory_bytes: int, parent: int) -> None:
    """Serve requests {"answer", "reference"} until the pipe closes or the parent is gone.

    Replies {"verdict": bool or null, "cpu": seconds, "error": str}; a null verdict comes with an error.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    logging.disable(logging.CRITICAL)
    slow_verdict = REWARDS[reward].slow_verdict
    slow_verdict(r"\frac{1}{2}", "x")  # imports and builds the parser, so that no answer pays for it

    replies = os.dup(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.write(replies, READY)
    while _request_arrives(parent) and (request := sys.stdin.readline()):
        item = json.loads(request)
        _limit_cpu(cpu_seconds + CPU_SLACK_SECONDS)
        start = time.process_time()
        verdict, error = None, ""
        try:
            verdict = slow_verdict(item["answer"], item["reference"])
        except MemoryError:
            error = "out of memory"
        reply = {"verdict": verdict, "cpu": time.process_time() - start, "error": error}
        os.write(replies, json.dumps(reply).encode() + b"\n")


def _request_arrives(parent: int) -> bool:
    """Wait for a request; False once the parent is gone. A closed pipe isn't enough: its forks may hold it open."""
    while os.getppid() == parent:
        if select.select([sys.stdin], [], [], PARENT_CHECK_SECONDS)[0]:
            return True
    return False


def _limit_cpu(seconds: float) -> None:
    """Have the kernel end this process after so much more CPU time, should the parent not be there to do it."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))

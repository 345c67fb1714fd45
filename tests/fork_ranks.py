"""Ranks of a program on this machine, forked after the imports that cost each of them ten seconds under torchrun:
`python fork_ranks.py RANKS PROGRAM ARGUMENT ...`. Ends with 1, and ends the others, when a rank fails."""

import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

import megarl.learner.learner  # noqa: F401


def main() -> int:
    ranks, program = int(sys.argv[1]), sys.argv[2]
    with socket.socket() as held:  # the kernel gives the port to nobody else, and rank 0 can listen on it
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        left = {pid for rank in range(ranks) if (pid := os.fork() or run(program, rank, ranks, port))}
        while left:
            pid, status = os.wait()
            left.discard(pid)
            if status:
                for other in left:
                    os.kill(other, signal.SIGKILL)
                return 1
    return 0


def run(program: str, rank: int, ranks: int, port: int) -> int:
    """In the child; doesn't return."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(program).parent))
    status = 1
    try:
        runpy.run_path(program, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())

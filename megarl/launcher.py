"""Starts the ranks of a run on this machine, as torchrun does, and says in one line why they ended."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from pathlib import Path

from megarl.config import Config

USER_ERROR = 2  # exit status of a rank that refused the user's input


class RunFailed(RuntimeError):
    """A rank ended the run; the message names the first one and what to do."""


def launch(config: Config, arguments: list[str]) -> None:
    """Run `megarl ARGUMENTS` on the config's number of ranks and wait for them. Exits on failure."""
    import logging

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # CPU ranks share the cores; more threads than cores would fight each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's overlap needs one queue
    ranks = config.learner.world_size or config.learner.model_parallel_size
    logs = Path(config.run.dir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    launch_config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
        # Rank 0 speaks to the terminal, the others to files.
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects={rank: Std.ALL for rank in range(1, ranks)}),
    )
    try:
        elastic_launch(launch_config, sys.executable)("-m", "megarl.cli", *arguments)
    except ChildFailedError as error:
        # A killed rank takes the others down within the same poll: it is the cause, they are not.
        rank, failure = min(error.failures.items(), key=lambda item: (_blame(item[1].exitcode), item[1].timestamp))
        if failure.exitcode == USER_ERROR:
            sys.exit(USER_ERROR)  # already explained by rank 0
        what = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"exited with {failure.exitcode}"
        raise RunFailed(f"rank {rank} {what}; logs are in {logs}, go on with --resume") from None


def _blame(exitcode: int) -> int:
    """Order of likely causes: refused input, a signal (but the launcher itself sends SIGTERM), an error."""
    if exitcode == USER_ERROR:
        return 0
    return 1 if exitcode < 0 and exitcode != -signal.SIGTERM else 2

"""Starts the ranks of a run on this machine, as torchrun does, and says in one line why they ended."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from megarl.config import Config, LearnerConfig
from megarl.processes import cores, describe_exit, python_command, python_path
from megarl.rank import LAST_WORDS
from megarl.types import UserError

USER_ERROR = 2  # exit status of a rank that refused the user's input
FOUND = "found"  # beside the last words
LOOPBACK = "127.0.0.1"  # this machine's name may mean nothing to it


class RunFailed(RuntimeError):
    """A rank ended the run; the message names the first one and what to do."""


def launch(config: Config, arguments: list[str], found: Any) -> None:
    """Run `megarl ARGUMENTS` on the config's number of ranks and wait for them. Exits on failure.

    `found`, what has been read for it, is handed to rank 0.
    """
    import logging

    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    gpus = torch.cuda.device_count()
    ranks = rank_count(config.learner, gpus)
    if gpus > ranks and config.learner.world_size is None:
        print(f"{ranks} ranks on {gpus} GPUs: a model takes TP x PP = {config.learner.model_parallel_size} of them")
    logs = Path(config.run.dir) / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir={config.run.dir} can't be created ({error.strerror})") from None
    launch_config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{LOOPBACK}:0",
        local_addr=LOOPBACK,
        max_restarts=0,
        monitor_interval=0.5,
        # Rank 0 speaks to the terminal, the others to files.
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects={rank: Std.ALL for rank in range(1, ranks)}),
    )
    with tempfile.TemporaryDirectory() as last_words:
        os.environ |= python_path() | {LAST_WORDS: last_words}
        (Path(last_words) / FOUND).write_bytes(pickle.dumps(found))
        for name, value in rank_environment(ranks, gpus, cores()).items():
            os.environ.setdefault(name, value)
        try:
            elastic_launch(launch_config, sys.executable)(*python_command("megarl.cli", *arguments)[1:])
        except ChildFailedError as error:
            # A killed rank takes the others down within the same poll: it is the cause, they are not.
            rank, failure = min(error.failures.items(), key=lambda item: (_blame(item[1].exitcode), item[1].timestamp))
            words = Path(last_words) / str(rank)
            said = words.read_text() if words.exists() else None
            if said:
                sys.stderr.write(words.with_suffix(".details").read_text())
            if failure.exitcode == USER_ERROR and said:
                raise UserError(said) from None
            resume = ", go on with --resume" if (logs.parent / "checkpoints/LATEST").exists() else ""
            why = said or describe_exit(failure.exitcode)
            raise RunFailed(f"rank {rank} {why}; logs are in {logs}{resume}") from None
        except SignalException as signalled:
            raise KeyboardInterrupt(signalled.sigval.name) from None


def found_by_launch() -> Any:
    """In a rank."""
    return pickle.loads((Path(os.environ[LAST_WORDS]) / FOUND).read_bytes())


def rank_count(learner: LearnerConfig, gpus: int) -> int:
    """How many ranks this machine gets: as many as asked for, else as many whole models as it has GPUs for."""
    size = learner.model_parallel_size
    ranks = learner.world_size or max(gpus // size, 1) * size
    if 0 < gpus < ranks:
        what = "world_size" if learner.world_size else "tensor_model_parallel_size x pipeline_model_parallel_size"
        raise UserError(f"learner.{what}={ranks} is more than this machine's {gpus} GPUs; use at most {gpus}")
    return ranks


def rank_environment(ranks: int, gpus: int, cores: int) -> dict[str, str]:
    """What ranks on one machine get unless the user has set it."""
    environment = {
        # Without a GPU more threads than cores would fight each other.
        "OMP_NUM_THREADS": str(max(cores // ranks, 1)) if gpus else "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron's overlap needs one queue
    }
    if "lo" in (name for _, name in socket.if_nameindex()):
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return environment


def _blame(exitcode: int) -> int:
    """Order of likely causes: refused input, a signal (but the launcher itself sends SIGTERM), an error."""
    if exitcode == USER_ERROR:
        return 0
    return 1 if exitcode < 0 and exitcode != -signal.SIGTERM else 2

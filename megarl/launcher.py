"""Starts the ranks of a run here, as torchrun does, says in one line why they ended, and joins ranks of others."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

from megarl.config import Config
from megarl.types import UserError

USER_ERROR = 2  # exit status of a rank that refused the user's input


LAST_WORDS = "MEGARL_LAST_WORDS"  # folder where ranks of `launch` say why they end
PR_SET_PDEATHSIG = 1


class RunFailed(RuntimeError):
    """A rank ended the run; the message names the first one and what to do."""


def launch(config: Config, arguments: list[str]) -> None:
    """Run `megarl ARGUMENTS` on the config's number of ranks and wait for them. Exits on failure."""
    import logging

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # CPU ranks share the cores; more threads than cores would fight each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's overlap needs one queue
    ranks = config.learner.world_size or config.learner.model_parallel_size
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
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
        # Rank 0 speaks to the terminal, the others to files.
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects={rank: Std.ALL for rank in range(1, ranks)}),
    )
    with tempfile.TemporaryDirectory() as last_words:
        os.environ[LAST_WORDS] = last_words
        try:
            elastic_launch(launch_config, sys.executable)("-m", "megarl.cli", *arguments)
        except ChildFailedError as error:
            # A killed rank takes the others down within the same poll: it is the cause, they are not.
            rank, failure = min(error.failures.items(), key=lambda item: (_blame(item[1].exitcode), item[1].timestamp))
            words = Path(last_words) / str(rank)
            said = words.read_text() if words.exists() else None
            if said:
                sys.stderr.write(words.with_suffix(".details").read_text())
            if failure.exitcode == USER_ERROR and said:
                raise UserError(said) from None
            died = (
                f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"exited with {failure.exitcode}"
            )
            resume = ", go on with --resume" if (logs.parent / "checkpoints/LATEST").exists() else ""
            raise RunFailed(f"rank {rank} {said or died}; logs are in {logs}{resume}") from None
        except SignalException as signalled:
            raise KeyboardInterrupt(signalled.sigval.name) from None


def join_launcher() -> bool:
    """Whether this process is a rank of torchrun, of srun, or of `launch`; gives srun's tasks torchrun's variables.

    A rank of `launch` also ends when that is killed.
    """
    environment = os.environ
    if "RANK" not in environment and int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_ID" in environment:
        for name, theirs in (("RANK", "PROCID"), ("WORLD_SIZE", "NTASKS"), ("LOCAL_RANK", "LOCALID")):
            environment[name] = environment[f"SLURM_{theirs}"]
        if "MASTER_ADDR" not in environment:
            nodes = ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]]
            environment["MASTER_ADDR"] = subprocess.run(
                nodes, capture_output=True, text=True, check=True
            ).stdout.split()[0]
        environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000))
    if launched_by_megarl():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return "RANK" in environment and "WORLD_SIZE" in environment


def launched_by_megarl() -> bool:
    return LAST_WORDS in os.environ


def leave_last_words(message: str, details: str) -> bool:
    """Tell `launch` why this rank ends; False where nobody listens (torchrun, srun)."""
    folder = os.environ.get(LAST_WORDS)
    if folder is None or "RANK" not in os.environ:
        return False
    (Path(folder) / f"{os.environ['RANK']}.details").write_text(details)
    (Path(folder) / os.environ["RANK"]).write_text(message)
    return True


def _blame(exitcode: int) -> int:
    """Order of likely causes: refused input, a signal (but the launcher itself sends SIGTERM), an error."""
    if exitcode == USER_ERROR:
        return 0
    return 1 if exitcode < 0 and exitcode != -signal.SIGTERM else 2

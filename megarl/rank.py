"""This process as one of several ranks: what torchrun, srun or `launch` call it, and how it says why it ends."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from megarl.types import UserError

LAST_WORDS = "MEGARL_LAST_WORDS"  # folder where `launch` leaves what it has read, and its ranks why they end
PR_SET_PDEATHSIG = 1
# What a launcher tells its ranks. Engines and single processes must not take them for their own.
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_",
    "ROLE_",
    "TORCHELASTIC_",
)
RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FIRST_RESERVED_STEP = 0xFFFFFFF0  # Slurm's numbers for steps that aren't srun's: salloc's shell, the batch script
STORE_SECONDS = 2
RANK_0_SECONDS = 5


def join_launcher() -> bool:
    """Whether this process is a rank of torchrun, of srun, or of `launch`; gives srun's tasks torchrun's variables.

    A rank of `launch` also ends when that is killed.
    """
    try:
        if not os.environ.get("RANK"):  # then what else there is of a launcher's is an old one's
            variables = srun_variables(os.environ)
            leave_launcher()
            os.environ.update(variables)
            if not variables:
                return False
        check_rendezvous(os.environ)
    except UserError:
        leave_launcher()  # there are no other ranks to leave the saying of it to
        raise
    if launched_by_megarl():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return True


def leave_launcher() -> None:
    """Forget what a launcher, or one before it in this shell, has left: this process works alone."""
    for name in [name for name in os.environ if name.startswith(LAUNCHER_VARIABLES)]:
        del os.environ[name]


def launched_by_megarl() -> bool:
    return LAST_WORDS in os.environ


def check_rendezvous(environment: Mapping[str, str]) -> None:
    """Raises UserError where RANK is there without what must come with it."""
    if missing := [name for name in RENDEZVOUS if not environment.get(name)]:
        raise UserError(
            f"RANK={environment['RANK']} is set but {' and '.join(missing)} is not; unset RANK and WORLD_SIZE to have "
            "megarl start its ranks, or start them with torchrun or srun"
        )
    rank, size, port = (environment[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise UserError(f"RANK={rank} and WORLD_SIZE={size} are not a rank and a number of ranks; unset both")
    if not (port.isdecimal() and int(port) < 1 << 16):
        raise UserError(f"MASTER_PORT={port} is not a port; use a number below {1 << 16}")


def srun_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for one of several tasks of srun; none elsewhere, such as in a shell of salloc."""
    step = environment.get("SLURM_STEP_ID", "")
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or "1"
    is_step = step.isdecimal() and int(step) < FIRST_RESERVED_STEP
    if not is_step or tasks in ("0", "1") or not environment.get("SLURM_PROCID"):
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    address = environment.get("MASTER_ADDR") or first_host(nodes)
    if not address:
        raise UserError("srun's tasks need MASTER_ADDR, the name of the node of task 0; SLURM_STEP_NODELIST is not set")
    job = environment.get("SLURM_JOB_ID", "")
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    here = tasks_on(int(environment.get("SLURM_NODEID") or 0), counts)
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environment.get("SLURM_LOCALID") or "0",
        **({"LOCAL_WORLD_SIZE": here} if here else {}),
        "MASTER_ADDR": address,
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20000 + (int(job) if job.isdecimal() else 0) % 20000),
    }


def tasks_on(node: int, counts: str) -> str | None:
    """One node's of Slurm's tasks a node: of 2(x3),1 nodes 0 to 2 have 2 and node 3 has 1."""
    each = [count for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))]
    return each[node] if node < len(each) else None


def first_host(nodes: str) -> str:
    """The first of Slurm's host list: node07 of node[07-09,12],other3. Containers have no scontrol to ask."""
    first = re.match(r"(?:\[[^]]*\]|[^,\[])*", nodes)
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0]) if first else ""


def say_last_words(message: str, details: str) -> None:
    """One line a mistake, after `details`: to `launch`, which shows the cause, else on standard error, once a job."""
    folder = os.environ.get(LAST_WORDS)
    if folder and "RANK" in os.environ:
        (Path(folder) / f"{os.environ['RANK']}.details").write_text(details)
        (Path(folder) / os.environ["RANK"]).write_text(message)
    elif _speaks_first():
        sys.stderr.write(details)
        for line in message.splitlines():
            print(f"megarl: error: {line}", file=sys.stderr)


def _speaks_first() -> bool:
    """Whether no other rank has said why the job ends: the first to end ends the others, so it must not be silent.

    torchrun's store counts. Without one, rank 0 speaks, and the others if they outlive that.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return True
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        from torch.distributed import DistError, TCPStore

        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            store = TCPStore(*where, is_master=False, timeout=timedelta(seconds=STORE_SECONDS))
            return store.add("megarl/last_words", 1) == 1
        except DistError:  # torchrun has ended
            return True
    if os.environ["RANK"] != "0":
        time.sleep(RANK_0_SECONDS)
    return True

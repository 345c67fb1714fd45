"""Limits of the machine that a run would meet later: raised where that is allowed, else told before the start."""

from __future__ import annotations

import multiprocessing
import resource

from megarl.types import UserError

OPEN_FILES = 65536


def raise_file_limit() -> None:
    """As many open files as this user may have: every rank and engine holds sockets to the others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_shared_memory() -> None:
    """Raises UserError where semaphores can't be made, which checkpoints and engines of several processes need."""
    try:
        multiprocessing.get_context("fork").Lock()  # spawn would start a tracker with it
    except OSError as error:
        raise UserError(
            f"/dev/shm can't be used ({error.strerror}); mount it writable, in a container with --shm-size=1g or more"
        ) from None


def has_bf16_products() -> bool:
    """Whether oneDNN multiplies bf16 matrices on this CPU; torch's own loops do it elsewhere, one number at a time."""
    import torch

    return torch.ops.mkldnn._is_mkldnn_bf16_supported()

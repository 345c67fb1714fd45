"""Weight transfer through shared memory, as a backend of vLLM's own weight-transfer lifecycle.

The sender (`Bucket`) fills a shared-memory file with tensors; the engine side (`SharedMemoryTransfer`, made known to
vLLM by `register`) checks what arrived against its checksum, loads it, and at the end refuses an update
in which any parameter is missing. vLLM is imported only where its engine runs.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

BACKEND = "megarl_shared_memory"
WORKER_EXTENSION = "megarl.rollout.vllm_worker.Extension"


class WeightTransferError(RuntimeError):
    """The engine refused weights: it serves nothing until a complete update succeeds."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in the bucket."""

    name: str
    dtype: str
    shape: list[int]
    offset: int  # bytes


class Bucket:
    """Shared memory that tensors are packed into, one bucketful after another."""

    def __init__(self, capacity: int) -> None:
        # Anonymous memory that the engines open through /proc: the kernel frees it however this process ends.
        self._descriptor = os.memfd_create("megarl-weights")
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")
        self.capacity = 0
        self._grow(capacity)
        self.clear()

    def add(self, name: str, tensor: Tensor) -> bool:
        """Pack a tensor; False when it has to wait for the next bucket. One larger than a bucket gets a larger one."""
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        if self.used + data.numel() > self.capacity:
            if self.entries:
                return False
            self._grow(data.numel())
        self._memory[self.used : self.used + data.numel()].copy_(data)
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.entries.append(Entry(name, dtype, list(tensor.shape), self.used))
        self.used += -(-data.numel() // 64) * 64  # aligned
        return True

    def message(self, last: bool) -> dict[str, Any]:
        """What the engine needs to read this bucketful; after the `last` one it checks that nothing is missing."""
        used = min(self.used, self.capacity)
        return {
            "path": str(self.path),
            "size": used,
            "checksum": checksum(self._memory[:used]),
            "entries": [asdict(entry) for entry in self.entries],
            "last": last,
        }

    def clear(self) -> None:
        self.entries: list[Entry] = []
        self.used = 0

    def close(self) -> None:
        os.close(self._descriptor)

    def _grow(self, capacity: int) -> None:
        if capacity > self.capacity:
            self.capacity = capacity
            self._memory = map_file(self.path, capacity)


def map_file(path: str | Path, size: int) -> Tensor:
    """u8[size] backed by the file."""
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


def checksum(data: Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(data.numpy())  # type: ignore[arg-type]


def register() -> None:
    """Makes the backend known to vLLM in this process, whichever plugins that loads."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "megarl.rollout.vllm_transfer", "SharedMemoryTransfer")

"""Weight transfer through shared memory, as a backend of vLLM's own weight-transfer lifecycle.

The sender (`Bucket`) fills a shared-memory file with tensors; the engine side (`SharedMemoryTransfer`, made known to
vLLM by `register`) checks what arrived against its checksum, loads it, and at the end refuses an update
in which any parameter is missing. vLLM is imported only where its engine runs.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
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


class SharedMemory:
    """Anonymous memory that other processes open by its path: the kernel frees it however this process ends."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("megarl-weights")
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        self.data = torch.empty(0, dtype=torch.uint8)

    @property
    def size(self) -> int:
        return self.data.numel()

    def grow(self, size: int) -> None:
        """To at least so many bytes."""
        if size > self.size:
            self.data = map_file(self.path, size)

    def close(self) -> None:
        os.close(self._descriptor)


class Bucket:
    """Shared memory that tensors are packed into, one bucketful after another."""

    def __init__(self, capacity: int) -> None:
        self.memory = SharedMemory()
        self.memory.grow(capacity)
        self.clear()

    def add(self, name: str, tensor: Tensor) -> bool:
        """Pack a tensor; False when it has to wait for the next bucket. One larger than a bucket gets a larger one."""
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        if self._end + data.numel() > self.memory.size:
            if self.entries:
                return False
            self.memory.grow(data.numel())
        self.memory.data[self._end : self._end + data.numel()].copy_(data)
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.entries.append(Entry(name, dtype, list(tensor.shape), self._end))
        self._end += -(-data.numel() // 64) * 64  # aligned
        return True

    @property
    def content(self) -> Tensor:
        """u8[size], of this bucketful."""
        return self.memory.data[: self._end]

    def message(self, last: bool) -> dict[str, Any]:
        """What the engine needs to read this bucketful; after the `last` one it checks that nothing is missing."""
        return {
            "path": self.memory.path,
            "size": self.content.numel(),
            "checksum": checksum(self.content),
            "entries": [asdict(entry) for entry in self.entries],
            "last": last,
        }

    def clear(self) -> None:
        self.entries: list[Entry] = []
        self._end = 0

    def close(self) -> None:
        self.memory.close()


def land(message: dict[str, Any], content: np.ndarray, memory: SharedMemory) -> dict[str, Any]:
    """The message for an engine that finds the content, which came by another way, in this memory."""
    memory.grow(content.size)
    memory.data[: content.size] = torch.from_numpy(content)
    return message | {"path": memory.path}


def map_file(path: str, size: int) -> Tensor:
    """u8[size] backed by the file."""
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


def checksum(data: Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(data.numpy())  # type: ignore[arg-type]


def register() -> None:
    """Makes the backend known to vLLM in this process, whichever plugins that loads."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "megarl.rollout.vllm_transfer", "SharedMemoryTransfer")

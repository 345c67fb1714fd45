"""Weight transfer through shared memory, as a backend of vLLM's own weight-transfer lifecycle.

The sender (`Bucket`) fills a shared-memory file with tensors; the engine side (`SharedMemoryTransfer`, made known to
vLLM by `register`) checks that what arrived is what was packed, next in turn and of this update, loads it, and at the
end refuses an update in which any bucket, tensor or parameter is missing. vLLM is imported only where its engine runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

BACKEND = "megarl_shared_memory"
WORKER_EXTENSION = "megarl.rollout.vllm_worker.Extension"
Message = dict[str, Any]  # what the engine needs to read a bucketful
Tensors = Iterable[tuple[str, Tensor]]


class WeightTransferError(RuntimeError):
    """The engine refused weights: it serves nothing until a complete update succeeds."""


class DamagedWeights(WeightTransferError):
    """The engine doesn't hold what was loaded into it."""


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
            os.ftruncate(self._descriptor, size)  # torch, which can do it too, then clears the first byte
            self.data = map_file(self.path, size)

    def close(self) -> None:
        os.close(self._descriptor)


class Bucket:
    """Shared memory that tensors are packed into, one bucketful after another; as `dtype`, or as they are."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.memory, self._dtype = SharedMemory(), dtype

    def pack(self, tensors: Tensors) -> Message | None:
        """Replace what is in it by these; None where there are none."""
        entries, end = [], 0
        for name, tensor in tensors:
            dtype = self._dtype or tensor.dtype
            size = tensor.numel() * dtype.itemsize
            self.memory.grow(end + size)
            self.memory.data[end : end + size].view(dtype).view(tensor.shape).copy_(tensor.detach())
            entries.append(Entry(name, str(dtype).removeprefix("torch."), list(tensor.shape), end))
            end += -(-size // 64) * 64  # aligned
        if not entries:
            return None
        self.memory.grow(end)
        return {
            "path": self.memory.path,
            "size": end,
            "checksum": checksum(self.memory.data[:end]),
            "entries": [asdict(entry) for entry in entries],
        }

    def close(self) -> None:
        self.memory.close()


def bucketfuls(tensors: Tensors, size: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Together not more than so many bytes, unless a single one is."""
    full: list[tuple[str, Tensor]] = []
    held = 0
    for name, tensor in tensors:
        if full and held + tensor.nbytes > size:
            yield full
            full, held = [], 0
        full.append((name, tensor))
        held += tensor.nbytes
    if full:
        yield full


def content(message: Message) -> np.ndarray:
    """u8[size], the bucketful, for who shares the memory that it lies in."""
    return map_file(message["path"], message["size"]).numpy()


def land(message: Message, content: np.ndarray, memory: SharedMemory) -> Message:
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

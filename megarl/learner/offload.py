"""Memory that is lent while nobody uses it: tensors that go to the host and come back to where they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class _Lent:
    storage: torch.UntypedStorage
    size: int  # bytes
    host: Tensor | None  # u8[size]; None: zeros when it comes back


class Offload:
    """Empties storages in place, so whatever views them stays a view of them, not to be touched until it is filled.

    keep: tensors whose values come back. zero: those that come back as zeros. Tensors that share a storage go
    together, and one that keeps its values decides for all of them.
    """

    def __init__(self, keep: Iterable[Tensor] = (), zero: Iterable[Tensor] = ()) -> None:
        self._storages: dict[int, tuple[torch.UntypedStorage, bool]] = {}
        for tensors, keeps in ((keep, True), (zero, False)):
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage.nbytes():
                    self._storages.setdefault(storage.data_ptr(), (storage, keeps))
        self._size = sum(storage.nbytes() for storage, _ in self._storages.values())
        self._lent: list[_Lent] = []

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return self._size

    @contextmanager
    def lent(self) -> Iterator[None]:
        """While the block runs."""
        self._lend()
        try:
            yield
        finally:
            self._take_back()

    @contextmanager
    def back(self) -> Iterator[None]:
        """For the block, where it is lent; it goes again afterwards."""
        was_lent = bool(self._lent)
        self._take_back()
        try:
            yield
        finally:
            if was_lent:
                self._lend()

    def _lend(self) -> None:
        assert not self._lent, "lent already"
        for storage, keeps in self._storages.values():
            size, on_gpu = storage.nbytes(), storage.device.type == "cuda"
            host = None
            if keeps:
                host = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
                host.copy_(_bytes(storage), non_blocking=True)
            self._lent.append(_Lent(storage, size, host))
        _finish_copies()
        before = torch.cuda.memory_allocated()  # 0 without a GPU
        for lent in self._lent:
            lent.storage.resize_(0)
        freed = before - torch.cuda.memory_allocated()
        assert freed >= sum(lent.size for lent in self._lent if lent.storage.device.type == "cuda"), "memory not freed"
        torch.cuda.empty_cache()  # what torch keeps for later is of no use to another process

    def _take_back(self) -> None:
        for lent in self._lent:
            lent.storage.resize_(lent.size)
            if lent.host is None:
                _bytes(lent.storage).zero_()
            else:
                _bytes(lent.storage).copy_(lent.host, non_blocking=True)
        _finish_copies()
        self._lent = []


def _finish_copies() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)

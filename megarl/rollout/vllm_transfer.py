"""The engine side of weight transfer; loaded by vLLM inside its worker processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from megarl.rollout.transfer import WeightTransferError, checksum, map_file
from megarl.rollout.witness import Witness


@dataclass
class Announced(WeightTransferInitInfo):
    """What every update brings, as `models.weights.Manifest`."""

    shapes: dict[str, list[int]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)


@dataclass
class BucketInfo(WeightTransferUpdateInfo):
    """One bucketful, as `Bucket.pack` describes it, and its place: the `index`th of the update."""

    update: int
    index: int
    path: str
    size: int
    checksum: str
    entries: list[dict[str, Any]]

    def __str__(self) -> str:
        names = [entry["name"] for entry in self.entries]
        return f"weight bucket {self.index} of update {self.update} ({', '.join(names[:3])}; {len(names)} in all)"


@dataclass
class Seal(WeightTransferUpdateInfo):
    """The end of an update of so many buckets."""

    update: int
    buckets: int


class SharedMemoryTransfer(WeightTransferEngine[Announced, BucketInfo]):
    """Reads buckets from shared memory, verifies them, and loads them layer by layer."""

    init_info_cls = Announced
    update_info_cls = BucketInfo

    def init_transfer_engine(self, init_info: Announced) -> None:
        self.shapes, self.tied = init_info.shapes, init_info.tied
        dtype: Any = self.model_config.dtype
        self.witness = Witness(self.model, dtype)

    def expect(self, update: int, witnessed: bool) -> None:
        """The number of the update that starts next, and whether what it brings is to be remembered."""
        self.update = update
        self.witness.open(witnessed)

    def start_weight_update(self) -> None:
        self.received: set[str] = set()
        self.loaded: set[str] = set()
        self.buckets = 0
        for layer in self.model.modules():
            if (info := get_layerwise_info(layer)).can_load():  # what an update left that failed
                info.loaded_weights.clear()
                info.load_numel = 0
        initialize_layerwise_reload(self.model)
        # In the form that loaders know, before a layer is packed or quantised.
        self.parameters = dict(self.model.named_parameters())

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, which synchronises a device that may not exist."""
        if "buckets" in update_info:
            self._check_complete(Seal(**update_info))
        else:
            self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: BucketInfo) -> None:
        if (update_info.update, update_info.index) != (self.update, self.buckets):
            raise WeightTransferError(f"{update_info} arrived where bucket {self.buckets} of {self.update} was due")
        memory = map_file(update_info.path, update_info.size)
        if checksum(memory) != update_info.checksum:
            raise WeightTransferError(f"{update_info} arrived corrupted")
        for entry in update_info.entries:
            self._check_announced(entry["name"], entry["shape"])
            self.received.add(entry["name"])
        tensors = {entry["name"]: self._tensor(memory, entry) for entry in update_info.entries}
        self.witness.arrived(tensors)
        model: Any = self.model
        self.loaded |= model.load_weights(iter(tensors.items()))
        for name, source in self.tied.items():
            if source in tensors and name in self.parameters:
                self._load_tied(name, tensors[source])
        self.buckets += 1

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self.witness.close()

    def shutdown(self) -> None:
        pass

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Abstract up to vLLM 0.26; what sends is `Bucket`."""
        raise NotImplementedError

    def _check_announced(self, name: str, shape: list[int]) -> None:
        if name not in self.shapes:
            raise WeightTransferError(f"a weight bucket holds a tensor that was never announced: {name}")
        if list(self.shapes[name]) != list(shape):
            raise WeightTransferError(f"{name} was announced as {list(self.shapes[name])} and arrived as {shape}")
        if name in self.received:
            raise WeightTransferError(f"{name} arrived twice")

    def _check_complete(self, seal: Seal) -> None:
        """Before finish_weight_update, after whose failure vLLM accepts no new update."""
        if (seal.update, seal.buckets) != (self.update, self.buckets):
            raise WeightTransferError(
                f"incomplete weight update: {self.buckets} buckets of update {self.update} arrived, "
                f"{seal.buckets} of {seal.update} were sent"
            )
        missing = [name for name in self.shapes if name not in self.received]
        untouched = sorted(self.parameters.keys() - self.loaded)
        if missing or untouched:
            raise WeightTransferError(
                f"incomplete weight update: {len(missing)} tensors never arrived {missing[:3]}, "
                f"{len(untouched)} parameters were not written {untouched[:3]}"
            )

    def _load_tied(self, name: str, tensor: torch.Tensor) -> None:
        """vLLM's loader skips a tied layer, but reloading gives it a weight of its own (prepacked, on a CPU)."""
        parameter: Any = self.parameters[name]
        parameter.weight_loader(parameter, tensor)
        self.loaded.add(name)

    def _tensor(self, memory: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
        """A copy on the engine's device: loading waits until a layer is complete, the bucket is refilled before."""
        dtype, shape = getattr(torch, entry["dtype"]), torch.Size(entry["shape"])
        data = memory[entry["offset"] : entry["offset"] + shape.numel() * dtype.itemsize]
        return data.clone().view(dtype).view(shape).to(self.device)

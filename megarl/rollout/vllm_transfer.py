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

from megarl.rollout.transfer import WeightTransferError, checksum, map_file

EMBEDDING = "model.embed_tokens.weight"


@dataclass
class Manifest(WeightTransferInitInfo):
    """The names of all tensors that every update must bring."""

    names: list[str] = field(default_factory=list)


@dataclass
class BucketInfo(WeightTransferUpdateInfo):
    """One bucketful, as `Bucket.message` describes it."""

    path: str
    size: int
    checksum: str
    entries: list[dict[str, Any]]
    last: bool


class SharedMemoryTransfer(WeightTransferEngine[Manifest, BucketInfo]):
    """Reads buckets from shared memory, verifies them, and loads them layer by layer."""

    init_info_cls = Manifest
    update_info_cls = BucketInfo

    def init_transfer_engine(self, init_info: Manifest) -> None:
        self.expected = set(init_info.names)

    def start_weight_update(self) -> None:
        self.received: set[str] = set()
        self.loaded: set[str] = set()
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class, which synchronises a device that may not exist."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: BucketInfo) -> None:
        memory = map_file(update_info.path, update_info.size)
        names = [entry["name"] for entry in update_info.entries]
        if checksum(memory) != update_info.checksum:
            raise WeightTransferError(f"a weight bucket arrived corrupted (tensors: {names[:3]}, {len(names)} in all)")
        if unknown := set(names) - self.expected:
            raise WeightTransferError(f"a weight bucket holds tensors that were never announced: {sorted(unknown)[:3]}")
        tensors = {entry["name"]: self._tensor(memory, entry) for entry in update_info.entries}
        model: Any = self.model
        self.loaded |= model.load_weights(iter(tensors.items()))
        if self.model_config.hf_config.tie_word_embeddings and EMBEDDING in tensors:
            self._load_tied_head(tensors[EMBEDDING])
        self.received |= set(names)
        if update_info.last:
            self._check_complete()

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def _check_complete(self) -> None:
        """Here and not in finish_weight_update, after whose failure vLLM accepts no new update."""
        missing = sorted(self.expected - self.received)
        untouched = sorted({name for name, _ in self.model.named_parameters()} - self.loaded)
        if missing or untouched:
            raise WeightTransferError(
                f"incomplete weight update: {len(missing)} tensors never arrived {missing[:3]}, "
                f"{len(untouched)} parameters were not written {untouched[:3]}"
            )

    def shutdown(self) -> None:
        pass

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Abstract up to vLLM 0.26; what sends is `Bucket`."""
        raise NotImplementedError

    def _load_tied_head(self, embedding: torch.Tensor) -> None:
        """vLLM's loader skips a tied head, but reloading gives it a weight of its own (prepacked, on a CPU)."""
        model: Any = self.model
        weight = model.lm_head.weight
        weight.weight_loader(weight, embedding)
        self.loaded.add("lm_head.weight")

    def _tensor(self, memory: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
        """A copy on the engine's device: loading waits until a layer is complete, the bucket is refilled before."""
        dtype, shape = getattr(torch, entry["dtype"]), torch.Size(entry["shape"])
        data = memory[entry["offset"] : entry["offset"] + shape.numel() * dtype.itemsize]
        return data.clone().view(dtype).view(shape).to(self.device)

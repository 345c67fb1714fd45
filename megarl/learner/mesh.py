"""The ranks: process groups from the launcher's environment, this rank's place in them, and decisions shared by all."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megarl.config import LearnerConfig
from megarl.learner.cpu import device as device_layer
from megarl.types import UserError

T = TypeVar("T")
MODEL_SEED = 1234  # dropout is 0 and weights are loaded, so no result depends on it


def device_index(local_rank: int, visible: int) -> int:
    """The GPU of a rank among those it sees: srun may show each task its own alone. Raises UserError."""
    if visible > 1 and local_rank >= visible:
        raise UserError(
            f"LOCAL_RANK={local_rank}, but only {visible} GPUs are visible; start at most as many ranks a node"
        )
    return local_rank % visible


def check_devices(uuids: list[str]) -> None:
    """Of every rank's GPU, in rank order. Raises UserError where two ranks have the same one."""
    for rank, uuid in enumerate(uuids):
        if (first := uuids.index(uuid)) < rank:
            raise UserError(
                f"ranks {first} and {rank} have the same GPU ({uuid}); start one rank a GPU, and let each see all GPUs "
                "of its node or its own alone"
            )


class Mesh:
    """Tensor-, pipeline- and data-parallel groups over all ranks. One per process; `close` it at the end."""

    def __init__(self, config: LearnerConfig, timeout_minutes: int = 60) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        if config.world_size not in (None, self.world_size):
            raise UserError(
                f"learner.world_size={config.world_size} but the launcher started {self.world_size} ranks; make "
                "them equal"
            )
        config.data_parallel_size(self.world_size)
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(device_index(int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()))
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        timeout = datetime.timedelta(minutes=timeout_minutes)
        if not dist.is_initialized():
            backend = "nccl" if on_gpu else "gloo"
            if "RANK" in os.environ:
                dist.init_process_group(backend, timeout=timeout)
            else:  # a process of its own needs no rendezvous
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        # Decisions and metrics are host data: they travel over gloo whatever the tensors use.
        self.control = dist.new_group(backend="gloo", timeout=timeout)
        if on_gpu:
            check_devices(self.gather(str(torch.cuda.get_device_properties(self.device).uuid)))
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            distributed_timeout_minutes=timeout_minutes,
        )
        device_layer.patch_megatron()
        model_parallel_cuda_manual_seed(MODEL_SEED)

        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.tp_rank, self.tp_size = self.tp_group.rank(), self.tp_group.size()
        self.pp_rank = parallel_state.get_pipeline_model_parallel_rank()
        self.pp_size = parallel_state.get_pipeline_model_parallel_world_size()
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.dp_size = parallel_state.get_data_parallel_world_size()
        replicas = self.gather(self.dp_rank)
        self._replicas = [[r for r, of in enumerate(replicas) if of == i] for i in range(self.dp_size)]
        self._replica, _ = dist.new_subgroups_by_enumeration(self._replicas, timeout=timeout, backend="gloo")

    @property
    def layout(self) -> str:
        return f"{self.world_size} ranks on {self.device.type}: TP={self.tp_size} PP={self.pp_size} DP={self.dp_size}"

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def reports(self) -> bool:
        """Whether this rank speaks for its replica of the model, whose results the ranks of its last stage share."""
        return self.is_last_stage and self.tp_rank == 0

    def broadcast(self, value: T | None) -> T:
        """Rank 0's value, on every rank; the others pass None."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        box: list[T] = [value] * self.world_size
        dist.all_gather_object(box, value, group=self.control)
        return box

    def scatter(self, parts: Iterable[T] | None) -> T:
        """Of rank 0's parts, one a replica of the model, that of this rank's; the others pass None.

        Rank 0 takes one part at a time, and sends it to one rank of the replica, which passes it on.
        """
        box: list[T | None] = [None]
        if self.rank == 0:
            assert parts is not None
            for ranks, part in zip(self._replicas, parts, strict=True):
                if ranks[0] == 0:
                    box = [part]
                else:
                    dist.send_object_list([part], dst=ranks[0], group=self.control)
        elif self.rank == self._replicas[self.dp_rank][0]:
            dist.recv_object_list(box, src=0, group=self.control)
        if len(self._replicas[self.dp_rank]) > 1:
            dist.broadcast_object_list(box, src=self._replicas[self.dp_rank][0], group=self._replica)
        return box[0]  # type: ignore[return-value]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of a CPU tensor, in place."""
        dist.all_reduce(values, group=self.control)
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """The largest of all ranks of a CPU tensor's values, in place."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.control)
        return values

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def close(self, last: bool = True) -> None:
        """Dissolve the layout; with `last`, the job's process group too (it can't be made twice)."""
        parallel_state.destroy_model_parallel()
        if last:
            dist.destroy_process_group()

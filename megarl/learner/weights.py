"""Weights in and out: Hugging Face files -> Megatron shards -> a stream of Hugging Face tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.learner.mesh import Mesh
from megarl.learner.model import ValueHead
from megarl.models.family import Architecture
from megarl.models.hugging_face import HuggingFaceFiles
from megarl.models.weights import Weight, join, split, weight_table
from megarl.types import UserError

BUCKET_BYTES = 256 * 2**20


def load_hf_weights(model: Any, arch: Architecture, mesh: Mesh, folder: str | Path) -> None:
    """Fill this rank's parameters. Raises UserError on unknown or missing names and on wrong shapes."""
    files = HuggingFaceFiles(folder)
    files.check_names(arch, folder)
    with torch.no_grad():
        for weight, param in named_weights(model, arch):
            shard = split(weight.layout, [files[name] for name in weight.hf], arch, mesh.tp_size)[mesh.tp_rank]
            if shard.shape != param.shape:
                raise UserError(
                    f"model.path={folder}: {weight.hf[0]} gives a shard of {list(shard.shape)}, "
                    f"config.json implies {list(param.shape)}"
                )
            param.copy_(shard)


def named_weights(model: Any, arch: Architecture) -> list[tuple[Weight, Tensor]]:
    """This rank's parameters with their rows of the weight table, in the model's order; not a critic's value head.

    Unknown names raise.
    """
    names = [name for name, _ in model.named_parameters()]
    fused_norms = any(name.endswith("layer_norm_weight") for name in names)
    table = {weight.megatron: weight for weight in weight_table(arch, fused_norms)}
    first_layer = model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0

    def global_name(name: str) -> str:
        match = re.match(r"decoder\.layers\.(\d+)\.", name)
        return name if match is None else f"decoder.layers.{int(match[1]) + first_layer}.{name[match.end() :]}"

    return [
        (table[global_name(name)], param)
        for name, param in model.named_parameters()
        if not (name.startswith("output_layer.") and isinstance(model.output_layer, ValueHead))
    ]


class WeightStream:
    """Streams the whole model, resharded, as Hugging Face tensors to rank 0.

    `value` of each parameter is streamed: itself, or something of its shape.

    Collective: every rank iterates `tensors()`; only rank 0 gets tensors. Parameters travel in buckets: one all-gather
    over the tensor-parallel group and, from later pipeline stages, one send to rank 0.
    """

    def __init__(
        self,
        model: Any,
        arch: Architecture,
        mesh: Mesh,
        bucket_bytes: int = BUCKET_BYTES,
        value: Callable[[Tensor], Tensor] = lambda param: param.data,
    ) -> None:
        self.arch, self.mesh, self.bucket_bytes = arch, mesh, bucket_bytes
        self._mine = [
            (weight, value(param))
            for weight, param in named_weights(model, arch)
            # The tied copy of the last stage is the first stage's embedding again.
            if not (arch.tied_embeddings and weight.megatron == "output_layer.weight" and not mesh.is_first_stage)
        ]
        rows = [(weight, tuple(param.shape)) for weight, param in self._mine]
        everyone = mesh.gather((mesh.pp_rank, mesh.tp_rank, mesh.dp_rank, rows))
        self._leaders = {pp: rank for rank, (pp, tp, dp, _) in enumerate(everyone) if tp == 0 and dp == 0}
        self._rows = {pp: rows for pp, tp, dp, rows in everyone if tp == 0 and dp == 0}
        self._dtype = self._mine[0][1].dtype if self._mine else torch.float32

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) for every tensor of the Hugging Face model on rank 0; nothing elsewhere."""
        for stage in range(self.mesh.pp_size):
            start = 0
            for rows in self._buckets(self._rows[stage]):
                shards = self._gather_to_rank0(stage, start, rows)
                start += len(rows)
                if shards is not None:
                    yield from self._unpack(rows, shards)

    def _buckets(self, rows: list[tuple[Weight, tuple[int, ...]]]) -> Iterator[list[tuple[Weight, tuple[int, ...]]]]:
        bucket: list[tuple[Weight, tuple[int, ...]]] = []
        size = 0
        for weight, shape in rows:
            weight_bytes = torch.Size(shape).numel() * self._dtype.itemsize * self.mesh.tp_size
            if bucket and size + weight_bytes > self.bucket_bytes:
                yield bucket
                bucket, size = [], 0
            bucket.append((weight, shape))
            size += weight_bytes
        if bucket:
            yield bucket

    def _gather_to_rank0(
        self, stage: int, start: int, rows: list[tuple[Weight, tuple[int, ...]]]
    ) -> list[Tensor] | None:
        """The flat bucket of every tensor-parallel rank, on rank 0; None elsewhere."""
        mesh, leader = self.mesh, self._leaders[stage]
        length = sum(torch.Size(shape).numel() for _, shape in rows)
        shards: list[Tensor] | None = None
        if mesh.pp_rank == stage and mesh.dp_rank == 0:
            flat = torch.cat([param.flatten() for _, param in self._mine[start : start + len(rows)]])
            shards = [torch.empty_like(flat) for _ in range(mesh.tp_size)]
            dist.all_gather(shards, flat, group=mesh.tp_group)
        if leader != 0:
            if mesh.rank == leader:
                assert shards is not None
                dist.send(torch.stack(shards), dst=0)
            elif mesh.rank == 0:
                received = torch.empty(mesh.tp_size, length, dtype=self._dtype, device=mesh.device)
                dist.recv(received, src=leader)
                shards = list(received)
        return shards if mesh.rank == 0 else None

    def _unpack(self, rows: list[tuple[Weight, tuple[int, ...]]], shards: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        offset = 0
        for weight, shape in rows:
            size = torch.Size(shape).numel()
            parts = [shard[offset : offset + size].view(shape) for shard in shards]
            offset += size
            yield from zip(weight.hf, join(weight.layout, parts, self.arch), strict=True)

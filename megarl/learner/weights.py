"""Weights in and out: Hugging Face files -> Megatron shards -> a stream of Hugging Face tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby, zip_longest
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
LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
Row = tuple[Weight, torch.Size]  # of the weight table, and the shape of a shard


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
        match = LAYER.match(name)
        return name if match is None else f"decoder.layers.{int(match[1]) + first_layer}.{name[match.end() :]}"

    return [
        (table[global_name(name)], param)
        for name, param in model.named_parameters()
        if not (name.startswith("output_layer.") and isinstance(model.output_layer, ValueHead))
    ]


@dataclass(frozen=True)
class _Part:
    """Consecutive parameters of a stage: whole layers."""

    first: int  # its place among the stage's
    rows: list[Row]
    replica: int  # the data-parallel rank that sends it


class WeightStream:
    """Streams the whole model, resharded, as Hugging Face tensors.

    `value` of each parameter is streamed: itself, or something of its shape.

    Collective: every rank iterates, some get tensors. Whole layers are gathered over one tensor-parallel group to its
    first rank, which keeps them, or sends them on to rank 0. Stages do so side by side, and so do the replicas of a
    stage, which share its layers out.
    """

    def __init__(
        self, model: Any, arch: Architecture, mesh: Mesh, value: Callable[[Tensor], Tensor] = lambda param: param.data
    ) -> None:
        self.arch, self.mesh = arch, mesh
        self._mine = [
            (weight, value(param))
            for weight, param in named_weights(model, arch)
            # The tied copy of the last stage is the first stage's embedding again.
            if not (arch.tied_embeddings and weight.megatron == "output_layer.weight" and not mesh.is_first_stage)
        ]
        rows = [(weight, value.shape) for weight, value in self._mine]
        everyone = mesh.gather((mesh.pp_rank, mesh.dp_rank, mesh.tp_rank, rows))
        self._leaders = {(pp, dp): rank for rank, (pp, dp, tp, _) in enumerate(everyone) if tp == 0}
        self._rows = {pp: rows for pp, dp, tp, rows in everyone if dp == tp == 0}
        self._dtype = self._mine[0][1].dtype if self._mine else torch.float32

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) for every tensor of the Hugging Face model on rank 0, stage after stage; nothing elsewhere."""
        for stage in range(self.mesh.pp_size):
            for parts in self._shared_out(stage, BUCKET_BYTES, set()):
                yield from self._tensors(stage, parts, set())

    def rounds(self, size: int, keepers: set[int]) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """The same number on every rank: in each, about `size` bytes that this rank keeps, if it is one of the keepers,
        else sends on to rank 0; all are to be iterated."""
        stages = range(self.mesh.pp_size)
        for parts in zip_longest(*(self._shared_out(stage, size, keepers) for stage in stages), fillvalue=[]):
            pairs = zip(stages, parts, strict=True)
            yield chain.from_iterable(self._tensors(stage, some, keepers) for stage, some in pairs)

    def _shared_out(self, stage: int, size: int, keepers: set[int]) -> Iterator[list[_Part]]:
        """A stage's layers, in each round a part for each of its replicas that keeps tensors, or else for the first."""
        replicas = [dp for dp in range(self.mesh.dp_size) if self._leaders[stage, dp] in keepers] or [0]
        parts: list[_Part] = []
        first = 0
        for rows in self._parts(self._rows[stage], size):
            parts.append(_Part(first, rows, replicas[len(parts) % len(replicas)]))
            first += len(rows)
        for start in range(0, len(parts), len(replicas)):
            yield parts[start : start + len(replicas)]

    def _parts(self, rows: list[Row], size: int) -> Iterator[list[Row]]:
        part: list[Row] = []
        held = 0
        for _, layer in groupby(rows, lambda row: _layer_of(row[0].megatron)):
            group = list(layer)
            group_bytes = sum(shape.numel() for _, shape in group) * self._dtype.itemsize * self.mesh.tp_size
            if part and held + group_bytes > size:
                yield part
                part, held = [], 0
            part, held = part + group, held + group_bytes
        if part:
            yield part

    def _tensors(self, stage: int, parts: list[_Part], keepers: set[int]) -> Iterator[tuple[str, Tensor]]:
        """Of these parts what this rank is to have."""
        mesh = self.mesh
        for part in parts:
            leader = self._leaders[stage, part.replica]
            keeper = leader if leader in keepers else 0
            shards: list[list[Tensor]] = []
            if (mesh.pp_rank, mesh.dp_rank) == (stage, part.replica):
                shards = self._gather(part, leader)
            if leader != keeper and mesh.rank == leader:
                dist.send(torch.cat([value.flatten() for shard in shards for value in shard]), dst=keeper)
            if leader != keeper and mesh.rank == keeper:
                numel = sum(shape.numel() for _, shape in part.rows)
                received = torch.empty(mesh.tp_size, numel, dtype=self._dtype, device=mesh.device)
                dist.recv(received, src=leader)
                shards = [_cut(flat, part.rows) for flat in received]
            if mesh.rank == keeper:
                for (weight, _), of_ranks in zip(part.rows, zip(*shards, strict=True), strict=True):
                    yield from zip(weight.hf, join(weight.layout, list(of_ranks), self.arch), strict=True)

    def _gather(self, part: _Part, leader: int) -> list[list[Tensor]]:
        """Every tensor-parallel rank's shards of the part, on their first rank; nothing on the others."""
        mesh = self.mesh
        mine = [value for _, value in self._mine[part.first : part.first + len(part.rows)]]
        if mesh.tp_size == 1:
            return [mine]
        flat = torch.cat([value.flatten() for value in mine])
        gathered = [torch.empty_like(flat) for _ in range(mesh.tp_size)] if mesh.rank == leader else None
        dist.gather(flat, gathered, dst=leader, group=mesh.tp_group)
        return [_cut(shard, part.rows) for shard in gathered or []]


def _layer_of(name: str) -> str:
    """What is loaded together: a layer, or a parameter outside of all."""
    match = LAYER.match(name)
    return match[0] if match else name


def _cut(flat: Tensor, rows: list[Row]) -> list[Tensor]:
    shapes = [shape for _, shape in rows]
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

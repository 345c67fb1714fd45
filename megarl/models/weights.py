"""The weight table: which Hugging Face tensors make up each Megatron parameter, and how tensor parallelism cuts it.

The table is data. `split` and `join` are inverse: HF tensors -> one shard per tensor-parallel rank -> HF tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from megarl.models.family import Architecture


class Layout(Enum):
    REPLICATED = "every rank holds the whole tensor"
    VOCAB = "rows are the vocabulary, padded to a multiple of the ranks"
    ROW = "input features (dim 1) are cut"
    QKV = "query heads of a group, its key, its value; groups are cut"
    GATE_UP = "each rank holds its part of gate, then its part of up"


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter; `{layer}` in the names is the global layer number, from 0."""

    megatron: str
    hf: tuple[str, ...]
    layout: Layout

    def at(self, layer: int) -> Weight:
        return Weight(self.megatron.format(layer=layer), tuple(n.format(layer=layer) for n in self.hf), self.layout)


def weight_table(arch: Architecture, fused_norms: bool = False) -> list[Weight]:
    """All parameters of a model in the order of its layers.

    fused_norms: Transformer Engine's layers keep a norm's weight inside the linear that follows it.
    """
    norm1 = "self_attention.linear_qkv.layer_norm_weight" if fused_norms else "input_layernorm.weight"
    norm2 = "mlp.linear_fc1.layer_norm_weight" if fused_norms else "pre_mlp_layernorm.weight"
    megatron, hf = "decoder.layers.{layer}.", "model.layers.{layer}."
    qkv = [f"{hf}self_attn.{part}_proj" for part in "qkv"]
    layer = [
        Weight(megatron + norm1, (hf + "input_layernorm.weight",), Layout.REPLICATED),
        Weight(megatron + "self_attention.linear_qkv.weight", tuple(n + ".weight" for n in qkv), Layout.QKV),
        Weight(megatron + "self_attention.linear_proj.weight", (hf + "self_attn.o_proj.weight",), Layout.ROW),
        Weight(megatron + norm2, (hf + "post_attention_layernorm.weight",), Layout.REPLICATED),
        Weight(
            megatron + "mlp.linear_fc1.weight",
            (hf + "mlp.gate_proj.weight", hf + "mlp.up_proj.weight"),
            Layout.GATE_UP,
        ),
        Weight(megatron + "mlp.linear_fc2.weight", (hf + "mlp.down_proj.weight",), Layout.ROW),
    ]
    if arch.qkv_bias:
        layer.append(Weight(megatron + "self_attention.linear_qkv.bias", tuple(n + ".bias" for n in qkv), Layout.QKV))
    return [
        Weight("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Layout.VOCAB),
        *(weight.at(i) for i in range(arch.num_layers) for weight in layer),
        Weight("decoder.final_layernorm.weight", ("model.norm.weight",), Layout.REPLICATED),
        # Tied: with several pipeline stages the last one holds a copy of the embedding.
        Weight(
            "output_layer.weight",
            ("model.embed_tokens.weight" if arch.tied_embeddings else "lm_head.weight",),
            Layout.VOCAB,
        ),
    ]


@dataclass(frozen=True)
class Manifest:
    """What every transfer of a model's weights brings, no more and no less."""

    shapes: dict[str, tuple[int, ...]]  # of the Hugging Face tensors, in the order of the model's layers
    tied: dict[str, str]  # a tensor that the model doesn't hold -> the one that it uses in its place


def manifest(arch: Architecture) -> Manifest:
    names, alone = (
        [name for weight in weight_table(of) for name in weight.hf]
        for of in (arch, replace(arch, tied_embeddings=False))
    )
    return Manifest(
        {name: hf_shape(name, arch) for name in names},
        {own: name for name, own in zip(names, alone, strict=True) if name != own},
    )


def hf_names(arch: Architecture) -> set[str]:
    """The tensors that a Hugging Face checkpoint of this architecture holds."""
    return {name for weight in weight_table(arch) for name in weight.hf}


def hf_shape(name: str, arch: Architecture) -> tuple[int, ...]:
    """The shape of one of them."""
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size
    queries, keys = arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
    *_, module, kind = name.split(".")
    rows, columns = {
        "embed_tokens": (arch.vocab_size, hidden),
        "lm_head": (arch.vocab_size, hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }.get(module, (hidden, 0))  # else a norm
    return (rows, columns) if kind == "weight" and columns else (rows,)


def split(layout: Layout, tensors: list[Tensor], arch: Architecture, tp: int) -> list[Tensor]:
    """The shard of each of `tp` ranks."""
    if layout is Layout.REPLICATED:
        return tensors * tp
    if layout is Layout.VOCAB:
        padding = arch.padded_vocab_size(tp) - tensors[0].size(0)
        return list(torch.nn.functional.pad(tensors[0], (0, 0, 0, padding)).chunk(tp))
    if layout is Layout.ROW:
        return list(tensors[0].chunk(tp, dim=1))
    if layout is Layout.QKV:
        groups = torch.cat([t.unflatten(0, (arch.num_query_groups, -1)) for t in tensors], dim=1)
        return [part.flatten(0, 1) for part in groups.chunk(tp)]
    return [torch.cat(parts) for parts in zip(*(t.chunk(tp) for t in tensors), strict=True)]  # GATE_UP


def join(layout: Layout, shards: list[Tensor], arch: Architecture) -> list[Tensor]:
    """The HF tensors from the shards of all tensor-parallel ranks, in rank order; of one shard, mostly views of it."""
    if layout is Layout.REPLICATED:
        return [shards[0]]
    if layout is Layout.VOCAB:
        return [_whole(shards)[: arch.vocab_size]]
    if layout is Layout.ROW:
        return [_whole(shards, dim=1)]
    if layout is Layout.QKV:
        groups = _whole(shards).unflatten(0, (arch.num_query_groups, -1))
        heads = arch.num_attention_heads // arch.num_query_groups
        return [t.flatten(0, 1) for t in groups.split([heads * arch.head_dim, arch.head_dim, arch.head_dim], dim=1)]
    return [_whole(parts) for parts in zip(*(shard.chunk(2) for shard in shards), strict=True)]  # GATE_UP


def _whole(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)

"""Layer spec without Transformer Engine: causal attention (grouped queries, packed or padded, rotary) and RMSNorm.

Plain torch, so it runs on a CPU and, where Transformer Engine is missing, on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megarl.data.packing import before, segment_positions


def local_block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Megatron's local GPT layers with our attention and norm, for this pipeline stage."""
    layer = get_gpt_layer_local_spec(num_experts=None, moe_grouped_gemm=False, normalization="RMSNorm")
    layer.submodules.self_attention.submodules.core_attention = RotaryAttention
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)


@dataclass
class PackedSequences(PackedSeqParams):
    """Boundaries of a packed micro-batch's segments, with what every layer derives from them computed once."""

    prefix: Tensor | None = None  # i64[segments], as in MicroBatch

    @cached_property
    def positions(self) -> Tensor:
        """i64[T]: each token's position in its sequence."""
        return segment_positions(self.cu_seqlens_q.long(), self.prefix)

    @cached_property
    def rectangles(self) -> list[Rectangle]:
        """All segments, those of similar length (and prefix) in one rectangle, of which less than half is padding."""
        cu_seqlens = self.cu_seqlens_q.long()
        starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
        prefix = torch.full_like(lengths, -1) if self.prefix is None else self.prefix
        behind = before(lengths, prefix)
        size_class = torch.stack([(x.clamp(min=1) + (x > 0)).log2().floor() for x in (lengths, behind)])
        result = []
        for value in size_class.unique(dim=1).unbind(1):
            rows = (size_class == value[:, None]).all(0).nonzero().squeeze(-1)
            columns = torch.arange(int(lengths[rows].max()), device=cu_seqlens.device)
            valid = columns < lengths[rows, None]
            query = (starts[rows, None] + columns) * valid
            if not behind[rows].any():
                result.append(Rectangle(query, valid, query, None))
                continue
            ahead = torch.arange(int(behind[rows].max()), device=cu_seqlens.device)
            seen = ahead < behind[rows, None]
            key = torch.cat([(starts[prefix[rows], None] + ahead) * seen, query], 1)
            causal = torch.ones(len(columns), len(columns), dtype=torch.bool, device=cu_seqlens.device).tril()
            shape = (len(rows), len(columns))
            mask = torch.cat([seen[:, None].expand(*shape, -1), causal.expand(*shape, -1)], 2)
            result.append(Rectangle(query, valid, key, mask.unsqueeze(1)))
        return result

    @cached_property
    def order(self) -> Tensor:
        """i64[T]: where each token stands among the valid ones of all rectangles."""
        return torch.cat([rectangle.query[rectangle.valid] for rectangle in self.rectangles]).argsort()


@dataclass(frozen=True)
class Rectangle:
    """Rows of segments that one attention call serves: indices of tokens, padded."""

    query: Tensor  # i64[B, S]
    valid: Tensor  # bool[B, S], the tokens of the segment
    key: Tensor  # i64[B, K], the segment behind what it goes on behind
    mask: Tensor | None  # bool[B, 1, S, K], what is seen; None: the tokens up to one's own


class RotaryAttention(MegatronModule):
    """Causal self-attention that also rotates queries and keys, so that packed positions cost one gather a layer."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.inv_freq = config.rotary_inv_freq  # f32[D/2]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
        **_: Any,
    ) -> Tensor:
        """query [S, B, n, D], key and value [S, B, g, D] -> [S, B, n D]; packed: [T, n, D] -> [T, n D].

        Padding is at the end of a row, where causality keeps it from the tokens before it.
        """
        if packed_seq_params is None:
            positions = torch.arange(query.size(0), device=query.device)
            query, key = (_rotate(x, positions[:, None], self.inv_freq) for x in (query, key))
            rows = [x.transpose(0, 1) for x in (query, key, value)]
            return self._attend(*rows).transpose(0, 1).flatten(2)
        query, key = (_rotate(x, packed_seq_params.positions, self.inv_freq) for x in (query, key))
        outputs = [
            self._attend(query[r.query], key[r.key], value[r.key], r.mask)[r.valid]
            for r in packed_seq_params.rectangles
        ]
        return torch.cat(outputs)[packed_seq_params.order].flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """query [B, S, n, D], key and value [B, K, g, D] -> [B, S, n, D]"""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        output = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True
        )
        return output.transpose(1, 2)


def _rotate(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotary embedding, halves rotated (arXiv 2104.09864, in the layout of Llama); x [..., heads, D]."""
    angle = positions[..., None].float() * inv_freq.to(x.device)
    cos, sin = (f(angle).to(x.dtype).unsqueeze(-2) for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, computed in fp32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.size(-1),), self.weight.float(), self.eps).to(x.dtype)

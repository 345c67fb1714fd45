"""Reads a Hugging Face folder's configuration into an `Architecture`, and says which layouts it allows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megarl.files import read_json, refuse_broken_links
from megarl.models import llama, qwen2
from megarl.models.keys import check_keys, check_rope, check_sizes, check_values
from megarl.types import UserError

FAMILIES = {"llama": llama, "qwen2": qwen2}


@dataclass(frozen=True)
class Architecture:
    """A decoder with rotary positions, RMSNorm, grouped queries and a gated SiLU MLP."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    qkv_bias: bool
    tied_embeddings: bool

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        return -(-self.vocab_size // tensor_model_parallel_size) * tensor_model_parallel_size

    def check_layout(self, tensor_model_parallel_size: int, pipeline_model_parallel_size: int) -> None:
        """Raises UserError, naming what this model allows, where a size doesn't divide it."""
        tp, pp = tensor_model_parallel_size, pipeline_model_parallel_size
        common = math.gcd(math.gcd(self.num_attention_heads, self.num_query_groups), self.ffn_hidden_size)
        if common % tp:
            raise UserError(
                f"learner.tensor_model_parallel_size={tp} does not divide this model's {self.num_attention_heads} "
                f"query heads, {self.num_query_groups} key-value heads and {self.ffn_hidden_size} MLP features; "
                f"it allows {_listed(_divisors(common))}"
            )
        if self.num_layers % pp:
            raise UserError(
                f"learner.pipeline_model_parallel_size={pp} does not divide this model's {self.num_layers} layers; "
                f"it allows {_listed(_divisors(self.num_layers))}"
            )


def read_hf_config(path: str | Path) -> Any:
    """The transformers configuration of a Hugging Face folder.

    Raises UserError where there is none, and for a key of it that would be ignored.
    """
    from transformers import AutoConfig

    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"model.path={path} is not a folder; expected a Hugging Face model folder (config.json, *.safetensors)"
        )
    refuse_broken_links(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path={path} has no config.json; expected a Hugging Face model folder")
    try:
        keys = read_json(folder / "config.json")
        if keys.get("auto_map"):
            raise UserError("auto_map asks for code of the model's own, which is never run")
        hf_config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises a type of its own for each kind of bad value
        raise UserError(f"model.path={path}: config.json is not usable ({' '.join(str(error).split())})") from None
    if family := FAMILIES.get(hf_config.model_type):
        try:
            check_keys(keys, family)
        except UserError as error:
            raise UserError(f"model.path={path}: {error}") from None
    return hf_config


def architecture(hf_config: Any) -> Architecture:
    """What megarl needs to know of a model. Raises UserError for what no family here can represent."""
    family = FAMILIES.get(hf_config.model_type)
    if family is None:
        raise UserError(
            f"config.json: model_type '{hf_config.model_type}' is not supported; supported: {', '.join(FAMILIES)}"
        )
    check_values(hf_config.to_diff_dict(), family)
    check_rope(hf_config.rope_parameters or {}, family)
    check_sizes(hf_config)
    heads, groups = hf_config.num_attention_heads, hf_config.num_key_value_heads or hf_config.num_attention_heads
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
    if heads % groups:
        raise UserError(f"config.json: num_key_value_heads={groups} does not divide num_attention_heads={heads}")
    if not family.OWN_HEAD_DIM and head_dim != hf_config.hidden_size // heads:
        raise UserError(
            f"config.json: this {hf_config.model_type} model's head_dim={head_dim} is not supported; only "
            f"hidden_size / num_attention_heads ({hf_config.hidden_size // heads})"
        )
    return Architecture(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        vocab_size=hf_config.vocab_size,
        max_position_embeddings=hf_config.max_position_embeddings,
        norm_eps=hf_config.rms_norm_eps,
        qkv_bias=family.QKV_BIAS,
        tied_embeddings=bool(hf_config.tie_word_embeddings),
    )


def rotary_inv_freq(hf_config: Any) -> Tensor:
    """f32[D/2]: the rotary frequencies, any scaling included, as transformers computes them."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(hf_config).inv_freq.float()


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _listed(values: list[int]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"

"""Builds this rank's part of the Megatron model: configuration, layer spec, pipeline stage."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megarl.config import LearnerConfig, Precision
from megarl.learner.cpu.spec import local_block_spec
from megarl.learner.mesh import Mesh
from megarl.models.family import architecture, rotary_inv_freq
from megarl.types import UserError


def uses_transformer_engine(dtype: torch.dtype) -> bool:
    """Transformer Engine's layers are used where there is a GPU and the package; the local spec elsewhere, and in fp32,
    in which Transformer Engine has no attention over packed sequences."""
    has_package = importlib.util.find_spec("transformer_engine") is not None
    return torch.cuda.is_available() and has_package and dtype is not torch.float32


def check_precision(precision: Precision) -> None:
    """Raises UserError where this machine can't compute in `precision`."""
    if precision == "fp8":
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
        if not uses_transformer_engine(params_dtype(precision)) or capability < (9, 0):
            raise UserError(
                "model.precision=fp8 needs Transformer Engine and a Hopper or newer GPU; use fp32 or bf16 here"
            )


def params_dtype(precision: Precision) -> torch.dtype:
    return torch.float32 if precision == "fp32" else torch.bfloat16


def token_multiple(precision: Precision) -> int:
    """What the number of tokens of a micro-batch must be divisible by: fp8's matrix products want multiples of 16."""
    return 16 if precision == "fp8" else 1


def can_share_prompts(learner: LearnerConfig, precision: Precision) -> bool:
    """Whether the attention at hand lets responses go on behind one prompt: the local one does. Raises UserError where
    it is told to and can't."""
    can = not uses_transformer_engine(params_dtype(precision))
    if learner.share_prompts is True and not can:
        raise UserError(
            f"learner.share_prompts=true: Transformer Engine's attention, which model.precision={precision} uses here, "
            "keeps every response with its own prompt; use auto"
        )
    return can


def transformer_config(hf_config: Any, learner: LearnerConfig, precision: Precision) -> TransformerConfig:
    arch = architecture(hf_config)
    dtype, on_gpu = params_dtype(precision), torch.cuda.is_available()
    recompute: dict[str, Any] = {}
    if learner.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=learner.tensor_model_parallel_size,
        pipeline_model_parallel_size=learner.pipeline_model_parallel_size,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp8="hybrid" if precision == "fp8" else None,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # demanded of dense models too when sequence lengths vary
        calculate_per_token_loss=True,  # gradients are summed: the loss carries its global denominator
        use_cpu_initialization=not on_gpu,
        batch_p2p_comm=on_gpu,
        batch_p2p_sync=on_gpu,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=uses_transformer_engine(dtype),
        **recompute,
    )
    config.rotary_inv_freq = rotary_inv_freq(hf_config)
    return config


class ValueHead(torch.nn.Module):
    """Hidden states -> one value a token, in place of the vocabulary; the same on all tensor-parallel ranks.

    In float32 whatever the layers are in: the small steps of a regression are lost in bf16. It begins at zero: the
    first values are 0 in every layout.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32))

    def forward(self, hidden: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return F.linear(hidden.float(), self.weight), None


def build_critic(hf_config: Any, config: TransformerConfig, mesh: Mesh) -> GPTModel:
    """`build_model` with a value head."""
    model = build_model(hf_config, config, mesh, tied=False)
    if mesh.is_last_stage:
        model.output_layer = ValueHead(config.hidden_size).to(mesh.device)
    return model


def build_model(hf_config: Any, config: TransformerConfig, mesh: Mesh, tied: bool | None = None) -> GPTModel:
    """This pipeline stage's layers, this tensor-parallel rank's shards; weights are not set.

    The last stage returns hidden states [B, S, H]: `linear_logprob` takes them and `output_weight`.

    `tied`: whether the output layer is the embedding; default: as the architecture says.
    """
    arch = architecture(hf_config)
    if uses_transformer_engine(config.params_dtype):
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

        spec, position_embedding = get_gpt_decoder_block_spec(config, use_transformer_engine=True), "rope"
    else:
        spec, position_embedding = local_block_spec(config), "none"  # the local attention rotates by itself
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=arch.padded_vocab_size(mesh.tp_size),
        max_sequence_length=arch.max_position_embeddings,
        pre_process=mesh.is_first_stage,
        post_process=mesh.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied_embeddings if tied is None else tied,
        position_embedding_type=position_embedding,
    )
    if position_embedding == "rope":
        model.rotary_pos_emb.inv_freq = config.rotary_inv_freq.to(mesh.device)
    if mesh.is_last_stage:
        model.output_layer.forward = _hidden_states
    return model.to(device=mesh.device, dtype=config.params_dtype)


def output_weight(model: GPTModel) -> torch.Tensor:
    """[V/tp, H]: what the hidden states that the model returns on its last stage are multiplied with."""
    tied = model.share_embeddings_and_output_weights
    return model.shared_embedding_or_output_weight() if tied else model.output_layer.weight


def _hidden_states(hidden: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
    """In place of Megatron's output layer, which would make the logits of all tokens at once."""
    return hidden, None

"""Which keys of a config.json are understood, and at which values: what else it says would be ignored in silence.

A key is read into the `Architecture` (or by transformers, for the rotary frequencies), or says nothing of what the
model computes, or is known at the values that mean what the family computes anyway.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cache
from types import ModuleType
from typing import Any

from megarl.types import UserError

READ = {
    "architectures",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "vocab_size",
}
SIZES = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "vocab_size",
    "head_dim",  # which may follow from others
)
SILENT = {
    "attn_implementation",
    "dtype",  # model.precision decides
    "initializer_range",
    "is_llama_config",
    "max_sequence_length",
    "max_window_layers",  # use_sliding_window decides
    "model_max_length",
    "pretraining_tp",  # a way of slicing the same products
    "sliding_window",  # use_sliding_window decides
    "tokenizer_class",
    "torch_dtype",
    "transformers.js_config",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
}
FIXED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "use_sliding_window": (False, None),
    # What older versions of transformers wrote of every model.
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "finetuning_task": (None,),
    "is_decoder": (False,),
    "prefix": (None,),
    "pruned_heads": ({},),
    "task_specific_params": (None,),
    "tf_legacy_loss": (False,),
    "tie_encoder_decoder": (False,),
    "torchscript": (False,),
    "use_bfloat16": (False,),
}
ROPE = {
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "llama3": {
        "rope_theta",
        "factor",
        "high_freq_factor",
        "low_freq_factor",
        "original_max_position_embeddings",
    },
}


def check_keys(config: Mapping[str, Any], family: ModuleType) -> None:
    """Raises UserError for a key of a config.json that isn't understood, or whose value isn't."""
    check_values(config, family)
    if not config.get("architectures"):
        raise UserError(f'config.json: architectures is missing; add "architectures": ["{family.ARCHITECTURE}"]')
    known = READ | _silent() | _fixed().keys() | family.FIXED.keys()
    for key, value in config.items():
        if key not in known and not key.startswith("_"):
            raise UserError(
                f"config.json: {key}={_shown(value)} is not understood of a {family.MODEL_TYPE} model; "
                "remove it if it doesn't change what the model computes"
            )
    _check_rope_spelling(config)


def check_values(config: Mapping[str, Any], family: ModuleType) -> None:
    """Raises UserError where a key that is there has a value that this family can't represent."""
    fixed = _fixed() | family.FIXED | {"architectures": ([family.ARCHITECTURE],)}
    for key, values in fixed.items():
        if key in config and config[key] not in values:
            _refuse(family, key, config[key], values)
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        _refuse(family, "layer_types", config["layer_types"], (["full_attention", "..."],))


def check_rope(parameters: Mapping[str, Any], family: ModuleType) -> None:
    """Raises UserError for rotary parameters, as transformers reads them, that change more than the frequencies."""
    kind = parameters.get("rope_type", "default")
    if kind not in list(ROPE):  # whatever a file may hold, hashable or not
        _refuse(family, "rope_type", kind, ROPE)
    for key, value in parameters.items():
        if key in ROPE[kind]:
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise UserError(f"config.json: {key}={_shown(value)} of rope_type {kind} is not a number above 0")
        elif key not in ("rope_type", "type") and value is not None and (key, value) != ("partial_rotary_factor", 1):
            raise UserError(
                f"config.json: {key}={_shown(value)} is not understood of rope_type {kind}; "
                f"understood: {', '.join(sorted(ROPE[kind]))}"
            )


def check_sizes(hf_config: Any) -> None:
    """Raises UserError for sizes that no model has; those that are null follow from others."""
    for key in SIZES:
        value = getattr(hf_config, key, None)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"config.json: {key}={_shown(value)} is not a number above 0")


def _check_rope_spelling(config: Mapping[str, Any]) -> None:
    """Old and new names of one thing may both be there, but must agree: readers differ in which they prefer."""
    nested = config.get("rope_scaling") or config.get("rope_parameters") or {}
    for old, new, ours, theirs in (
        ("rope_scaling", "rope_parameters", nested, config.get("rope_parameters") or nested),
        ("rope_theta", "rope_parameters", config.get("rope_theta"), nested.get("rope_theta")),
        ("type", "rope_type", nested.get("type"), nested.get("rope_type")),
    ):
        if ours is not None and theirs is not None and ours != theirs:
            raise UserError(f"config.json: {old}={_shown(ours)} and {new} ({_shown(theirs)}) differ; keep one of them")


@cache
def _silent() -> set[str]:
    """And what a generation configuration says, which was once part of the model's."""
    from transformers import GenerationConfig

    return SILENT | GenerationConfig().to_dict().keys()


@cache
def _fixed() -> dict[str, tuple[Any, ...]]:
    """And what transformers may write of any model, at its default."""
    from transformers import PreTrainedConfig

    base = json.loads(json.dumps(PreTrainedConfig().to_dict()))
    others = base.keys() - READ - _silent()
    return FIXED | {key: (base[key],) for key in others if not key.startswith("_")}


def _refuse(family: ModuleType, key: str, value: Any, allowed: Collection[Any]) -> None:
    wanted = " or ".join(_shown(choice) for choice in allowed)
    raise UserError(
        f"config.json: this {family.MODEL_TYPE} model's {key}={_shown(value)} is not supported; only {wanted}"
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."

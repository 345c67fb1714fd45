"""Llama: Llama 2 and 3, SmolLM2 and whatever else declares model_type llama."""

from __future__ import annotations

from typing import Any

MODEL_TYPE, ARCHITECTURE = "llama", "LlamaForCausalLM"
QKV_BIAS = False
OWN_HEAD_DIM = True
FIXED: dict[str, tuple[Any, ...]] = {  # keys that are understood at these values only
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
}

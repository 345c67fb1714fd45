"""Qwen2 and Qwen2.5 (dense): Llama with a bias on queries, keys and values."""

from __future__ import annotations

from typing import Any

MODEL_TYPE, ARCHITECTURE = "qwen2", "Qwen2ForCausalLM"
QKV_BIAS = True
OWN_HEAD_DIM = False  # vLLM computes it from the hidden size
FIXED: dict[str, tuple[Any, ...]] = {  # keys that are understood at these values only
    "attention_bias": (True, None),
    "mlp_bias": (False, None),
}

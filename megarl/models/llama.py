"""Llama: Llama 2 and 3, SmolLM2 and whatever else declares model_type llama."""

from __future__ import annotations

from typing import Any

QKV_BIAS = False


def unsupported(hf_config: Any) -> dict[str, bool]:
    """Configuration keys whose values this family can't represent."""
    return {
        "attention_bias": bool(getattr(hf_config, "attention_bias", False)),
        "mlp_bias": bool(getattr(hf_config, "mlp_bias", False)),
    }

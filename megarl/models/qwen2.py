"""Qwen2 and Qwen2.5 (dense): Llama with a bias on queries, keys and values."""

from __future__ import annotations

from typing import Any

QKV_BIAS = True


def unsupported(hf_config: Any) -> dict[str, bool]:
    """Configuration keys whose values this family can't represent."""
    return {"use_sliding_window": bool(getattr(hf_config, "use_sliding_window", False))}

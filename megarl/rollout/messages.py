"""What travels between the trainer and an engine's process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Request:
    """One response to sample."""

    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How to sample it. Recorded log-probs are those of the distribution that was sampled from."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int


@dataclass(frozen=True)
class Response:
    token_ids: np.ndarray  # i32[R]
    logprobs: np.ndarray  # f32[R]
    finish_reason: str  # "stop" | "length"
    weight_version: int

"""What travels between the trainer and an engine's process.

To the engine go Start, AnnounceWeights, StartUpdate, LoadBucket, FinishUpdate, VerifyWeights, Sleep and Wake, each
answered by a Done before the next is sent, and at any time Submit and Abort, which have no answer of their own. From it
come Done, Refused, Finished and Progress; when it can't go on, Broken, its last words.

To the host of another node go Launch and Kill; from it comes Ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megarl.models.weights import Manifest

FIRST = -1  # the `due` of a request that goes before all training steps


@dataclass(frozen=True)
class Sampling:
    """How to sample a response. Recorded log-probs are those of the distribution that was sampled from."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int


@dataclass(frozen=True)
class Request:
    """One response to sample. Those with a smaller `due`, the training step that waits for it, are begun first."""

    prompt_ids: list[int]
    seed: int
    due: int = FIRST


@dataclass(frozen=True)
class Response:
    token_ids: np.ndarray  # i32[R]
    logprobs: np.ndarray  # f32[R]
    finish_reason: str  # "stop" | "length"
    weight_versions: np.ndarray  # i32[R], that of the weights which sampled each token


@dataclass(frozen=True)
class Start:
    """Load the model with these arguments of vllm.LLM."""

    options: dict[str, Any]


@dataclass(frozen=True)
class AnnounceWeights:
    """What every update brings."""

    manifest: Manifest


@dataclass(frozen=True)
class StartUpdate:
    """Get ready for new weights, once every response that is being generated is finished or has grown by `patience`
    tokens since the last update; without patience, once they are finished. No other is begun meanwhile."""

    update: int  # its number; those of later updates are higher
    patience: int | None = None
    witnessed: bool = False  # what it brings is remembered, to be verified


@dataclass(frozen=True)
class LoadBucket:
    """Load a bucketful of weights, as `Bucket.pack` describes it, in its turn."""

    update: int
    index: int  # of the update's buckets
    bucket: dict[str, Any]
    content: np.ndarray | None  # u8[size], where the engine doesn't share the memory that it lies in


@dataclass(frozen=True)
class FinishUpdate:
    """Serve the new weights, if all so many buckets are there; what is being generated goes on with them, its tokens
    so far computed anew."""

    update: int
    buckets: int
    version: int


@dataclass(frozen=True)
class VerifyWeights:
    """Compare what is held with what the last update brought, which was witnessed. Where it differs, serve nothing."""


@dataclass(frozen=True)
class Sleep:
    """Give back the memory of the GPU, while nothing is being generated: the weights go to the host's."""


@dataclass(frozen=True)
class Wake:
    """Take it again; for new weights, the part that they go to."""

    for_weights: bool = False


@dataclass(frozen=True)
class Submit:
    """Requests, each with the number that its response will carry."""

    requests: list[tuple[int, Request]]
    sampling: Sampling


@dataclass(frozen=True)
class Abort:
    """Give up the requests of these numbers, where they aren't finished."""

    numbers: list[int]


@dataclass(frozen=True)
class Done:
    """The last command was carried out, or why it was not."""

    error: str | None = None
    seconds: float = 0.0  # that the engine worked at it


@dataclass(frozen=True)
class Refused:
    """A request can't be served, here or by any engine."""

    number: int
    reason: str


@dataclass(frozen=True)
class Finished:
    """The numbers and responses that a step of generation has finished."""

    responses: list[tuple[int, Response]]
    busy: float  # seconds of generation so far


@dataclass(frozen=True)
class Progress:
    """Said about every second while nothing is finished."""

    tokens: int  # of all unfinished responses
    busy: float


@dataclass(frozen=True)
class Broken:
    """Generation failed; the engine ends."""

    reason: str


@dataclass(frozen=True)
class Launch:
    """Start the `life`th process of engine `index`, whose connection to rank 0 says this number."""

    number: int
    index: int
    life: int
    log_path: str


@dataclass(frozen=True)
class Kill:
    """What was launched by this number, if it still lives."""

    number: int


@dataclass(frozen=True)
class Ended:
    """What was launched by this number, or why it could not be."""

    number: int
    how: str

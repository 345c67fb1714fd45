"""Launch parameters of the kernels and tile sizes of `linear_logprob`, by device."""

from __future__ import annotations

from functools import cache

import torch

# Any other GPU takes the first row. BLOCK_V of logit_stats decides the order of its sums, so it does not depend on the
# shapes: a token's log-prob is the same in whatever micro-batch it comes.
KERNELS: dict[str, dict[str, dict[str, int]]] = {
    "NVIDIA H100": {
        "logit_stats": {"BLOCK_V": 4096, "num_warps": 4, "num_stages": 3},
        "logit_grad": {"BLOCK_V": 4096, "num_warps": 8, "num_stages": 1},
        "merge_stats": {"BLOCK_T": 128, "num_warps": 4, "num_stages": 1},
        "policy_epilogue": {"BLOCK_T": 512, "num_warps": 4, "num_stages": 1},
    },
}
# (rows, columns) of the logits that exist at a time. Forward tiles are always whole, so that every product has the same
# shape and a token's log-prob does not depend on its neighbours; a backward tile is as high as the tokens need, up to
# its rows: fewer passes over the gradient of the weight.
TILES: dict[str, dict[str, tuple[int, int]]] = {
    "NVIDIA H100": {"forward": (1024, 32768), "backward": (8192, 8192)},
    "cpu": {"forward": (128, 8192), "backward": (512, 4096)},
}


def tuned(op: str) -> dict[str, int]:
    """What a kernel is launched with on the current device."""
    return dict(KERNELS[_device_name()][op])


def tile(direction: str, device: torch.device) -> tuple[int, int]:
    """(rows, columns) of `linear_logprob`'s tiles; direction: forward | backward."""
    return TILES["cpu" if device.type == "cpu" else _device_name()][direction]


@cache
def _device_name() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((known for known in KERNELS if name.startswith(known)), next(iter(KERNELS)))

"""Which code computes an op: Triton's kernels on a GPU, plain torch elsewhere."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from megarl.ops import reference


def implementation(tensor: Tensor) -> ModuleType:
    """The module whose functions take this tensor; both modules have the same ones."""
    if not tensor.is_cuda:
        return reference
    from megarl.ops import kernels

    return kernels

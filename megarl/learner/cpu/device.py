"""Device layer: Megatron-Core's `cuda` references resolve to the CPU where there is no GPU.

Call `install()` before megatron.core is imported and `patch_megatron()` after. It patches torch process-wide, so it
must never run in a process that holds a vLLM engine. Packages whose kernels need a GPU can't be imported afterwards, so
that Megatron takes its own or torch's versions of them. With a GPU present both do nothing.
"""

# mypy: ignore-errors

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
# Tensor factories that Megatron calls with device=torch.cuda.current_device().
FACTORIES = (
    "empty",
    "zeros",
    "ones",
    "full",
    "tensor",
    "arange",
    "rand",
    "randn",
    "empty_like",
    "zeros_like",
    "ones_like",
)
# Megatron takes optimizer and norms from whichever of these can be imported.
GPU_PACKAGES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")
_installed = False


def install() -> None:
    """Route cuda devices, streams and random states to the CPU. Idempotent."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    sys.modules.update(dict.fromkeys(GPU_PACKAGES))
    # `with torch.device(...)` knows factories by identity and remembers them at first use: let it see torch's own.
    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    _patch_tensor()
    _patch_cuda()
    barrier = torch.distributed.barrier
    torch.distributed.barrier = lambda group=None, async_op=False, device_ids=None: barrier(group, async_op)


def patch_megatron() -> None:
    """The places where Megatron keeps CUDA and CPU random states apart: here they are one."""
    if not _installed:
        return
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    # fork() warns that the CPU state moved with the CUDA state, which is the point.
    logging.getLogger(megatron_random.__name__).addFilter(lambda r: "CPU RNG state changed" not in r.getMessage())


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return wrapped


def _patch_tensor() -> None:
    to, type_name = torch.Tensor.to, torch.Tensor.type

    def to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and not isinstance(args[0], (torch.dtype, torch.Tensor)) and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return to(self, *args, **kwargs)

    def type_as_cuda(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Megatron's optimizers tell parameters apart by names such as torch.cuda.FloatTensor."""
        if dtype is None:
            return type_name(self).replace("torch.", "torch.cuda.", 1)
        return type_name(self, dtype.replace("torch.cuda.", "torch.") if isinstance(dtype, str) else dtype)

    torch.Tensor.to = to_cpu
    torch.Tensor.type = type_as_cuda
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.record_stream = lambda self, stream: None
    torch.nn.Module.cuda = lambda self, device=None: self


class _Stream:
    """A stream or event with nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, *args: Any) -> _Stream:
        return self

    def elapsed_time(self, *args: Any) -> float:
        return 0.0

    def query(self) -> bool:
        return True

    def wait(self, *args: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = record = wait


def _patch_cuda() -> None:
    cuda = torch.cuda
    results: dict[str, Any] = {
        "current_device": CPU,
        "device_count": 1,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "get_device_capability": (0, 0),
        "is_current_stream_capturing": False,
        **dict.fromkeys(("synchronize", "empty_cache", "set_device", "_lazy_init", "reset_peak_memory_stats")),
    }
    for name, result in results.items():
        setattr(cuda, name, lambda *args, _result=result, **kwargs: _result)
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = _Stream
    cuda.stream = cuda.device = lambda *args: contextlib.nullcontext()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    cuda.manual_seed = cuda.random.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.manual_seed_all = cuda.random.manual_seed_all = cuda.manual_seed

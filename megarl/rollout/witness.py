"""What an engine holds, against what was loaded into it: digests of every tensor, as vLLM's loaders left it and as its
kernels find it.

A CPU's kernels keep the weights of a linear layer in an order of their own, out of reach; what they multiply by is then
read off their products with unit vectors, each of which is a column, exactly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megarl.rollout.transfer import checksum

COLUMNS = 256  # of a weight that are read at a time


class Witness:
    """Of one worker's part of a model, whose layers are loaded whole and then packed."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._open = False
        self._loaded: dict[str, str] = {}  # digests of what the last update that was witnessed brought
        self._widths: dict[str, int] = {}  # of the weights of layers that are packed
        self._fixed: dict[str, str] = {}  # of what no update brings
        names = {layer: name for name, layer in model.named_modules()}
        for method in {getattr(layer, "quant_method", None) for layer in names}:
            if hasattr(method, "process_weights_after_loading"):
                self._watch(method, names)

    def open(self, remembers: bool) -> None:
        """An update begins; whether it will be verified."""
        self._open, self._loaded = remembers, {}

    def close(self) -> None:
        """It is over."""
        self._open = False

    def arrived(self, tensors: dict[str, Tensor]) -> None:
        """Of these, the layers that aren't packed hold each under its own name."""
        if self._open:
            plain = {name for name, layer in self._model.named_modules() if not hasattr(layer, "quant_method")}
            for name, tensor in tensors.items():
                if name.rpartition(".")[0] in plain:
                    self._loaded[name] = self._digest(tensor)

    def damaged(self) -> list[str]:
        """The names of what isn't as it was loaded. Raises AssertionError where nothing was witnessed."""
        assert self._loaded, "nothing of the last update was remembered"
        held = defaultdict(set)
        for name, tensor in self._held():
            held[name].add(self._digest(tensor))
        wrong = [name for name, digest in self._loaded.items() if held.pop(name, None) != {digest}]
        for name, digests in held.items():
            if {self._fixed.setdefault(name, min(digests))} != digests:
                wrong.append(name)
        return sorted(wrong)

    def _watch(self, method: Any, names: dict[nn.Module, str]) -> None:
        pack = method.process_weights_after_loading

        def process_weights_after_loading(layer: nn.Module) -> None:
            if self._open:
                for name, parameter in layer.named_parameters(recurse=False):
                    self._loaded[f"{names[layer]}.{name}"] = self._digest(parameter)
                    if name == "weight":
                        self._widths[names[layer]] = parameter.size(1)
            pack(layer)

        method.process_weights_after_loading = process_weights_after_loading

    def _held(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its name, and once more where a kernel has its own of it."""
        for prefix, layer in self._model.named_modules():
            for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
                if tensor.numel():
                    yield f"{prefix}.{name}", tensor
            if hasattr(layer, "cpu_linear") and prefix in self._widths:
                yield f"{prefix}.weight", weight_in_use(layer, self._widths[prefix], self._dtype)
                if (bias := getattr(layer, "bias", None)) is not None:
                    nothing = torch.zeros(1, self._widths[prefix], dtype=self._dtype)
                    yield f"{prefix}.bias", layer.quant_method.apply(layer, nothing, bias)[0]

    def _digest(self, tensor: Tensor) -> str:
        """Of the values, whatever the sign of a zero, in the model's type: some kernels keep wider copies."""
        values = tensor.detach().cpu()
        if values.is_floating_point():
            values = values.to(self._dtype) + 0
        return checksum(values.contiguous().view(-1).view(torch.uint8))


@torch.inference_mode()
def weight_in_use(layer: Any, width: int, dtype: torch.dtype) -> Tensor:
    """[outputs, inputs], as the layer's kernel has it."""
    columns = []
    for start in range(0, width, COLUMNS):
        count = min(COLUMNS, width - start)
        units = torch.zeros(count, width, dtype=dtype)
        units[:, start : start + count].fill_diagonal_(1)
        columns.append(layer.quant_method.apply(layer, units, None))
    return torch.cat(columns).t()

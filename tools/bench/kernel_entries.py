"""What the kernel benchmark measures: floors, our ops, plain torch, and every published kernel that is installed.

An entry is a function of the inputs that returns what is timed: a function without arguments whose result holds the
log-probs, entropies and gradients that it computed. Packages of others are imported inside their entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Inputs:
    """The same for all entries. v = V/tp: one rank's slice, and targets within it."""

    hidden: Tensor  # bf16[T, H]
    weight: Tensor  # bf16[v, H]
    logits: Tensor  # bf16[T, v], their product, rounded
    targets: Tensor  # i64[T]
    by_logprob: Tensor  # f32[T], arriving gradients
    by_entropy: Tensor  # f32[T]
    scratch: Tensor  # bf16[T, v], for what is overwritten

    @property
    def on_gpu(self) -> bool:
        return self.logits.is_cuda


@dataclass
class Result:
    """What an entry computed; None: it doesn't compute that."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    by_logits: Tensor | None = None
    by_hidden: Tensor | None = None
    by_weight: Tensor | None = None


Run = Callable[[], Any]


@dataclass
class Entry:
    name: str
    family: str  # floor | logits | hidden | epilogue
    make: Callable[[Inputs], Run]
    floor: tuple[str, ...] = ()  # names of the floors whose sum it can't beat
    package: str | None = None  # what to install
    gpu_only: bool = False
    prepare: Callable[[Inputs], None] | None = None  # before every run, not timed


def copy(x: Inputs) -> Run:
    return lambda: x.scratch.copy_(x.logits)


def product(name: str) -> Callable[[Inputs], Run]:
    """A bare product of the linear op, of whole matrices: of the forward pass, or of a gradient."""

    def make(x: Inputs) -> Run:
        if name == "logits":
            return lambda: torch.mm(x.hidden, x.weight.t(), out=x.scratch)
        out = torch.empty_like(x.hidden if name == "hidden" else x.weight)
        if name == "hidden":
            return lambda: torch.mm(x.logits, x.weight, out=out)
        return lambda: torch.mm(x.logits.t(), x.hidden, out=out)

    return make


def statistics(x: Inputs) -> Any:
    from megarl.ops.implementation import implementation

    ops = implementation(x.logits)
    stats = ops.logit_stats(x.logits, x.targets, None, 0, x.logits.size(1), 1.0)
    return ops, stats[:, 0].contiguous(), *ops.normalise(stats, None, 1.0)


def logit_stats(x: Inputs) -> Run:
    def run() -> Result:
        _, _, logprob, entropy, _ = statistics(x)
        return Result(logprob, entropy)

    return run


def product_alone(x: Inputs) -> Run:
    """Its error is what the product costs by itself: what tensor cores add up of bf16 is less exact than float32."""
    from megarl.ops.linear import linear_logits

    def run() -> Result:
        values = []
        for rows in torch.arange(len(x.hidden), device=x.hidden.device).split(256):
            space = torch.empty(len(rows), len(x.weight), dtype=torch.float32, device=x.hidden.device)
            log_p = linear_logits(x.hidden[rows], x.weight, space).double().log_softmax(-1)
            values.append((log_p.gather(-1, x.targets[rows, None])[:, 0], -(log_p.exp() * log_p).sum(-1)))
        logprob, entropy = (torch.cat(value) for value in zip(*values, strict=True))
        return Result(logprob, entropy)

    return run


def logit_grad(in_place: bool) -> Callable[[Inputs], Run]:
    def make(x: Inputs) -> Run:
        ops, m, _, entropy, log_s = statistics(x)

        def run() -> Result:
            given, out = (x.scratch, x.scratch) if in_place else (x.logits, torch.empty_like(x.logits))
            upstream = (x.by_logprob, x.by_entropy)
            ops.logit_grad(given, x.targets, None, m, log_s, entropy, *upstream, 0, given.size(1), 1.0, out)
            return Result(by_logits=out)

        return run

    return make


def from_logits(function: Callable[[Tensor, Tensor], Any]) -> Callable[[Inputs], Run]:
    """function(logits, targets) -> log-probs, or (log-probs, entropies), and its backward pass."""

    def make(x: Inputs) -> Run:
        def run() -> Result:
            logits = x.logits.detach().requires_grad_()
            values = function(logits, x.targets)
            values = values if isinstance(values, tuple) else (values,)
            torch.autograd.backward(values, _upstream(x, values))
            return _result(values, by_logits=logits.grad)

        return run

    return make


def from_hidden(function: Callable[[Tensor, Tensor, Tensor], Any]) -> Callable[[Inputs], Run]:
    """function(hidden, weight, targets) -> log-probs, or (log-probs, entropies), and its backward pass."""

    def make(x: Inputs) -> Run:
        def run() -> Result:
            hidden, weight = x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()
            values = function(hidden, weight, x.targets)
            values = values if isinstance(values, tuple) else (values,)
            torch.autograd.backward(values, _upstream(x, values))
            return _result(values, by_hidden=hidden.grad, by_weight=weight.grad)

        return run

    return make


def _result(values: tuple[Tensor, ...], **gradients: Tensor | None) -> Result:
    logprob, entropy, *_ = *(value.detach() for value in values), None
    return Result(logprob, entropy, **gradients)


def _upstream(x: Inputs, values: tuple[Tensor, ...]) -> list[Tensor]:
    return [g.to(v.dtype) for v, g in zip(values, (x.by_logprob, x.by_entropy), strict=False)]


def ours_from_logits(in_place: bool) -> Callable[[Inputs], Run]:
    def make(x: Inputs) -> Run:
        from megarl.ops.logprob import logprob_and_entropy

        if not in_place:
            return from_logits(logprob_and_entropy)(x)

        def run() -> Result:
            logits = x.scratch.detach().requires_grad_()
            values = logprob_and_entropy(logits, x.targets, in_place=True)
            torch.autograd.backward(values, _upstream(x, values))
            return _result(values, by_logits=logits.grad)

        return run

    return make


def ours_from_hidden(dtype: torch.dtype) -> Callable[[Inputs], Run]:
    def function(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
        from megarl.ops.linear import linear_logprob

        return linear_logprob(hidden, weight, targets, logits_dtype=dtype)

    return from_hidden(function)


def plain(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def plain_linear(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return plain(hidden @ weight.t(), targets)


def compiled(wrap: Callable, function: Callable) -> Callable[[Inputs], Run]:
    return lambda x: wrap(torch.compile(function))(x)


def epilogue(where: str) -> Callable[[Inputs], Run]:
    """GRPO's loss of tokens: by the op of this device, or in plain torch."""

    def make(x: Inputs) -> Run:
        from megarl.ops import reference
        from megarl.ops.implementation import implementation
        from megarl.ops.rules import Rule

        ops = implementation(x.logits) if where == "here" else reference
        rule = Rule(ratio="token", clip="ppo", kl_coef=0.001)
        logprob, ones = -x.by_logprob.abs(), torch.ones_like(x.by_logprob)
        arguments = (logprob, 0.1 * x.by_entropy, x.by_logprob, ones, None, None, logprob + 0.1 * x.by_entropy)
        return lambda: ops.policy_epilogue(rule, *arguments)

    return make


def trl(x: Inputs) -> Run:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return from_logits(lambda logits, ids: (selective_log_softmax(logits, ids), entropy_from_logits(logits)))(x)


def trl_together(x: Inputs) -> Run:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return from_logits(selective_log_softmax_and_entropy)(x)


def verl(x: Inputs) -> Run:
    from verl.utils.torch_functional import entropy_from_logits_with_chunking, logprobs_from_logits

    def function(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        entropy = entropy_from_logits_with_chunking(logits)
        return logprobs_from_logits(logits, targets, inplace_backward=False), entropy

    return from_logits(function)(x)


def verl_chunked(x: Inputs) -> Run:
    from verl.utils.experimental.torch_functional import FusedLinearForPPOFunction

    return from_hidden(FusedLinearForPPOFunction.apply)(x)


def verl_kernel(x: Inputs) -> Run:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return from_hidden(lambda hidden, weight, ids: tuple(linear_cross_entropy(hidden, weight, ids, 1.0, "none")))(x)


def liger(x: Inputs) -> Run:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    def function(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss, entropy = Function.apply(hidden, weight, targets, 1.0, -100, 1, True)
        return -loss, entropy

    return from_hidden(function)(x)


def cut_cross_entropy(exact: bool) -> Callable[[Inputs], Run]:
    def make(x: Inputs) -> Run:
        from cut_cross_entropy import linear_cross_entropy

        options = {"filter_eps": None} if exact else {}
        return from_hidden(lambda h, w, ids: -linear_cross_entropy(h, w, ids, reduction="none", **options))(x)

    return make


def megatron(x: Inputs) -> Run:
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    if not dist.is_initialized():
        dist.init_process_group("nccl" if x.on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD

    def function(logits: Tensor, targets: Tensor) -> Tensor:
        return -fused_vocab_parallel_cross_entropy(logits.unsqueeze(1), targets.unsqueeze(1), group).squeeze(1)

    return from_logits(function)(x)


def refill(x: Inputs) -> None:
    x.scratch.copy_(x.logits)


PRODUCT_ALONE = "the product, summed in float64"
FORWARD, GRADIENT = ("read of the logits",), ("copy of the logits",)
PRODUCTS = ("product: logits", "product: logits", "product: hidden gradient", "product: weight gradient")
ENTRIES = [
    Entry("copy of the logits", "floor", copy),
    Entry("product: logits", "floor", product("logits")),
    Entry("product: hidden gradient", "floor", product("hidden")),
    Entry("product: weight gradient", "floor", product("weight")),
    Entry("logit_stats", "logits", logit_stats, FORWARD),
    Entry("logit_grad", "logits", logit_grad(False), GRADIENT),
    Entry("logit_grad, in place", "logits", logit_grad(True), GRADIENT, prepare=refill),
    Entry("logprob_and_entropy", "logits", ours_from_logits(False), FORWARD + GRADIENT),
    Entry("logprob_and_entropy, in place", "logits", ours_from_logits(True), FORWARD + GRADIENT, prepare=refill),
    Entry("torch", "logits", from_logits(plain), FORWARD + GRADIENT),
    Entry("torch.compile", "logits", compiled(from_logits, plain), FORWARD + GRADIENT),
    Entry("TRL", "logits", trl, FORWARD + GRADIENT, "trl"),
    Entry("TRL, both at once", "logits", trl_together, FORWARD + GRADIENT, "trl"),
    Entry("verl", "logits", verl, FORWARD + GRADIENT, "verl"),
    Entry("Megatron, fused", "logits", megatron, FORWARD + GRADIENT, "megatron-core"),
    Entry(PRODUCT_ALONE, "hidden", product_alone, PRODUCTS[:1]),
    Entry("linear_logprob", "hidden", ours_from_hidden(torch.float32), PRODUCTS),
    Entry("linear_logprob, bf16 logits", "hidden", ours_from_hidden(torch.bfloat16), PRODUCTS),
    Entry("torch", "hidden", from_hidden(plain_linear), PRODUCTS),
    Entry("torch.compile", "hidden", compiled(from_hidden, plain_linear), PRODUCTS),
    Entry("verl, chunked torch", "hidden", verl_chunked, PRODUCTS, "verl"),
    Entry("verl, kernel", "hidden", verl_kernel, PRODUCTS, "verl", gpu_only=True),
    Entry("Liger kernel", "hidden", liger, PRODUCTS, "liger-kernel"),
    Entry("cut cross-entropy", "hidden", cut_cross_entropy(False), PRODUCTS, "cut-cross-entropy", gpu_only=True),
    Entry("cut cross-entropy, exact", "hidden", cut_cross_entropy(True), PRODUCTS, "cut-cross-entropy", gpu_only=True),
    Entry("policy_epilogue", "epilogue", epilogue("here")),
    Entry("torch", "epilogue", epilogue("torch")),
]

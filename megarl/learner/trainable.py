"""A model with its gradients and its optimizer: the policy, or the critic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megarl.config import OptimConfig, Precision
from megarl.learner.model import params_dtype


class Trainable:
    """Optimizer state and reduced gradients are sharded over data-parallel ranks unless `sharded` is False."""

    def __init__(
        self, module: GPTModel, config: TransformerConfig, optim: OptimConfig, precision: Precision, sharded: bool
    ) -> None:
        self.module, self.optim = module, optim
        # Without overlap_grad_reduce, whose hook wants a .grad of every parameter: `linear_logprob` adds the output
        # layer's to main_grad itself.
        self.ddp = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=sharded, check_for_nan_in_grad=True
            ),
            module,
        )
        self.optimizer = get_megatron_optimizer(_optimizer_config(optim, precision, sharded), [self.ddp])
        _prepare(self.optimizer)

    @property
    def weights(self) -> list[Tensor]:
        return [*self.module.parameters(), *self.module.buffers()]

    @property
    def optimizer_state(self) -> list[Tensor]:
        """Moments and, under lower precision, the weights in float32; without what lies in the weights' own memory."""
        of_weights = {weight.untyped_storage().data_ptr() for weight in self.weights}
        parts = [part.optimizer for part in _parts(self.optimizer)]
        tensors = [value for part in parts for state in part.state.values() for value in state.values()]
        tensors += [param for part in parts for group in part.param_groups for param in group["params"]]
        return [t for t in tensors if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in of_weights]

    @property
    def gradients(self) -> list[Tensor]:
        """The buffers that every main_grad is a view of; zeros between updates."""
        return [buffer.grad_data for buffer in [*self.ddp.buffers, *self.ddp.expert_parallel_buffers]]

    def zero_grad(self) -> None:
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self, lr: float) -> float:
        """Move the weights along the gradient of the last backward pass; the gradient's norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        succeeded, grad_norm, _ = self.optimizer.step()
        assert succeeded, "the optimizer refused a step without loss scaling"
        return float(grad_norm)


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up, then constant, or cosine towards min_lr_ratio, which the step after the last would have."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.lr_schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup_steps) / max(steps - optim.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine)


def _optimizer_config(optim: OptimConfig, precision: Precision, sharded: bool) -> OptimizerConfig:
    dtype = params_dtype(precision)
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.grad_clip,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_distributed_optimizer=sharded,
    )


def _prepare(optimizer: Any) -> None:
    """Make the optimizer, Transformer Engine's, Apex's or torch's, fit to be saved and restored at any time.

    It gets its moments now: a checkpoint may be due before the first update, when everything was filtered away. And
    restoring must treat the `step` of torch's AdamW apart (the others keep it in their groups): Megatron's distributed
    optimizer looks for it among the tensors, and gives all parameters one and the same counter, which AdamW would then
    advance once for each of them.
    """
    for part in _parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part, DistributedOptimizer):
            _index_as_stored(part)
        if not isinstance(part.optimizer, torch.optim.AdamW):
            continue
        for state in part.optimizer.state.values():
            state["step"] = torch.zeros(())
        if isinstance(part, DistributedOptimizer):
            part._set_main_param_and_optimizer_states = _restore_except_step(part)


def _parts(optimizer: Any) -> list[Any]:
    """One for each kind of parameter."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _index_as_stored(part: DistributedOptimizer) -> None:
    """Megatron stores a group's float32 parameters before the others, but looks them up in the model's order."""
    for group, members in enumerate(zip(part.model_fp32_groups, part.model_float16_groups, strict=True)):
        for order, param in enumerate(itertools.chain(*members)):
            part.model_param_group_index_map[param] = (group, order)


def _restore_except_step(part: DistributedOptimizer) -> Callable[[Tensor, dict[str, Tensor]], None]:
    restore = part._set_main_param_and_optimizer_states

    def restore_except_step(model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        own = part._get_main_param_and_optimizer_states(model_param)
        restore(model_param, {"step": own["step"], **tensors})
        part.optimizer.state[own["param"]]["step"] = own["step"].clone()

    return restore_except_step

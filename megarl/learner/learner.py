"""The learner: annotates batches with log-probs and moves the policy, whatever the layout and whatever the recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megarl.algorithms.loss import policy_loss, token_weights
from megarl.algorithms.recipe import Recipe
from megarl.config import Config, OptimConfig
from megarl.data.packing import MicroBatch, micro_batches
from megarl.learner.cpu.spec import PackedSequences
from megarl.learner.mesh import Mesh
from megarl.learner.model import build_model, params_dtype, transformer_config
from megarl.learner.weights import WeightStream, load_hf_weights
from megarl.models.family import architecture
from megarl.models.files import save_hf_model
from megarl.ops.logprob import logprob_and_entropy
from megarl.types import Batch

Loss = Callable[[Tensor, Tensor, MicroBatch], Tensor]  # (logprobs, entropy, micro-batch) -> sum


@dataclass(frozen=True)
class Update:
    """What one optimizer update saw; per-token values are of the policy before it."""

    logprobs: Tensor  # f32[T]
    entropy: Tensor  # f32[T]
    loss: float
    grad_norm: float
    lr: float


class Learner:
    """The policy, its optimizer and, where the recipe needs one, the frozen reference.

    Every method is collective: all ranks call it with the same arguments. Optimizer state and reduced gradients are
    sharded over data-parallel ranks (Megatron's distributed optimizer); without `shard_optimizer` every rank ends a
    `backward` with the whole gradient. `temperature` is that of the sampling whose log-probs are computed.
    """

    def __init__(
        self,
        config: Config,
        recipe: Recipe,
        hf_config: Any,
        mesh: Mesh,
        *,
        temperature: float = 1.0,
        shard_optimizer: bool = True,
    ) -> None:
        self.config, self.recipe, self.mesh, self.temperature = config, recipe, mesh, temperature
        self.arch = architecture(hf_config)
        self.transformer = transformer_config(hf_config, config.learner, config.model.precision)
        # The loss carries its denominator, so Megatron must not divide by a token count.
        self.transformer.finalize_model_grads_func = lambda model, num_tokens, **kw: finalize_model_grads(
            model, None, **kw
        )
        model = build_model(hf_config, self.transformer, mesh)
        load_hf_weights(model, self.arch, mesh, config.model.path)
        self.module = model
        self.reference = None
        if recipe.needs_reference:
            self.reference = build_model(hf_config, self.transformer, mesh).requires_grad_(False)
            self.reference.load_state_dict(model.state_dict())
        self.policy = DistributedDataParallel(
            self.transformer,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=shard_optimizer, check_for_nan_in_grad=True
            ),
            model,
        )
        self.optimizer = get_megatron_optimizer(_optimizer_config(config, shard_optimizer), [self.policy])
        _prepare_torch_adamw(self.optimizer)
        self._forward_backward = get_forward_backward_func()
        self._stream = WeightStream(model, self.arch, mesh)

    def annotate(self, batch: Batch, *, old: bool, reference: bool) -> None:
        """Fill old_logprobs (by the policy as it is) and ref_logprobs (by the frozen reference) of the batch."""
        if old:
            batch.old_logprobs, _, _ = self._run(self.policy, batch, loss=None)
        if reference:
            assert self.reference is not None
            batch.ref_logprobs, _, _ = self._run(self.reference, batch, loss=None)

    def update(self, batch: Batch, step: int) -> Update:
        """One optimizer update on a mini-batch. `step` sets the learning rate."""
        gradients = self.backward(batch)
        lr = learning_rate(self.config.optim, step, self.config.run.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        succeeded, grad_norm, _ = self.optimizer.step()
        assert succeeded, "the optimizer refused a step without loss scaling"
        logprobs, entropy, loss = gradients
        return Update(logprobs, entropy, loss, float(grad_norm), lr)

    def backward(self, batch: Batch) -> tuple[Tensor, Tensor, float]:
        """Leave the gradient of the mini-batch's loss in main_grad; (log-probs, entropy, loss)."""
        self.policy.zero_grad_buffer()
        self.optimizer.zero_grad()
        sequence = batch.sequence_of_token
        weights = token_weights(self.recipe, batch.mask, sequence, len(batch))
        advantages = batch.advantages[sequence]

        def loss(logprobs: Tensor, entropy: Tensor, micro: MicroBatch) -> Tensor:
            def of_token(values: Tensor | None) -> Tensor | None:
                return None if values is None else micro.of_token(values).to(logprobs.device)

            return policy_loss(
                self.recipe,
                logprobs,
                entropy,
                of_token(advantages),  # type: ignore[arg-type]
                of_token(weights),  # type: ignore[arg-type]
                of_token(batch.old_logprobs),
                of_token(batch.ref_logprobs),
            )

        return self._run(self.policy, batch, loss)

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy as Hugging Face tensors on rank 0, nothing elsewhere; every rank must iterate."""
        return self._stream.tensors()

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder, on rank 0."""
        tensors = self.hf_weights()
        if self.mesh.rank == 0:
            save_hf_model(folder, self.config.model.path, tensors)
        else:
            list(tensors)

    def _run(self, model: Any, batch: Batch, loss: Loss | None) -> tuple[Tensor, Tensor, float]:
        """Megatron's schedule over the batch: (log-probs f32[T], entropy f32[T], loss) on every rank."""
        config, mesh = self.config, self.mesh
        micros = micro_batches(
            batch, mesh.dp_rank, mesh.dp_size, config.learner.micro_batch_tokens, config.learner.packing
        )
        result = torch.zeros(2, len(batch.tokens))
        total = torch.zeros(1)
        reports = mesh.is_last_stage and mesh.tp_rank == 0

        def forward_step(iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            micro = next(iterator)
            logits = model(
                micro.inputs.to(mesh.device),
                micro.positions.to(mesh.device),
                None,
                packed_seq_params=_packed(micro, mesh.device),
            )

            def loss_function(logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
                logprobs, entropy = logprob_and_entropy(
                    logits,
                    micro.targets.to(logits.device),
                    tp_group=mesh.tp_group,
                    vocab_size=self.arch.vocab_size,
                    temperature=self.temperature,
                )
                value = logprobs.sum() * 0 if loss is None else loss(logprobs, entropy, micro)
                if reports:
                    real = micro.token >= 0
                    values = torch.stack([logprobs, entropy]).detach().cpu()
                    result[:, micro.token[real]] = values[:, real]
                    total.add_(value.detach().cpu())
                return value, torch.zeros((), dtype=torch.int, device=logits.device), {}

            return logits, loss_function

        longest = max(micro.inputs.numel() for micro in micros)
        with torch.set_grad_enabled(loss is not None):
            self._forward_backward(
                forward_step_func=forward_step,
                data_iterator=iter(micros),
                model=[model],
                num_microbatches=len(micros),
                seq_length=longest,
                micro_batch_size=1,
                forward_only=loss is None,
            )
        mesh.sum(result)
        mesh.sum(total)
        return result[0], result[1], float(total)


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up, then constant, or cosine towards min_lr_ratio, which the step after the last would have."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.lr_schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup_steps) / max(steps - optim.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine)


def _packed(micro: MicroBatch, device: torch.device) -> PackedSeqParams | None:
    if micro.cu_seqlens is None:
        return None
    cu_seqlens = micro.cu_seqlens.to(device)
    longest = int(micro.cu_seqlens.diff().max())
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _optimizer_config(config: Config, sharded: bool) -> OptimizerConfig:
    optim, dtype = config.optim, params_dtype(config.model.precision)
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


def _prepare_torch_adamw(optimizer: Any) -> None:
    """Make torch's AdamW, which stands in for Transformer Engine's or Apex's, fit to be saved and restored at any time.

    It gets its moments now: a checkpoint may be due before the first update, when everything was filtered away. And
    restoring must treat its `step` apart: Megatron's distributed optimizer looks for it among the tensors, and gives
    all parameters one and the same counter, which AdamW would then advance once for each of them.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not isinstance(part.optimizer, torch.optim.AdamW):
            continue
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                state = part.optimizer.state[param]
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
        if isinstance(part, DistributedOptimizer):
            part._set_main_param_and_optimizer_states = _restore_except_step(part)


def _restore_except_step(part: DistributedOptimizer) -> Callable[[Tensor, dict[str, Tensor]], None]:
    restore = part._set_main_param_and_optimizer_states

    def restore_except_step(model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        own = part._get_main_param_and_optimizer_states(model_param)
        restore(model_param, {"step": own["step"], **tensors})
        part.optimizer.state[own["param"]]["step"] = own["step"].clone()

    return restore_except_step

"""The learner: annotates batches with log-probs and values, and moves policy and critic, whatever layout and recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megarl.algorithms.gae import gae, value_loss, whiten
from megarl.algorithms.loss import Tokens, policy_loss, sequence_weights
from megarl.algorithms.mismatch import REJECTS_SEQUENCES, mismatch_weights
from megarl.algorithms.recipe import Recipe
from megarl.batch import Batch, Sequences, Update
from megarl.config import Config
from megarl.data.packing import MicroBatch, lay_out
from megarl.data.plan import Deal, Rules, Share, make_plan
from megarl.learner.cpu.spec import PackedSequences
from megarl.learner.mesh import Mesh
from megarl.learner.model import (
    build_critic,
    build_model,
    can_share_prompts,
    output_weight,
    token_multiple,
    transformer_config,
)
from megarl.learner.offload import Offload
from megarl.learner.trainable import Trainable, learning_rate
from megarl.learner.weights import WeightStream, load_hf_weights
from megarl.models.family import architecture
from megarl.models.hugging_face import save_hf_model
from megarl.ops.linear import linear_logprob

Outputs = tuple[Tensor, ...]  # per-token results of a forward pass, laid out as the micro-batch
Head = Callable[[Tensor, MicroBatch], Outputs]  # the model's output of a micro-batch -> Outputs
Loss = Callable[[Outputs, MicroBatch], Tensor]  # Outputs of a micro-batch -> sum


class Learner:
    """The policy and, where the recipe needs them, the critic and the frozen reference (the policy it starts from).

    Every method is collective: all ranks call it, each with its part of the same step. Optimizer state and reduced
    gradients are sharded over data-parallel ranks (Megatron's distributed optimizer); without `shard_optimizer` every
    rank ends a `backward` with the whole gradient. `temperature` is that of the sampling whose log-probs are computed.
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
        precision = config.model.precision
        self.token_multiple = token_multiple(precision)
        self.share_prompts = can_share_prompts(config.learner, precision) and config.learner.share_prompts

        def transformer() -> Any:  # of each model its own: Megatron hangs hooks of the model's gradients on it
            made = transformer_config(hf_config, config.learner, precision)
            # The loss carries its denominator, so Megatron must not divide by a token count.
            made.finalize_model_grads_func = lambda model, num_tokens, **kw: finalize_model_grads(model, None, **kw)
            return made

        def trainable(build: Callable[..., Any], optim: Any) -> Trainable:
            settings = transformer()
            module = build(hf_config, settings, mesh)
            load_hf_weights(module, self.arch, mesh, config.model.path)
            return Trainable(module, settings, optim, precision, shard_optimizer)

        self.policy = trainable(build_model, config.optim)
        self.critic = trainable(build_critic, config.critic_optim) if recipe.needs_critic else None
        self.reference = None
        if recipe.needs_reference or config.run.track_kl:
            self.reference = build_model(hf_config, transformer(), mesh).requires_grad_(False)
            self.reference.load_state_dict(self.policy.module.state_dict())
        self._forward_backward = get_forward_backward_func()
        self._updating, self._weights = Offload(), Offload()  # what is lent: for updates, for anything
        self._stream = WeightStream(self.policy.module, self.arch, mesh)

    @property
    def trainables(self) -> dict[str, Trainable]:
        """What a checkpoint holds."""
        return {"policy": self.policy} | ({"critic": self.critic} if self.critic else {})

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Lend what learner.offload names while the block runs, in which the learner only hands out its weights."""
        what, trainables = self.config.learner.offload, list(self.trainables.values())
        if what != "none":
            self._updating = Offload(
                [tensor for trainable in trainables for tensor in trainable.optimizer_state],
                [tensor for trainable in trainables for tensor in trainable.gradients],
            )
        if what == "all":
            weights = [tensor for trainable in trainables for tensor in trainable.weights]
            self._weights = Offload([*weights, *(self.reference.parameters() if self.reference else [])])
        with self._updating.lent(), self._weights.lent():
            yield

    @property
    def lent_bytes(self) -> int:
        """Of this rank's GPU, at its last rest."""
        return self._updating.size + self._weights.size

    def deal(self, sequences: Sequences | None) -> Deal:
        """What this rank has of a step's sequences, planned and sent by rank 0; the others' own are not looked at."""
        config, schedule, mesh = self.config.learner, self.config.schedule, self.mesh
        plan = parts = None
        if mesh.rank == 0:
            assert sequences is not None
            rules = Rules(
                mesh.dp_size,
                config.micro_batch_tokens,
                config.packing,
                self.share_prompts,
                pairs=self.recipe.objective == "dpo",
                multiple=self.token_multiple,
                minibatch_prompts=schedule.minibatch_prompts,
            )
            plan = make_plan(sequences, rules)
            parts = (sequences.select(plan.numbers(rank)) for rank in range(mesh.dp_size))
        return Deal(mesh.broadcast(plan), mesh.dp_rank, mesh.scatter(parts).batch())

    def annotate(self, deal: Deal) -> Deal:
        """The deal with what the recipe needs to learn from it, before the step's first update.

        Old log-probs, reference log-probs, the correction of rollout mismatch (without the responses it rejects),
        values and with them advantages and returns.
        """
        recipe, batch = self.recipe, deal.batch
        old_logprobs = None
        if recipe.old_policy == "rollout":
            old_logprobs = batch.rollout_logprobs
        elif recipe.needs_old_logprobs(self.config.updates_per_step):
            old_logprobs, _ = self.score(deal.whole())
        deal = replace(deal, batch=replace(batch, old_logprobs=old_logprobs))
        if recipe.mismatch != "none":
            deal = self._correct_mismatch(deal)
        if self.reference is not None:
            ref_logprobs, _ = self.score(deal.whole(), reference=True)
            deal = replace(deal, batch=replace(deal.batch, ref_logprobs=ref_logprobs))
        if self.critic:
            (values,), _ = self._run(self.critic.ddp, deal.whole(), _value_head, 1)
            batch = deal.batch
            rewards = batch.advantages[batch.cu_seqlens[1:] - 1]
            advantages, returns = gae(recipe, rewards, values, batch.mask, batch.sequence_of_token)
            advantages = whiten(recipe, advantages, batch.mask, self.mesh)
            deal = replace(deal, batch=replace(batch, values=values, returns=returns, advantages=advantages))
        return deal

    def updates(self, deal: Deal) -> list[Share]:
        """What each optimizer update of a step learns from, one epoch after the other."""
        limit = self.config.rollout.max_response_tokens
        shares = deal.updates(lambda tokens, prompts: sequence_weights(self.recipe, tokens, prompts, limit))
        return shares * self.config.schedule.epochs

    def score(self, share: Share, *, reference: bool = False) -> tuple[Tensor, Tensor]:
        """(log-probs f32[T], entropy f32[T]) of the share's response tokens by the policy as it is, or by the
        reference; 0 elsewhere, and on ranks that don't hold the last stage."""
        module = self.reference if reference else self.policy.module
        assert module is not None, "no reference was asked for"
        model = module if reference else self.policy.ddp
        (logprobs, entropy), _ = self._run(model, share, self._policy_head(module, share.batch), 2)
        return logprobs, entropy

    def update(self, share: Share, step: int) -> Update:
        """One optimizer update of the policy and of the critic on a mini-batch. `step` sets the learning rates."""
        steps, lr = self.config.run.steps, 0.0
        grad_norm, value, value_grad_norm = 0.0, None, None
        if self.critic:
            value = self.backward_critic(share)
            value_grad_norm = self.critic.step(learning_rate(self.critic.optim, step, steps))
        logprobs, entropy, loss = self.backward(share)
        if not self.critic or step >= self.config.critic.head_start_steps:
            lr = learning_rate(self.policy.optim, step, steps)
            grad_norm = self.policy.step(lr)
        return Update(logprobs, entropy, loss, grad_norm, lr, value, value_grad_norm)

    def backward(self, share: Share) -> tuple[Tensor, Tensor, float]:
        """Leave the gradient of the mini-batch's loss in the policy's main_grad; (log-probs, entropy, loss)."""
        assert share.weights is not None, "weights are those of an update"
        self.policy.zero_grad()
        batch, sequence, prompt = share.batch, share.batch.sequence_of_token, share.batch.prompt_of_token
        weights = share.weights.float()[sequence] * batch.mask

        def loss(outputs: Outputs, micro: MicroBatch) -> Tensor:
            logprobs, entropy = outputs

            def of_token(values: Tensor) -> Tensor:
                return micro.of_token(values).to(logprobs.device).flatten()

            def given(values: Tensor | None) -> Tensor | None:
                return None if values is None else of_token(values)

            def counted(index: Tensor) -> Tensor:  # from 0, so that its largest needn't be asked of the device
                return micro.of_token(index).unique(return_inverse=True)[1].to(logprobs.device).flatten()

            tokens = Tokens(
                logprobs=logprobs.flatten(),
                entropy=entropy.flatten(),
                advantages=of_token(batch.advantages),
                weights=of_token(weights),
                mask=of_token(batch.mask),
                sequence=counted(sequence),
                prompt=counted(prompt),
                sequences=share.sequences,
                old_logprobs=given(batch.old_logprobs),
                ref_logprobs=given(batch.ref_logprobs),
                correction=given(batch.correction),
            )
            return policy_loss(self.recipe, tokens)

        head = self._policy_head(self.policy.module, batch)
        (logprobs, entropy), total = self._run(self.policy.ddp, share, head, 2, loss)
        return logprobs, entropy, total

    def backward_critic(self, share: Share) -> float:
        """Leave the gradient of the mini-batch's value loss in the critic's main_grad; the loss."""
        batch = share.batch
        assert self.critic and batch.values is not None and batch.returns is not None
        self.critic.zero_grad()
        weights = batch.mask / share.tokens  # the mean over tokens
        old_values, returns = batch.values, batch.returns

        def loss(outputs: Outputs, micro: MicroBatch) -> Tensor:
            (values,) = outputs
            old, target, weight = (micro.of_token(x).to(values.device) for x in (old_values, returns, weights))
            return value_loss(self.recipe, values, old, target, weight)

        _, total = self._run(self.critic.ddp, share, _value_head, 1, loss)
        return total

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy as Hugging Face tensors on rank 0, nothing elsewhere; every rank must iterate."""
        with self._weights.back():
            yield from self._stream.tensors()

    def weight_rounds(self, size: int, keepers: set[int]) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """The same tensors in rounds of about `size` bytes a keeper, on those ranks; every rank must iterate them."""
        with self._weights.back():
            yield from self._stream.rounds(size, keepers)

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder, on rank 0."""
        tensors = self.hf_weights()
        if self.mesh.rank == 0:
            save_hf_model(folder, self.config.model.path, tensors)
        else:
            list(tensors)

    def _correct_mismatch(self, deal: Deal) -> Deal:
        batch, mesh = deal.batch, self.mesh
        assert batch.old_logprobs is not None and batch.rollout_logprobs is not None
        sequence = batch.sequence_of_token
        correction = mismatch_weights(self.recipe, batch.old_logprobs, batch.rollout_logprobs, batch.mask, sequence)
        deal = replace(deal, batch=replace(batch, correction=correction))
        if self.recipe.mismatch not in REJECTS_SEQUENCES:
            return deal
        rejected = torch.zeros(len(deal.plan))
        if mesh.reports:
            rejected[deal.plan.numbers(deal.rank)] = 1 - batch.of_sequences(correction).clamp(max=1)
        return deal.without(mesh.sum(rejected) > 0)

    def _policy_head(self, module: GPTModel, batch: Batch) -> Head:
        """(log-probs, entropies) of the response tokens, 0 elsewhere, from the hidden states of a micro-batch."""
        dtype = torch.float32 if self.config.learner.fp32_logits else torch.bfloat16

        def head(hidden: Tensor, micro: MicroBatch) -> Outputs:
            logprobs, entropy = linear_logprob(
                hidden.flatten(0, 1),
                output_weight(module),
                micro.targets.to(hidden.device).flatten(),
                keep=(micro.of_token(batch.mask) > 0).flatten(),
                tp_group=self.mesh.tp_group,
                vocab_size=self.arch.vocab_size,
                temperature=self.temperature,
                logits_dtype=dtype,
            )
            return logprobs.view(micro.targets.shape), entropy.view(micro.targets.shape)

        return head

    def _run(self, model: Any, share: Share, head: Head, width: int, loss: Loss | None = None) -> tuple[Tensor, float]:
        """Megatron's schedule over the share: (the head's `width` outputs f32[width, T], 0 on ranks that don't hold the
        last stage; the loss of all ranks).

        With `loss` also backwards; its gradient is then in the model's main_grad. Nothing waits for the device between
        micro-batches.
        """
        config, mesh = self.config, self.mesh
        micros = list(lay_out(share, config.learner.packing, self.token_multiple))
        result = torch.zeros(width, len(share.batch.tokens), device=mesh.device)
        total = torch.zeros(1, dtype=torch.float64, device=mesh.device)

        def forward_step(iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            micro = next(iterator)
            output = model(
                micro.inputs.to(mesh.device),
                micro.positions.to(mesh.device),
                None,
                packed_seq_params=_packed(micro, mesh.device),
            )

            def loss_function(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
                outputs = head(output, micro)
                value = outputs[0].sum() * 0 if loss is None else loss(outputs, micro)
                real = (micro.token >= 0).flatten().nonzero().flatten()
                values = torch.stack(outputs).detach().float().flatten(1)[:, real.to(mesh.device)]
                result.index_copy_(1, micro.token.flatten()[real].to(mesh.device), values)
                total.add_(value.detach())
                return value, torch.zeros((), dtype=torch.int, device=output.device), {}

            return output, loss_function

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
        return result.cpu(), float(mesh.sum(total.cpu() * mesh.reports))


def _value_head(output: Tensor, micro: MicroBatch) -> Outputs:
    return (output.squeeze(-1),)


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
        prefix=None if micro.prefix is None else micro.prefix.to(device),
    )

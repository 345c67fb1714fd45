"""The loss: ratio x clip x aggregation, proximal term, KL and entropy, per token. Returns sums; the denominator is in
the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.algorithms.mismatch import REJECTS_SEQUENCES, mismatch_weights, sequence_mean, sequence_sum
from megarl.algorithms.pairwise import dpo_loss
from megarl.algorithms.recipe import Recipe
from megarl.ops import rules
from megarl.ops.epilogue import policy_epilogue
from megarl.ops.rules import LOG_RATIO_LIMIT, Rule, clipped_objective


@dataclass(frozen=True)
class Tokens:
    """The tokens of some whole sequences, flat; all tensors [T], off the mask of no effect."""

    logprobs: Tensor  # of the policy, differentiable
    entropy: Tensor  # of the policy, differentiable
    advantages: Tensor
    weights: Tensor  # of `sequence_weights`: what the token counts in the mini-batch's loss; 0 off the mask
    mask: Tensor  # 1 on response tokens
    sequence: Tensor  # i64, which sequence, counted from 0 and below T
    prompt: Tensor  # i64, which prompt, likewise
    sequences: int  # of the whole mini-batch, those without response tokens not counted
    old_logprobs: Tensor | None = None  # by the policy that the ratio is taken against; None: the policy itself
    ref_logprobs: Tensor | None = None  # by the frozen reference; needed when kl_coef > 0
    correction: Tensor | None = None  # of `mismatch_weights`

    def on_mask(self, values: Tensor) -> Tensor:
        """The values on response tokens, 0 elsewhere: what stands there may be anything, and must not become NaN."""
        return torch.where(self.mask > 0, values, 0.0)


def loss(
    recipe: Recipe,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    prompt_ids: Tensor | None = None,
    max_response_tokens: int | None = None,
) -> Tensor:
    """The loss of one mini-batch as a number to differentiate: for notebooks; the learner runs the same code in parts.

    Args:
        logprobs, old_logprobs, ref_logprobs, rollout_logprobs: [B, L], of each response's tokens, in nats, by the
            policy, by the policy before the step, by the frozen reference (kl_coef > 0) and by the engine that sampled
            (mismatch, old_policy=rollout).
        advantages: [B] or [B, L], from `credit` or `gae`.
        mask: [B, L], 1 on response tokens; a row without any doesn't count.
        entropy: [B, L], nats; needed when entropy_coef is not 0.
        prompt_ids: i64[B], which prompt each row answers; needed by objective=dpo and prompt_mean_token_mean.
        max_response_tokens: the constant divisor of seq_mean_token_sum_norm.

    Raises ValueError naming what the recipe needs and was not given.
    """
    rows, columns = logprobs.shape
    needs = {
        "entropy": recipe.entropy_coef != 0 and entropy is None,
        "ref_logprobs": recipe.needs_reference and ref_logprobs is None,
        "rollout_logprobs": (recipe.mismatch != "none" or recipe.old_policy == "rollout") and rollout_logprobs is None,
        "prompt_ids": (recipe.objective == "dpo" or recipe.aggregation == "prompt_mean_token_mean")
        and prompt_ids is None,
        "max_response_tokens": recipe.aggregation == "seq_mean_token_sum_norm" and max_response_tokens is None,
    }
    if missing := [name for name, lacks in needs.items() if lacks]:
        raise ValueError(f"recipe {recipe.name} needs {', '.join(missing)}")
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1).expand(rows, columns)
    prompts = torch.arange(rows) if prompt_ids is None else torch.unique(prompt_ids, return_inverse=True)[1]
    sequence = torch.arange(rows).repeat_interleave(columns)
    prompt = prompts.repeat_interleave(columns)
    flat_mask = mask.reshape(-1).to(logprobs)
    correction = None
    if recipe.mismatch != "none":
        assert rollout_logprobs is not None
        correction = mismatch_weights(
            recipe, old_logprobs.reshape(-1), rollout_logprobs.reshape(-1), flat_mask, sequence
        ).detach()
        if recipe.mismatch in REJECTS_SEQUENCES:
            flat_mask = flat_mask * correction
    mask_rows = flat_mask.view(rows, columns)
    weights = sequence_weights(recipe, (mask_rows > 0).sum(1), prompts, max_response_tokens).to(logprobs)
    old = rollout_logprobs if recipe.old_policy == "rollout" else old_logprobs
    assert old is not None
    return policy_loss(
        recipe,
        Tokens(
            logprobs=logprobs.reshape(-1),
            entropy=torch.zeros_like(flat_mask) if entropy is None else entropy.reshape(-1),
            advantages=advantages.reshape(-1),
            weights=(weights[:, None] * mask_rows).reshape(-1),
            mask=flat_mask,
            sequence=sequence,
            prompt=prompt,
            sequences=count_present(sequence, flat_mask),
            old_logprobs=old.reshape(-1).detach(),
            ref_logprobs=None if ref_logprobs is None else ref_logprobs.reshape(-1),
            correction=correction,
        ),
    )


def sequence_weights(recipe: Recipe, tokens: Tensor, prompts: Tensor, max_response_tokens: int | None = None) -> Tensor:
    """f64[S]: what each token of a sequence counts in the mini-batch's loss, the global denominator included.

    Of the whole mini-batch, so the gradient can't depend on how it is cut into micro-batches or spread over ranks.

    Args:
        tokens: i64[S], response tokens of each sequence; those without any don't count.
        prompts: i64[S], which prompt each answers.
        max_response_tokens: the divisor of seq_mean_token_sum_norm.
    """
    present = tokens > 0
    counted = tokens.double().clamp(min=1)
    answered = count_present(prompts, tokens)
    if recipe.objective == "dpo":
        weights = torch.full_like(counted, 1 / answered)
    elif recipe.aggregation == "token_mean":
        weights = torch.full_like(counted, 1 / max(int(tokens.sum()), 1))
    elif recipe.aggregation == "prompt_mean_token_mean":
        index = torch.unique(prompts, return_inverse=True)[1]
        weights = 1 / answered / sequence_sum(tokens.double(), index).clamp(min=1)
    else:
        weights = torch.full_like(counted, 1 / max(int(present.sum()), 1))
        if recipe.aggregation == "seq_mean_token_mean":
            weights = weights / counted
        elif recipe.aggregation == "seq_mean_token_sum_norm":
            assert max_response_tokens is not None, "seq_mean_token_sum_norm needs the response limit"
            weights = weights / max_response_tokens
    return weights * present


def count_present(index: Tensor, tokens: Tensor) -> int:
    """How many prompts (or sequences) have response tokens; at least 1, to divide by."""
    return max(len(index[tokens > 0].unique()), 1)


def policy_loss(recipe: Recipe, tokens: Tokens) -> Tensor:
    """The weighted sum over tokens of -objective + proximal + kl_coef * KL - entropy_coef * entropy."""
    if recipe.objective == "dpo":
        return dpo_loss(recipe, tokens)
    logprobs = tokens.on_mask(tokens.logprobs)
    old = logprobs.detach() if tokens.old_logprobs is None else tokens.on_mask(tokens.old_logprobs)
    log_ratio, advantages = logprobs - old, tokens.on_mask(tokens.advantages)
    assert recipe.kl_coef == 0 or tokens.ref_logprobs is not None, "kl_coef > 0 needs reference log-probs"
    total = policy_epilogue(
        token_rule(recipe),
        logprobs,
        ratio_of(recipe, log_ratio, advantages, tokens.mask, tokens.sequence),
        advantages,
        tokens.on_mask(tokens.weights),
        correction=None if tokens.correction is None else tokens.on_mask(tokens.correction),
        entropy=tokens.on_mask(tokens.entropy),
        ref_logprobs=None if tokens.ref_logprobs is None else tokens.on_mask(tokens.ref_logprobs),
    ).sum()
    if recipe.proximal == "squared_log_ratio":
        total = total + 0.5 * recipe.proximal_coef * _squared_log_ratio(recipe, tokens, log_ratio)
    return total


def token_rule(recipe: Recipe) -> Rule:
    """The constants of a token's loss."""
    return Rule(**{name: getattr(recipe, name) for name in Rule._fields if name in Recipe.model_fields})


def ratio_of(recipe: Recipe, log_ratio: Tensor, advantages: Tensor, mask: Tensor, sequence: Tensor) -> Tensor:
    """f[T]: the log-ratio that the objective sees: the token's, or its sequence's mean (GSPO, arXiv 2507.18071,
    equation 5), behind the clip where that comes first (GMPO, 2507.20673)."""
    if recipe.clip == "token_log":
        capped, raised = log_ratio.clamp(max=recipe.clip_high), log_ratio.clamp(min=-recipe.clip_low)
        log_ratio = torch.where(advantages > 0, capped, raised)
    if recipe.ratio == "sequence":
        log_ratio = sequence_mean(log_ratio, mask, sequence)
    return log_ratio


def clipped_tokens(
    recipe: Recipe, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, sequence: Tensor
) -> tuple[Tensor, Tensor]:
    """(low, high), bool[T] each: the tokens whose ratio the clip holds, from below and from above (by the dual clip,
    where A < 0); a metric."""
    advantages, log_ratio = (torch.where(mask > 0, x, 0.0) for x in (advantages, logprobs - old_logprobs))
    if recipe.clip == "token_log":
        return (advantages < 0) & (log_ratio < -recipe.clip_low), (advantages > 0) & (log_ratio > recipe.clip_high)
    log_ratio = ratio_of(recipe, log_ratio, advantages, mask, sequence)
    _, _, _, low, high = clipped_objective(logprobs, log_ratio, advantages, *token_rule(recipe).of_objective)
    return low, high


def _squared_log_ratio(recipe: Recipe, tokens: Tokens, log_ratio: Tensor) -> Tensor:
    """Kimi k1.5's proximal term (arXiv 2501.12599, equation 3): of tokens, or of each sequence's sum."""
    if recipe.proximal_level == "token":
        return (log_ratio**2 * tokens.weights).sum()
    total = sequence_sum(log_ratio * tokens.mask, tokens.sequence)
    share = tokens.mask / sequence_sum(tokens.mask, tokens.sequence).clamp(min=1)  # its tokens share one square
    return (total**2 * share).sum() / tokens.sequences


def kl_estimate(estimator: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference) from sampled tokens, [T] (Schulman's k1, k2, k3)."""
    return rules.kl_estimate(logprobs, ref_logprobs, LOG_RATIO_LIMIT, estimator)[0]

"""The loss of each token from its log-prob: clip rule, KL and entropy, with their derivatives, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.ops.implementation import implementation
from megarl.ops.rules import Rule


def policy_epilogue(
    rule: Rule,
    logprobs: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    correction: Tensor | None = None,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
) -> Tensor:
    """f[T]: (-objective * correction + kl_coef * KL - entropy_coef * entropy) * weight, all arguments [T].

    Differentiable by `logprobs`, `log_ratio` and `entropy`. No argument may hold NaN, not even where the weight is 0.

    Args:
        log_ratio: of the policy to the old one, of the token or its sequence; unused by ratio=none.
        correction: of rollout mismatch; None: 1.
        entropy: needed where entropy_coef is not 0.
        ref_logprobs: needed where kl_coef is not 0.
    """
    entropy = entropy if rule.entropy_coef else None
    ref_logprobs = ref_logprobs if rule.kl_coef else None
    loss: Tensor = _PolicyEpilogue.apply(
        rule, logprobs, log_ratio, advantages, weights, correction, entropy, ref_logprobs
    )
    return loss


class _PolicyEpilogue(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rule, logprobs, log_ratio, advantages, weights, correction, entropy, ref_logprobs):  # type: ignore[no-untyped-def]
        loss, by_logprob, by_log_ratio = implementation(logprobs).policy_epilogue(
            rule, logprobs, log_ratio, advantages, weights, correction, entropy, ref_logprobs
        )
        ctx.save_for_backward(by_logprob, by_log_ratio, None if entropy is None else -rule.entropy_coef * weights)
        return loss

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        by_logprob, by_log_ratio, by_entropy = ctx.saved_tensors
        entropy = None if by_entropy is None else by_entropy * grad
        return None, by_logprob * grad, by_log_ratio * grad, None, None, None, entropy, None

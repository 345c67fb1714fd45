"""Iterative DPO: the first correct against the first wrong sample of each prompt (arXiv 2305.18290, equation 7)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.algorithms.recipe import Recipe

if TYPE_CHECKING:
    from megarl.algorithms.loss import Tokens


def dpo_loss(recipe: Recipe, tokens: Tokens) -> Tensor:
    """The weighted sum over pairs of -log sigmoid(beta * margin), with smoothed labels.

    The margin is the chosen response's log-ratio to the old policy (that which began the step) minus the rejected
    one's; advantages are 1 on chosen and -1 on rejected tokens, and both responses of a pair must be among `tokens`.
    """
    old = tokens.logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    log_ratio = tokens.on_mask(tokens.logprobs - old)
    margin = torch.zeros_like(log_ratio).index_add(0, tokens.prompt, tokens.advantages.sign() * log_ratio)
    weights = torch.zeros_like(log_ratio).scatter_reduce(0, tokens.prompt, tokens.weights, "amax")
    smoothing, logit = recipe.label_smoothing, recipe.dpo_beta * margin
    return -(weights * ((1 - smoothing) * F.logsigmoid(logit) + smoothing * F.logsigmoid(-logit))).sum()

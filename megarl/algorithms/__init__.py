"""Algorithms as recipes of orthogonal fields; pure torch, no Megatron, no GPU.

recipe = Recipe.named("grpo", clip_high=0.28)
credited = credit(recipe, prompt_ids, rewards)            # which samples count, and their advantages
value = loss(recipe, logprobs, old_logprobs, credited.advantages, mask * credited.keep[:, None])
value.backward()
"""

from megarl.algorithms.credit import credit
from megarl.algorithms.gae import gae, value_loss, whiten
from megarl.algorithms.loss import loss
from megarl.algorithms.mismatch import mismatch_weights
from megarl.algorithms.recipe import Recipe
from megarl.algorithms.recipes import RECIPES
from megarl.batch import Credit

__all__ = ["RECIPES", "Credit", "Recipe", "credit", "gae", "loss", "mismatch_weights", "value_loss", "whiten"]

"""A recipe is an algorithm: one value for each of a few orthogonal choices. The named ones are rows of `RECIPES`.

To make a new algorithm, recombine the fields: in Python `Recipe(name="mine", baseline="mean", ...)`, in YAML
`recipe: {name: grpo, clip_high: 0.28}`. What each field does is defined where it acts: selection, baseline and scale in
`credit.py`; ratio, clip, aggregation, KL and entropy in `loss.py`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megarl.types import UserError


class Recipe(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: str = "custom"
    # A correct answer gets 1.
    wrong_reward: Literal[0.0, -1.0] = Field(0.0, description="reward of a wrong answer")  # type: ignore[valid-type]
    overlong: Literal["none", "mask"] = Field("none", description="mask: truncated responses leave the loss")
    group_filter: Literal["none", "all_wrong", "all_correct", "both"] = Field(
        "none", description="drop whole prompts whose samples are all wrong / all correct"
    )
    sample_filter: Literal["none", "positive"] = Field("none", description="positive: only correct samples")
    dropped: Literal["remove", "zero"] = Field(
        "remove", description="remove: dropped samples leave the denominator; zero: they count with advantage 0"
    )
    baseline: Literal["none", "mean"] = Field("none", description="subtracted from the reward")
    scale: Literal["none", "group_std"] = Field("none", description="divides the advantage")
    std_ddof: Literal[0, 1] = 1
    std_eps: float = Field(1e-6, gt=0)
    ratio: Literal["none", "token"] = Field("none", description="importance ratio against the policy that sampled")
    clip: Literal["none", "ppo"] = "none"
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float | None = Field(None, gt=1, description="lower bound dual_clip * A on the objective when A < 0")
    aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"] = "seq_mean_token_mean"
    kl_coef: float = Field(0.0, ge=0, description="weight of KL(policy || reference) in the loss")
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = Field(0.0, description="weight of the policy's entropy, subtracted from the loss")

    @model_validator(mode="after")
    def _every_field_acts(self) -> Recipe:
        if self.clip != "none" and self.ratio == "none":
            raise UserError(
                f"recipe.clip={self.clip} clips a ratio, but recipe.ratio=none; use ratio=token or clip=none"
            )
        if self.dual_clip is not None and self.clip == "none":
            raise UserError(f"recipe.dual_clip={self.dual_clip:g} bounds clip=ppo, but recipe.clip=none; use clip=ppo")
        if self.scale == "group_std" and self.baseline == "none" and self.group_filter != "both":
            raise UserError(
                "recipe.scale=group_std divides by zero where all samples of a prompt agree; "
                "use baseline=mean or group_filter=both with it"
            )
        return self

    @property
    def group_fields(self) -> list[str]:
        """The fields that compare the samples of one prompt with each other."""
        choices = {"group_filter": self.group_filter, "baseline": self.baseline, "scale": self.scale}
        return [f"{field}={value}" for field, value in choices.items() if value != "none"]

    @property
    def compares_within_group(self) -> bool:
        return bool(self.group_fields)

    def needs_old_logprobs(self, updates_per_step: int) -> bool:
        """Before a step's only update the policy is the old policy, and the ratio is 1."""
        return self.ratio != "none" and updates_per_step > 1

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0


# Source: "A Minimalist Approach to LLM Reasoning", arXiv 2504.11343 (RAFT, RAFT++, Reinforce, Reinforce-Rej);
# GRPO: arXiv 2402.03300.
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="raft", sample_filter="positive"),
        Recipe(name="raft_pp", sample_filter="positive", ratio="token", clip="ppo"),
        Recipe(name="reinforce", wrong_reward=-1.0, ratio="token", clip="ppo"),
        Recipe(name="reinforce_rej", wrong_reward=-1.0, group_filter="both", ratio="token", clip="ppo"),
        Recipe(name="grpo", baseline="mean", scale="group_std", kl_coef=0.001, ratio="token", clip="ppo"),
    )
}

# Demonstrations instead of rollouts: every sequence has advantage 1, so the loss is their negative log-likelihood.
SFT = Recipe(name="sft", aggregation="token_mean")

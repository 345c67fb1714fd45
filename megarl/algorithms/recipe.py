"""A recipe is an algorithm: one value for each of a few orthogonal choices. The named ones are in `recipes.py`.

To make a new algorithm, recombine the fields: in Python `Recipe(baseline="mean", ...)` or `Recipe.named("grpo",
clip_high=0.28)`, in YAML `recipe: {name: grpo, clip_high: 0.28}`. What each field does is defined where it acts:
selection, baseline and scale in `credit.py`; ratio, aggregation and proximal term in `loss.py`; clip and KL in
`ops/rules.py`; the critic in `gae.py`; DPO in `pairwise.py`; the correction of rollout mismatch in `mismatch.py`;
refilling in `rollout/rounds.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megarl.types import UserError

# Baselines that give samples of one prompt with equal rewards advantage 0, so that dividing by their spread is safe.
_CENTRED = ("mean", "leave_one_out", "length_mean")
_GROUP_BASELINES = (*_CENTRED, "pool_mean")
_GROUP_SCALES = ("group_std", "group_mean")
# Trainer-to-rollout ratios that each correction lets pass, as published with it. A geometric mean hardly leaves 1.
_MISMATCH_BOUNDS = {"token_icepop": (0.5, 5.0), "geo_reject": (0.999, 1.001)}
_USUAL_BOUNDS = (0.5, 2.0)


def _bound(of: int) -> Any:
    """The default of mismatch_low (0) or mismatch_high (1), which depends on the mismatch, validated before it."""
    return lambda data: _MISMATCH_BOUNDS.get(data.get("mismatch"), _USUAL_BOUNDS)[of]


class Recipe(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: str = "custom"
    objective: Literal["policy_gradient", "dpo"] = Field(
        "policy_gradient", description="dpo: first correct against first wrong sample of each prompt"
    )

    # Rewards. A correct answer gets 1.
    wrong_reward: Literal[0.0, -1.0] = Field(0.0, description="reward of a wrong answer")  # type: ignore[valid-type]
    overlong: Literal["none", "mask", "soft"] = Field(
        "none", description="truncated responses; mask: leave the loss, soft: DAPO's length penalty on the reward"
    )
    overlong_cache_tokens: int | None = Field(
        None, ge=1, description="soft: penalty grows over the last so many tokens of the limit; null: a fifth of it"
    )

    # Which samples.
    group_filter: Literal["none", "all_wrong", "all_correct", "both"] = Field(
        "none", description="drop whole prompts whose samples are all wrong / all correct"
    )
    backfill: Literal["none", "resample", "adaptive"] = Field(
        "none",
        description="resample: replace dropped prompts by fresh ones; adaptive: sample a prompt until half of the "
        "group is correct and half wrong",
    )
    backfill_rounds: int = Field(4, ge=1, description="rounds of sampling per step, the first one included")
    samples_per_round: int | None = Field(
        None, ge=1, description="adaptive: drawn for a prompt in each round; null: as many as its group keeps"
    )
    sample_filter: Literal["none", "positive"] = Field("none", description="positive: only correct samples")
    dropped: Literal["remove", "zero"] = Field(
        "remove", description="remove: dropped samples leave the denominator; zero: they count with advantage 0"
    )

    # Advantages.
    baseline: Literal[
        "none", "mean", "leave_one_out", "length_mean", "pool_mean", "batch_token_mean", "greedy", "critic"
    ] = Field("none", description="subtracted from the reward; critic: generalised advantages, whitened")
    scale: Literal["none", "group_std", "group_mean", "batch_std", "batch_token_std"] = Field(
        "none", description="divides the advantage"
    )
    std_ddof: Literal[0, 1] = Field(1, description="a standard deviation divides by count - std_ddof")
    scale_eps: float = Field(1e-6, gt=0, description="added to the divisor")
    gamma: float = Field(1.0, gt=0, le=1, description="critic: discount")
    gae_lambda: float = Field(1.0, ge=0, le=1, description="critic: lambda of the generalised advantage")
    value_clip: float = Field(0.5, gt=0, description="critic: how far a value may move per step unpunished")

    # The objective of a token.
    ratio: Literal["none", "token", "sequence"] = Field(
        "none", description="importance ratio against the old policy; none: plain log-likelihood gradient"
    )
    old_policy: Literal["trainer", "rollout"] = Field(
        "trainer", description="whose log-probs the ratio is taken against"
    )
    clip: Literal["none", "ppo", "cispo", "token_log", "sapo", "dppo_tv"] = Field("none", description="of the ratio")
    clip_low: float = Field(0.2, gt=0, description="token_log: in nats; dppo_tv: as a probability")
    clip_high: float = Field(0.2, gt=0, description="likewise; cispo truncates the ratio at 1 + clip_high")
    dual_clip: float | None = Field(None, gt=1, description="lower bound dual_clip * A on ppo's objective when A < 0")
    sapo_tau_positive: float = Field(1.0, gt=0, description="sapo: temperature of the gate where A > 0")
    sapo_tau_negative: float = Field(1.05, gt=0, description="sapo: temperature of the gate where A <= 0")
    ratio_cap: float = Field(20.0, gt=1, description="dppo_tv: truncates the ratio")
    mismatch: Literal["none", "token_tis", "token_icepop", "seq_tis", "seq_reject", "geo_reject"] = Field(
        "none", description="corrects for the rollout engine's log-probs differing from the trainer's"
    )
    mismatch_low: float = Field(
        default_factory=_bound(0),
        ge=0,
        lt=1,
        description="smallest accepted trainer-to-rollout ratio; by default 0.999 with geo_reject",
    )
    mismatch_high: float = Field(
        default_factory=_bound(1),
        gt=1,
        description="largest accepted, or where it is truncated (tis); by default 1.001 with geo_reject, 5 with "
        "token_icepop",
    )

    # The loss of a mini-batch.
    aggregation: Literal[
        "token_mean",
        "seq_mean_token_mean",
        "seq_mean_token_sum",
        "seq_mean_token_sum_norm",
        "prompt_mean_token_mean",
    ] = Field("seq_mean_token_mean", description="norm: sum over the response limit instead of the length")
    proximal: Literal["none", "squared_log_ratio"] = Field(
        "none", description="penalty on the squared log-ratio to the old policy"
    )
    proximal_level: Literal["token", "sequence"] = Field(
        "sequence", description="whose log-ratio is squared: each token's, or the sum over a response"
    )
    proximal_coef: float = Field(0.1, gt=0, description="tau of Kimi k1.5; the penalty is tau / 2 * log-ratio^2")
    kl_coef: float = Field(0.0, ge=0, description="weight of KL(policy || reference) in the loss")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="Schulman's estimators of the KL per token")
    entropy_coef: float = Field(0.0, description="weight of the policy's entropy, subtracted from the loss")
    dpo_beta: float = Field(0.1, gt=0, description="dpo: scale of the margin between the two log-ratios")
    label_smoothing: float = Field(0.1, ge=0, lt=0.5, description="dpo: probability that a pair is the wrong way round")

    @classmethod
    def named(cls, name: str, /, variant: str = "paper", **fields: Any) -> Recipe:
        """A shipped recipe, with some fields changed. Raises UserError for an unknown name, variant or field.

        `variant`: "paper" is what the text of arXiv 2504.11343 says, "minimal_rl" what its released scripts ran.
        """
        from megarl.algorithms.recipes import RECIPES, VARIANTS, variant_fields  # the table is made of Recipes

        for value, known, what in ((name, RECIPES, "recipe"), (variant, VARIANTS, "variant")):
            if not isinstance(value, str) or value not in known:
                raise UserError(f"{what}={value!r} is unknown{nearest(str(value), known)}; {what}s: {', '.join(known)}")
        for field in fields:
            if field not in cls.model_fields:
                raise UserError(f"recipe.{field} is not a known field{nearest(field, cls.model_fields)}")
        try:
            return cls.model_validate(compose(RECIPES[name], fields, variant_fields(variant, name)))
        except ValidationError as error:
            first = error.errors()[0]
            cause = first.get("ctx", {}).get("error")
            key = ".".join(["recipe", *map(str, first["loc"])])
            raise UserError(str(cause) if isinstance(cause, UserError) else f"{key}: {first['msg']}") from None

    @model_validator(mode="after")
    def _every_field_acts(self) -> Recipe:
        for problem in _contradictions(self):
            raise UserError(problem)
        return self

    @property
    def group_fields(self) -> list[str]:
        """The fields that compare the samples of one prompt with each other."""
        compares = {
            "group_filter": self.group_filter != "none",
            "backfill": self.backfill == "adaptive",
            "baseline": self.baseline in _GROUP_BASELINES,
            "scale": self.scale in _GROUP_SCALES,
            "objective": self.objective == "dpo",
        }
        return [f"{field}={getattr(self, field)}" for field, does in compares.items() if does]

    @property
    def compares_within_group(self) -> bool:
        return bool(self.group_fields)

    @property
    def off_policy_fields(self) -> list[str]:
        """The fields that compare the policy with the one that sampled."""
        neutral = {"ratio": "none", "proximal": "none", "mismatch": "none", "objective": "policy_gradient"}
        return [f"{field}={value}" for field, off in neutral.items() if (value := getattr(self, field)) != off]

    def needs_old_logprobs(self, updates_per_step: int) -> bool:
        """Whether the trainer must score the samples before its first update on them.

        Before a step's only update the policy is the old policy, and the ratio is 1.
        """
        if self.mismatch != "none":
            return True
        return bool(self.off_policy_fields) and self.old_policy == "trainer" and updates_per_step > 1

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def needs_critic(self) -> bool:
        return self.baseline == "critic"


# Fields that act only where others say so: when, in words and as a test. Owners come before what depends on them.
ACTS: dict[str, tuple[str, Callable[[Recipe], bool]]] = {
    **{
        field: ("objective=policy_gradient", lambda r: r.objective == "policy_gradient")
        for field in ("wrong_reward", "group_filter", "backfill", "sample_filter", "dropped", "baseline", "scale")
        + ("ratio", "mismatch", "aggregation", "proximal", "kl_coef", "entropy_coef")
    },
    "overlong_cache_tokens": ("overlong=soft", lambda r: r.overlong == "soft"),
    "backfill_rounds": ("backfill=resample or adaptive", lambda r: r.backfill != "none"),
    "samples_per_round": ("backfill=adaptive", lambda r: r.backfill == "adaptive"),
    "std_ddof": (
        "a standard deviation in scale, or baseline=critic",
        lambda r: r.scale.endswith("std") or r.baseline == "critic",
    ),
    "scale_eps": ("a scale, or baseline=critic", lambda r: r.scale != "none" or r.baseline == "critic"),
    **{field: ("baseline=critic", lambda r: r.baseline == "critic") for field in ("gamma", "gae_lambda", "value_clip")},
    "old_policy": (
        "ratio=token or sequence, or a proximal term",
        lambda r: r.ratio != "none" or r.proximal != "none",
    ),
    "clip": ("ratio=token or sequence", lambda r: r.ratio != "none"),
    "clip_low": ("clip=ppo, token_log or dppo_tv", lambda r: r.clip in ("ppo", "token_log", "dppo_tv")),
    "clip_high": ("clip=ppo, cispo, token_log or dppo_tv", lambda r: r.clip not in ("none", "sapo")),
    "dual_clip": ("clip=ppo", lambda r: r.clip == "ppo"),
    **{field: ("clip=sapo", lambda r: r.clip == "sapo") for field in ("sapo_tau_positive", "sapo_tau_negative")},
    "ratio_cap": ("clip=dppo_tv", lambda r: r.clip == "dppo_tv"),
    "mismatch_low": (
        "mismatch=token_icepop, seq_reject or geo_reject",
        lambda r: r.mismatch in ("token_icepop", "seq_reject", "geo_reject"),
    ),
    "mismatch_high": ("a mismatch correction", lambda r: r.mismatch != "none"),
    **{
        field: ("proximal=squared_log_ratio", lambda r: r.proximal != "none")
        for field in ("proximal_level", "proximal_coef")
    },
    "kl_estimator": ("kl_coef > 0", lambda r: r.kl_coef != 0),
    **{field: ("objective=dpo", lambda r: r.objective == "dpo") for field in ("dpo_beta", "label_smoothing")},
}


def compose(base: Recipe, changes: Mapping[str, Any], variant: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe made from another: those of `base`, over them a variant's, over these one's own `changes`.

    Fields that the changes leave without effect fall back to their defaults: GSPO without a clip has no clip_low.
    """
    values = {**base.model_dump(exclude_unset=True), **variant, **changes}
    for field, (_, acts) in ACTS.items():
        if field not in changes and not acts(Recipe.model_construct(**values)):
            values.pop(field, None)
    if "dropped" in variant and "dropped" not in changes and values.get("backfill") == "resample":
        del values["dropped"]
    return values


def default(field: str, others: Mapping[str, Any] | None = None) -> Any:
    """What a field is where nothing is said of it; that of some depends on the `others`."""
    return Recipe.model_fields[field].get_default(call_default_factory=True, validated_data=dict(others or {}))


def _contradictions(r: Recipe) -> Iterable[str]:
    """What the fields of a recipe can't mean together, each as one line that names the fields and the fix."""
    for field, (condition, acts) in ACTS.items():
        if (value := getattr(r, field)) != (usual := default(field, dict(r))) and not acts(r):
            yield f"recipe.{field}={value} acts only with {condition}; use that, or leave it at {usual}"
    if r.objective == "dpo" and r.overlong == "soft":
        yield "recipe.overlong=soft changes rewards, which recipe.objective=dpo doesn't look at; use overlong=mask"
    if r.clip == "token_log" and r.ratio != "sequence":
        yield f"recipe.clip=token_log clips inside a sequence's ratio, but recipe.ratio={r.ratio}; use ratio=sequence"
    if r.clip in ("cispo", "sapo", "dppo_tv") and r.ratio != "token":
        yield f"recipe.clip={r.clip} acts on token ratios, but recipe.ratio={r.ratio}; use ratio=token"
    if r.clip in ("ppo", "dppo_tv") and r.clip_low >= 1:
        yield f"recipe.clip_low={r.clip_low:g} leaves clip={r.clip} nothing below; use less than 1"
    if r.old_policy == "rollout" and r.mismatch != "none":
        yield (
            f"recipe.mismatch={r.mismatch} corrects from rollout to trainer log-probs, but recipe.old_policy=rollout "
            "takes the ratio against the rollout already; use one of them"
        )
    if r.scale == "group_mean" and r.wrong_reward != 0:
        yield (
            f"recipe.scale=group_mean divides by the mean reward, which recipe.wrong_reward={r.wrong_reward:g} lets be "
            "zero or negative; use wrong_reward=0.0"
        )
    if r.scale == "group_mean" and r.overlong == "soft":
        yield "recipe.scale=group_mean divides by the mean reward, which overlong=soft can make negative; use mask"
    centred = (*_CENTRED, "batch_token_mean") if r.scale.startswith("batch") else _CENTRED
    if r.baseline == "critic" and r.scale != "none":
        yield f"recipe.baseline=critic whitens its advantages already, so recipe.scale={r.scale}; use scale=none"
    elif r.scale != "none" and r.baseline not in centred and r.group_filter != "both":
        yield (
            f"recipe.scale={r.scale} divides by zero where all rewards agree; use baseline={' or '.join(centred)}, or "
            "group_filter=both, with it"
        )
    if r.baseline == "critic" and r.ratio == "sequence":
        yield "recipe.baseline=critic gives every token its own advantage, recipe.ratio=sequence one; use ratio=token"
    if r.baseline == "critic" and r.dropped == "zero" and (r.group_filter, r.sample_filter) != ("none", "none"):
        yield "recipe.baseline=critic gives dropped samples advantages of their own; use dropped=remove with its filter"
    if r.baseline == "pool_mean" and r.backfill != "adaptive":
        yield "recipe.baseline=pool_mean is the mean over adaptive rounds; use backfill=adaptive, or baseline=mean"
    if r.backfill == "resample" and r.group_filter == "none":
        yield "recipe.backfill=resample replaces dropped prompts, but recipe.group_filter=none drops none; use both"
    if r.backfill == "resample" and r.dropped == "zero":
        yield "recipe.backfill=resample replaces dropped prompts, but dropped=zero keeps them; use dropped=remove"


def nearest(key: str, known: Iterable[str]) -> str:
    """', did you mean X?' where something known is close, else nothing."""
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""

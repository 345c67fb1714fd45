"""The recipes that ship, by name, with their sources; and the variants in which the paper's were published."""

from __future__ import annotations

from typing import Any

from megarl.algorithms.recipe import Recipe

_PPO: dict[str, Any] = {"ratio": "token", "clip": "ppo"}
_PM1: dict[str, Any] = {"wrong_reward": -1.0}
_GRPO: dict[str, Any] = {"baseline": "mean", "scale": "group_std"}

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="raft", sample_filter="positive"),
        Recipe(name="raft_pp", sample_filter="positive", **_PPO),
        Recipe(name="raft_pp_no_clip", sample_filter="positive", ratio="token"),
        Recipe(name="raft_pp_clip_higher", sample_filter="positive", **_PPO, clip_high=0.28),
        Recipe(name="reinforce", **_PM1, **_PPO),
        Recipe(name="reinforce_mean_zero", **_PM1, **_PPO, baseline="mean"),
        Recipe(name="reinforce_drop_all_correct", **_PM1, **_PPO, group_filter="all_correct"),
        Recipe(name="reinforce_drop_all_wrong", **_PM1, **_PPO, group_filter="all_wrong"),
        Recipe(name="reinforce_rej", **_PM1, **_PPO, group_filter="both"),
        Recipe(name="reinforce_rej_std", **_PM1, **_PPO, group_filter="both", scale="group_std"),
        Recipe(name="grpo", **_GRPO, **_PPO),
        Recipe(name="ppo", baseline="critic", **_PPO),
        Recipe(name="iterative_dpo", objective="dpo"),
        Recipe(name="dr_grpo", baseline="mean", **_PPO, aggregation="seq_mean_token_sum_norm"),
        Recipe(
            name="dapo",
            **_PM1,
            **_GRPO,
            **_PPO,
            clip_high=0.28,
            group_filter="both",
            backfill="resample",
            overlong="soft",
            aggregation="token_mean",
        ),
        Recipe(name="rloo", baseline="leave_one_out", aggregation="seq_mean_token_sum"),
        Recipe(name="opo", baseline="length_mean", aggregation="seq_mean_token_sum"),
        Recipe(name="remax", baseline="greedy", aggregation="seq_mean_token_sum"),
        Recipe(name="reinforce_plus_plus", baseline="batch_token_mean", scale="batch_token_std"),
        Recipe(name="gspo", **_GRPO, ratio="sequence", clip="ppo", clip_low=3e-4, clip_high=4e-4),
        Recipe(name="cispo", **_GRPO, ratio="token", clip="cispo", aggregation="token_mean"),
        Recipe(
            name="scale_rl",
            group_filter="both",
            baseline="mean",
            scale="batch_std",
            ratio="token",
            old_policy="rollout",
            clip="cispo",
            clip_high=4.0,
            aggregation="prompt_mean_token_mean",
        ),
        Recipe(name="maxrl", baseline="mean", scale="group_mean", aggregation="seq_mean_token_sum"),
        Recipe(name="gmpo", **_GRPO, ratio="sequence", clip="token_log", clip_low=0.4, clip_high=0.4),
        Recipe(name="sapo", **_GRPO, ratio="token", clip="sapo"),
        Recipe(
            name="dppo",
            baseline="mean",
            ratio="token",
            old_policy="rollout",
            clip="dppo_tv",
            clip_low=0.15,
            clip_high=0.15,
        ),
        Recipe(
            name="kimi_k2",
            baseline="mean",
            proximal="squared_log_ratio",
            aggregation="seq_mean_token_sum",
        ),
        Recipe(
            name="reinforce_ada",
            backfill="adaptive",
            samples_per_round=8,
            baseline="pool_mean",
            **_PPO,
            clip_high=0.28,
        ),
    )
}

MINIMALIST = "A Minimalist Approach to LLM Reasoning, arXiv 2504.11343"
SCRIPT_HAD_KL = "its script averaged over all tokens and had a KL of 0.001: setting minimal_rl"
SOURCES: dict[str, str] = {
    "raft": f"RAFT: {MINIMALIST}, section 2, the text ({SCRIPT_HAD_KL})",
    "raft_pp": f"RAFT++: {MINIMALIST}, equation 6, the text ({SCRIPT_HAD_KL})",
    "raft_pp_no_clip": f"RAFT++ without clipping: {MINIMALIST}, section 4",
    "raft_pp_clip_higher": f"RAFT++ with DAPO's clip-higher: {MINIMALIST}, section 4",
    "reinforce": f"Reinforce with rewards +1 and -1: {MINIMALIST}, section 2",
    "reinforce_mean_zero": f"Reinforce + mean zero (variant 2 of the component figure): {MINIMALIST}",
    "reinforce_drop_all_correct": f"Reinforce + remove all-correct prompts (variant 3): {MINIMALIST}",
    "reinforce_drop_all_wrong": f"Reinforce + remove all-wrong prompts (variant 4): {MINIMALIST}",
    "reinforce_rej": f"Reinforce-Rej (variant 5, remove both): {MINIMALIST}, the text ({SCRIPT_HAD_KL})",
    "reinforce_rej_std": f"Reinforce-Rej + normalisation by the standard deviation (variant 6): {MINIMALIST}",
    "grpo": "GRPO: DeepSeekMath, arXiv 2402.03300, section 4.1, without KL as in the text of arXiv 2504.11343 "
    f"(DeepSeekMath's own is 0.04; {SCRIPT_HAD_KL})",
    "ppo": "PPO: arXiv 1707.06347, equation 7; GAE: arXiv 1506.02438; as in the text of arXiv 2504.11343 (its script "
    "averaged over all tokens of one sample a prompt: setting minimal_rl)",
    "iterative_dpo": f"Iterative DPO: {MINIMALIST}, whose code does the same; DPO: arXiv 2305.18290, equation 7",
    "dr_grpo": "Dr. GRPO: arXiv 2503.20783, with the constant divisor of its code: the response limit",
    "dapo": "DAPO: arXiv 2503.14476, the text, with its rewards of 1 and -1",
    "rloo": "RLOO: arXiv 2402.14740, without the KL in its reward",
    "opo": "OPO: arXiv 2505.23585",
    "remax": "ReMax: arXiv 2310.10505, without the KL in its reward",
    "reinforce_plus_plus": "REINFORCE++: arXiv 2501.03262, without the KL in its reward (for its PPO clipping add "
    "ratio: token, clip: ppo)",
    "gspo": "GSPO: arXiv 2507.18071",
    "cispo": "CISPO: MiniMax-M1, arXiv 2506.13585",
    "scale_rl": "ScaleRL: arXiv 2510.13786, the text: the ratio is to the policy that sampled",
    "maxrl": "MaxRL: arXiv 2602.02710, the text: a response counts by the sum over its tokens",
    "gmpo": "GMPO: arXiv 2507.20673",
    "sapo": "SAPO: arXiv 2511.20347",
    "dppo": "DPPO: arXiv 2602.04879, takeaway 2: the trust region is around the policy that sampled",
    "kimi_k2": "Kimi K2: arXiv 2507.20534; its proximal term: Kimi k1.5, arXiv 2501.12599, equation 3",
    "reinforce_ada": "Reinforce-Ada: arXiv 2510.04996, the text; of its script 8 samples a round, to keep 4 "
    "(schedule.samples_per_prompt), not its mean over all tokens (aggregation: token_mean)",
}

# What the paper's released scripts ran, where it differs from the text: the code's own defaults in all recipes, ...
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "minimal_rl": {
        "aggregation": "token_mean",
        "dropped": "zero",
        "entropy_coef": 0.001,
        "dual_clip": 3.0,
    },
}
# ... and what the scripts of some recipes asked for beside them.
VARIANTS_OF_RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "minimal_rl": dict.fromkeys(("raft", "raft_pp", "grpo", "reinforce_rej"), {"kl_coef": 0.001}),
}


def variant_fields(variant: str, base: str) -> dict[str, Any]:
    """What a variant changes in a recipe that starts from `base`, a shipped one or none."""
    return VARIANTS[variant] | VARIANTS_OF_RECIPES.get(variant, {}).get(base, {})


# Demonstrations instead of rollouts: every sequence has advantage 1, so the loss is their negative log-likelihood.
SFT = Recipe(name="sft", aggregation="token_mean")

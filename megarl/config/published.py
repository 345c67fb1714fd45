r"""Published settings as configuration values: `setting: paper` or `minimal_rl` puts them below a config's own.

Source: arXiv 2504.11343. "paper" is what its text says, "minimal_rl" what its released scripts ran; the recipe fields
in which the two differ are `VARIANTS` of `algorithms/recipes.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

_PAPER: dict[str, dict[str, Any]] = {
    "data": {
        "max_prompt_tokens": 1024,
        "chat_template": True,
        "system_prompt": "Please reason step by step, and put your final answer within \\boxed{}.",
        "prompt_template": ("{problem} Let's think step by step and output the final answer within \\boxed{}."),
    },
    "schedule": {"prompts_per_step": 1024, "samples_per_prompt": 4, "minibatch_prompts": 512, "epochs": 1},
    "optim": {
        "lr": 1e-6,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "beta1": 0.9,
        "beta2": 0.999,
        "weight_decay": 0.01,
        "grad_clip": 1.0,
    },
    "critic": {"lr": 1e-5},
    "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_response_tokens": 4096},
    "eval": {"samples_per_prompt": 16, "temperature": 1.0},
}

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": _PAPER,
    "minimal_rl": {
        **_PAPER,
        "schedule": {**_PAPER["schedule"], "minibatch_prompts": 256},
        "rollout": {**_PAPER["rollout"], "max_response_tokens": 3072},
    },
}

# Where a kind of algorithm was run differently from the others: (setting, field of the recipe, its value) -> sections.
_DPO: dict[str, dict[str, Any]] = {
    "schedule": {"samples_per_prompt": 8, "minibatch_prompts": 128, "epochs": 2},
    "optim": {"lr": 5e-7, "lr_schedule": "cosine"},
}
_OF_KINDS: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {
    ("paper", "objective", "dpo"): _DPO,
    ("minimal_rl", "objective", "dpo"): _DPO,
    ("minimal_rl", "baseline", "critic"): {"schedule": {"samples_per_prompt": 1}},
}


def published_values(setting: str, recipe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The sections of a setting, for a recipe with these fields."""
    values = copy.deepcopy(SETTINGS[setting])
    for (of_setting, field, value), sections in _OF_KINDS.items():
        if of_setting == setting and recipe.get(field) == value:
            for section, changes in sections.items():
                values[section] |= changes
    return values

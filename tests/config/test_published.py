"""The published settings against the numbers of arXiv 2504.11343 and of its released scripts."""

import pytest

from megarl.algorithms.recipes import RECIPES
from megarl.config import Config
from megarl.config.published import SETTINGS, published_values

PROMPT = {
    "max_prompt_tokens": 1024,
    "chat_template": True,
    "system_prompt": r"Please reason step by step, and put your final answer within \boxed{}.",
    "prompt_template": r"{problem} Let's think step by step and output the final answer within \boxed{}.",
}
ADAMW = {
    "lr": 1e-6,
    "lr_schedule": "constant",
    "warmup_steps": 0,
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 0.01,
    "grad_clip": 1.0,
}
CRITIC = {"lr": 1e-5}
EVAL = {"samples_per_prompt": 16, "temperature": 1.0}


@pytest.mark.parametrize(("setting", "minibatch", "tokens"), [("paper", 512, 4096), ("minimal_rl", 256, 3072)])
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "iterative_dpo"])
def test_a_setting_is_what_was_published(setting, minibatch, tokens, recipe):
    n = 1 if (setting, recipe) == ("minimal_rl", "ppo") else 4  # its script drew one sample a prompt
    assert published_values(setting, dict(RECIPES[recipe])) == {
        "data": PROMPT,
        "schedule": {
            "prompts_per_step": 1024,
            "samples_per_prompt": n,
            "minibatch_prompts": minibatch,
            "epochs": 1,
        },
        "optim": ADAMW,
        "critic": CRITIC,
        "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_response_tokens": tokens},
        "eval": EVAL,
    }


@pytest.mark.parametrize(("setting", "tokens"), [("paper", 4096), ("minimal_rl", 3072)])
def test_iterative_dpo_samples_and_learns_on_its_own_schedule(setting, tokens):
    assert published_values(setting, {"objective": "dpo"}) == {
        "data": PROMPT,
        "schedule": {"prompts_per_step": 1024, "samples_per_prompt": 8, "minibatch_prompts": 128, "epochs": 2},
        "optim": {**ADAMW, "lr": 5e-7, "lr_schedule": "cosine"},
        "critic": CRITIC,
        "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_response_tokens": tokens},
        "eval": EVAL,
    }


def test_a_recipe_of_ones_own_has_the_settings_of_the_others():
    for setting in SETTINGS:
        assert published_values(setting, {"name": "mine"}) == published_values(setting, dict(RECIPES["grpo"]))


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_published_value_is_a_key_of_the_configuration(setting):
    for section, values in published_values(setting, {"objective": "dpo"}).items():
        assert values.keys() <= Config.model_fields[section].annotation.model_fields.keys()


def test_changing_what_was_asked_for_leaves_the_setting_as_it_was():
    pairs: dict = {"objective": "dpo"}
    published_values("paper", pairs)["optim"]["lr"] = 1.0
    published_values("minimal_rl", {})["data"].clear()
    assert [published_values("paper", of)["optim"]["lr"] for of in (pairs, {})] == [5e-7, 1e-6]
    assert published_values("paper", {})["data"] == published_values("minimal_rl", {})["data"] == PROMPT

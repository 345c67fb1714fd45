import pytest
from pydantic import ValidationError

from megarl.algorithms.recipe import RECIPES, SFT, Recipe

DEFAULTS = {
    "wrong_reward": 0.0,
    "overlong": "none",
    "group_filter": "none",
    "sample_filter": "none",
    "dropped": "remove",
    "baseline": "none",
    "scale": "none",
    "std_ddof": 1,
    "std_eps": 1e-6,
    "ratio": "none",
    "clip": "none",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": None,
    "aggregation": "seq_mean_token_mean",
    "kl_coef": 0.0,
    "kl_estimator": "k3",
    "entropy_coef": 0.0,
}
PPO_CLIP = {"ratio": "token", "clip": "ppo"}
PUBLISHED = {
    "raft": {"sample_filter": "positive"},
    "raft_pp": {"sample_filter": "positive", **PPO_CLIP},
    "reinforce": {"wrong_reward": -1.0, **PPO_CLIP},
    "reinforce_rej": {"wrong_reward": -1.0, "group_filter": "both", **PPO_CLIP},
    "grpo": {"baseline": "mean", "scale": "group_std", "kl_coef": 0.001, **PPO_CLIP},
}


def differences(a, b):
    return {field for field in DEFAULTS if getattr(a, field) != getattr(b, field)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_named_recipe_sets_the_published_fields_and_no_others(name):
    assert RECIPES[name].model_dump() == {"name": name, **DEFAULTS, **PUBLISHED[name]}


def test_there_are_no_recipes_beyond_the_published_ones():
    assert RECIPES.keys() == PUBLISHED.keys()


def test_neighbouring_recipes_differ_in_their_idea_alone():
    assert differences(RECIPES["raft"], RECIPES["raft_pp"]) == {"ratio", "clip"}
    assert differences(RECIPES["raft_pp"], RECIPES["reinforce"]) == {"sample_filter", "wrong_reward"}
    assert differences(RECIPES["reinforce"], RECIPES["reinforce_rej"]) == {"group_filter"}


def test_demonstrations_are_plain_likelihood_averaged_over_tokens():
    assert differences(SFT, Recipe()) == {"aggregation"}
    assert SFT.aggregation == "token_mean"


@pytest.mark.parametrize(
    ("fields", "compares"),
    [
        ({}, []),
        ({"sample_filter": "positive"}, []),
        ({"group_filter": "all_wrong"}, ["group_filter=all_wrong"]),
        ({"baseline": "mean"}, ["baseline=mean"]),
        ({"baseline": "mean", "scale": "group_std"}, ["baseline=mean", "scale=group_std"]),
    ],
)
def test_a_recipe_knows_which_fields_compare_samples_of_one_prompt(fields, compares):
    recipe = Recipe(**fields)
    assert recipe.group_fields == compares
    assert recipe.compares_within_group == bool(compares)


def test_only_a_kl_term_needs_the_reference():
    assert {name for name, recipe in RECIPES.items() if recipe.needs_reference} == {"grpo"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip_hi": 0.28}, "clip_hi"),
        ({"wrong_reward": 0.5}, "0.0 or -1.0"),
        ({"wrong_reward": 1.0}, "0.0 or -1.0"),
        ({"baseline": "median"}, "'none' or 'mean'"),
        ({"std_ddof": 2}, "0 or 1"),
        ({"clip_low": 1.0}, "less than 1"),
        ({"clip_low": 0.0}, "greater than 0"),
        ({"clip_high": -0.2}, "greater than 0"),
        ({"dual_clip": 1.0, **PPO_CLIP}, "greater than 1"),
        ({"kl_coef": -0.1}, "greater than or equal to 0"),
        ({"kl_coef": float("inf")}, "finite"),
        ({"entropy_coef": float("nan")}, "finite"),
        ({"clip": "ppo"}, "use ratio=token or clip=none"),
        ({"dual_clip": 3.0, "ratio": "token"}, "use clip=ppo"),
        ({"scale": "group_std"}, "use baseline=mean or group_filter=both"),
        ({"scale": "group_std", "group_filter": "all_wrong"}, "use baseline=mean or group_filter=both"),
    ],
)
def test_a_recipe_refuses_what_it_could_not_honour(fields, message):
    with pytest.raises(ValidationError, match=message):
        Recipe(**fields)


def test_a_recipe_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        RECIPES["grpo"].clip_high = 0.28

"""The shipped recipes against the published table, and what a recipe refuses to be."""

import pytest
import reference
from pydantic import ValidationError

from megarl.algorithms.recipe import ACTS, Recipe, nearest
from megarl.algorithms.recipes import RECIPES, SFT, SOURCES, VARIANTS
from megarl.types import UserError

# The specification's table is written down once more, in the reference; these tests hold the package's to it.
DEFAULTS = {**reference.DEFAULTS, "backfill_rounds": 4}
PUBLISHED, PPO = reference.RECIPES, reference.PPO


def differences(a, b):
    return {field for field in DEFAULTS if getattr(a, field) != getattr(b, field)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_named_recipe_sets_the_published_fields_and_no_others(name):
    assert RECIPES[name].model_dump() == {"name": name, **DEFAULTS, **PUBLISHED[name]}


def test_there_are_no_recipes_beyond_the_published_ones_and_each_has_its_source():
    assert RECIPES.keys() == PUBLISHED.keys() == SOURCES.keys()
    assert all("arXiv" in source and "\n" not in source for source in SOURCES.values())


@pytest.mark.parametrize(
    ("one", "other", "field"),
    [
        ("raft", "raft_pp_no_clip", "ratio"),
        ("raft_pp_no_clip", "raft_pp", "clip"),
        ("raft_pp", "raft_pp_clip_higher", "clip_high"),
        ("reinforce", "reinforce_mean_zero", "baseline"),
        ("reinforce", "reinforce_drop_all_correct", "group_filter"),
        ("reinforce", "reinforce_drop_all_wrong", "group_filter"),
        ("reinforce", "reinforce_rej", "group_filter"),
        ("reinforce_drop_all_correct", "reinforce_rej", "group_filter"),
        ("reinforce_rej", "reinforce_rej_std", "scale"),
        ("rloo", "opo", "baseline"),
        ("rloo", "remax", "baseline"),
    ],
)
def test_neighbouring_recipes_differ_in_one_field(one, other, field):
    assert differences(RECIPES[one], RECIPES[other]) == {field}


def test_no_two_recipes_are_the_same():
    for name, recipe in RECIPES.items():
        assert [other for other in RECIPES if not differences(recipe, RECIPES[other])] == [name]


def test_demonstrations_are_plain_likelihood_averaged_over_tokens():
    assert differences(SFT, Recipe()) == {"aggregation"}
    assert SFT.aggregation == "token_mean"


def test_a_recipe_by_its_name_takes_fields():
    assert Recipe.named("grpo") == RECIPES["grpo"]
    changed = Recipe.named("grpo", clip_high=0.28, dropped="zero")
    assert differences(changed, RECIPES["grpo"]) == {"clip_high", "dropped"}
    assert Recipe.named("grpo", name="mine") == RECIPES["grpo"].model_copy(update={"name": "mine"})


@pytest.mark.parametrize(
    ("arguments", "fields", "message"),
    [
        (["grop"], {}, "recipe='grop' is unknown, did you mean grpo?; recipes: raft, raft_pp"),
        (["reinforce-rej"], {}, "did you mean reinforce_rej?"),
        (["zzz"], {}, "recipe='zzz' is unknown; recipes: raft, raft_pp"),
        (["grpo", "papr"], {}, "variant='papr' is unknown, did you mean paper?; variants: paper, minimal_rl"),
        (["grpo"], {"clip_hi": 0.28}, "recipe.clip_hi is not a known field, did you mean clip_high?"),
        (["grpo"], {"clip_high": -1.0}, "recipe.clip_high: Input should be greater than 0"),
        (["grpo"], {"clip_high": "wide"}, "recipe.clip_high: "),
        (["grpo"], {"baseline": "median"}, "recipe.baseline: Input should be 'none', 'mean', "),
        (["grpo"], {"baseline": "none"}, "recipe.scale=group_std divides by zero"),
    ],
)
def test_a_named_recipe_that_can_not_be_is_refused_in_one_line(arguments, fields, message):
    with pytest.raises(UserError) as caught:
        Recipe.named(*arguments, **fields)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_nearest_name_is_offered_only_where_one_is_near():
    assert nearest("gmppo", RECIPES) == ", did you mean gmpo?"
    assert nearest("quicksort", RECIPES) == ""


SCRIPTS = {"aggregation": "token_mean", "dropped": "zero", "entropy_coef": 0.001, "dual_clip": 3.0}


def test_the_variants_are_the_text_and_the_scripts():
    assert VARIANTS == {"paper": {}, "minimal_rl": SCRIPTS}
    for name, recipe in RECIPES.items():
        assert Recipe.named(name, variant="paper") == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_the_scripts_change_what_can_act_in_a_recipe(name):
    recipe, expected = RECIPES[name], dict(SCRIPTS)
    if recipe.clip != "ppo":
        del expected["dual_clip"]
    if name == "dapo":
        del expected["dropped"]  # it has put other prompts in their place
    if name in ("raft", "raft_pp", "grpo", "reinforce_rej"):
        expected["kl_coef"] = 0.001
    if name == "iterative_dpo":
        expected = {}
    assert Recipe.named(name, "minimal_rl") == recipe.model_copy(update=expected)


def test_fields_of_ones_own_win_over_the_variant():
    recipe = Recipe.named("grpo", "minimal_rl", kl_coef=0.5, dual_clip=None)
    assert (recipe.kl_coef, recipe.dual_clip, recipe.entropy_coef) == (0.5, None, 0.001)


def test_no_recipe_has_a_kl_term_but_by_the_scripts_of_four():
    assert {name for name, recipe in RECIPES.items() if recipe.needs_reference} == set()
    with_kl = {name: r for name in RECIPES if (r := Recipe.named(name, "minimal_rl")).needs_reference}
    assert with_kl.keys() == {"raft", "raft_pp", "grpo", "reinforce_rej"}
    assert {(recipe.kl_coef, recipe.kl_estimator) for recipe in with_kl.values()} == {(0.001, "k3")}


@pytest.mark.parametrize(
    ("fields", "compares"),
    [
        ({}, []),
        ({"sample_filter": "positive"}, []),
        ({"group_filter": "all_wrong"}, ["group_filter=all_wrong"]),
        ({"baseline": "mean"}, ["baseline=mean"]),
        ({"baseline": "leave_one_out"}, ["baseline=leave_one_out"]),
        ({"baseline": "length_mean"}, ["baseline=length_mean"]),
        ({"baseline": "greedy"}, []),
        ({"baseline": "critic"}, []),
        ({"baseline": "batch_token_mean", "scale": "batch_token_std"}, []),
        ({"baseline": "mean", "scale": "group_std"}, ["baseline=mean", "scale=group_std"]),
        ({"baseline": "mean", "scale": "group_mean"}, ["baseline=mean", "scale=group_mean"]),
        ({"baseline": "mean", "scale": "batch_std"}, ["baseline=mean"]),
        ({"backfill": "adaptive"}, ["backfill=adaptive"]),
        ({"backfill": "adaptive", "baseline": "pool_mean"}, ["backfill=adaptive", "baseline=pool_mean"]),
        ({"backfill": "resample", "group_filter": "both"}, ["group_filter=both"]),
        ({"objective": "dpo"}, ["objective=dpo"]),
    ],
)
def test_a_recipe_knows_which_fields_compare_samples_of_one_prompt(fields, compares):
    recipe = Recipe(**fields)
    assert recipe.group_fields == compares
    assert recipe.compares_within_group == bool(compares)


@pytest.mark.parametrize(
    ("fields", "compares"),
    [
        ({}, []),
        ({"kl_coef": 0.3}, []),
        ({"ratio": "token"}, ["ratio=token"]),
        ({"ratio": "sequence", "clip": "ppo"}, ["ratio=sequence"]),
        ({"proximal": "squared_log_ratio"}, ["proximal=squared_log_ratio"]),
        ({"mismatch": "seq_tis"}, ["mismatch=seq_tis"]),
        ({"ratio": "token", "mismatch": "token_tis"}, ["ratio=token", "mismatch=token_tis"]),
        ({"objective": "dpo"}, ["objective=dpo"]),
    ],
)
def test_a_recipe_knows_which_fields_compare_with_the_policy_that_sampled(fields, compares):
    assert Recipe(**fields).off_policy_fields == compares


@pytest.mark.parametrize(
    ("fields", "one", "several"),
    [
        ({}, False, False),
        ({"ratio": "token"}, False, True),
        ({"ratio": "sequence"}, False, True),
        ({"proximal": "squared_log_ratio"}, False, True),
        ({"objective": "dpo"}, False, True),
        ({"ratio": "token", "old_policy": "rollout"}, False, False),
        ({"mismatch": "token_tis"}, True, True),
        ({"mismatch": "geo_reject", "ratio": "token"}, True, True),
    ],
)
def test_old_log_probs_are_scored_where_the_policy_moves_before_it_is_compared(fields, one, several):
    recipe = Recipe(**fields)
    assert (recipe.needs_old_logprobs(1), recipe.needs_old_logprobs(2)) == (one, several)


def test_only_ppo_needs_a_critic():
    assert {name for name, recipe in RECIPES.items() if recipe.needs_critic} == {"ppo"}


MEAN = {"baseline": "mean"}
REFUSED = [
    # Not a value of the field.
    ({"clip_hi": 0.28}, "clip_hi"),
    ({"wrong_reward": 0.5}, "0.0 or -1.0"),
    ({"wrong_reward": 1.0}, "0.0 or -1.0"),
    ({"baseline": "median"}, "'none', 'mean', 'leave_one_out'"),
    ({"std_ddof": 2}, "0 or 1"),
    ({"clip_low": 0.0}, "greater than 0"),
    ({"clip_high": -0.2}, "greater than 0"),
    ({"dual_clip": 1.0, **PPO}, "greater than 1"),
    ({"mismatch_low": 1.0}, "less than 1"),
    ({"mismatch_high": 1.0}, "greater than 1"),
    ({"ratio_cap": 1.0}, "greater than 1"),
    ({"gamma": 1.5}, "less than or equal to 1"),
    ({"label_smoothing": 0.5}, "less than 0.5"),
    ({"backfill_rounds": 0}, "greater than or equal to 1"),
    ({"overlong_cache_tokens": 0}, "greater than or equal to 1"),
    ({"kl_coef": -0.1}, "greater than or equal to 0"),
    ({"kl_coef": float("inf")}, "finite"),
    ({"entropy_coef": float("nan")}, "finite"),
    # Fields that can't act together.
    ({"clip": "token_log"}, "recipe.clip=token_log acts only with ratio=token or sequence; .*leave it at none"),
    ({"clip": "token_log", "ratio": "token"}, "clip=token_log .*recipe.ratio=token; use ratio=sequence"),
    ({"clip": "cispo"}, "recipe.clip=cispo acts only with ratio=token or sequence"),
    ({"clip": "sapo", "ratio": "sequence"}, "recipe.clip=sapo .*recipe.ratio=sequence; use ratio=token"),
    ({"clip": "dppo_tv", "ratio": "sequence"}, "recipe.clip=dppo_tv .*recipe.ratio=sequence; use ratio=token"),
    ({"clip": "ppo"}, "recipe.clip=ppo acts only with ratio=token or sequence"),
    ({"clip_low": 1.0, **PPO}, "recipe.clip_low=1 .*clip=ppo.*use less than 1"),
    ({"clip_low": 1.5, "clip": "dppo_tv", "ratio": "token"}, "recipe.clip_low=1.5 .*clip=dppo_tv.*use less than 1"),
    ({"dual_clip": 3.0, "ratio": "token"}, "recipe.dual_clip=3.0 acts only with clip=ppo; .*leave it at None"),
    ({"dual_clip": 3.0, "ratio": "token", "clip": "cispo"}, "recipe.dual_clip=3.0 acts only with clip=ppo"),
    (
        {"old_policy": "rollout"},
        "recipe.old_policy=rollout acts only with ratio=token or sequence, or a prox.*leave it at trainer",
    ),
    (
        {"old_policy": "rollout", "mismatch": "token_tis", "ratio": "token"},
        "recipe.mismatch=token_tis .*recipe.old_policy=rollout .*use one of them",
    ),
    (
        {"scale": "group_mean", "wrong_reward": -1.0, **MEAN},
        "recipe.scale=group_mean .*recipe.wrong_reward=-1 .*use wrong_reward=0.0",
    ),
    ({"scale": "group_mean", "overlong": "soft", **MEAN}, "recipe.scale=group_mean .*overlong=soft .*use mask"),
    ({"scale": "batch_std", "baseline": "critic"}, "recipe.baseline=critic .*recipe.scale=batch_std; use scale=none"),
    ({"scale": "group_std"}, "recipe.scale=group_std .*use baseline=mean or .*group_filter=both"),
    ({"scale": "group_std", "group_filter": "all_wrong"}, "use baseline=mean or .*group_filter=both"),
    ({"scale": "group_std", "baseline": "batch_token_mean"}, "use baseline=mean or leave_one_out or length_mean, or"),
    ({"scale": "group_std", "baseline": "greedy"}, "recipe.scale=group_std"),
    ({"scale": "batch_std", "baseline": "greedy"}, "recipe.scale=batch_std .*batch_token_mean, or group_filter=both"),
    ({"baseline": "pool_mean"}, "recipe.baseline=pool_mean .*use backfill=adaptive, or baseline=mean"),
    (
        {"baseline": "pool_mean", "backfill": "resample", "group_filter": "both"},
        "recipe.baseline=pool_mean .*use backfill=adaptive",
    ),
    ({"backfill": "resample"}, "recipe.backfill=resample .*recipe.group_filter=none .*use both"),
    (
        {"backfill": "resample", "group_filter": "both", "dropped": "zero"},
        "recipe.backfill=resample .*dropped=zero .*use dropped=remove",
    ),
    # Fields without a meaning for pairs.
    ({"objective": "dpo", "sample_filter": "positive"}, "recipe.sample_filter=positive .*leave it at none"),
    ({"objective": "dpo", "group_filter": "both"}, "recipe.group_filter=both .*leave it at none"),
    ({"objective": "dpo", "backfill": "adaptive"}, "recipe.backfill=adaptive .*leave it at none"),
    (
        {"objective": "dpo", "baseline": "mean"},
        "recipe.baseline=mean acts only with objective=policy_gradient",
    ),
    ({"objective": "dpo", "scale": "group_std"}, "recipe.scale=group_std .*leave it at none"),
    ({"objective": "dpo", "ratio": "token"}, "recipe.ratio=token .*leave it at none"),
    ({"objective": "dpo", "dropped": "zero"}, "recipe.dropped=zero .*leave it at remove"),
    ({"objective": "dpo", "wrong_reward": -1.0}, "recipe.wrong_reward=-1.*leave it at 0"),
    ({"objective": "dpo", "aggregation": "token_mean"}, "recipe.aggregation=token_mean .*leave it at seq_mean"),
    ({"objective": "dpo", "overlong": "soft"}, "recipe.overlong=soft .*use overlong=mask"),
    ({"baseline": "critic", "group_filter": "both", "dropped": "zero"}, "baseline=critic .*use dropped=remove"),
    ({"baseline": "critic", "sample_filter": "positive", "dropped": "zero"}, "critic .*use dropped=remove"),
    ({"objective": "dpo", "clip": "ppo"}, "recipe.clip=ppo .*leave it at none"),
    ({"objective": "dpo", "old_policy": "rollout"}, "recipe.old_policy=rollout .*leave it at trainer"),
    ({"baseline": "critic", "ratio": "sequence"}, "recipe.baseline=critic .*recipe.ratio=sequence .*use ratio=token"),
    ({"objective": "dpo", "mismatch": "seq_tis"}, "recipe.mismatch=seq_tis .*leave it at none"),
    ({"objective": "dpo", "proximal": "squared_log_ratio"}, "recipe.proximal=squared_log_ratio .*leave it at none"),
    ({"objective": "dpo", "kl_coef": 0.1}, "recipe.kl_coef=0.1 .*leave it at 0.0"),
    ({"objective": "dpo", "entropy_coef": 0.1}, "recipe.entropy_coef=0.1 .*leave it at 0.0"),
]


# Each dependent field at another value than its default, in a recipe where nothing makes it act.
WITHOUT_EFFECT = {
    "overlong_cache_tokens": 8, "backfill_rounds": 2, "samples_per_round": 8, "std_ddof": 0, "scale_eps": 0.1,
    "gamma": 0.9, "gae_lambda": 0.9, "value_clip": 0.2, "old_policy": "rollout", "clip": "ppo",
    "clip_low": 0.1, "clip_high": 0.3, "dual_clip": 3.0,
    "sapo_tau_positive": 2.0, "sapo_tau_negative": 2.0, "ratio_cap": 5.0, "mismatch_low": 0.1, "mismatch_high": 5.0,
    "proximal_level": "token", "proximal_coef": 1.0, "kl_estimator": "k2", "dpo_beta": 1.0, "label_smoothing": 0.2,
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WITHOUT_EFFECT.items())
def test_a_field_that_would_have_no_effect_is_refused(field, value):
    with pytest.raises(ValidationError, match=rf"recipe\.{field}=.* acts only with .*leave it at"):
        Recipe(**{field: value})


def test_every_field_that_depends_on_another_is_tested():
    policy_gradient_only = {field for field, (condition, _) in ACTS.items() if condition == "objective=policy_gradient"}
    assert WITHOUT_EFFECT.keys() == ACTS.keys() - policy_gradient_only


@pytest.mark.parametrize(
    ("base", "changes", "fallen_back"),
    [
        ("gspo", {"clip": "none"}, {"clip_low", "clip_high"}),
        ("grpo", {"ratio": "none"}, {"clip"}),
        ("raft_pp_clip_higher", {"ratio": "none"}, {"clip", "clip_high"}),
        ("grpo", {"objective": "dpo"}, {"baseline", "scale", "ratio", "clip"}),
        ("reinforce_ada", {"backfill": "none", "baseline": "mean"}, {"samples_per_round"}),
        ("scale_rl", {"ratio": "none"}, {"clip", "clip_high", "old_policy"}),
        ("grpo", {"clip_high": 0.28}, set()),
    ],
)
def test_what_a_change_leaves_without_effect_falls_back_to_its_default(base, changes, fallen_back):
    made = Recipe.named(base, **changes)
    assert differences(made, RECIPES[base]) == fallen_back | changes.keys()
    assert all(getattr(made, field) == DEFAULTS[field] for field in fallen_back)


@pytest.mark.parametrize(
    ("fields", "message"), REFUSED, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_a_recipe_refuses_what_it_could_not_honour(fields, message):
    with pytest.raises(ValidationError, match=message):
        Recipe(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"scale": "group_std", "group_filter": "both"},
        {"scale": "group_std", "baseline": "leave_one_out"},
        {"scale": "group_std", "baseline": "length_mean"},
        {"scale": "batch_std", "baseline": "batch_token_mean"},
        {"scale": "batch_token_std", "baseline": "greedy", "group_filter": "both"},
        {"scale": "group_mean", "baseline": "mean", "overlong": "mask"},
        {"clip": "token_log", "ratio": "sequence", "clip_low": 1.5},  # nats, not a fraction
        {"clip": "ppo", "ratio": "sequence", "dual_clip": 3.0},
        {"clip": "ppo", "ratio": "token", "old_policy": "rollout"},
        {"proximal": "squared_log_ratio", "old_policy": "rollout"},
        {"mismatch": "seq_reject"},
        {"baseline": "critic", "mismatch": "token_tis", "group_filter": "both"},
        {"backfill": "resample", "group_filter": "all_wrong"},
        {"backfill": "adaptive", "baseline": "mean"},
        {"objective": "dpo", "overlong": "mask", "dpo_beta": 0.5, "label_smoothing": 0.0},
    ],
    ids=str,
)
def test_other_recombinations_of_the_fields_are_recipes_too(fields):
    assert Recipe(**fields).model_dump() == {"name": "custom", **DEFAULTS, **fields}


@pytest.mark.parametrize(
    ("mismatch", "low", "high"),
    [
        ("token_tis", 0.5, 2.0),
        ("seq_tis", 0.5, 2.0),
        ("seq_reject", 0.5, 2.0),
        ("token_icepop", 0.5, 5.0),
        ("geo_reject", 0.999, 1.001),
    ],
)
def test_each_correction_of_mismatch_has_the_bounds_it_was_published_with(mismatch, low, high):
    for recipe in (Recipe(mismatch=mismatch), Recipe.named("grpo", mismatch=mismatch)):
        assert (recipe.mismatch_low, recipe.mismatch_high) == (low, high)
    wider = Recipe.named("grpo", mismatch=mismatch, mismatch_high=3.0)
    assert (wider.mismatch_low, wider.mismatch_high) == (low, 3.0)


def test_a_recipe_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        RECIPES["grpo"].clip_high = 0.28

"""Which samples count and for how much, against definitions written with Python's own statistics."""

import statistics

import numpy as np
import pytest
import torch

from megarl.algorithms.credit import credit, credit_groups
from megarl.algorithms.recipe import RECIPES, Recipe
from megarl.types import Prompt, RewardStatus, Sample, SampleGroup

# Groups of four verdicts: 2/4, 0/4, 4/4, 1/4 and 3/4 right.
GROUPS = [
    [True, False, True, False],
    [False, False, False, False],
    [True, True, True, True],
    [False, False, True, False],
    [True, True, False, True],
]


def grpo(group):
    rewards = [1.0 if right else 0.0 for right in group]
    mean = statistics.mean(rewards)
    deviation = statistics.stdev(rewards) if len(group) > 1 else 0.0
    return [(reward - mean) / (deviation + 1e-6) for reward in rewards]


# Verdicts of one prompt's samples -> advantage of each; None: not in the loss.
DEFINITIONS = {
    "raft": lambda group: [1.0 if right else None for right in group],
    "raft_pp": lambda group: [1.0 if right else None for right in group],
    "reinforce": lambda group: [1.0 if right else -1.0 for right in group],
    "reinforce_rej": lambda group: [None if len(set(group)) == 1 else 1.0 if right else -1.0 for right in group],
    "grpo": grpo,
}


def credited(recipe, groups, valid=None):
    """The advantage of each sample, None where it is not kept, group by group."""
    index = torch.tensor([i for i, group in enumerate(groups) for _ in group], dtype=torch.int64)
    correct = torch.tensor([right for group in groups for right in group], dtype=torch.bool)
    if valid is not None:
        valid = torch.tensor([ok for group in valid for ok in group], dtype=torch.bool)
    result = credit(recipe, index, correct, valid)
    assert result.advantages.dtype == torch.float32 and result.keep.dtype == torch.bool
    assert (result.advantages[~result.keep] == 0).all()
    flat = [a if kept else None for a, kept in zip(result.advantages.tolist(), result.keep.tolist(), strict=True)]
    return [[flat.pop(0) for _ in group] for group in groups]


def assert_same(actual, expected):
    assert [len(group) for group in actual] == [len(group) for group in expected]
    for got, wanted in zip(actual, expected, strict=True):
        assert [a is None for a in got] == [e is None for e in wanted]
        kept = [e for e in wanted if e is not None]
        assert [a for a in got if a is not None] == pytest.approx(kept, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_credits_samples_as_defined(name):
    assert_same(credited(RECIPES[name], GROUPS), [DEFINITIONS[name](group) for group in GROUPS])


def test_grpo_divides_by_the_standard_deviation_of_a_sample():
    one_right = credited(RECIPES["grpo"], [[True, False, False, False]])
    assert_same(one_right, [[0.75 / 0.500001, -0.25 / 0.500001, -0.25 / 0.500001, -0.25 / 0.500001]])
    population = RECIPES["grpo"].model_copy(update={"std_ddof": 0})
    assert_same(credited(population, [[True, False]]), [[0.5 / 0.500001, -0.5 / 0.500001]])


def test_std_eps_is_added_to_the_deviation_and_not_to_the_variance():
    recipe = RECIPES["grpo"].model_copy(update={"std_eps": 0.5})
    assert_same(credited(recipe, [[True, False, False, False]]), [[0.75, -0.25, -0.25, -0.25]])


def test_a_mean_without_a_scale_centres_the_rewards():
    recipe = Recipe(wrong_reward=-1.0, baseline="mean")
    assert_same(credited(recipe, [[True, False, False, False]]), [[1.5, -0.5, -0.5, -0.5]])


def test_a_scale_without_a_mean_keeps_the_sign_of_the_reward():
    recipe = Recipe(wrong_reward=-1.0, group_filter="both", scale="group_std")
    std = statistics.stdev([1, -1, -1, -1]) + 1e-6
    expected = [[1 / std, -1 / std, -1 / std, -1 / std], [None] * 4]
    assert_same(credited(recipe, [[True, False, False, False], [True] * 4]), expected)


def test_grpo_gives_equal_rewards_no_advantage_at_all():
    for rewards in ([True] * 3, [False] * 7):
        assert credited(RECIPES["grpo"], [rewards]) == [[0.0] * len(rewards)]


@pytest.mark.parametrize(
    ("group_filter", "kept"),
    [
        ("none", [True, True, True, True, True]),
        ("all_wrong", [True, False, True, True, True]),
        ("all_correct", [True, True, False, True, True]),
        ("both", [True, False, False, True, True]),
    ],
)
def test_a_group_filter_drops_whole_prompts(group_filter, kept):
    result = credited(Recipe(group_filter=group_filter), GROUPS)
    assert [[a is not None for a in group] for group in result] == [[k] * 4 for k in kept]


@pytest.mark.parametrize("name", ["raft", "reinforce_rej"])
def test_zeroed_samples_stay_in_the_loss_with_no_advantage(name):
    zeroed = RECIPES[name].model_copy(update={"dropped": "zero"})
    expected = [[0.0 if a is None else a for a in group] for group in credited(RECIPES[name], GROUPS)]
    assert any(a == 0.0 for group in expected for a in group)
    assert credited(zeroed, GROUPS) == expected


@pytest.mark.parametrize("dropped", ["remove", "zero"])
@pytest.mark.parametrize("name", RECIPES)
def test_samples_without_a_verdict_leave_the_loss_and_the_statistics(name, dropped):
    recipe = RECIPES[name].model_copy(update={"dropped": dropped})
    valid = [[True, True, False, True], [True, False, True, True], [False] * 4, [True, True, False, True], [True] * 4]
    remaining = [[r for r, ok in zip(*pair, strict=True) if ok] for pair in zip(GROUPS, valid, strict=True)]
    expected = credited(recipe, remaining)
    for group, flags in zip(expected, valid, strict=True):
        for position, ok in enumerate(flags):
            if not ok:
                group.insert(position, None)
    assert_same(credited(recipe, GROUPS, valid), expected)
    # The verdicts that are masked make no difference.
    flipped = [[r if ok else not r for r, ok in zip(*pair, strict=True)] for pair in zip(GROUPS, valid, strict=True)]
    assert credited(recipe, flipped, valid) == credited(recipe, GROUPS, valid)


def test_a_timeout_can_make_a_mixed_group_all_right():
    valid = [[True, True, False, True]]
    assert credited(RECIPES["reinforce_rej"], [[True, True, False, True]], valid) == [[None] * 4]


def test_a_group_of_one_valid_sample_has_nothing_to_compare():
    valid = [[False, True, False, False]]
    group = [[True, True, False, False]]
    assert credited(RECIPES["grpo"], group, valid) == [[None, 0.0, None, None]]
    assert credited(RECIPES["reinforce_rej"], group, valid) == [[None] * 4]


@pytest.mark.parametrize(
    ("name", "groups"),
    [("raft", [[False] * 4, [False] * 2]), ("reinforce_rej", [[False] * 4, [True] * 4]), ("grpo", [])],
)
def test_a_step_may_keep_nothing(name, groups):
    assert credited(RECIPES[name], groups) == [[None] * len(group) for group in groups]


def test_groups_are_found_by_their_prompt_and_not_by_their_place():
    index = torch.tensor([2, 0, 2, 0, 2, 0])
    correct = torch.tensor([True, True, False, True, False, True])
    result = credit(RECIPES["reinforce_rej"], index, correct)
    assert result.keep.tolist() == [True, False] * 3
    assert result.advantages.tolist() == [1.0, 0.0, -1.0, 0.0, -1.0, 0.0]


def make_group(*samples):
    prompt = Prompt("p", "?", np.array([1, 2], np.int32), "3", "test")
    one, logprob = np.array([5], np.int32), np.array([-1.0], np.float32)
    return SampleGroup(
        prompt,
        [Sample(i, one, logprob, "", finish, 0, RewardStatus(status)) for i, (status, finish) in enumerate(samples)],
    )


def test_only_a_correct_verdict_earns_the_reward():
    group = make_group(("correct", "stop"), ("wrong", "stop"), ("no_answer", "stop"), ("truncated", "length"))
    assert credit_groups(RECIPES["reinforce"], [group]).advantages.tolist() == [1.0, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("status", ["timeout", "error"])
def test_timeouts_and_errors_of_the_verifier_are_not_wrong_answers(status):
    group = make_group(("correct", "stop"), (status, "stop"), ("wrong", "stop"), (status, "length"))
    for recipe in (RECIPES["reinforce"], RECIPES["reinforce"].model_copy(update={"dropped": "zero"})):
        result = credit_groups(recipe, [group])
        assert result.keep.tolist() == [True, False, True, False]
        assert result.advantages.tolist() == [1.0, 0.0, -1.0, 0.0]
    result = credit_groups(RECIPES["grpo"], [group])
    half = 0.5 / (0.5**0.5 + 1e-6)
    assert result.advantages.tolist() == pytest.approx([half, 0, -half, 0], rel=1e-6)


def test_the_overlong_mask_removes_truncated_responses_from_loss_and_statistics():
    group = make_group(("correct", "stop"), ("truncated", "length"), ("wrong", "stop"), ("correct", "length"))
    kept = credit_groups(RECIPES["grpo"], [group])
    assert kept.keep.all()
    masked = credit_groups(RECIPES["grpo"].model_copy(update={"overlong": "mask"}), [group])
    assert masked.keep.tolist() == [True, False, True, False]
    assert masked.advantages.tolist() == credit_groups(RECIPES["grpo"], [
        make_group(("correct", "stop"), ("error", "stop"), ("wrong", "stop"), ("error", "stop"))
    ]).advantages.tolist()  # fmt: skip


def test_groups_of_different_sizes_are_numbered_in_order():
    groups = [make_group(("correct", "stop")), make_group(), make_group(("wrong", "stop"), ("correct", "stop"))]
    result = credit_groups(RECIPES["reinforce_rej"], groups)
    assert result.keep.tolist() == [False, True, True]
    assert result.advantages.tolist() == [0.0, -1.0, 1.0]

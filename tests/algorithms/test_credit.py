"""Which samples count and for how much: small cases worked out by hand, and what holds for every recipe."""

import math

import numpy as np
import pytest
import torch

from megarl.algorithms.credit import credit, credit_groups, is_filtered, overlong_penalty
from megarl.algorithms.recipe import Recipe
from megarl.algorithms.recipes import RECIPES
from megarl.types import Prompt, RewardStatus, Sample, SampleGroup

# Groups of four verdicts: 2/4, 0/4, 4/4, 1/4 and 3/4 right.
GROUPS = [
    [True, False, True, False],
    [False, False, False, False],
    [True, True, True, True],
    [False, False, True, False],
    [True, True, False, True],
]
LENGTHS = [[3, 9, 5, 2], [4, 4, 4, 4], [7, 1, 2, 6], [8, 3, 5, 9], [2, 2, 6, 1]]
LIMIT = 10
VARIED = [*RECIPES.values(), *(Recipe.named(name, "minimal_rl") for name in RECIPES)]


def credited(recipe, groups, valid=None, lengths=None, pool=None, greedy=None, ids=None):
    """The advantage of each sample, None where it is not kept, group by group; `pool` and `greedy` have one a group."""

    def flat(values, dtype):
        return torch.tensor([value for group in values for value in group], dtype=dtype)

    def of_groups(values):
        return flat([[value] * len(group) for value, group in zip(values, groups, strict=True)], torch.float64)

    result = credit(
        recipe,
        flat([[i] * len(group) for i, group in zip(ids or range(len(groups)), groups, strict=True)], torch.int64),
        flat(groups, torch.bool),
        valid=None if valid is None else flat(valid, torch.bool),
        lengths=flat([[1] * len(group) for group in groups] if lengths is None else lengths, torch.int64),
        pool_rewards=None if pool is None else of_groups(pool),
        greedy_rewards=of_groups([0.0] * len(groups) if greedy is None else greedy),
        max_response_tokens=LIMIT,
    )
    assert result.advantages.dtype == torch.float64 and result.keep.dtype == torch.bool
    assert result.advantages.isfinite().all() and (result.advantages[~result.keep] == 0).all()
    flat_result = [a if k else None for a, k in zip(result.advantages.tolist(), result.keep.tolist(), strict=True)]
    return [[flat_result.pop(0) for _ in group] for group in groups]


def assert_same(actual, expected):
    assert [len(group) for group in actual] == [len(group) for group in expected]
    for got, wanted in zip(actual, expected, strict=True):
        assert [a is None for a in got] == [e is None for e in wanted]
        kept = [e for e in wanted if e is not None]
        assert [a for a in got if a is not None] == pytest.approx(kept, rel=1e-9, abs=1e-9)


# ---- which samples ---------------------------------------------------------------------------------------------------


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


def test_only_correct_samples_are_positive():
    expected = [[1.0 if right else None for right in group] for group in GROUPS]
    assert_same(credited(RECIPES["raft"], GROUPS), expected)
    assert_same(credited(Recipe(sample_filter="positive", wrong_reward=-1.0), GROUPS), expected)


@pytest.mark.parametrize("name", ["raft", "reinforce_rej", "reinforce_drop_all_wrong"])
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

    def remaining(values):
        return [[v for v, ok in zip(*pair, strict=True) if ok] for pair in zip(values, valid, strict=True)]

    greedy = [1.0, 0.0, 1.0, 1.0, 0.0]
    expected = credited(recipe, remaining(GROUPS), lengths=remaining(LENGTHS), greedy=greedy)
    for group, flags in zip(expected, valid, strict=True):
        for position, ok in enumerate(flags):
            if not ok:
                group.insert(position, None)
    assert_same(credited(recipe, GROUPS, valid, LENGTHS, greedy=greedy), expected)
    # Neither the verdicts nor the lengths of what is masked make a difference.
    flipped = [[r if ok else not r for r, ok in zip(*pair, strict=True)] for pair in zip(GROUPS, valid, strict=True)]
    other = [[x if ok else 10 - x for x, ok in zip(*pair, strict=True)] for pair in zip(LENGTHS, valid, strict=True)]
    assert credited(recipe, flipped, valid, other, greedy=greedy) == credited(
        recipe, GROUPS, valid, LENGTHS, greedy=greedy
    )


def test_a_timeout_can_make_a_mixed_group_all_right():
    valid = [[True, True, False, True]]
    assert credited(RECIPES["reinforce_rej"], [[True, True, False, True]], valid) == [[None] * 4]


def test_a_group_of_one_valid_sample_has_nothing_to_compare():
    valid = [[False, True, False, False]]
    group = [[True, True, False, False]]
    for name in ("grpo", "rloo", "opo", "maxrl", "dr_grpo", "kimi_k2"):
        assert credited(RECIPES[name], group, valid) == [[None, 0.0, None, None]]
    for name in ("reinforce_rej", "dapo", "scale_rl", "iterative_dpo"):
        assert credited(RECIPES[name], group, valid) == [[None] * 4]


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("raft", [[False] * 4, [False] * 2]),
        ("reinforce_rej", [[False] * 4, [True] * 4]),
        ("scale_rl", [[False] * 4, [True] * 4]),
        ("iterative_dpo", [[False] * 4, [True] * 4]),
        *((name, []) for name in RECIPES),
    ],
)
def test_a_step_may_keep_nothing(name, groups):
    assert credited(RECIPES[name], groups) == [[None] * len(group) for group in groups]


# ---- baselines and scales --------------------------------------------------------------------------------------------


def test_a_mean_without_a_scale_centres_the_rewards():
    recipe = Recipe(wrong_reward=-1.0, baseline="mean")
    assert_same(credited(recipe, [[True, False, False, False]]), [[1.5, -0.5, -0.5, -0.5]])


def test_each_sample_is_compared_with_the_mean_of_the_others():
    expected = [[1.0, -1 / 3, -1 / 3, -1 / 3], [0.0, 0.0]]
    assert_same(credited(RECIPES["rloo"], [[True, False, False, False], [True, True]]), expected)
    signed = Recipe(wrong_reward=-1.0, baseline="leave_one_out")
    assert_same(credited(signed, [[True, False, False, False]]), [[2.0, -2 / 3, -2 / 3, -2 / 3]])


def test_the_length_mean_weighs_rewards_by_the_tokens_they_took():
    # (3 + 5) right tokens of 20.
    result = credited(RECIPES["opo"], [[True, False, True, False]], lengths=[[3, 10, 5, 2]])
    assert_same(result, [[0.6, -0.4, 0.6, -0.4]])
    signed = Recipe(wrong_reward=-1.0, baseline="length_mean")  # (8 - 12) / 20
    result = credited(signed, [[True, False, True, False]], lengths=[[3, 10, 5, 2]])
    assert_same(result, [[1.2, -0.8, 1.2, -0.8]])


def test_the_pool_mean_is_of_everything_that_was_sampled():
    recipe, group = RECIPES["reinforce_ada"], [[True, True, False, False]]
    assert_same(credited(recipe, group, pool=[0.125]), [[0.875, 0.875, -0.125, -0.125]])
    assert_same(credited(recipe, group), [[0.5, 0.5, -0.5, -0.5]])  # nothing more was sampled
    signed = recipe.model_copy(update={"wrong_reward": -1.0})  # the pool's mean reward is then -0.75
    assert_same(credited(signed, group, pool=[0.125]), [[1.75, 1.75, -0.25, -0.25]])


def test_the_greedy_response_is_the_baseline_of_its_prompt():
    groups = [[True, False], [True, False]]
    assert_same(credited(RECIPES["remax"], groups, greedy=[1.0, 0.0]), [[0.0, -1.0], [1.0, 0.0]])
    signed = Recipe(wrong_reward=-1.0, baseline="greedy")
    assert_same(credited(signed, groups, greedy=[1.0, 0.0]), [[0.0, -2.0], [2.0, 0.0]])


def test_the_batch_token_mean_and_deviation_count_tokens_of_what_is_learned_from():
    # 6 of 8 tokens are right: mean 0.75, variance (6 * 0.25^2 + 2 * 0.75^2) / 7.
    groups, lengths = [[True, False], [True]], [[2, 2], [4]]
    std = math.sqrt(1.5 / 7) + 1e-6
    recipe = RECIPES["reinforce_plus_plus"]
    assert_same(credited(recipe, groups, lengths=lengths), [[0.25 / std, -0.75 / std], [0.25 / std]])
    # Samples without a verdict and filtered prompts are not among them.
    more = credited(
        recipe.model_copy(update={"group_filter": "all_wrong"}),
        [*groups, [False], [True]],
        valid=[[True, True], [True], [True], [False]],
        lengths=[*lengths, [9], [9]],
    )
    assert_same(more, [[0.25 / std, -0.75 / std], [0.25 / std], [None], [None]])


def test_the_batch_deviation_is_of_the_advantages_that_are_learned_from():
    # Advantages 0.5, -0.5, 0.25, 0.25, 0.25, -0.75: mean 0, sum of squares 1.25.
    groups = [[True, False], [True, True, True, False], [True, True], [False]]
    expected = [[0.5, -0.5], [0.25, 0.25, 0.25, -0.75], [None, None], [None]]
    std = math.sqrt(1.25 / 5) + 1e-6
    assert_same(
        credited(RECIPES["scale_rl"], groups), [[a if a is None else a / std for a in group] for group in expected]
    )
    # Prompts that are not filtered bring their zeros: 9 advantages instead of 6.
    kept = RECIPES["scale_rl"].model_copy(update={"group_filter": "none"})
    std = math.sqrt(1.25 / 8) + 1e-6
    assert_same(credited(kept, groups), [[(a or 0.0) / std for a in group] for group in expected])


def test_the_group_mean_divides_by_the_pass_rate():
    result = credited(RECIPES["maxrl"], [[True, False, False, False], [False, False], [True, True]])
    assert_same(result, [[0.75 / 0.250001, *[-0.25 / 0.250001] * 3], [0.0, 0.0], [0.0, 0.0]])


def test_a_deviation_divides_by_one_less_than_the_count():
    one_right = credited(RECIPES["grpo"], [[True, False, False, False]])
    assert_same(one_right, [[0.75 / 0.500001, -0.25 / 0.500001, -0.25 / 0.500001, -0.25 / 0.500001]])
    population = RECIPES["grpo"].model_copy(update={"std_ddof": 0})
    assert_same(credited(population, [[True, False]]), [[0.5 / 0.500001, -0.5 / 0.500001]])


def test_scale_eps_is_added_to_the_deviation_and_not_to_the_variance():
    recipe = RECIPES["grpo"].model_copy(update={"scale_eps": 0.5})
    assert_same(credited(recipe, [[True, False, False, False]]), [[0.75, -0.25, -0.25, -0.25]])


def test_a_scale_without_a_mean_keeps_the_sign_of_the_reward():
    expected = [[1 / 1.000001, *[-1 / 1.000001] * 3], [None] * 4]  # the deviation of 1, -1, -1, -1 is 1
    assert_same(credited(RECIPES["reinforce_rej_std"], [[True, False, False, False], [True] * 4]), expected)


@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if r.baseline in ("mean", "leave_one_out")])
def test_equal_rewards_have_no_advantage_at_all(name):
    recipe = RECIPES[name].model_copy(update={"group_filter": "none"})
    for rewards in ([True] * 3, [False] * 7):
        assert credited(recipe, [rewards]) == [[0.0] * len(rewards)]


def test_with_a_critic_advantages_are_the_rewards():
    assert credited(RECIPES["ppo"], [[True, False]]) == [[1.0, 0.0]]
    assert credited(RECIPES["ppo"].model_copy(update={"wrong_reward": -1.0}), [[True, False]]) == [[1.0, -1.0]]


# ---- overlong --------------------------------------------------------------------------------------------------------


def test_the_soft_penalty_falls_over_the_last_tokens_before_the_limit():
    lengths = torch.tensor([0, 80, 81, 90, 99, 100, 101, 500])
    expected = [0.0, 0.0, -0.05, -0.5, -0.95, -1.0, -1.0, -1.0]
    assert overlong_penalty(lengths, 100, 20).tolist() == pytest.approx(expected)
    assert overlong_penalty(lengths, 100, None).tolist() == pytest.approx(expected)  # a fifth of the limit
    assert overlong_penalty(torch.tensor([96, 98]), 100, 4).tolist() == [0.0, -0.5]
    assert overlong_penalty(torch.tensor([2, 3]), 3, None).tolist() == [0.0, -1.0]  # of one token at least


def test_the_soft_penalty_is_part_of_the_reward_and_so_of_the_baseline():
    plain = Recipe(overlong="soft", overlong_cache_tokens=4)
    group, lengths = [[True, True, False, False]], [[6, 8, 9, 10]]
    assert_same(credited(plain, group, lengths=lengths), [[1.0, 0.5, -0.75, -1.0]])
    centred = plain.model_copy(update={"baseline": "mean"})
    mean = (1.0 + 0.5 - 0.75 - 1.0) / 4
    expected = [[1.0 - mean, 0.5 - mean, -0.75 - mean, -1.0 - mean]]
    assert_same(credited(centred, group, lengths=lengths), expected)


def test_in_dapo_a_right_answer_at_the_limit_is_worth_more_than_a_wrong_one():
    result = credit(
        RECIPES["dapo"],
        torch.zeros(3, dtype=torch.int64),
        torch.tensor([True, True, False]),
        lengths=torch.tensor([100, 50, 50]),
        max_response_tokens=100,
    )
    assert result.advantages.tolist() == pytest.approx([0.0, 1.0, -1.0], abs=1e-5)


def test_the_soft_penalty_leaves_filters_to_the_verdicts():
    lengths = [[1, 10], [10, 1], [10, 10]]
    kept = credited(RECIPES["dapo"], [[True, True], [False, False], [True, False]], lengths=lengths)
    assert [[a is None for a in group] for group in kept] == [[True] * 2, [True] * 2, [False] * 2]


# ---- what credit is given --------------------------------------------------------------------------------------------


def test_groups_are_found_by_their_prompt_and_not_by_their_place():
    ids = torch.tensor([2, 0, 2, 0, 2, 0])
    correct = torch.tensor([True, True, False, True, False, True])
    result = credit(RECIPES["reinforce_rej"], ids, correct)
    assert result.keep.tolist() == [True, False] * 3
    assert result.advantages.tolist() == [1.0, 0.0, -1.0, 0.0, -1.0, 0.0]


@pytest.mark.parametrize("name", RECIPES)
def test_prompts_may_have_any_numbers(name):
    greedy = [1.0, 0.0, 1.0, 1.0, 0.0]
    expected = credited(RECIPES[name], GROUPS, lengths=LENGTHS, greedy=greedy)
    assert credited(RECIPES[name], GROUPS, lengths=LENGTHS, greedy=greedy, ids=[10**12, -4, 0, 7, -(10**9)]) == expected


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "iterative_dpo"])  # pairs the first of each kind
def test_the_order_of_the_samples_of_a_step_makes_no_difference(name):
    ids = torch.arange(5).repeat_interleave(4)
    given = {
        "prompt_ids": ids,
        "rewards": torch.tensor(GROUPS).flatten(),
        "lengths": torch.tensor(LENGTHS).flatten(),
        "greedy_rewards": torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])[ids],
    }
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    result = credit(RECIPES[name], **given, max_response_tokens=LIMIT)
    shuffled = credit(RECIPES[name], **{k: v[order] for k, v in given.items()}, max_response_tokens=LIMIT)
    assert torch.equal(shuffled.keep, result.keep[order])
    torch.testing.assert_close(shuffled.advantages, result.advantages[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.float64])
def test_rewards_are_one_and_zero_of_any_type(dtype):
    rewards = torch.tensor([1, 0, 0]).to(dtype)
    result = credit(RECIPES["reinforce"], torch.zeros(3, dtype=torch.int64), rewards)
    assert result.advantages.tolist() == [1.0, -1.0, -1.0]


@pytest.mark.parametrize("rewards", [[1.0, -1.0], [0.5, 1.0], [2, 0], [float("nan"), 0.0]])
def test_other_rewards_are_refused_with_the_field_that_changes_them(rewards):
    with pytest.raises(ValueError, match="must be 1 .* or 0 .*recipe.wrong_reward"):
        credit(RECIPES["reinforce"], torch.zeros(2, dtype=torch.int64), torch.tensor(rewards))


@pytest.mark.parametrize(
    ("recipe", "missing"),
    [
        (RECIPES["opo"], "lengths"),
        (RECIPES["reinforce_plus_plus"], "lengths"),
        (RECIPES["dapo"], "max_response_tokens"),
        (Recipe(baseline="mean", scale="batch_token_std"), "lengths"),
        (RECIPES["remax"], "greedy_rewards"),
    ],
)
def test_what_a_recipe_needs_and_was_not_given_is_named(recipe, missing):
    with pytest.raises(ValueError, match=missing):
        credit(recipe, torch.zeros(2, dtype=torch.int64), torch.tensor([True, False]))


def test_a_soft_penalty_needs_the_response_limit():
    with pytest.raises(ValueError, match="max_response_tokens"):
        credit(
            Recipe(overlong="soft"),
            torch.zeros(2, dtype=torch.int64),
            torch.tensor([True, False]),
            lengths=torch.ones(2, dtype=torch.int64),
        )


# ---- pairs -----------------------------------------------------------------------------------------------------------


def test_the_first_correct_is_paired_with_the_first_wrong_sample_of_each_prompt():
    expected = [[1.0, -1.0, None, None], [None] * 4, [None] * 4, [-1.0, None, 1.0, None], [1.0, None, -1.0, None]]
    assert credited(RECIPES["iterative_dpo"], GROUPS) == expected


def test_pairs_pass_over_samples_without_a_verdict():
    valid = [[False, True, True, True], [True, True, False, True]]
    result = credited(RECIPES["iterative_dpo"], [[True, False, True, True], [True, True, False, True]], valid)
    assert result == [[None, -1.0, 1.0, None], [None] * 4]


def test_pairs_of_prompts_that_are_interleaved():
    result = credit(
        RECIPES["iterative_dpo"],
        torch.tensor([9, 4, 9, 4, 9, 4]),
        torch.tensor([False, True, False, True, True, False]),
    )
    assert result.advantages.tolist() == [-1.0, 1.0, 0.0, 0.0, 1.0, -1.0]
    assert result.keep.tolist() == [True, True, False, False, True, True]


# ---- sample groups ---------------------------------------------------------------------------------------------------


def make_samples(*samples):
    """One sample for each (status, finish reason) or (status, finish reason, length)."""
    made = []
    for i, (status, finish, *length) in enumerate(samples):
        ids = np.full(length[0] if length else 1, 5, np.int32)
        made.append(
            Sample(
                i,
                ids,
                np.full(len(ids), -1.0, np.float32),
                "",
                finish,
                np.zeros(len(ids), np.int32),
                RewardStatus(status),
            )
        )
    return made


def make_group(*samples, unused=(), greedy=None):
    prompt = Prompt("p", "?", np.array([1, 2], np.int32), "3", "test")
    return SampleGroup(
        prompt, make_samples(*samples), make_samples(*unused), make_samples(greedy)[0] if greedy else None
    )


RIGHT, WRONG, CUT = ("correct", "stop"), ("wrong", "stop"), ("truncated", "length")


def test_only_a_correct_verdict_earns_the_reward():
    group = make_group(RIGHT, WRONG, ("no_answer", "stop"), CUT)
    assert credit_groups(RECIPES["reinforce"], [group]).advantages.tolist() == [1.0, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("status", ["timeout", "error"])
def test_timeouts_and_errors_of_the_verifier_are_not_wrong_answers(status):
    group = make_group(RIGHT, (status, "stop"), WRONG, (status, "length"))
    for recipe in (RECIPES["reinforce"], RECIPES["reinforce"].model_copy(update={"dropped": "zero"})):
        result = credit_groups(recipe, [group])
        assert result.keep.tolist() == [True, False, True, False]
        assert result.advantages.tolist() == [1.0, 0.0, -1.0, 0.0]
    result = credit_groups(RECIPES["grpo"], [group])
    half = 0.5 / (0.5**0.5 + 1e-6)
    assert result.advantages.tolist() == pytest.approx([half, 0, -half, 0])


def test_the_overlong_mask_removes_truncated_responses_from_the_loss_and_not_from_the_statistics():
    group = make_group(RIGHT, CUT, WRONG, ("correct", "length"))
    whole = credit_groups(RECIPES["grpo"], [group])
    assert whole.keep.all()
    masked = credit_groups(RECIPES["grpo"].model_copy(update={"overlong": "mask"}), [group])
    assert masked.keep.tolist() == [True, False, True, False]
    assert masked.advantages.tolist() == [whole.advantages[0], 0.0, whole.advantages[2], 0.0]


def test_the_lengths_of_a_group_are_those_of_its_responses():
    group = make_group(("correct", "stop", 3), ("wrong", "stop", 10), ("correct", "stop", 5), ("wrong", "stop", 2))
    assert credit_groups(RECIPES["opo"], [group]).advantages.tolist() == pytest.approx([0.6, -0.4, 0.6, -0.4])
    soft = Recipe(overlong="soft", overlong_cache_tokens=4)
    assert credit_groups(soft, [group], max_response_tokens=10).advantages.tolist() == [1.0, -1.0, 1.0, 0.0]


def test_samples_that_are_not_used_count_in_the_pool_and_nowhere_else():
    one = make_group(RIGHT, WRONG, unused=[WRONG, ("timeout", "stop"), WRONG, CUT, WRONG, WRONG, WRONG])
    other = make_group(RIGHT, WRONG)
    result = credit_groups(RECIPES["reinforce_ada"], [one, other])
    assert result.keep.tolist() == [True] * 4
    assert result.advantages.tolist() == [0.875, -0.125, 0.5, -0.5]  # 1 of the 8 with a verdict
    assert credit_groups(RECIPES["dr_grpo"], [one, other]).advantages.tolist() == [0.5, -0.5] * 2


def test_the_greedy_response_of_a_group_is_its_baseline_and_no_sample():
    groups = [
        make_group(RIGHT, WRONG, greedy=RIGHT),
        make_group(RIGHT, WRONG, greedy=WRONG),
        make_group(RIGHT, WRONG, greedy=CUT),
        make_group(RIGHT, WRONG, greedy=("timeout", "stop")),  # says nothing, so there is nothing to compare with
    ]
    result = credit_groups(RECIPES["remax"], groups)
    assert result.advantages.tolist() == [0.0, -1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert result.keep.tolist() == [True] * 6 + [False] * 2


def test_a_missing_greedy_response_is_an_error_and_not_a_wrong_answer():
    with pytest.raises(ValueError, match="greedy_rewards"):
        credit_groups(RECIPES["remax"], [make_group(RIGHT, WRONG, greedy=RIGHT), make_group(RIGHT, WRONG)])


def test_groups_of_different_sizes_are_numbered_in_order():
    groups = [make_group(RIGHT), make_group(), make_group(WRONG, RIGHT)]
    result = credit_groups(RECIPES["reinforce_rej"], groups)
    assert result.keep.tolist() == [False, True, True]
    assert result.advantages.tolist() == [0.0, -1.0, 1.0]


@pytest.mark.parametrize("recipe", VARIED, ids=lambda recipe: f"{recipe.name} {recipe.dropped}")
def test_a_step_without_groups_keeps_nothing(recipe):
    result = credit_groups(recipe, [], max_response_tokens=LIMIT)
    assert len(result.keep) == len(result.advantages) == 0


@pytest.mark.parametrize(
    ("group_filter", "filtered"),
    [
        ("none", [False, False, False]),
        ("all_wrong", [False, True, False]),
        ("all_correct", [False, False, True]),
        ("both", [False, True, True]),
    ],
)
def test_a_prompt_is_filtered_where_credit_keeps_none_of_it(group_filter, filtered):
    recipe = Recipe(group_filter=group_filter)
    groups = [make_group(RIGHT, WRONG), make_group(WRONG, CUT), make_group(RIGHT, RIGHT)]
    assert [is_filtered(recipe, group) for group in groups] == filtered
    assert [not credit_groups(recipe, [group]).keep.any() for group in groups] == filtered


def test_a_prompt_is_filtered_by_its_verdicts_alone():
    recipe = Recipe(group_filter="both", overlong="mask")
    assert is_filtered(recipe, make_group(RIGHT, ("timeout", "stop")))
    assert not is_filtered(recipe, make_group(RIGHT, CUT))  # a truncated response is a wrong answer
    assert is_filtered(Recipe(), make_group(("timeout", "stop"), ("error", "stop")))  # nothing to learn from
    assert is_filtered(recipe, make_group(RIGHT, RIGHT, unused=[WRONG]))

"""Metrics of hand-made samples and updates, against values worked out by hand."""

import dataclasses
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megarl.algorithms.mismatch import add_mismatch, mismatch_metrics
from megarl.algorithms.recipe import Recipe
from megarl.algorithms.recipes import RECIPES
from megarl.batch import Batch, Credit, Kept, Update
from megarl.data.plan import Rules, Share, make_plan
from megarl.metrics import evaluation_metrics, sample_metrics, update_metrics
from megarl.sums import QUANTILE_ERROR, Sums
from megarl.types import Prompt, RewardStatus, Rollout, Sample, SampleGroup

KIND = {"c": "correct", "w": "wrong", "n": "no_answer", "t": "truncated", "o": "timeout", "e": "error"}


def make_samples(*samples):
    """One sample for each (letter of KIND, response length)."""
    made = []
    for i, (letter, length) in enumerate(samples):
        finish = "length" if letter == "t" else "stop"
        ids, logprobs = np.arange(length, dtype=np.int32), np.zeros(length, np.float32)
        made.append(Sample(i, ids, logprobs, "", finish, np.zeros(len(ids), np.int32), RewardStatus(KIND[letter])))
    return made


def group(name, *samples, unused=(), greedy=()):
    """A prompt of 2 tokens with samples for each (letter of KIND, response length)."""
    prompt = Prompt(name, "", np.array([7, 8], np.int32), "", "test")
    return SampleGroup(prompt, make_samples(*samples), make_samples(*unused), next(iter(make_samples(*greedy)), None))


GROUPS = [
    group("all correct", ("c", 1), ("c", 3)),
    group("mixed", ("c", 2), ("w", 4)),
    group("all wrong", ("t", 8), ("n", 2)),
    group("no verdict", ("o", 1), ("e", 3)),
]


def plan_of(groups, credit):
    return make_plan(Kept(groups, credit), Rules(1, 1000))


def test_sample_metrics_count_groups_verdicts_and_lengths_and_what_was_kept():
    keep = torch.tensor([False, False, True, True, False, False, False, False])
    credit = Credit(keep, torch.zeros(8), rewards=torch.tensor([1.0, 1.0, 1.0, -1.0, -1.5, -1.0, 0.0, 0.0]))
    plan = plan_of(GROUPS, credit)
    assert sample_metrics(Rollout(GROUPS), credit, plan, 0) == {
        "reward/mean": -0.5 / 8,
        "reward/pass_rate": 3 / 8,
        "groups/all_correct": 1 / 4,
        "groups/all_wrong": 2 / 4,
        "groups/mixed": 1 / 4,
        "samples/generated": 8,
        "engines/restarts": 0,
        "tokens/generated": 24,
        "samples/kept": 2,
        "samples/rejected": 0,
        "tokens/kept": 6,
        "tokens/pass": 8,  # with the 2 tokens of each prompt, without the first: it is predicted by none
        "response/length": 3,
        "response/truncated": 1 / 8,
        "reward/correct": 3 / 8,
        **{f"reward/{status}": 1 / 8 for status in ("wrong", "no_answer", "truncated", "timeout", "error")},
        "reward/alarm": 1,
        "staleness/mean": 0,
        "staleness/max": 0,
    }


def test_sample_metrics_of_a_step_that_keeps_nothing_are_zero_where_they_count_what_was_kept():
    credit = Credit(torch.zeros(8, dtype=torch.bool), torch.zeros(8), torch.zeros(8))
    plan = plan_of(GROUPS, credit)
    metrics = sample_metrics(Rollout(GROUPS), credit, plan, 0)
    assert metrics["samples/kept"] == metrics["tokens/kept"] == 0
    assert metrics["samples/generated"] == 8


def test_replaced_groups_count_as_sampled_and_not_as_kept():
    credit = Credit(torch.tensor([True, True]), torch.zeros(2), torch.zeros(2))
    plan = plan_of(GROUPS[1:2], credit)
    metrics = sample_metrics(Rollout(GROUPS[1:2], replaced=[GROUPS[0], *GROUPS[2:]]), credit, plan, 0)
    assert metrics == sample_metrics(Rollout(GROUPS), credit, plan, 0)
    assert (metrics["samples/generated"], metrics["samples/kept"], metrics["tokens/kept"]) == (8, 2, 6)
    assert metrics["groups/mixed"] == 1 / 4


def test_unused_samples_count_as_sampled_and_in_their_groups_verdicts():
    groups = [
        group("became mixed", ("c", 2), ("c", 4), unused=[("w", 6), ("t", 8)]),
        group("all wrong", ("w", 1), ("w", 3), unused=[("w", 2), ("o", 6)]),
        group("all correct", ("c", 1), ("c", 3)),
    ]
    credit = Credit(torch.ones(6, dtype=torch.bool), torch.zeros(6), torch.zeros(6))
    plan = plan_of(groups, credit)
    metrics = sample_metrics(Rollout(groups), credit, plan, 0)
    assert metrics["reward/pass_rate"] == metrics["reward/correct"] == 4 / 10
    assert (metrics["reward/wrong"], metrics["reward/truncated"], metrics["reward/timeout"]) == (4 / 10, 1 / 10, 1 / 10)
    assert metrics["groups/mixed"] == metrics["groups/all_wrong"] == metrics["groups/all_correct"] == 1 / 3
    assert (metrics["samples/generated"], metrics["tokens/generated"]) == (10, 36)
    assert (metrics["samples/kept"], metrics["tokens/kept"]) == (6, 14)
    assert (metrics["response/length"], metrics["response/truncated"]) == (3.6, 1 / 10)


def test_greedy_responses_cost_tokens_and_say_nothing_of_the_policy_that_samples():
    groups = [group("a", ("w", 2), ("w", 4), greedy=[("c", 30)]), group("b", ("c", 2), ("w", 4), greedy=[("t", 50)])]
    plain = [group("a", ("w", 2), ("w", 4)), group("b", ("c", 2), ("w", 4))]
    credit = Credit(torch.ones(4, dtype=torch.bool), torch.zeros(4), torch.zeros(4))
    plan = plan_of(groups, credit)
    with_greedy, without = (sample_metrics(Rollout(g), credit, plan, 0) for g in (groups, plain))
    assert (with_greedy.pop("samples/generated"), without.pop("samples/generated")) == (6, 4)
    assert (with_greedy.pop("tokens/generated"), without.pop("tokens/generated")) == (92, 12)
    assert with_greedy == without


def minibatch(advantages, old_ratio=None, ref=None, **given):
    """Sequences of one prompt token and two response tokens; 99 in a per-token list marks what must not be read."""
    count = len(advantages)
    return Batch(
        tokens=torch.zeros(3 * count, dtype=torch.int64),
        cu_seqlens=torch.arange(count + 1) * 3,
        mask=torch.tensor([0.0, 1.0, 1.0] * count),
        advantages=torch.tensor(advantages).repeat_interleave(3),
        prompt_index=torch.zeros(count, dtype=torch.int64),
        prompt_lengths=torch.ones(count, dtype=torch.int64),
        old_logprobs=None if old_ratio is None else -torch.tensor(old_ratio).log(),  # of a policy with log-probs 0
        ref_logprobs=None if ref is None else torch.tensor(ref),
        **{name: torch.tensor(values) for name, values in given.items()},
    )


def share_of(batch):
    return Share(batch, [list(range(len(batch)))])


def metrics_of(recipe, updates):
    return update_metrics(recipe, [(share_of(batch), made) for batch, made in updates])


def update(entropy, loss=0.0, grad_norm=0.0, lr=0.0, **critic):
    return Update(torch.zeros(len(entropy)), torch.tensor(entropy), loss, grad_norm, lr, **critic)


PPO = Recipe(ratio="token", clip="ppo", clip_low=0.2, clip_high=0.3)
PLAIN = [99.0, 1.0, 1.0]


def test_update_metrics_average_over_updates_and_over_response_tokens():
    updates = [
        (minibatch([1.0]), update([99.0, 1.0, 2.0], loss=0.5, grad_norm=1.0, lr=0.25)),
        (minibatch([1.0, 1.0]), update([99.0, 3.0, 4.0, 99.0, 6.0, 8.0], loss=1.5, grad_norm=2.0, lr=0.125)),
    ]
    assert metrics_of(RECIPES["raft"], updates) == {
        "updates/count": 2,
        "updates/skipped": 0,
        "policy/entropy": 24 / 6,  # per token, not per update
        "optim/loss": 1.0,
        "optim/grad_norm": 1.5,
        "optim/lr": 0.125,  # the last
    }


def test_a_step_without_updates_is_counted_as_skipped():
    for recipe in RECIPES.values():
        assert metrics_of(recipe, []) == {"updates/count": 0, "updates/skipped": 1}


def test_ratios_are_taken_against_the_old_policy_and_clip_only_on_the_side_that_the_advantage_pushes_to():
    down, up = [99.0, 0.5, 1.0], [99.0, 2.0, 1.25]  # 1.25 is inside 1.3
    first = minibatch([-1.0, 1.0, -1.0, 1.0], old_ratio=[*down, *down, *up, *up])
    second = minibatch([0.0], old_ratio=[99.0, 0.25, 4.0])  # advantage 0: nothing to clip
    metrics = metrics_of(PPO, [(first, update([0.0] * 12)), (second, update([0.0] * 3))])
    assert metrics["ratio/mean"] == pytest.approx((2 * 1.5 + 2 * 3.25 + 4.25) / 10)
    assert metrics["ratio/max"] == pytest.approx(4.0)
    assert metrics["ratio/clipped_low"] == pytest.approx(1 / 10)
    assert metrics["ratio/clipped_high"] == pytest.approx(1 / 10)


def test_without_old_logprobs_the_ratio_is_one_and_nothing_is_clipped():
    metrics = metrics_of(PPO, [(minibatch([-1.0, 1.0]), update(PLAIN * 2))])
    assert (metrics["ratio/mean"], metrics["ratio/max"]) == (1, 1)
    assert (metrics["ratio/clipped_low"], metrics["ratio/clipped_high"]) == (0, 0)


def test_a_ratio_that_is_not_clipped_has_no_clip_fractions():
    metrics = metrics_of(Recipe(ratio="token"), [(minibatch([1.0], old_ratio=[99.0, 1.0, 3.0]), update(PLAIN))])
    assert metrics["ratio/mean"] == pytest.approx(2.0)
    assert not any("clipped" in name for name in metrics)


@pytest.mark.parametrize(
    ("recipe", "low", "high"),
    [
        # Ratios 0.5 and 4 with A > 0, 0.5 and 1 with A < 0, at old probability 1: sequence means 1.41 and 0.71.
        (PPO, 1 / 4, 1 / 4),
        (Recipe(ratio="token"), None, None),
        (Recipe(ratio="token", clip="cispo", clip_high=3.5), 0, 0),
        (Recipe(ratio="token", clip="cispo", clip_high=0.5), 0, 1 / 4),
        (Recipe(ratio="sequence", clip="ppo"), 2 / 4, 2 / 4),
        (Recipe(ratio="sequence", clip="ppo", clip_low=0.3, clip_high=0.5), 0, 0),
        (Recipe(ratio="sequence", clip="token_log", clip_low=0.6, clip_high=1.3), 1 / 4, 1 / 4),
        (Recipe(ratio="token", clip="dppo_tv", clip_low=0.4, clip_high=2.9), 1 / 4, 1 / 4),
    ],
    ids=lambda value: getattr(value, "clip", None),
)
def test_each_clip_counts_the_tokens_that_it_holds(recipe, low, high):
    batch = minibatch([1.0, -1.0], old_ratio=[99.0, 0.5, 4.0, 99.0, 0.5, 1.0])
    logprobs = batch.old_logprobs.neg()
    batch.old_logprobs = torch.zeros_like(logprobs)  # probability 1, so that a ratio is also a distance
    made = update(PLAIN * 2)
    metrics = metrics_of(recipe, [(batch, dataclasses.replace(made, logprobs=logprobs))])
    found = (metrics.get("ratio/clipped_low"), metrics.get("ratio/clipped_high"))
    assert found == ((None, None) if low is None else (pytest.approx(low), pytest.approx(high)))


@pytest.mark.parametrize(
    ("recipe", "has_ratio", "has_clip"),
    [
        (RECIPES["raft"], False, False),
        (RECIPES["maxrl"], False, False),
        (RECIPES["raft_pp_no_clip"], True, False),
        (RECIPES["raft_pp"], True, True),
        (RECIPES["cispo"], True, True),
        (RECIPES["gspo"], True, True),
        (RECIPES["gmpo"], True, True),
        (RECIPES["dppo"], True, True),
        (RECIPES["sapo"], True, False),
        (RECIPES["kimi_k2"], True, False),
        (RECIPES["iterative_dpo"], True, False),
        (Recipe(mismatch="token_tis"), True, False),
    ],
)
def test_ratios_are_shown_where_the_recipe_compares_with_the_old_policy(recipe, has_ratio, has_clip):
    batch = minibatch([1.0], old_ratio=[99.0, 0.5, 4.0], correction=[0.0, 1.0, 1.0])
    metrics = metrics_of(recipe, [(batch, update(PLAIN))])
    assert ("ratio/mean" in metrics, "ratio/max" in metrics) == (has_ratio, has_ratio)
    assert ("ratio/clipped_low" in metrics, "ratio/clipped_high" in metrics) == (has_clip, has_clip)


def test_the_critics_values_are_measured_against_what_they_should_be():
    values = minibatch([1.0, -1.0], values=[99.0, 0.5, 0.5, 99.0, 0.0, 0.5], returns=[99.0, 1.0, 1.0, 99.0, 0.0, 0.0])
    more = minibatch([1.0], values=[99.0, 1.0, 1.0], returns=[99.0, 1.0, 1.0])
    updates = [
        (values, update(PLAIN * 2, value_loss=0.5, value_grad_norm=2.0)),
        (more, update(PLAIN, value_loss=0.25, value_grad_norm=1.0)),
    ]
    metrics = metrics_of(RECIPES["ppo"], updates)
    assert (metrics["critic/value_loss"], metrics["critic/value_grad_norm"]) == (0.375, 1.5)
    # Errors 0.5, 0.5, 0, -0.5, 0, 0 (variance 0.142), returns 1, 1, 0, 0, 1, 1 (variance 4 / 15).
    assert metrics["critic/explained_variance"] == pytest.approx(1 - (0.75 - 0.25 / 6) / 5 / (4 / 15))
    assert not any(name.startswith("critic/") for name in metrics_of(RECIPES["grpo"], [(with_ref(), update(PLAIN))]))


def with_ref():
    return minibatch([1.0], ref=[99.0, 0.0, 0.0])


@pytest.mark.parametrize("returns", [[99.0, 0.0, 0.0], [99.0, 1.0, 1.0]])
def test_the_explained_variance_is_a_number_where_all_returns_agree(returns):
    batch = minibatch([1.0], values=[99.0, 0.5, 0.25], returns=returns)
    metrics = metrics_of(RECIPES["ppo"], [(batch, update(PLAIN, value_loss=0.0, value_grad_norm=0.0))])
    assert math.isfinite(metrics["critic/explained_variance"])


def test_the_explained_variance_of_a_single_token_is_a_number():
    batch = minibatch([1.0], values=[99.0, 0.5, 99.0], returns=[99.0, 1.0, 99.0])
    batch.mask = torch.tensor([0.0, 1.0, 0.0])
    metrics = metrics_of(RECIPES["ppo"], [(batch, update(PLAIN, value_loss=0.0, value_grad_norm=0.0))])
    assert math.isfinite(metrics["critic/explained_variance"])


def test_the_mean_correction_of_mismatch_is_over_response_tokens():
    recipe = Recipe(mismatch="token_tis")
    first = minibatch([1.0], correction=[99.0, 1.0, 2.0])
    second = minibatch([1.0, 1.0], correction=[99.0, 0.5, 0.5, 99.0, 0.0, 1.0])
    metrics = metrics_of(recipe, [(first, update(PLAIN)), (second, update(PLAIN * 2))])
    assert metrics["mismatch/correction"] == pytest.approx(5 / 6)
    assert "mismatch/correction" not in metrics_of(Recipe(), [(first, update(PLAIN))])


def test_kl_is_estimated_from_the_response_tokens():
    # log(policy / reference) = log 2 and -log 2, so k3 = 1/2 + log 2 - 1 and 2 - log 2 - 1.
    batch = minibatch([1.0], ref=[99.0, -math.log(2), math.log(2)])
    metrics = metrics_of(Recipe(kl_coef=0.1), [(batch, update(PLAIN))])
    assert metrics["policy/kl_k1"] == pytest.approx(0, abs=1e-7)
    assert metrics["policy/kl_k3"] == pytest.approx(0.25, abs=1e-6)
    measured = metrics_of(RECIPES["raft"], [(batch, update(PLAIN))])  # no KL term, but the reference is kept
    assert measured["policy/kl_k3"] == metrics["policy/kl_k3"]
    assert "policy/kl_k1" not in metrics_of(RECIPES["raft"], [(minibatch([1.0]), update(PLAIN))])


def test_samples_rejected_for_their_mismatch_are_counted_and_not_kept():
    credit = Credit(torch.tensor([True, True]), torch.zeros(2), torch.zeros(2))
    plan = plan_of(GROUPS[1:2], credit)
    plan = replace(plan, responses=plan.responses * torch.tensor([0, 1]))
    metrics = sample_metrics(Rollout(GROUPS[1:2]), credit, plan, 0)
    assert (metrics["samples/kept"], metrics["samples/rejected"], metrics["tokens/kept"]) == (1, 1, 4)


def mismatch(logprobs, rollout_logprobs, mask):
    sums = Sums()
    add_mismatch(sums, logprobs, rollout_logprobs, mask)
    return mismatch_metrics(sums)


def test_mismatch_is_that_of_the_masked_tokens():
    learner = torch.tensor([99.0, 0.0, math.log(3), 99.0])
    metrics = mismatch(learner, torch.zeros(4), torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert metrics.pop("mismatch/p99") == pytest.approx(math.log(3), rel=QUANTILE_ERROR)
    assert metrics == pytest.approx(
        {
            "mismatch/mean": math.log(3) / 2,
            "mismatch/max": math.log(3),
            "mismatch/k3": (3 - 1 - math.log(3)) / 2,
            "mismatch/effective_sample_size": (1 + 3) ** 2 / (1 + 9) / 2,
        },
        rel=1e-6,
    )


def test_the_99th_percentile_leaves_out_the_largest_hundredth_whatever_the_sign():
    difference = torch.arange(101) / 1000
    signed = torch.where(torch.arange(101) % 2 == 0, difference, -difference)
    metrics = mismatch(signed - 1, torch.full((101,), -1.0), torch.ones(101))
    assert metrics["mismatch/mean"] == pytest.approx(0.05, rel=1e-5)
    assert metrics["mismatch/p99"] == pytest.approx(0.099, rel=QUANTILE_ERROR)
    assert metrics["mismatch/max"] == pytest.approx(0.1, rel=1e-5)


def test_equal_logprobs_have_no_mismatch_and_a_full_effective_sample_size():
    logprobs = torch.tensor([-0.5, -2.0, -7.0])
    metrics = mismatch(logprobs, logprobs.clone(), torch.ones(3))
    assert metrics.pop("mismatch/effective_sample_size") == 1
    assert set(metrics.values()) == {0}


def test_one_dominating_token_is_an_effective_sample_of_one():
    metrics = mismatch(torch.tensor([30.0, 0.0, 0.0, 0.0]), torch.zeros(4), torch.ones(4))
    assert metrics["mismatch/effective_sample_size"] == pytest.approx(1 / 4)


def test_no_response_token_has_no_mismatch():
    assert mismatch(torch.zeros(2), torch.ones(2), torch.zeros(2)) == {}
    assert mismatch(torch.zeros(0), torch.zeros(0), torch.zeros(0)) == {}


def test_avg_at_k_counts_samples_and_pass_at_k_problems():
    assert evaluation_metrics(GROUPS) == {
        "eval/avg@2": 3 / 8,
        "eval/pass@2": 2 / 4,
        "eval/prompts": 4,
        "eval/response_length": 3,
        "eval/truncated": 1 / 8,
        "eval/undecided": 2 / 8,
    }


def test_several_sets_are_measured_each_and_their_mean_counts_every_set_the_same():
    sources = ("easy", "hard", "hard", "hard")
    groups = [replace(g, prompt=replace(g.prompt, source=s)) for g, s in zip(GROUPS, sources, strict=True)]
    metrics = evaluation_metrics(groups)
    assert (metrics["eval/easy/avg@2"], metrics["eval/hard/avg@2"]) == (1, pytest.approx(1 / 6))
    assert metrics["eval/avg@2"] == pytest.approx((1 + 1 / 6) / 2)
    assert metrics["eval/pass@2"] == pytest.approx((1 + 1 / 3) / 2)
    assert (metrics["eval/prompts"], metrics["eval/hard/prompts"]) == (4, 3)


def test_with_one_sample_a_problem_avg_and_pass_are_the_same():
    metrics = evaluation_metrics([group("a", ("c", 1)), group("b", ("w", 1)), group("c", ("n", 1))])
    assert metrics["eval/avg@1"] == metrics["eval/pass@1"] == pytest.approx(1 / 3)

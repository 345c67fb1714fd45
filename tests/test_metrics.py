"""Metrics of hand-made samples and updates, against values worked out by hand."""

import math

import numpy as np
import pytest
import torch

from megarl.algorithms.credit import Credit
from megarl.algorithms.recipe import RECIPES, Recipe
from megarl.data.batch import build_batch
from megarl.learner.learner import Update
from megarl.metrics import evaluation_metrics, mismatch_metrics, sample_metrics, update_metrics
from megarl.types import Batch, Prompt, RewardStatus, Sample, SampleGroup

KIND = {"c": "correct", "w": "wrong", "n": "no_answer", "t": "truncated", "o": "timeout", "e": "error"}


def group(name, *samples):
    """A prompt of 2 tokens and one sample for each (letter of KIND, response length)."""
    made = []
    for i, (letter, length) in enumerate(samples):
        finish = "length" if letter == "t" else "stop"
        ids, logprobs = np.arange(length, dtype=np.int32), np.zeros(length, np.float32)
        made.append(Sample(i, ids, logprobs, "", finish, 0, RewardStatus(KIND[letter])))
    return SampleGroup(Prompt(name, "", np.array([7, 8], np.int32), "", "test"), made)


GROUPS = [
    group("all correct", ("c", 1), ("c", 3)),
    group("mixed", ("c", 2), ("w", 4)),
    group("all wrong", ("t", 8), ("n", 2)),
    group("no verdict", ("o", 1), ("e", 3)),
]


def test_sample_metrics_count_groups_verdicts_and_lengths_and_what_was_kept():
    keep = torch.tensor([False, False, True, True, False, False, False, False])
    batch = build_batch(GROUPS, Credit(keep, torch.zeros(8)))
    assert sample_metrics(GROUPS, batch) == {
        "reward/pass_rate": 3 / 8,
        "groups/all_correct": 1 / 4,
        "groups/all_wrong": 2 / 4,
        "groups/mixed": 1 / 4,
        "samples/generated": 8,
        "tokens/generated": 24,
        "samples/kept": 2,
        "tokens/kept": 6,
        "response/length": 3,
        "response/truncated": 1 / 8,
        "reward/correct": 3 / 8,
        **{f"reward/{status}": 1 / 8 for status in ("wrong", "no_answer", "truncated", "timeout", "error")},
    }


def test_sample_metrics_of_a_step_that_keeps_nothing_are_zero_where_they_count_what_was_kept():
    batch = build_batch(GROUPS, Credit(torch.zeros(8, dtype=torch.bool), torch.zeros(8)))
    metrics = sample_metrics(GROUPS, batch)
    assert metrics["samples/kept"] == metrics["tokens/kept"] == 0
    assert metrics["samples/generated"] == 8


def minibatch(advantages, old_ratio=None, ref=None):
    """Sequences of one prompt token and two response tokens; 99 in a per-token list marks what must not be read."""
    count = len(advantages)
    return Batch(
        tokens=torch.zeros(3 * count, dtype=torch.int64),
        cu_seqlens=torch.arange(count + 1) * 3,
        mask=torch.tensor([0.0, 1.0, 1.0] * count),
        advantages=torch.tensor(advantages),
        prompt_index=torch.zeros(count, dtype=torch.int64),
        old_logprobs=None if old_ratio is None else -torch.tensor(old_ratio).log(),  # of a policy with log-probs 0
        ref_logprobs=None if ref is None else torch.tensor(ref),
    )


def update(entropy, loss=0.0, grad_norm=0.0, lr=0.0):
    return Update(torch.zeros(len(entropy)), torch.tensor(entropy), loss, grad_norm, lr)


PPO = Recipe(ratio="token", clip="ppo", clip_low=0.2, clip_high=0.3)
PLAIN = [99.0, 1.0, 1.0]


def test_update_metrics_average_over_updates_and_over_response_tokens():
    updates = [
        (minibatch([1.0]), update([99.0, 1.0, 2.0], loss=0.5, grad_norm=1.0, lr=0.25)),
        (minibatch([1.0, 1.0]), update([99.0, 3.0, 4.0, 99.0, 6.0, 8.0], loss=1.5, grad_norm=2.0, lr=0.125)),
    ]
    assert update_metrics(RECIPES["raft"], updates) == {
        "updates/count": 2,
        "policy/entropy": 24 / 6,  # per token, not per update
        "optim/loss": 1.0,
        "optim/grad_norm": 1.5,
        "optim/lr": 0.125,  # the last
    }


def test_no_update_leaves_only_its_count():
    for recipe in RECIPES.values():
        assert update_metrics(recipe, []) == {"updates/count": 0}


def test_ratios_are_taken_against_the_old_policy_and_clip_only_on_the_side_that_the_advantage_pushes_to():
    down, up = [99.0, 0.5, 1.0], [99.0, 2.0, 1.25]  # 1.25 is inside 1.3
    first = minibatch([-1.0, 1.0, -1.0, 1.0], old_ratio=[*down, *down, *up, *up])
    second = minibatch([0.0], old_ratio=[99.0, 0.25, 4.0])  # advantage 0: nothing to clip
    metrics = update_metrics(PPO, [(first, update([0.0] * 12)), (second, update([0.0] * 3))])
    assert metrics["ratio/mean"] == pytest.approx((2 * 1.5 + 2 * 3.25 + 4.25) / 10)
    assert metrics["ratio/max"] == pytest.approx(4.0)
    assert metrics["ratio/clipped_low"] == pytest.approx(1 / 10)
    assert metrics["ratio/clipped_high"] == pytest.approx(1 / 10)


def test_without_old_logprobs_the_ratio_is_one_and_nothing_is_clipped():
    metrics = update_metrics(PPO, [(minibatch([-1.0, 1.0]), update(PLAIN * 2))])
    assert (metrics["ratio/mean"], metrics["ratio/max"]) == (1, 1)
    assert (metrics["ratio/clipped_low"], metrics["ratio/clipped_high"]) == (0, 0)


def test_a_ratio_that_is_not_clipped_has_no_clip_fractions():
    metrics = update_metrics(Recipe(ratio="token"), [(minibatch([1.0], old_ratio=[99.0, 1.0, 3.0]), update(PLAIN))])
    assert metrics["ratio/mean"] == pytest.approx(2.0)
    assert not any("clipped" in name for name in metrics)


def test_kl_is_estimated_from_the_response_tokens():
    # log(policy / reference) = log 2 and -log 2, so k3 = 1/2 + log 2 - 1 and 2 - log 2 - 1.
    batch = minibatch([1.0], ref=[99.0, -math.log(2), math.log(2)])
    metrics = update_metrics(Recipe(kl_coef=0.1), [(batch, update(PLAIN))])
    assert metrics["policy/kl_k1"] == pytest.approx(0, abs=1e-7)
    assert metrics["policy/kl_k3"] == pytest.approx(0.25, abs=1e-6)
    assert "policy/kl_k1" not in update_metrics(RECIPES["raft"], [(batch, update(PLAIN))])


def test_mismatch_is_that_of_the_masked_tokens():
    learner = torch.tensor([99.0, 0.0, math.log(3), 99.0])
    metrics = mismatch_metrics(learner, torch.zeros(4), torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert metrics == pytest.approx(
        {
            "mismatch/mean": math.log(3) / 2,
            "mismatch/p99": 0.99 * math.log(3),  # interpolated between the two
            "mismatch/max": math.log(3),
            "mismatch/k3": (3 - 1 - math.log(3)) / 2,
            "mismatch/effective_sample_size": (1 + 3) ** 2 / (1 + 9) / 2,
        },
        rel=1e-6,
    )


def test_the_99th_percentile_leaves_out_the_largest_hundredth_whatever_the_sign():
    difference = torch.arange(101) / 1000
    signed = torch.where(torch.arange(101) % 2 == 0, difference, -difference)
    metrics = mismatch_metrics(signed - 1, torch.full((101,), -1.0), torch.ones(101))
    assert metrics["mismatch/mean"] == pytest.approx(0.05, rel=1e-5)
    assert metrics["mismatch/p99"] == pytest.approx(0.099, rel=1e-5)
    assert metrics["mismatch/max"] == pytest.approx(0.1, rel=1e-5)


def test_equal_logprobs_have_no_mismatch_and_a_full_effective_sample_size():
    logprobs = torch.tensor([-0.5, -2.0, -7.0])
    metrics = mismatch_metrics(logprobs, logprobs.clone(), torch.ones(3))
    assert metrics.pop("mismatch/effective_sample_size") == 1
    assert set(metrics.values()) == {0}


def test_one_dominating_token_is_an_effective_sample_of_one():
    metrics = mismatch_metrics(torch.tensor([30.0, 0.0, 0.0, 0.0]), torch.zeros(4), torch.ones(4))
    assert metrics["mismatch/effective_sample_size"] == pytest.approx(1 / 4)


def test_no_response_token_has_no_mismatch():
    assert mismatch_metrics(torch.zeros(2), torch.ones(2), torch.zeros(2)) == {}
    assert mismatch_metrics(torch.zeros(0), torch.zeros(0), torch.zeros(0)) == {}


def test_avg_at_k_counts_samples_and_pass_at_k_problems():
    assert evaluation_metrics(GROUPS) == {
        "eval/avg@2": 3 / 8,
        "eval/pass@2": 2 / 4,
        "eval/prompts": 4,
        "eval/response_length": 3,
        "eval/truncated": 1 / 8,
    }


def test_with_one_sample_a_problem_avg_and_pass_are_the_same():
    metrics = evaluation_metrics([group("a", ("c", 1)), group("b", ("w", 1)), group("c", ("n", 1))])
    assert metrics["eval/avg@1"] == metrics["eval/pass@1"] == pytest.approx(1 / 3)

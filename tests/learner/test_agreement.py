"""The check that the engine serves the learner's weights, and the learning-rate schedule."""

import pytest
import torch

from megarl.config import OptimConfig, parse_config
from megarl.learner.agreement import LIMITS, MismatchError, check_agreement
from megarl.learner.learner import learning_rate
from megarl.types import Batch


def config_with(precision, limit=None):
    return parse_config(
        {
            "model": {"path": "unused", "precision": precision},
            "data": {"train": "arithmetic"},
            "rollout": {"max_logprob_difference": limit},
        }
    )


def differing_by(difference):
    """A batch and the learner's log-probs, which differ from the engine's by this much on average, once each way."""
    batch = Batch(
        tokens=torch.zeros(4, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 4]),
        mask=torch.tensor([0.0, 0.0, 1.0, 1.0]),
        advantages=torch.ones(1),
        prompt_index=torch.zeros(1, dtype=torch.int64),
        rollout_logprobs=torch.tensor([0.0, 0.0, -1.0, -2.0]),
    )
    return batch, batch.rollout_logprobs + torch.tensor([50.0, -50.0, 1.5, -0.5]) * difference


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_precision_has_a_limit_of_its_own(precision):
    config, limit = config_with(precision), LIMITS[precision]
    metrics = check_agreement(config, *differing_by(0.9 * limit))
    assert metrics["mismatch/mean"] == pytest.approx(0.9 * limit, rel=1e-3)
    assert metrics["mismatch/max"] == pytest.approx(1.35 * limit, rel=1e-3)  # a single token may be over it
    with pytest.raises(MismatchError, match=f"over the limit of {limit:g}"):
        check_agreement(config, *differing_by(1.1 * limit))


def test_what_bf16_may_differ_by_is_refused_in_fp32():
    apart = differing_by(0.05)
    assert check_agreement(config_with("bf16"), *apart)["mismatch/mean"] == pytest.approx(0.05, rel=1e-3)
    with pytest.raises(MismatchError):
        check_agreement(config_with("fp32"), *apart)


@pytest.mark.parametrize("limit", [1e-4, 0.5])
def test_an_explicit_limit_replaces_that_of_the_precision_whether_stricter_or_looser(limit):
    config = config_with("fp32", limit)
    assert check_agreement(config, *differing_by(0.9 * limit))["mismatch/mean"] <= limit
    with pytest.raises(MismatchError, match=f"over the limit of {limit:g} .rollout.max_logprob_difference"):
        check_agreement(config, *differing_by(1.1 * limit))


def test_a_difference_that_is_not_a_number_is_a_mismatch():
    batch, logprobs = differing_by(0.0)
    logprobs[2] = float("nan")
    with pytest.raises(MismatchError):
        check_agreement(config_with("bf16"), batch, logprobs)


def test_warm_up_is_linear_and_never_zero():
    optim = OptimConfig(lr=8.0, warmup_steps=4)
    assert [learning_rate(optim, step, 10) for step in range(4)] == [2.0, 4.0, 6.0, 8.0]


def test_a_constant_rate_stays_where_warm_up_left_it():
    assert {learning_rate(OptimConfig(lr=0.3), step, 5) for step in range(5)} == {0.3}
    warmed = OptimConfig(lr=0.3, warmup_steps=2)
    assert {learning_rate(warmed, step, 5) for step in range(1, 5)} == {0.3}


@pytest.mark.parametrize("warmup", [0, 200])
def test_cosine_starts_at_the_full_rate_after_warm_up_and_falls_to_about_the_minimum(warmup):
    optim = OptimConfig(lr=2.0, lr_schedule="cosine", warmup_steps=warmup, min_lr_ratio=0.1)
    rates = [learning_rate(optim, step, 1000) for step in range(warmup, 1000)]
    assert rates[0] == pytest.approx(2.0)
    assert all(earlier > later for earlier, later in zip(rates, rates[1:], strict=False))
    assert rates[len(rates) // 2] == pytest.approx(1.1, abs=0.01)
    assert 0.2 <= rates[-1] == pytest.approx(0.2, abs=1e-4)


def test_a_cosine_of_one_step_has_a_rate():
    optim = OptimConfig(lr=2.0, lr_schedule="cosine", min_lr_ratio=0.5)
    assert 1.0 <= learning_rate(optim, 0, 1) <= 2.0

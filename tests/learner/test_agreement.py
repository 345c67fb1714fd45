"""The engine serves the learner's weights; the policy on evaluation samples; the learning-rate schedule."""

import math

import numpy as np
import pytest
import torch
from dealing import learn, score

from megarl.algorithms.mismatch import add_mismatch, mismatch_metrics
from megarl.algorithms.recipes import RECIPES
from megarl.batch import Batch, Credit, Update, build_batch
from megarl.config import OptimConfig, parse_config
from megarl.data.plan import Deal, Plan, Share
from megarl.learner.agreement import (
    LIMITS,
    PROBE_GROUPS,
    MismatchError,
    check_agreement,
    probe_agreement,
    probe_policy,
    step_agreement,
)
from megarl.learner.learner import Learner
from megarl.learner.mesh import Mesh
from megarl.learner.trainable import learning_rate
from megarl.models.family import read_hf_config
from megarl.sums import Sums
from megarl.types import Prompt, Rollout, Sample, SampleGroup


def config_with(precision, limit=None, path="unused", **sections):
    return parse_config(
        {
            "model": {"path": str(path), "precision": precision},
            "data": {"train": "arithmetic"},
            "rollout": {"max_logprob_difference": limit, **sections.pop("rollout", {})},
            **sections,
        }
    )


def differing_by(difference):
    """A batch and the learner's log-probs, which differ from the engine's by this much on average, once each way."""
    batch = Batch(
        tokens=torch.zeros(4, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 4]),
        mask=torch.tensor([0.0, 0.0, 1.0, 1.0]),
        advantages=torch.ones(4),
        prompt_index=torch.zeros(1, dtype=torch.int64),
        prompt_lengths=torch.tensor([2]),
        rollout_logprobs=torch.tensor([0.0, 0.0, -1.0, -2.0]),
    )
    return batch, batch.rollout_logprobs + torch.tensor([50.0, -50.0, 1.5, -0.5]) * difference


def mismatch_of(batch, logprobs):
    sums = Sums()
    add_mismatch(sums, logprobs, batch.rollout_logprobs, batch.mask)
    return mismatch_metrics(sums)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_precision_has_a_limit_of_its_own(precision):
    config, limit = config_with(precision), LIMITS[precision]
    metrics = check_agreement(config, mismatch_of(*differing_by(0.9 * limit)))
    assert metrics["mismatch/mean"] == pytest.approx(0.9 * limit, rel=1e-3)
    assert metrics["mismatch/max"] == pytest.approx(1.35 * limit, rel=1e-3)  # a single token may be over it
    with pytest.raises(MismatchError, match=f"over the limit of {limit:g}"):
        check_agreement(config, mismatch_of(*differing_by(1.1 * limit)))


def test_what_bf16_may_differ_by_is_refused_in_fp32():
    apart = differing_by(0.05)
    assert check_agreement(config_with("bf16"), mismatch_of(*apart))["mismatch/mean"] == pytest.approx(0.05, rel=1e-3)
    with pytest.raises(MismatchError):
        check_agreement(config_with("fp32"), mismatch_of(*apart))


@pytest.mark.parametrize("limit", [1e-4, 0.5])
def test_an_explicit_limit_replaces_that_of_the_precision_whether_stricter_or_looser(limit):
    config = config_with("fp32", limit)
    assert check_agreement(config, mismatch_of(*differing_by(0.9 * limit)))["mismatch/mean"] <= limit
    with pytest.raises(MismatchError, match=f"over the limit of {limit:g} .rollout.max_logprob_difference"):
        check_agreement(config, mismatch_of(*differing_by(1.1 * limit)))


def test_a_difference_that_is_not_a_number_is_a_mismatch():
    batch, logprobs = differing_by(0.0)
    logprobs[2] = float("nan")
    with pytest.raises(MismatchError):
        check_agreement(config_with("bf16"), mismatch_of(batch, logprobs))


@pytest.mark.parametrize("sampling", [{"top_p": 0.9}, {"top_k": 5}])
def test_an_engine_that_renormalises_can_not_agree_and_is_only_measured(sampling):
    config = config_with("fp32", rollout={**sampling, "allow_truncated_sampling": True})
    assert check_agreement(config, mismatch_of(*differing_by(2.0)))["mismatch/mean"] == pytest.approx(2.0)


@pytest.fixture(scope="module")
def mesh(qwen2):
    mesh = Mesh(config_with("fp32", path=qwen2).learner)
    yield mesh
    mesh.close(last=False)


@pytest.fixture(scope="module")
def moved(qwen2, mesh):
    """A learner with a reference, one update away from it, and evaluation groups that it sampled itself."""
    config = config_with(
        "fp32",
        path=qwen2,
        run={"track_kl": True},
        optim={"lr": 1e-2},
        rollout={"temperature": 0.8},
        eval={"temperature": 0.8},
    )
    learner = Learner(config, RECIPES["raft"], read_hf_config(qwen2), mesh, temperature=0.8)
    groups = scored(learner, make_groups(3))
    learn(learner, as_batch(groups))
    return learner, scored(learner, groups)


def make_groups(count, samples=2):
    """Random prompts and responses of several lengths."""
    rng = np.random.default_rng(0)

    def ids(length):
        return rng.integers(2, 50, length).astype(np.int32)

    return [
        SampleGroup(
            Prompt(str(i), "", ids(2 + i % 3), "", "test"),
            [
                Sample(j, ids(n), np.zeros(n, np.float32), "", "stop", np.zeros(n, np.int32))
                for j, n in enumerate((3 + i % 4, 8)[:samples])
            ],
        )
        for i in range(count)
    ]


def as_batch(groups):
    count = sum(len(group.samples) for group in groups)
    return build_batch(groups, Credit(torch.ones(count, dtype=torch.bool), torch.ones(count), torch.ones(count)))


def scored(learner, groups):
    """The groups with the learner's own log-probs as the engine's."""
    batch = as_batch(groups)
    logprobs, _ = score(learner, batch)
    parts = logprobs[batch.mask > 0].split([len(s.response_ids) for g in groups for s in g.samples])
    for sample, part in zip((s for g in groups for s in g.samples), parts, strict=True):
        sample.rollout_logprobs = part.numpy()
    return groups


def test_the_probe_measures_agreement_entropy_and_the_distance_from_the_start(moved):
    learner, groups = moved
    metrics = probe_policy(learner.config, learner, groups)
    batch = as_batch(groups)
    kept = batch.mask > 0
    logprobs, entropy = (values[kept].double() for values in score(learner, batch))
    d = logprobs - score(learner, batch, reference=True)[0][kept].double()
    assert metrics["eval/mismatch/mean"] == 0
    assert metrics["eval/entropy"] == pytest.approx(float(entropy.mean()))
    assert 0 < metrics["eval/entropy"] < math.log(50)
    assert metrics["eval/kl_k1"] == pytest.approx(float(d.mean()), rel=1e-4)
    assert metrics["eval/kl_k3"] == pytest.approx(float((torch.exp(-d) - 1 + d).mean()), rel=1e-3)
    assert metrics["eval/kl_sequence"] == pytest.approx(float(d.sum()) / 6, rel=1e-4)
    assert metrics["eval/kl_k3"] > 1e-3, "the update moved nothing"
    assert {name for name in metrics if not name.startswith("eval/mismatch/")} == {
        "eval/entropy",
        "eval/kl_k1",
        "eval/kl_k3",
        "eval/kl_sequence",
    }


def test_the_probe_refuses_an_engine_with_other_weights(moved):
    learner, groups = moved
    stale = scored(learner, make_groups(3))
    for group in stale:
        for sample in group.samples:
            sample.rollout_logprobs = sample.rollout_logprobs + np.float32(0.01)
    with pytest.raises(MismatchError, match="does not serve the learner's weights"):
        probe_policy(learner.config, learner, stale)


def test_samples_of_another_temperature_say_nothing_of_the_policy(moved):
    learner, groups = moved
    greedy = learner.config.model_copy(update={"eval": learner.config.eval.model_copy(update={"temperature": 0.0})})
    assert probe_policy(greedy, learner, groups) == {}


def test_the_probe_is_of_the_first_groups(moved):
    learner, _ = moved
    groups = scored(learner, make_groups(PROBE_GROUPS + 1, samples=1))
    expected = probe_policy(learner.config, learner, groups[:PROBE_GROUPS])
    assert probe_policy(learner.config, learner, groups) == expected
    assert probe_policy(learner.config, learner, groups[1:]) != expected


def test_without_a_reference_there_is_no_kl(qwen2, mesh):
    config = config_with("fp32", path=qwen2)
    learner = Learner(config, RECIPES["raft"], read_hf_config(qwen2), mesh)
    metrics = probe_policy(config, learner, scored(learner, make_groups(2)))
    assert "eval/entropy" in metrics and not any("kl" in name for name in metrics)


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


STALE = {"recipe": {"name": "raft_pp", "old_policy": "rollout"}, "schedule": {"max_staleness": 2}}


def agreement(batch, update):
    plan = Plan(batch.prompt_index, batch.response_tokens, [[[[0]]]], False, 3, 3)
    deal = Deal(plan, 0, batch)
    return step_agreement(config_with("fp32", **STALE), None, 7, deal, deal, [(Share(batch, [[0]]), update)])


def test_samples_by_older_weights_are_measured_by_their_lag_and_not_refused():
    batch, logprobs = differing_by(0.0)
    logprobs += torch.tensor([0.0, 0.0, 0.5, 0.1])
    update = Update(logprobs, torch.zeros(4), loss=0.0, grad_norm=0.0, lr=0.0)
    for versions, lags in (([0, 0, 5, 6], {2: 0.5, 1: 0.1}), ([0, 0, 7, 5], {0: 0.5, 2: 0.1})):
        batch.weight_versions = torch.tensor(versions)
        metrics = agreement(batch, update)
        assert metrics["mismatch/mean"] == pytest.approx(0.3)
        by_lag = {name: value for name, value in metrics.items() if "lag" in name}
        assert by_lag == {f"mismatch/lag_{lag}": pytest.approx(value) for lag, value in lags.items()}
    batch.weight_versions = torch.tensor([0, 0, 7, 7])  # by the step's own weights
    with pytest.raises(MismatchError):
        agreement(batch, update)


def test_a_probe_by_other_weights_is_refused_however_old_the_samples_may_be(moved):
    learner, groups = moved
    config = learner.config.model_copy(update={"schedule": config_with("fp32", **STALE).schedule})
    rollout = Rollout([], probe=groups)
    assert probe_agreement(config, learner, rollout) == {"mismatch/probe": 0}
    for sample in groups[0].samples:
        sample.rollout_logprobs = sample.rollout_logprobs + np.float32(0.1)
    with pytest.raises(MismatchError):
        probe_agreement(config, learner, rollout)
    assert probe_agreement(learner.config, learner, rollout) == {}  # where no sample may be old, there is no probe

"""Does the engine serve what the learner holds? Their log-probs of the same tokens, compared after every update."""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.algorithms.loss import kl_estimate
from megarl.algorithms.mismatch import mismatch_metrics
from megarl.batch import Batch, Credit, Update, build_batch
from megarl.config import Config
from megarl.learner.learner import Learner
from megarl.types import Metrics, SampleGroup

PROBE_GROUPS = 64
# Mean |log-prob| difference that no rounding explains, only wrong weights or another function.
LIMITS = {"fp32": 1e-3, "bf16": 0.1, "fp8": 0.2}


class MismatchError(RuntimeError):
    """Engine and learner disagree: the engine serves other weights, or computes another function."""


def check_agreement(config: Config, batch: Batch, logprobs: Tensor) -> Metrics:
    """mismatch/* of a batch; logprobs f32[T] are the learner's, by the weights that sampled.

    Raises MismatchError over the limit.
    """
    assert batch.rollout_logprobs is not None
    metrics = mismatch_metrics(logprobs, batch.rollout_logprobs, batch.mask)
    limit = config.rollout.max_logprob_difference or LIMITS[config.model.precision]
    renormalised = config.rollout.top_p < 1 or config.rollout.top_k > 0  # by the engine alone: no agreement to expect
    if not renormalised and not metrics["mismatch/mean"] <= limit:
        raise MismatchError(
            f"log-probs of rollout engine and learner differ by {metrics['mismatch/mean']:.2g} on average, over the "
            f"limit of {limit:g} (rollout.max_logprob_difference): the engine does not serve the learner's weights"
        )
    return metrics


def step_agreement(config: Config, step: int, batch: Batch, updates: list[tuple[Batch, Update]]) -> Metrics:
    """mismatch/* of a step: on all its samples where the learner scored them first, else on the first mini-batch.

    Samples that the recipe rejects for their mismatch are among the former. Checked where all are by the step's
    weights; else mismatch/lag_<k> is the mean |log-prob difference| of the tokens from k versions before.
    """
    if config.recipe.needs_old_logprobs(config.updates_per_step) and len(batch):
        logprobs = batch.old_logprobs
    elif updates:
        batch, update = updates[0]
        logprobs = update.logprobs
    else:
        return {}
    assert logprobs is not None and batch.rollout_logprobs is not None and batch.weight_versions is not None
    lag = step - batch.weight_versions
    lags = lag[batch.mask > 0].unique().tolist()
    if lags == [0]:
        return check_agreement(config, batch, logprobs)
    metrics = mismatch_metrics(logprobs, batch.rollout_logprobs, batch.mask)
    for k in lags:
        of_lag = mismatch_metrics(logprobs, batch.rollout_logprobs, batch.mask * (lag == k))
        metrics[f"mismatch/lag_{k}"] = of_lag["mismatch/mean"]
    return metrics


def probe_agreement(config: Config, learner: Learner, probe: list[SampleGroup]) -> Metrics:
    """mismatch/probe: check_agreement on responses of every engine by the current weights, if there are any.
    Collective."""
    if not probe:
        return {}
    batch = _batch_of(probe)
    logprobs, _ = learner.score(batch)
    return {"mismatch/probe": check_agreement(config, batch, logprobs)["mismatch/mean"]}


def probe_policy(config: Config, learner: Learner, groups: list[SampleGroup]) -> Metrics:
    """The policy on some evaluation samples: eval/entropy, its agreement with the engine and, with a reference, the KL
    to it: k1 and k3 a token, and kl_sequence, the log-ratio of whole responses. Collective.

    Nothing where they were sampled at another temperature than the policy is trained at.
    """
    if config.eval.temperature != config.rollout.temperature:
        return {}
    batch = _batch_of(groups[:PROBE_GROUPS])
    logprobs, entropy = learner.score(batch)
    metrics = {f"eval/{name}": value for name, value in check_agreement(config, batch, logprobs).items()}
    response = batch.mask > 0
    metrics["eval/entropy"] = float(entropy[response].double().mean())
    if learner.reference is not None:
        reference, _ = learner.score(batch, reference=True)
        for estimator in ("k1", "k3"):
            kl = kl_estimate(estimator, logprobs, reference)[response]
            metrics[f"eval/kl_{estimator}"] = float(kl.double().mean())
        metrics["eval/kl_sequence"] = float((logprobs - reference)[response].double().sum() / len(batch))
    return metrics


def _batch_of(groups: list[SampleGroup]) -> Batch:
    """All samples of these groups, to be scored."""
    count = sum(len(group.samples) for group in groups)
    return build_batch(groups, Credit(torch.ones(count, dtype=torch.bool), torch.zeros(count), torch.zeros(count)))

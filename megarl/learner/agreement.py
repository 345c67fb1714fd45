"""Does the engine serve what the learner holds? Their log-probs of the same tokens, compared after every update."""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.algorithms.loss import kl_estimate
from megarl.algorithms.mismatch import mismatch_metrics
from megarl.config import Config
from megarl.data.batch import build_batch
from megarl.learner.learner import Learner
from megarl.types import Batch, Credit, Metrics, SampleGroup, Update

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


def step_agreement(config: Config, batch: Batch, updates: list[tuple[Batch, Update]]) -> Metrics:
    """check_agreement of a step: on all its samples where the learner scored them first, else on the first mini-batch.

    Samples that the recipe rejects for their mismatch are among the former.
    """
    if config.recipe.needs_old_logprobs(config.updates_per_step) and len(batch):
        assert batch.old_logprobs is not None
        return check_agreement(config, batch, batch.old_logprobs)
    if updates:
        first, update = updates[0]
        return check_agreement(config, first, update.logprobs)
    return {}


def probe_policy(config: Config, learner: Learner, groups: list[SampleGroup]) -> Metrics:
    """The policy on some evaluation samples: eval/entropy, its agreement with the engine and, with a reference, the KL
    to it: k1 and k3 a token, and kl_sequence, the log-ratio of whole responses. Collective.

    Nothing where they were sampled at another temperature than the policy is trained at.
    """
    if config.eval.temperature != config.rollout.temperature:
        return {}
    probe = groups[:PROBE_GROUPS]
    count = sum(len(group.samples) for group in probe)
    batch = build_batch(probe, Credit(torch.ones(count, dtype=torch.bool), torch.zeros(count), torch.zeros(count)))
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

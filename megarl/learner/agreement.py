"""Does the engine serve what the learner holds? Their log-probs of the same tokens, compared after every update."""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.algorithms.credit import Credit
from megarl.config import Config
from megarl.data.batch import build_batch
from megarl.learner.learner import Learner
from megarl.metrics import mismatch_metrics
from megarl.types import Batch, Metrics, SampleGroup

PROBE_GROUPS = 8
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


def probe_agreement(config: Config, learner: Learner, groups: list[SampleGroup]) -> Metrics:
    """check_agreement on a few evaluation groups; nothing where sampled at another temperature. Collective."""
    if config.eval.temperature != config.rollout.temperature:
        return {}
    probe = groups[:PROBE_GROUPS]
    count = sum(len(group.samples) for group in probe)
    batch = build_batch(probe, Credit(torch.ones(count, dtype=torch.bool), torch.zeros(count)))
    learner.annotate(batch, old=True, reference=False)
    assert batch.old_logprobs is not None
    return {f"eval/{name}": value for name, value in check_agreement(config, batch, batch.old_logprobs).items()}

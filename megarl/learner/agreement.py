"""Does the engine serve what the learner holds? Their log-probs of the same tokens, compared after every update."""

from __future__ import annotations

import torch

from megarl.algorithms.loss import kl_estimate
from megarl.algorithms.mismatch import add_mismatch, mismatch_metrics
from megarl.batch import Credit, Kept, Update
from megarl.config import Config
from megarl.data.plan import Deal, Share
from megarl.learner.learner import Learner
from megarl.sums import Ranks, Sums
from megarl.types import Metrics, Rollout, SampleGroup

PROBE_GROUPS = 64
# Mean |log-prob| difference that no rounding explains, only wrong weights or another function.
LIMITS = {"fp32": 1e-3, "bf16": 0.1, "fp8": 0.2}


class MismatchError(RuntimeError):
    """Engine and learner disagree: the engine serves other weights, or computes another function."""


def check_agreement(config: Config, metrics: Metrics) -> Metrics:
    """These mismatch_metrics, of samples by the learner's own weights. Raises MismatchError over the limit."""
    limit = config.rollout.max_logprob_difference or LIMITS[config.model.precision]
    renormalised = config.rollout.top_p < 1 or config.rollout.top_k > 0  # by the engine alone: no agreement to expect
    if metrics and not renormalised and not metrics["mismatch/mean"] <= limit:
        raise MismatchError(
            f"log-probs of rollout engine and learner differ by {metrics['mismatch/mean']:.2g} on average, over the "
            f"limit of {limit:g} (rollout.max_logprob_difference): the engine does not serve the learner's weights"
        )
    return metrics


def step_agreement(
    config: Config, ranks: Ranks, step: int, sampled: Deal, learned: Deal, updates: list[tuple[Share, Update]]
) -> Metrics:
    """mismatch/* of a step: on all its samples where the learner scored them first, else on the first mini-batch.

    Samples that the recipe rejects for their mismatch are among the former. Checked where all are by the step's
    weights; else mismatch/lag_<k> is the mean |log-prob difference| of the tokens from k versions before. Collective.
    """
    batch, logprobs = sampled.batch, learned.batch.old_logprobs
    if not config.recipe.needs_old_logprobs(config.updates_per_step):
        if not updates:
            return {}
        batch, logprobs = updates[0][0].batch, updates[0][1].logprobs
    assert logprobs is not None and batch.rollout_logprobs is not None and batch.weight_versions is not None
    sums = Sums(ranks)
    add_mismatch(sums, logprobs, batch.rollout_logprobs, batch.mask)
    most = config.schedule.max_staleness
    lags = range(most + 1) if most else ()
    for k in lags:
        chosen = (batch.mask > 0) & (step - batch.weight_versions == k)
        sums.add(f"lag_{k}", (logprobs - batch.rollout_logprobs)[chosen].abs())
    metrics = mismatch_metrics(sums.reduce())
    by_lag = {k: sums.mean(f"lag_{k}") for k in lags if f"lag_{k}" in sums}
    if by_lag.keys() <= {0}:
        return check_agreement(config, metrics)
    return metrics | {f"mismatch/lag_{k}": mean for k, mean in by_lag.items()}


def probe_agreement(config: Config, learner: Learner, rollout: Rollout | None) -> Metrics:
    """mismatch/probe: check_agreement on responses of every engine by the current weights, which a rollout has where
    its own samples may be older. Collective; the rollout is rank 0's."""
    if not config.schedule.max_staleness:
        return {}
    deal = learner.deal(_all_of(rollout.probe) if rollout else None)
    logprobs, _ = learner.score(deal.whole())
    sums = Sums(learner.mesh)
    assert deal.batch.rollout_logprobs is not None
    add_mismatch(sums, logprobs, deal.batch.rollout_logprobs, deal.batch.mask)
    return {"mismatch/probe": check_agreement(config, mismatch_metrics(sums.reduce()))["mismatch/mean"]}


def probe_policy(config: Config, learner: Learner, groups: list[SampleGroup] | None) -> Metrics:
    """The policy on some evaluation samples: eval/entropy, its agreement with the engine and, with a reference, the KL
    to it: k1 and k3 a token, and kl_sequence, the log-ratio of whole responses. Collective; the groups are rank 0's.

    Nothing where they were sampled at another temperature than the policy is trained at.
    """
    if config.eval.temperature != config.rollout.temperature:
        return {}
    deal = learner.deal(None if groups is None else _all_of(groups[:PROBE_GROUPS]))
    logprobs, entropy = learner.score(deal.whole())
    sums, response = Sums(learner.mesh), deal.batch.mask > 0
    assert deal.batch.rollout_logprobs is not None
    add_mismatch(sums, logprobs, deal.batch.rollout_logprobs, deal.batch.mask)
    sums.add("entropy", entropy[response])
    if learner.reference is not None:
        reference, _ = learner.score(deal.whole(), reference=True)
        for estimator in ("k1", "k3"):
            sums.add(f"kl_{estimator}", kl_estimate(estimator, logprobs, reference)[response])
        sums.add("kl_sequence", deal.batch.of_sequences((logprobs - reference).double() * deal.batch.mask))
    agreement = check_agreement(config, mismatch_metrics(sums.reduce()))
    means = [name for name in ("entropy", "kl_k1", "kl_k3", "kl_sequence") if name in sums]
    return {f"eval/{name}": value for name, value in agreement.items()} | {f"eval/{n}": sums.mean(n) for n in means}


def _all_of(groups: list[SampleGroup]) -> Kept:
    """All samples of these groups, to be scored."""
    count = sum(len(group.samples) for group in groups)
    return Kept(groups, Credit(torch.ones(count, dtype=torch.bool), torch.zeros(count), torch.zeros(count)))

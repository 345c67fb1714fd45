"""What a step's samples and updates say, as numbers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from megarl.algorithms.loss import clipped_tokens, kl_estimate
from megarl.algorithms.mismatch import sequence_mean
from megarl.algorithms.recipe import Recipe
from megarl.batch import Batch, Credit, Update
from megarl.data.plan import Plan, Share
from megarl.estimates import pass_at_k
from megarl.rewards.alarm import is_alarming
from megarl.sums import Ranks, Sums
from megarl.types import Metrics, RewardStatus, Rollout, SampleGroup


def sample_metrics(rollout: Rollout, credit: Credit, plan: Plan, step: int) -> Metrics:
    """Rewards, groups, lengths and staleness of all that was sampled, with backfill, and how much the recipe kept."""
    groups = [*rollout.groups, *rollout.replaced]
    samples = [sample for group in groups for sample in group.drawn]
    right = np.array([np.mean([sample.correct for sample in group.drawn]) for group in groups])
    statuses = Counter(sample.status for sample in samples)
    greedy = [group.greedy for group in groups if group.greedy]
    staleness = step - np.concatenate([sample.weight_versions for sample in rollout.samples])
    return {
        "reward/mean": float(credit.rewards.mean()),
        "reward/pass_rate": float(np.mean([sample.correct for sample in samples])),
        "groups/all_correct": float(np.mean(right == 1)),
        "groups/all_wrong": float(np.mean(right == 0)),
        "groups/mixed": float(np.mean((right > 0) & (right < 1))),
        "samples/generated": len(samples) + len(greedy),
        "tokens/generated": sum(len(sample.response_ids) for sample in (*samples, *greedy)),
        "samples/kept": int((plan.responses > 0).sum()),
        "samples/rejected": int((plan.responses == 0).sum()),  # for the mismatch of their log-probs
        "tokens/kept": int(plan.responses.sum()),
        "tokens/pass": plan.tokens,  # through the model, prompts included, when each kept sample is seen once
        "response/length": float(np.mean([len(sample.response_ids) for sample in samples])),
        "response/truncated": float(np.mean([sample.truncated for sample in samples])),
        **{f"reward/{status}": statuses[status] / len(samples) for status in RewardStatus},
        "reward/alarm": float(is_alarming(statuses)),
        "staleness/mean": float(staleness.mean()),  # weight versions that its sampler was behind, of a token
        "staleness/max": int(staleness.max()),
        "engines/restarts": rollout.restarts,
        **{f"time/{name}": seconds for name, seconds in rollout.seconds.items()},
    }


def update_metrics(recipe: Recipe, updates: list[tuple[Share, Update]], ranks: Ranks | None = None) -> Metrics:
    """Entropy, KL, ratios and gradient norm over the updates of a step; policy values precede each update. Collective.

    A step whose samples were all filtered away makes none: it is counted as skipped, and nothing moves.
    """
    if not updates:
        return {"updates/count": 0, "updates/skipped": 1}
    sums = Sums(ranks)
    for share, update in updates:
        _add_update(sums, recipe, share.batch, update)
    sums.reduce()
    metrics: Metrics = {
        "updates/count": len(updates),
        "updates/skipped": 0,
        "policy/entropy": sums.mean("entropy"),
        "optim/loss": float(np.mean([update.loss for _, update in updates])),
        "optim/grad_norm": float(np.mean([update.grad_norm for _, update in updates])),
        "optim/lr": updates[-1][1].lr,
    }
    if "ratio" in sums:
        metrics["ratio/mean"], metrics["ratio/max"] = sums.mean("ratio"), sums.max("ratio")
    if recipe.needs_critic:
        for name in ("value_loss", "value_grad_norm"):
            metrics[f"critic/{name}"] = float(np.mean([getattr(update, name) for _, update in updates]))
        spread = sums.variance("returns")  # where all returns agree there is nothing to explain
        explained = 1 - sums.variance("residuals") / spread if spread > 0 else 0.0
        metrics["critic/explained_variance"] = explained
    for name in ("ratio/clipped_low", "ratio/clipped_high", "policy/kl_k1", "policy/kl_k3", "mismatch/correction"):
        if name in sums:
            metrics[name] = sums.mean(name)
    return metrics


def _add_update(sums: Sums, recipe: Recipe, batch: Batch, update: Update) -> None:
    response = (batch.mask > 0).nonzero().flatten()
    old = update.logprobs if batch.old_logprobs is None else batch.old_logprobs
    sums.add("entropy", update.entropy[response])
    if recipe.off_policy_fields:
        log_ratio = torch.where(batch.mask > 0, update.logprobs - old, 0.0)
        if recipe.ratio == "sequence":
            log_ratio = sequence_mean(log_ratio, batch.mask, batch.sequence_of_token)
        sums.add("ratio", log_ratio[response].exp())
        if recipe.clip not in ("none", "sapo"):  # sapo's gate has no edge
            given = (update.logprobs, old, batch.advantages, batch.mask, batch.sequence_of_token)
            for name, clipped in zip(("low", "high"), clipped_tokens(recipe, *given), strict=True):
                sums.add(f"ratio/clipped_{name}", clipped[response])
    if batch.ref_logprobs is not None:
        for estimator in ("k1", "k3"):
            kl = kl_estimate(estimator, update.logprobs[response].double(), batch.ref_logprobs[response].double())
            sums.add(f"policy/kl_{estimator}", kl)
    if recipe.needs_critic:
        assert batch.returns is not None and batch.values is not None
        returns, values = batch.returns[response].double(), batch.values[response].double()
        sums.add("returns", returns)
        sums.add("residuals", returns - values)
    if recipe.mismatch != "none" and batch.correction is not None:
        sums.add("mismatch/correction", batch.correction[response])


def evaluation_metrics(groups: list[SampleGroup]) -> Metrics:
    """avg@k and pass@k over the problems, k the samples of each; with several sets, of each and the mean over sets.

    A sample without a verdict counts as not right; `eval/undecided` is the share of such samples.
    """
    sets: dict[str, list[SampleGroup]] = {}
    for group in groups:
        sets.setdefault(group.prompt.source, []).append(group)
    of_sets = {name: _set_metrics(members) for name, members in sets.items()}
    metrics = {
        f"eval/{name}": (sum if name == "prompts" else np.mean)([values[name] for values in of_sets.values()])
        for name in next(iter(of_sets.values()))
    }
    if len(sets) > 1:
        metrics |= {f"eval/{s}/{name}": value for s, values in of_sets.items() for name, value in values.items()}
    return {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}


def _set_metrics(groups: list[SampleGroup]) -> Metrics:
    k = len(groups[0].samples)
    correct = [sum(sample.correct for sample in group.samples) for group in groups]
    samples = [sample for group in groups for sample in group.samples]
    return {
        f"avg@{k}": float(pass_at_k(correct, k, 1).mean()),
        f"pass@{k}": float(pass_at_k(correct, k, k).mean()),
        "prompts": len(groups),
        "response_length": float(np.mean([len(s.response_ids) for s in samples])),
        "truncated": float(np.mean([s.truncated for s in samples])),
        "undecided": float(np.mean([not s.status.is_verdict for s in samples])),
    }

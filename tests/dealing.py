"""Whole batches to and from the parts that a learner's ranks have of them."""

import torch
from torch import Tensor

from megarl.batch import Batch, Update
from megarl.data.packing import MicroBatch, lay_out
from megarl.data.plan import Deal, Rules, Share, make_plan
from megarl.learner.learner import Learner


def only_update(learner: Learner, deal: Deal) -> Share:
    (share,) = learner.updates(deal)
    return share


def learn(learner: Learner, batch: Batch, step: int = 0) -> Update:
    """A step of one update, annotated as the recipe needs it."""
    return learner.update(only_update(learner, learner.annotate(learner.deal(batch))), step)


def score(learner: Learner, batch: Batch, reference: bool = False) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy), f32[T] each, in the order of the batch, on every rank."""
    deal = learner.deal(batch)
    logprobs, entropy = learner.score(deal.whole(), reference=reference)
    return collected(learner, deal, logprobs), collected(learner, deal, entropy)


def collected(learner: Learner, deal: Deal, values: Tensor) -> Tensor:
    """Values of this rank's tokens -> those of all, in the order of the batch that was dealt; on every rank."""
    mine = (deal.plan.numbers(deal.rank).tolist(), values.split(deal.batch.lengths.tolist()))
    everyone = learner.mesh.gather(mine if learner.mesh.reports else ([], []))
    parts = {number: part for numbers, split in everyone for number, part in zip(numbers, split, strict=True)}
    return torch.cat([values[:0], *(parts[number] for number in sorted(parts))])


def dealt(deal: Deal, values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Values of all tokens of the batch that was dealt -> those of this rank's."""
    parts = values.split(cu_seqlens.diff().tolist())
    return torch.cat([values[:0], *(parts[number] for number in deal.plan.numbers(deal.rank).tolist())])


def micro_batches(
    batch: Batch, rank: int, ranks: int, max_tokens: int, packing: bool, **rules: object
) -> list[MicroBatch]:
    """Those of a data-parallel rank in a step of one update, with indices of the batch's own tokens."""
    rules = Rules(ranks, max_tokens, packing, **rules)
    plan = make_plan(batch, rules)
    cuts = plan.updates[0][rank] if plan.updates else []
    return list(lay_out(Share(batch, cuts, plan.share_prompts), packing, rules.multiple))

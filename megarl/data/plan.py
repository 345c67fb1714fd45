"""Who learns from what: a step's sequences dealt to optimizer updates, data-parallel ranks and micro-batches.

Planned on rank 0, from lengths alone and deterministically. Every rank is told the plan and sent its own sequences.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megarl.batch import Batch, Sequences

MicroBatches = list[list[int]]  # the sequences of each
Weigh = Callable[[Tensor, Tensor], Tensor]  # of an update's sequences: tokens, prompts i64[S] -> f64[S] of their tokens
WORTH_SHARING = 0.95  # of the tokens that a pass takes otherwise


@dataclass(frozen=True)
class Rules:
    """How a step is cut."""

    ranks: int  # data-parallel
    micro_batch_tokens: int  # padding included
    packing: bool = True
    share_prompts: bool | str = False  # auto: where that saves tokens
    pairs: bool = False  # the two sequences of a prompt stay together
    multiple: int = 1  # what the tokens of a row are padded to
    minibatch_prompts: int | None = None  # of an update, filtered ones included; with pairs, of those that have one


@dataclass(frozen=True)
class Plan:
    """The same on every rank. Sequences are numbered as they were kept; one without response tokens is passed over."""

    prompts: Tensor  # i64[S], which prompt of the step each sequence answers
    responses: Tensor  # i64[S], its tokens in the loss
    updates: list[list[MicroBatches]]  # update -> data-parallel rank -> its micro-batches, as many on every rank
    share_prompts: bool  # neighbours in a micro-batch that answer one prompt hold it once
    tokens: int  # of a pass over all sequences
    unshared_tokens: int  # of one in which each sequence holds its prompt

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def saving(self) -> str:
        if not self.share_prompts:
            return "each response is computed with its prompt"
        return f"prompts are computed once: {self.tokens:,} tokens a pass instead of {self.unshared_tokens:,}"

    def numbers(self, rank: int) -> Tensor:
        """i64[K]: the sequences of a data-parallel rank, update after update."""
        return torch.tensor([i for update in self.updates for cut in update[rank] for i in cut], dtype=torch.int64)

    def of_update(self, update: int) -> Tensor:
        """bool[S]: the sequences that an update learns from."""
        inside = torch.zeros(len(self), dtype=torch.bool)
        inside[[i for rank in self.updates[update] for cut in rank for i in cut]] = True
        return inside & (self.responses > 0)


@dataclass(frozen=True)
class Share:
    """The sequences of an update, or of a step, that a data-parallel rank runs, and in which micro-batches."""

    batch: Batch
    micro_batches: MicroBatches  # numbers in the batch; as many on every rank
    share_prompts: bool = False
    weights: Tensor | None = None  # f64[K], of each sequence's tokens in the update's loss
    sequences: int = 0  # of the whole update, on all ranks
    tokens: int = 0  # of their responses


@dataclass(frozen=True)
class Deal:
    """What a data-parallel rank has of a step."""

    plan: Plan
    rank: int
    batch: Batch  # the sequences plan.numbers(rank), in this order

    def whole(self) -> Share:
        """All sequences, to be scored."""
        cuts = [cut for update in range(len(self.plan.updates)) for cut in self._micro_batches(update, 0)]
        return Share(self.batch, cuts, self.plan.share_prompts)

    def updates(self, weigh: Weigh) -> list[Share]:
        """Of each update that has something to learn from: as many on every rank."""
        plan, numbers, shares, first = self.plan, self.plan.numbers(self.rank), [], 0
        for i, update in enumerate(plan.updates):
            last = first + sum(map(len, update[self.rank]))
            if (inside := plan.of_update(i)).any():
                weights = torch.zeros(len(plan), dtype=torch.float64)
                weights[inside] = weigh(plan.responses[inside], plan.prompts[inside])
                share = Share(
                    self.batch.between(first, last),
                    self._micro_batches(i, first),
                    plan.share_prompts,
                    weights[numbers[first:last]],
                    sequences=int(inside.sum()),
                    tokens=int(plan.responses[inside].sum()),
                )
                shares.append(share)
            first = last
        return shares

    def without(self, rejected: Tensor) -> Deal:
        """The deal with these sequences, bool[S], out of the loss and of its denominator."""
        of_token = rejected[self.plan.numbers(self.rank)][self.batch.sequence_of_token]
        plan = replace(self.plan, responses=self.plan.responses.masked_fill(rejected, 0))
        return Deal(plan, self.rank, replace(self.batch, mask=self.batch.mask.masked_fill(of_token, 0.0)))

    def _micro_batches(self, update: int, first: int) -> MicroBatches:
        """Of an update, in numbers of the batch less `first`."""
        mine = [earlier[self.rank] for earlier in self.plan.updates]
        start = sum(len(cut) for cuts in mine[:update] for cut in cuts) - first
        found = []
        for cut in mine[update]:
            found.append([start + j for j, i in enumerate(cut) if self.plan.responses[i] > 0])
            start += len(cut)
        return found


def make_plan(sequences: Sequences, rules: Rules) -> Plan:
    """Units (a sequence, a pair, or those that share a prompt) go largest first to the rank with the fewest tokens,
    then fill its micro-batches. Ranks with fewer micro-batches than others get empty ones."""
    lengths = (sequences.lengths - 1).tolist()  # a sequence of L tokens gives L - 1 predictions
    prefixes = (sequences.prompt_lengths - 1).tolist()  # a prompt's last token predicts each response's first
    prompts = sequences.prompt_index.tolist()
    prefix_of = dict(zip(prompts, prefixes, strict=True))
    unshared = sum(lengths)
    shared = unshared - sum(prefixes) + sum(prefix_of.values())
    share = rules.share_prompts == "auto" and rules.packing and shared <= WORTH_SHARING * unshared
    share = share or rules.share_prompts is True
    updates = []
    for members in _updates(sequences.prompt_index, rules):
        units = _units(members, lengths, prefixes, prompts, rules, share)
        updates.append(_deal(units, lengths, rules))
    return Plan(
        sequences.prompt_index,
        sequences.response_tokens,
        updates,
        share,
        tokens=shared if share else unshared,
        unshared_tokens=unshared,
    )


def _updates(prompts: Tensor, rules: Rules) -> list[list[int]]:
    """The sequences of each optimizer update: whole prompts, in order; none that is empty."""
    if not rules.minibatch_prompts:
        return [list(range(len(prompts)))] if len(prompts) else []
    index = torch.unique(prompts, return_inverse=True)[1] if rules.pairs else prompts
    update = index // rules.minibatch_prompts
    return [(update == i).nonzero().flatten().tolist() for i in update.unique()]


Unit = tuple[int, list[int]]  # tokens, sequences


def _units(
    members: list[int], lengths: list[int], prefixes: list[int], prompts: list[int], rules: Rules, share: bool
) -> list[Unit]:
    """What stays together. A group that shares its prompt is split where it is more than a micro-batch or a rank's part
    of the update."""
    if not share and not rules.pairs:
        return [(lengths[i], [i]) for i in members]
    groups: dict[int, list[int]] = {}
    for i in members:
        groups.setdefault(prompts[i], []).append(i)
    if not share:
        return [(sum(lengths[i] for i in group), group) for group in groups.values()]

    def tokens(group: list[int]) -> int:
        return prefixes[group[0]] + sum(lengths[i] - prefixes[i] for i in group)

    room = min(rules.micro_batch_tokens, sum(map(tokens, groups.values())) // rules.ranks)
    units: list[Unit] = []
    for group in groups.values():
        unit = [group[0]]
        for i in group[1:]:
            if rules.pairs or tokens([*unit, i]) <= room:
                unit.append(i)
            else:
                units.append((tokens(unit), unit))
                unit = [i]
        units.append((tokens(unit), unit))
    return units


def _deal(units: list[Unit], lengths: list[int], rules: Rules) -> list[MicroBatches]:
    """The micro-batches of each rank."""
    hands: list[list[Unit]] = [[] for _ in range(rules.ranks)]
    loads = [(0, rank) for rank in range(rules.ranks)]
    for unit in sorted(units, key=lambda unit: (-unit[0], unit[1][0])):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + unit[0], rank))
        hands[rank].append(unit)
    dealt = [_cut(hand, lengths, rules) for hand in hands]
    most = max(map(len, dealt))
    return [cuts + [[] for _ in range(most - len(cuts))] for cuts in dealt]


def _cut(units: list[Unit], lengths: list[int], rules: Rules) -> MicroBatches:
    """Micro-batches of neighbours, which are of similar size, so that padding stays small."""

    def up(tokens: int) -> int:
        return -(-tokens // rules.multiple) * rules.multiple

    cuts: MicroBatches = []
    total = longest = 0  # of the last cut
    for tokens, members in units:
        longest_member = max(lengths[i] for i in members)
        total, longest = total + tokens, max(longest, longest_member)
        rows = len(members) + (len(cuts[-1]) if cuts else 0)
        if not cuts or (up(total) if rules.packing else rows * up(longest)) > rules.micro_batch_tokens:
            cuts.append([])
            total, longest = tokens, longest_member
        cuts[-1] += members
    return cuts

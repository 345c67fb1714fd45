"""Every recipe and every value of every field against `reference.py`, on hand-sized cases, to 1e-9.

A case knows what the definitions give and how to ask a package for the same; `check` runs all of them.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import ClassVar, Literal, get_args, get_origin

import numpy as np
import pytest
import reference
import torch
from pydantic import ValidationError
from reference import Dual, Response, Sample, Token

from megarl.algorithms.recipe import Recipe
from megarl.algorithms.recipes import RECIPES
from megarl.types import Prompt, RewardStatus, SampleGroup, UserError
from megarl.types import Sample as DrawnSample

LIMIT = 6  # tokens of a response; lengths of 7 are over it
Numbers = dict[str, list[float]]


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- asking the package ----------------------------------------------------------------------------------------------


class Case:
    """`fields` make the recipe: {"name": "grpo", "variant": "paper"} or {"ratio": "token", ...}."""

    name: str
    fields: dict
    runs: ClassVar[tuple[str, ...]]  # which files of the package

    @cached_property
    def expected(self) -> Numbers:
        return self.by_definition(reference.recipe(**self.fields))

    def actual(self, package: str) -> Numbers:
        recipe_class = importlib.import_module(f"{package}.recipe").Recipe
        fields = dict(self.fields)
        recipe = recipe_class.named(fields.pop("name"), **fields) if "name" in fields else recipe_class(**fields)
        return self.by_package(importlib.import_module(package), recipe)

    def by_definition(self, r) -> Numbers: ...

    def by_package(self, algorithms, recipe) -> Numbers: ...


def difference(case: Case, package: str = "megarl.algorithms") -> str | None:
    """Where a package disagrees with the definitions, or None."""
    try:
        actual = case.actual(package)
    except (UserError, ValidationError) as error:
        return f"{case.name}: refused: {error}"
    for key, expected in case.expected.items():
        if len(actual[key]) != len(expected):
            return f"{case.name}: {len(actual[key])} {key}, not {len(expected)}"
        for i, (ours, theirs) in enumerate(zip(actual[key], expected, strict=True)):
            if not abs(ours - theirs) <= 1e-9 * max(1.0, abs(theirs)):
                return f"{case.name}: {key}[{i}] is {ours!r}, not {theirs!r}"
    return None


def check(package: str = "megarl.algorithms", file: str | None = None) -> Iterator[str]:
    """Every disagreement of a package with the definitions, in the cases that run code of the file (or folder)."""
    chosen = (case for case in cases() if file is None or file.split("/")[0] in case.runs)
    return (found for case in chosen if (found := difference(case, package)))


# ---- credit ----------------------------------------------------------------------------------------------------------

VERDICTS = {"2/4": (1, 0, 0, 1), "0/4": (0, 0, 0, 0), "4/4": (1, 1, 1, 1), "1/4": (0, 0, 1, 0), "3/4": (1, 0, 1, 1)}


def group_of(verdicts, prompt: int, valid=None) -> list[Sample]:
    """Lengths of 1 to LIMIT + 1."""
    return [
        Sample(
            prompt=prompt,
            correct=bool(correct),
            length=1 + (3 * i + abs(prompt)) % (LIMIT + 1),
            valid=bool(valid is None or valid[i]),
            pool=(1 + abs(prompt) % 4) / 5,
            greedy=prompt % 2 == 0,
            truncated=i == 2,
        )
        for i, correct in enumerate(verdicts)
    ]


def interleaved(*groups: list[Sample]) -> list[Sample]:
    return [sample for row in itertools.zip_longest(*groups) for sample in row if sample is not None]


def batches() -> dict[str, list[Sample]]:
    groups = {name: group_of(verdicts, 40 - 17 * i) for i, (name, verdicts) in enumerate(VERDICTS.items())}
    return {
        **groups,
        "all groups": interleaved(*groups.values()),
        "all filtered": groups["0/4"] + groups["4/4"],
        "n=1": [group_of([i % 3 != 1], prompt=i - 2)[0] for i in range(5)],
        "n=1, all wrong": [group_of([0], prompt=i)[0] for i in range(3)],
        "some invalid": interleaved(
            group_of((1, 0, 0, 1), 3, valid=(1, 1, 1, 0)),
            group_of((1, 0, 0, 0), 8, valid=(0, 1, 1, 1)),  # what is left is all wrong
            group_of((1, 1, 0, 1), 5, valid=(1, 1, 0, 1)),  # what is left is all correct
            group_of((0, 1, 1, 0), 6, valid=(0, 1, 0, 0)),  # one is left
            group_of((1, 0), 7, valid=(0, 0)),
            group_of((0, 0, 1), -9),
        ),
        "none valid": group_of((1, 0), 7, valid=(0, 0)),
    }


def credit_of(algorithms, recipe, samples: list[Sample], pool: bool = True):
    return algorithms.credit(
        recipe,
        torch.tensor([s.prompt for s in samples]),
        torch.tensor([s.correct for s in samples]),
        valid=torch.tensor([s.valid for s in samples]),
        masked=torch.tensor([reference.masked(recipe, s) for s in samples]),
        lengths=torch.tensor([s.length for s in samples]),
        pool_rewards=f64([s.pool for s in samples]) if pool else None,
        greedy_rewards=f64([float(s.greedy) for s in samples]),
        max_response_tokens=LIMIT,
    )


@dataclass
class GroupsCase(Case):
    """The step's own groups: verdicts as statuses, truncation, a greedy answer, samples drawn beyond the group."""

    runs = ("recipe.py", "recipes.py", "credit.py")
    name: str
    fields: dict
    groups: list[list[Sample]]
    unused: list[list[Sample]]  # of each group

    def pooled(self, r) -> list[list[Sample]]:
        shares = []
        for drawn in map(list.__add__, self.groups, self.unused):
            correct = [s.correct for s in drawn if s.valid]
            shares.append(reference.mean(correct) if correct else 0.0)
        return [[replace(s, pool=share) for s in group] for group, share in zip(self.groups, shares, strict=True)]

    def by_definition(self, r) -> Numbers:
        keep, advantages = reference.credit(r, [s for group in self.pooled(r) for s in group], LIMIT)
        group_filter_alone = reference.recipe(**{**self.fields, "sample_filter": "none", "overlong": "none"})
        learned = [[reference.learned_from(group_filter_alone, group, s) for s in group] for group in self.groups]
        return {
            "keep": [float(k) for k in keep],
            "advantages": advantages,
            "filtered": [float(not any(group)) for group in learned],
        }

    def by_package(self, algorithms, recipe) -> Numbers:
        module = importlib.import_module(f"{algorithms.__name__}.credit")
        groups = [
            SampleGroup(
                Prompt(str(i), "", np.zeros(1), "", ""),
                [drawn(s) for s in group],
                unused=[drawn(s) for s in more],
                greedy=drawn(Sample(0, correct=group[0].greedy)),
            )
            for i, (group, more) in enumerate(zip(self.groups, self.unused, strict=True))
        ]
        credited = module.credit_groups(recipe, groups, LIMIT)
        return {
            "keep": credited.keep.double().tolist(),
            "advantages": credited.advantages.tolist(),
            "filtered": [float(module.is_filtered(recipe, group)) for group in groups],
        }


def drawn(s: Sample) -> DrawnSample:
    status = (RewardStatus.CORRECT if s.correct else RewardStatus.NO_ANSWER) if s.valid else RewardStatus.TIMEOUT
    reason = "length" if s.truncated else "stop"
    return DrawnSample(0, np.zeros(s.length), np.zeros(s.length), "", reason, 0, status)


@dataclass
class CreditCase(Case):
    runs = ("recipe.py", "recipes.py", "credit.py")
    name: str
    fields: dict
    samples: list[Sample]

    def by_definition(self, r) -> Numbers:
        keep, advantages = reference.credit(r, self.samples, LIMIT)
        return {"keep": [float(k) for k in keep], "advantages": advantages}

    def by_package(self, algorithms, recipe) -> Numbers:
        credited = credit_of(algorithms, recipe, self.samples, pool=self.samples[0].pool is not None)
        return {"keep": credited.keep.double().tolist(), "advantages": credited.advantages.tolist()}


# ---- loss and its gradient -------------------------------------------------------------------------------------------

JUNK = Token(logp=-7.0, old=5.0, rollout=3.0, ref=-9.0, entropy=1e6, value=1e3)  # behind the end of a response


@dataclass
class Row:
    """One response as it lies in a batch; removed rows have an empty mask."""

    tokens: list[Token]
    advantages: list[float]
    prompt: int
    removed: bool = False


def token(step: int, log_s: float = 0.0, mismatch: float | None = None, logp: float | None = None) -> Token:
    """Log-probs of at most 0.11, so that DPPO's probabilities move little unless a case wants them to."""
    logp = -2.2 - (0.37 * step) % 2 if logp is None else logp
    old = logp - log_s
    return Token(
        logp=logp,
        old=old,
        rollout=old - (0.1 * math.sin(step) if mismatch is None else mismatch),
        ref=logp + 1.5 * math.sin(2 * step + 1),
        entropy=0.1 + (0.7 * step) % 3,
        value=math.cos(step),
    )


def differentiable(rows: list[Row]) -> list[Response]:
    """What the reference sees of the rows, log-probs and entropies as variables named by their place."""
    return [
        Response(
            [
                Token(Dual(t.logp, {("logprobs", i, j): 1.0}), t.old, t.rollout, t.ref, Dual(t.entropy, {(i, j): 1.0}))
                for j, t in enumerate([] if row.removed else row.tokens)
            ],
            row.advantages,
            row.prompt,
        )
        for i, row in enumerate(rows)
    ]


def width_of(rows: list[Row]) -> int:
    return max(len(row.tokens) for row in rows) + 1


def padded(rows: list[Row], attribute: str) -> torch.Tensor:
    """f64[B, L], right-padded with junk."""
    width = width_of(rows)
    return f64([[getattr(t, attribute) for t in (*row.tokens, *[JUNK] * width)][:width] for row in rows])


def mask_of(rows: list[Row]) -> torch.Tensor:
    width = width_of(rows)
    return f64([[float(not row.removed and j < len(row.tokens)) for j in range(width)] for row in rows])


def loss_by_definition(r, rows: list[Row]) -> Numbers:
    result = reference.loss(r, differentiable(rows), LIMIT)
    places = [(i, j) for i in range(len(rows)) for j in range(width_of(rows))]
    return {
        "loss": [result.value],
        "dloss/dlogprobs": [result.slopes.get(("logprobs", *place), 0.0) for place in places],
        "dloss/dentropy": [result.slopes.get(place, 0.0) for place in places],
    }


def loss_by_package(algorithms, recipe, rows: list[Row], advantages: torch.Tensor, attached: bool = False) -> Numbers:
    logprobs, entropy = padded(rows, "logp").requires_grad_(), padded(rows, "entropy").requires_grad_()
    value = algorithms.loss(
        recipe,
        logprobs,
        logprobs if attached else padded(rows, "old"),
        advantages,
        mask_of(rows),
        entropy=entropy if recipe.entropy_coef else None,
        ref_logprobs=padded(rows, "ref") if recipe.kl_coef else None,
        rollout_logprobs=padded(rows, "rollout")
        if recipe.mismatch != "none" or recipe.old_policy == "rollout"
        else None,
        prompt_ids=torch.tensor([row.prompt for row in rows]),
        max_response_tokens=LIMIT,
    )
    grads = torch.autograd.grad(value, (logprobs, entropy), allow_unused=True)
    flat = [torch.zeros_like(logprobs) if grad is None else grad for grad in grads]
    return {
        "loss": [value.item()],
        "dloss/dlogprobs": flat[0].flatten().tolist(),
        "dloss/dentropy": flat[1].flatten().tolist(),
    }


@dataclass
class LossCase(Case):
    runs = ("recipe.py", "recipes.py", "loss.py", "ops", "mismatch.py", "pairwise.py")
    name: str
    fields: dict
    rows: list[Row]
    token_advantages: bool = False
    attached: bool = False  # the old log-probs are the policy's own, gradient and all; they count as constants

    def by_definition(self, r) -> Numbers:
        return loss_by_definition(r, self.rows)

    def by_package(self, algorithms, recipe) -> Numbers:
        width = width_of(self.rows)
        advantages = f64([[*row.advantages, *[100.0] * width][:width] for row in self.rows])
        advantages = advantages if self.token_advantages else advantages[:, 0]
        return loss_by_package(algorithms, recipe, self.rows, advantages, self.attached)


SIGNS = (0.7, -1.3, 0.0)


def around(edge: float) -> tuple[float, float]:
    """Both sides; a mean of the two isn't on the edge, where a gradient would be anyone's."""
    return edge - 1e-6, edge + 2e-6


def ratio_edges(r) -> list[float]:
    """Log-ratios on both sides of every place where a clip sets in, and between."""
    edges = [
        math.log(1 - r.clip_low),
        math.log(1 + r.clip_high),
        math.log(r.dual_clip or 3.0),
        -r.clip_low,
        r.clip_high,
    ]
    return [-1.2, 0.0, 0.9, *(x for edge in (*edges, math.log(r.ratio_cap)) for x in around(edge))]


def mismatch_edges(r) -> list[float]:
    return [-1.5, 0.0, 1.5, *around(math.log(r.mismatch_low)), *around(math.log(r.mismatch_high))]


def probability_moves(r) -> list[Token]:
    """From a probability of a half, on both sides of DPPO's thresholds; engine and trainer agree."""
    if r.clip != "dppo_tv":
        return []
    moves = [sign * x for sign, edge in ((1, r.clip_high), (-1, r.clip_low)) for x in around(edge)]
    ratios = [0.5 / (0.5 - x) for x in moves]
    return [token(step, math.log(ratio), mismatch=0.0, logp=math.log(0.5)) for step, ratio in enumerate(ratios)]


def ragged(tokens: list[Token], advantage: float) -> list[Row]:
    rows, left = [], list(tokens)
    for length in itertools.cycle((1, 3, 2, 5, 4)):
        if not left:
            return rows
        rows.append(Row(left[:length], [advantage] * len(left[:length]), 0))
        left = left[length:]


def adding_up(total: float, length: int, step: int) -> list[float]:
    parts = [0.3 * math.sin(step + i) for i in range(length - 1)]
    return [*parts, total - math.fsum(parts)]


def rows_for(r) -> list[Row]:
    """Advantages of every sign, each with ratios and mismatches at every edge, by token and by sequence."""
    rows = []
    for advantage in SIGNS:
        tokens = [token(step, x) for step, x in enumerate(ratio_edges(r))]
        if r.old_policy == "rollout":
            tokens += [token(step, x, mismatch=0.0) for step, x in enumerate(ratio_edges(r))]
        if r.mismatch != "none":
            tokens += [token(step, 0.1, x) for step, x in enumerate(mismatch_edges(r))]
        rows += ragged(tokens + probability_moves(r), advantage)
        if r.ratio == "sequence":
            for n, edge in enumerate(ratio_edges(r)):
                length = 1 + n % 3
                logs = adding_up(edge * length, length, n)
                rows.append(Row([token(n + i, x) for i, x in enumerate(logs)], [advantage] * length, 0))
        if r.mismatch.startswith(("seq", "geo")):
            for n, edge in enumerate(mismatch_edges(r)):
                for total, length in ((edge, 3), (2 * edge, 2)):
                    logs = adding_up(total, length, n)
                    rows.append(Row([token(n + i, 0.1, x) for i, x in enumerate(logs)], [advantage] * length, 0))
    rows.insert(2, Row([token(7, 0.3), token(8, -0.3)], [0.7, 0.7], 0, removed=True))
    for i, row in enumerate(rows):
        row.prompt = (7 * i) % 5 - 2
    return rows


def removed(rows: list[Row]) -> list[Row]:
    return [Row(row.tokens, row.advantages, row.prompt, removed=True) for row in rows]


def sign_changing(rows: list[Row]) -> list[Row]:
    """A critic's advantages: one a token."""
    return [
        Row(row.tokens, [a + math.sin(3 * i + j) for j, a in enumerate(row.advantages)], row.prompt, row.removed)
        for i, row in enumerate(rows)
    ]


def far_off_policy() -> list[Row]:
    """Log-ratios to the old policy and the reference beyond the limit of exp."""
    tokens = [token(1, 25.0), token(2, -25.0), token(3, 19.0)]
    for t, gap in zip(tokens, (25.0, -25.0, 21.0), strict=True):
        t.ref = t.logp + gap
    return [Row([t], [a], i) for i, (a, t) in enumerate(itertools.product(SIGNS, tokens))]


def pairs() -> list[Row]:
    rows = [
        Row([token(4 * i + j, 0.8 * math.sin(i + 2 * j)) for j in range(1 + (2 * i) % 5)], [], prompt)
        for i, prompt in enumerate((5, -1, -1, 3, 3, 5))
    ]
    for row, advantage in zip(rows, (1.0, -1.0, 1.0, 1.0, -1.0, -1.0), strict=True):
        row.advantages = [advantage] * len(row.tokens)
    return [*rows, Row([token(3)], [1.0], 9, removed=True)]


# ---- a step: credit, the critic's advantages if there is one, the loss -----------------------------------------------


@dataclass
class StepCase(Case):
    """Responses as long as the samples, their ratios at the recipe's edges."""

    runs = ("recipe.py", "recipes.py", "credit.py", "gae.py", "loss.py", "ops", "mismatch.py", "pairwise.py")
    name: str
    fields: dict
    samples: list[Sample]

    def rows(self, r, keep) -> list[Row]:
        edges, steps = ratio_edges(r), itertools.count()
        return [
            Row([token(s, edges[s % len(edges)]) for s in itertools.islice(steps, x.length)], [0.0], x.prompt, not kept)
            for x, kept in zip(self.samples, keep, strict=True)
        ]

    def by_definition(self, r) -> Numbers:
        keep, advantages = reference.credit(r, self.samples, LIMIT)
        rows = self.rows(r, keep)
        for row, advantage in zip(rows, advantages, strict=True):
            row.advantages = [advantage] * len(row.tokens)
        if r.baseline == "critic":
            kept = [row for row in rows if not row.removed]
            found = [reference.gae(r, row.advantages[0], [t.value for t in row.tokens])[0] for row in kept]
            for row, advantages in zip(kept, reference.whiten(r, found), strict=True):
                row.advantages = advantages
        return loss_by_definition(r, rows)

    def by_package(self, algorithms, recipe) -> Numbers:
        credited = credit_of(algorithms, recipe, self.samples)
        rows = self.rows(reference.recipe(**self.fields), credited.keep.tolist())
        advantages = credited.advantages
        if recipe.needs_critic:
            mask = mask_of(rows)
            sequence = torch.arange(len(rows)).repeat_interleave(mask.shape[1])
            found, _ = algorithms.gae(recipe, advantages, padded(rows, "value").flatten(), mask.flatten(), sequence)
            advantages = algorithms.whiten(recipe, found, mask.flatten()).view_as(mask)
        return loss_by_package(algorithms, recipe, rows, advantages)


# ---- the critic and the mismatch weights, flat -----------------------------------------------------------------------


@dataclass
class Flat:
    """Responses of a few tokens, each behind two prompt tokens of junk."""

    rows: list[list[Token]]
    removed: tuple[int, ...] = ()

    def kept(self) -> list[list[Token]]:
        return [[] if i in self.removed else row for i, row in enumerate(self.rows)]

    def scatter(self, numbers: list[list[float]], junk: float = 0.0) -> list[float]:
        """Numbers of the kept tokens, `junk` everywhere else."""
        out = []
        for row, own in zip(self.rows, numbers, strict=True):
            out += [junk, junk, *own, *[junk] * (len(row) - len(own))]
        return out

    def tensor(self, attribute: str) -> torch.Tensor:
        return f64(self.scatter([[getattr(t, attribute) for t in row] for row in self.rows], getattr(JUNK, attribute)))

    @property
    def mask(self) -> torch.Tensor:
        return f64(self.scatter([[1.0] * len(row) for row in self.kept()]))

    @property
    def sequence(self) -> torch.Tensor:
        return torch.tensor([i for i, row in enumerate(self.rows) for _ in range(len(row) + 2)])


@dataclass
class CriticCase(Case):
    """Advantages, whitened advantages, returns; the value loss and its gradient at moved values."""

    runs = ("recipe.py", "recipes.py", "gae.py")
    name: str
    fields: dict
    flat: Flat

    def rewards(self) -> list[float]:
        return [(1.0, -1.0, 0.0)[i % 3] for i in range(len(self.flat.rows))]

    def moved(self, r) -> list[list[float]]:
        """On both sides of where the value clip sets in, and far beyond."""
        moves = [-2.0, -0.8, -0.1, 0.2, 0.8, 2.0, *around(r.value_clip), *around(-r.value_clip)]
        places = itertools.count()
        return [[t.value + moves[next(places) % len(moves)] for t in row] for row in self.flat.rows]

    def by_definition(self, r) -> Numbers:
        kept = self.flat.kept()
        found = [
            reference.gae(r, reward, [t.value for t in row]) if row else ([], [])
            for reward, row in zip(self.rewards(), kept, strict=True)
        ]
        advantages, returns = [[own[k] for own in found] for k in (0, 1)]
        total, steps = Dual(0.0), itertools.count()
        for row, targets, values in zip(kept, returns, self.moved(r), strict=True):
            for t, target, value in zip(row, targets, values, strict=False):
                step = next(steps)
                weight = 0.1 + step % 3
                total += weight * reference.value_loss(r, Dual(value, {step: 1.0}), t.value, target)
        slopes = iter([total.slopes.get(step, 0.0) for step in range(next(steps))])
        return {
            "advantages": self.flat.scatter(advantages),
            "returns": [x for row in returns for x in row],
            "whitened": self.flat.scatter(reference.whiten(r, advantages)),
            "value loss": [total.value],
            "dloss/dvalues": self.flat.scatter([[next(slopes) for _ in row] for row in kept]),
        }

    def by_package(self, algorithms, recipe) -> Numbers:
        flat, mask = self.flat, self.flat.mask
        old = flat.tensor("value")
        advantages, returns = algorithms.gae(recipe, f64(self.rewards()), old, mask, flat.sequence)
        whitened = algorithms.whiten(recipe, advantages, mask)
        moved = self.moved(reference.recipe(**self.fields))
        values = f64(flat.scatter(moved, JUNK.value)).requires_grad_()
        weights = torch.zeros_like(mask)
        weights[mask > 0] = f64([0.1 + step % 3 for step in range(int(mask.sum()))])
        value = algorithms.value_loss(recipe, values, old, returns, weights)
        return {
            "advantages": advantages.tolist(),
            "returns": returns[mask > 0].tolist(),
            "whitened": whitened.tolist(),
            "value loss": [value.item()],
            "dloss/dvalues": torch.autograd.grad(value, values)[0].tolist(),
        }


@dataclass
class MismatchCase(Case):
    runs = ("ops", "recipe.py", "recipes.py", "mismatch.py")
    name: str
    fields: dict
    flat: Flat

    def by_definition(self, r) -> Numbers:
        weights = [
            [reference.mismatch_weight(r, Response(row, []), t) for t in row] if row else [] for row in self.flat.kept()
        ]
        return {"weights": self.flat.scatter(weights)}

    def by_package(self, algorithms, recipe) -> Numbers:
        flat = self.flat
        weights = algorithms.mismatch_weights(
            recipe, flat.tensor("old"), flat.tensor("rollout"), flat.mask, flat.sequence
        )
        return {"weights": weights.tolist()}


# ---- the cases -------------------------------------------------------------------------------------------------------

NAMED = [{"name": name, "variant": variant} for name in reference.RECIPES for variant in ("paper", "minimal_rl")]
OBJECTIVES = [
    {},
    {"ratio": "token"},
    {"ratio": "sequence"},
    {"ratio": "token", "clip": "ppo"},
    {"ratio": "token", "clip": "ppo", "clip_low": 0.1, "clip_high": 0.3},
    {"ratio": "token", "clip": "ppo", "dual_clip": 2.0},
    {"ratio": "sequence", "clip": "ppo"},
    {"ratio": "sequence", "clip": "ppo", "clip_high": 0.28, "dual_clip": 3.0},
    {"ratio": "token", "clip": "cispo", "clip_high": 0.4},
    {"ratio": "sequence", "clip": "token_log", "clip_low": 0.3, "clip_high": 0.4},
    {"ratio": "token", "clip": "sapo", "sapo_tau_positive": 1.2, "sapo_tau_negative": 2.0},
    {"ratio": "token", "clip": "dppo_tv", "clip_low": 0.15, "clip_high": 0.25, "ratio_cap": 5.0},
]
AGGREGATIONS = (
    "token_mean",
    "seq_mean_token_mean",
    "seq_mean_token_sum",
    "seq_mean_token_sum_norm",
    "prompt_mean_token_mean",
)
MISMATCHES = ("token_tis", "token_icepop", "seq_tis", "seq_reject", "geo_reject")
PROXIMAL = [
    {"proximal": "squared_log_ratio", "proximal_level": level, "proximal_coef": 0.3} for level in ("token", "sequence")
]
LOSSES = [
    *OBJECTIVES,
    *({**OBJECTIVES[5], "aggregation": aggregation} for aggregation in AGGREGATIONS),
    *({**kind, "mismatch": m} for kind in (OBJECTIVES[0], OBJECTIVES[4], OBJECTIVES[6]) for m in MISMATCHES),
    *({**OBJECTIVES[3], "mismatch": m, "mismatch_high": 1.1} for m in MISMATCHES if m.endswith("tis")),
    *(
        {**OBJECTIVES[3], "mismatch": m, "mismatch_low": 0.8, "mismatch_high": 1.1}
        for m in MISMATCHES
        if not m.endswith("tis")
    ),
    *({**OBJECTIVES[3], "mismatch": "geo_reject", "aggregation": aggregation} for aggregation in AGGREGATIONS),
    *({**OBJECTIVES[3], "kl_coef": 0.2, "kl_estimator": k, "mismatch": "token_tis"} for k in ("k1", "k2", "k3")),
    {**OBJECTIVES[0], "entropy_coef": 0.3, "kl_coef": 0.2, "mismatch": "seq_reject"},
    *({**p, "aggregation": aggregation} for p in PROXIMAL for aggregation in AGGREGATIONS),
    *({**OBJECTIVES[4], **p, "mismatch": m} for p in PROXIMAL for m in ("token_tis", "seq_reject")),
    *({**kind, "old_policy": "rollout"} for kind in (*OBJECTIVES[1:], *PROXIMAL)),
]
PAIR_LOSSES = [{"label_smoothing": 0.0}, {"dpo_beta": 2.0}, {"dpo_beta": 0.5, "label_smoothing": 0.3}]


def credits() -> list[dict]:
    """Every combination of baseline, scale and filters that a recipe may have; the other fields take turns."""
    fields = ("baseline", "scale", "group_filter", "sample_filter")
    choices = [get_args(Recipe.model_fields[field].annotation) for field in fields]
    legal = []
    for number, values in enumerate(itertools.product(*choices)):
        chosen = dict(zip(fields, values, strict=True))
        chosen["wrong_reward"] = 0.0 if chosen["scale"] == "group_mean" else (-1.0, -1.0, 0.0)[number % 3]
        chosen["std_ddof"] = (1, 1, 0, 0, 1)[number % 5]
        chosen["dropped"] = ("remove", "remove", "zero", "remove", "zero", "zero", "zero")[number % 7]
        if chosen["baseline"] == "pool_mean":
            chosen["backfill"] = "adaptive"
        with contextlib.suppress(ValidationError):
            Recipe(**chosen)
            legal.append(chosen)
    return legal


def named(fields: dict) -> str:
    return "/".join(f"{value:g}" if isinstance(value, float) else str(value) for value in fields.values()) or "plain"


@cache
def cases() -> list[Case]:
    found: list[Case] = []
    samples = batches()
    for fields in NAMED:
        found += [CreditCase(f"credit {named(fields)}, {name}", fields, batch) for name, batch in samples.items()]
        for name in ("all groups", "all filtered", "n=1", "n=1, all wrong"):
            found.append(StepCase(f"step {named(fields)}, {name}", fields, samples[name]))
        rows = pairs() if fields["name"] == "iterative_dpo" else rows_for(reference.recipe(**fields))
        found.append(LossCase(f"loss {named(fields)}", fields, rows))
        found.append(LossCase(f"loss {named(fields)}, all filtered", fields, removed(rows)))
    for fields in credits():
        for name in ("all groups", "some invalid"):
            found.append(CreditCase(f"credit {named(fields)}, {name}", fields, samples[name]))
    own_pool = [Sample(s.prompt, s.correct, s.length, greedy=s.greedy) for s in samples["all groups"]]
    fields = {"backfill": "adaptive", "baseline": "pool_mean", "wrong_reward": -1.0}
    found.append(CreditCase("credit pool_mean without a pool", fields, own_pool))
    for cache_tokens, dropped in itertools.product((None, 1, 3), ("remove", "zero")):
        fields = {"overlong": "soft", "overlong_cache_tokens": cache_tokens, "dropped": dropped, "baseline": "mean"}
        for more in ({"scale": "group_std"}, {"wrong_reward": -1.0, "group_filter": "both"}):
            found.append(CreditCase(f"credit {named({**fields, **more})}", {**fields, **more}, samples["all groups"]))
    groups = [samples[name] for name in VERDICTS] + [group_of((1, 0, 1), 3, valid=(0, 1, 1))]
    unused = [group_of(verdicts, 1) for verdicts in ((1, 1, 1), (0,), (), (1, 0), (), (1, 1))]
    filters = ({}, {"group_filter": "both"}, {"group_filter": "both", "dropped": "zero"}, {"sample_filter": "positive"})
    masks = [{"overlong": "mask", **more} for more in filters]
    baselines = ({"baseline": "mean"}, {"baseline": "greedy"}, {"baseline": "pool_mean", "backfill": "adaptive"})
    for mask, baseline in itertools.product(({}, *masks), baselines):
        fields = {**mask, **baseline, "wrong_reward": -1.0}
        found.append(GroupsCase(f"groups {named(fields)}", fields, groups, unused))
    for fields in LOSSES:
        rows = rows_for(reference.recipe(**fields))
        found.append(LossCase(f"loss {named(fields)}", fields, rows))
        found.append(LossCase(f"loss {named(fields)}, by token", fields, sign_changing(rows), token_advantages=True))
        on_policy = [row for a in SIGNS for row in ragged([token(i, 0.0, 0.3 * (i % 7 - 3)) for i in range(9)], a)]
        found.append(LossCase(f"loss {named(fields)}, on policy", fields, on_policy, attached=True))
    found += [LossCase(f"loss {named(fields)}, far off", fields, far_off_policy()) for fields in OBJECTIVES[1:]]
    fields = {**OBJECTIVES[0], "kl_coef": 1.0, "kl_estimator": "k3"}
    found.append(LossCase("loss k3, far off", fields, far_off_policy()))
    fields = {"mismatch": "geo_reject"}
    rejected = [Row([token(i, 0.1, 3.0), token(i, 0.1, 3.0)], [1.0, 1.0], i) for i in range(3)]
    found.append(LossCase("loss, all rejected", fields, rejected))
    for fields in PAIR_LOSSES:
        fields = {"objective": "dpo", **fields}
        found.append(LossCase(f"loss {named(fields)}", fields, pairs()))
    rows = [[token(5 * i + j, 0.2 * math.sin(j)) for j in range(n)] for i, n in enumerate((3, 1, 5, 2, 4, 1))]
    for fields in ({}, {"gamma": 0.9, "gae_lambda": 0.7}, {"gae_lambda": 0.0, "std_ddof": 0, "value_clip": 0.2}):
        critic = {"baseline": "critic", **fields}
        found.append(CriticCase(f"{named(critic)}", critic, Flat(rows, removed=(2,))))
        found.append(CriticCase(f"{named(critic)}, one token", critic, Flat(rows[1:2])))
        found.append(CriticCase(f"{named(critic)}, all filtered", critic, Flat(rows, removed=tuple(range(6)))))
    for kind in MISMATCHES:
        r = reference.recipe(mismatch=kind)
        flat = Flat([row.tokens for row in rows_for(r)], removed=(1, 4))
        found.append(MismatchCase(f"weights {kind}", {"mismatch": kind}, flat))
    return found


# ---- tests -----------------------------------------------------------------------------------------------------------


def of(kind: type[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in cases() if type(c) is kind])


@of(CreditCase)
def test_masks_and_advantages_are_the_definitions(case):
    assert difference(case) is None


@of(GroupsCase)
def test_credit_of_sample_groups_is_the_definitions(case):
    assert difference(case) is None


@of(LossCase)
def test_loss_and_gradients_are_the_definitions(case):
    assert difference(case) is None


@of(StepCase)
def test_a_step_from_verdicts_to_gradients_is_the_definitions(case):
    assert difference(case) is None


@of(CriticCase)
def test_generalised_advantages_whitening_and_value_loss_are_the_definitions(case):
    assert difference(case) is None


@of(MismatchCase)
def test_mismatch_weights_are_the_definitions(case):
    assert difference(case) is None


def test_the_reference_knows_every_recipe_and_no_other():
    assert set(reference.RECIPES) == set(RECIPES)


def test_every_value_of_every_choice_is_in_a_case():
    used = {(field, value) for c in cases() for field, value in vars(reference.recipe(**c.fields)).items()}
    for field, info in Recipe.model_fields.items():
        if get_origin(info.annotation) is Literal:
            for value in get_args(info.annotation):
                assert (field, value) in used, f"no case has {field}={value}"


def test_case_names_are_unique():
    names = [case.name for case in cases()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "name, verdicts, expected",
    [
        ("reinforce", "2/4", [1, -1, -1, 1]),
        ("raft", "2/4", [1, 0, 0, 1]),
        ("grpo", "2/4", [0.5 / (math.sqrt(1 / 3) + 1e-6) * sign for sign in (1, -1, -1, 1)]),
        ("grpo", "1/4", [-0.25 / 0.500001, -0.25 / 0.500001, 0.75 / 0.500001, -0.25 / 0.500001]),
        ("grpo", "4/4", [0, 0, 0, 0]),
        ("rloo", "3/4", [1 / 3, -1, 1 / 3, 1 / 3]),
        ("reinforce_rej_std", "2/4", [1 / (math.sqrt(4 / 3) + 1e-6) * sign for sign in (1, -1, -1, 1)]),
        ("maxrl", "1/4", [-0.25 / 0.250001, -0.25 / 0.250001, 0.75 / 0.250001, -0.25 / 0.250001]),
        ("iterative_dpo", "3/4", [1, -1, 0, 0]),
    ],
)
def test_the_reference_gives_numbers_worked_out_by_hand(name, verdicts, expected):
    samples = group_of(VERDICTS[verdicts], 0)
    assert reference.credit(reference.recipe(name), samples, LIMIT)[1] == pytest.approx(expected, rel=1e-12)


def test_the_reference_differentiates_as_differences_do():
    r = reference.recipe(**OBJECTIVES[5], **PROXIMAL[1], kl_coef=0.2, entropy_coef=0.3)
    rows = rows_for(r)
    slopes = reference.loss(r, differentiable(rows), LIMIT).slopes
    for i, j in ((0, 0), (1, 1), (3, 1), (4, 4)):
        t, nudged = rows[i].tokens[j], []
        for nudge in (-1e-7, 1e-7):
            rows[i].tokens[j] = Token(t.logp + nudge, t.old, t.rollout, t.ref, t.entropy)
            nudged.append(reference.loss(r, differentiable(rows), LIMIT).value)
        rows[i].tokens[j] = t
        assert slopes["logprobs", i, j] == pytest.approx((nudged[1] - nudged[0]) / 2e-7, abs=1e-6)

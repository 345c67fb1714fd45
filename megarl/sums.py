"""Sums over the tokens of all ranks: what metrics, whitening and limits are made of, however many tokens."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

SMALLEST, LARGEST = -40, 10  # powers of two between which a histogram tells values apart
BINS_PER_OCTAVE = 16
QUANTILE_ERROR = 2 ** (0.5 / BINS_PER_OCTAVE) - 1  # relative, at most (2.2%); below 2 ** SMALLEST a value counts as 0
BINS = (LARGEST - SMALLEST) * BINS_PER_OCTAVE + 2


class Ranks(Protocol):
    """What is asked of the learner's mesh."""

    @property
    def reports(self) -> bool: ...

    def sum(self, values: Tensor) -> Tensor: ...

    def max(self, values: Tensor) -> Tensor: ...


class Sums:
    """Of named values. Every rank adds the same names in the same order, then reduces; one that doesn't report counts
    for nothing. Without ranks, of this process alone."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self._ranks = ranks
        self._moments: dict[str, Tensor] = {}  # f64[3]: count, sum, sum of squares
        self._largest: dict[str, Tensor] = {}  # f64[1]
        self._histograms: dict[str, Tensor] = {}  # f64[BINS], counts

    def add(self, name: str, values: Tensor, quantiles: bool = False) -> None:
        """Values of any shape; with `quantiles`, none negative."""
        values = values.detach().flatten()
        if self._ranks and not self._ranks.reports:
            values = values[:0]
        exact = values.double()
        moments = torch.stack([exact.new_tensor(len(exact)), exact.sum(), exact.dot(exact)])
        self._moments[name] = self._moments.get(name, 0) + moments
        largest = exact.max() if len(exact) else exact.new_tensor(-math.inf)
        self._largest[name] = torch.maximum(self._largest.get(name, largest), largest)
        if quantiles:
            bins = values.float().log2().sub_(SMALLEST).mul_(BINS_PER_OCTAVE).floor_().nan_to_num_(nan=BINS)
            counts = torch.bincount(bins.clamp_(-1, BINS - 2).add_(1).int(), minlength=BINS).double()
            self._histograms[name] = self._histograms.get(name, 0) + counts

    def reduce(self) -> Sums:
        """Over all ranks, in place. Collective."""
        if self._ranks and self._moments:
            tables = [self._moments, self._histograms]
            reduced = self._ranks.sum(torch.cat([value for table in tables for value in table.values()]))
            sizes = [len(value) for table in tables for value in table.values()]
            parts = iter(reduced.split(sizes))
            for table in tables:
                table.update({name: next(parts) for name in table})
            largest = self._ranks.max(torch.stack(list(self._largest.values())))
            self._largest = dict(zip(self._largest, largest, strict=True))
        return self

    def __contains__(self, name: str) -> bool:
        """Whether any rank had values of this name."""
        return self.count(name) > 0

    def count(self, name: str) -> int:
        return int(self._moments[name][0]) if name in self._moments else 0

    def total(self, name: str) -> float:
        return float(self._moments[name][1])

    def squares(self, name: str) -> float:
        return float(self._moments[name][2])

    def mean(self, name: str) -> float:
        return self.total(name) / self.count(name)

    def variance(self, name: str, ddof: int = 0) -> float:
        count, total, squares = self._moments[name].tolist()
        return max(squares - total**2 / max(count, 1), 0.0) / max(count - ddof, 1)

    def max(self, name: str) -> float:
        return float(self._largest[name])

    def quantile(self, name: str, q: float) -> float:
        """The value that a share q of all are at or below, up to QUANTILE_ERROR; at most the largest."""
        counts = self._histograms[name].cumsum(0)
        index = int((counts < q * counts[-1]).sum())
        if index == 0:
            return 0.0
        return min(2 ** (SMALLEST + (index - 0.5) / BINS_PER_OCTAVE), self.max(name))

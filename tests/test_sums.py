"""Sums against the values themselves, in one process and over ranks."""

import numpy as np
import pytest
import torch

from megarl.sums import QUANTILE_ERROR, Sums


class Ranks:
    """Of several processes' sums, added here one after the other."""

    def __init__(self, reports=True):
        self.reports, self.given = reports, []

    def sum(self, values):
        self.given.append(values.clone())
        return values

    def max(self, values):
        return values


def test_moments_are_those_of_all_values_whatever_part_they_came_in():
    values = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sums = Sums()
    for part in values.split([1, 0, 400, 599]):
        sums.add("x", part.view(-1, 1))
    sums.reduce()
    assert sums.count("x") == 1000
    assert sums.mean("x") == pytest.approx(float(values.mean()))
    assert sums.max("x") == float(values.max())
    assert sums.squares("x") == pytest.approx(float((values**2).sum()))
    for ddof in (0, 1):
        assert sums.variance("x", ddof) == pytest.approx(float(values.var(correction=ddof)))


@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("q", [0.01, 0.5, 0.99])
def test_a_quantile_is_off_by_at_most_what_is_stated(spread, q):
    values = torch.exp(spread * torch.randn(5000, generator=torch.Generator().manual_seed(1)) - 5).double()
    sums = Sums()
    sums.add("x", values, quantiles=True)
    exact = float(np.quantile(values.numpy(), q, method="inverted_cdf"))
    assert sums.quantile("x", q) == pytest.approx(exact, rel=QUANTILE_ERROR * 1.001)


def test_values_beyond_the_histogram_count_at_its_ends():
    sums = Sums()
    sums.add("x", torch.tensor([0.0, 0.0, 1e-30, 1e9]), quantiles=True)
    assert sums.quantile("x", 0.5) == 0
    assert 1000 < sums.quantile("x", 1.0) <= 1e9
    sums.add("y", torch.tensor([float("nan"), 1.0]), quantiles=True)
    assert np.isnan(sums.mean("y"))


def test_a_name_without_values_is_absent():
    sums = Sums()
    sums.add("x", torch.zeros(0))
    assert "x" not in sums and "y" not in sums and sums.count("x") == 0


def test_a_rank_that_does_not_report_sends_zeros_of_the_same_shape():
    speaking, silent = Ranks(), Ranks(reports=False)
    for ranks in (speaking, silent):
        sums = Sums(ranks)
        sums.add("x", torch.ones(3), quantiles=True)
        sums.add("y", torch.ones(2))
        sums.reduce()
    assert silent.given[0].shape == speaking.given[0].shape
    assert not silent.given[0].any() and speaking.given[0].any()

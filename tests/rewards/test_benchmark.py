"""The grading benchmark: how often the math reward is right, by category. `pytest -s` prints the table."""

from collections import Counter, defaultdict

import pytest
from cases import CASES

from megarl.rewards.pool import RewardPool
from megarl.types import RewardStatus

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def verdicts():
    with RewardPool(workers=2) as pool:
        return pool.grade([(response, reference, False) for _, response, reference, _ in CASES])


def table(verdicts):
    rows = defaultdict(Counter)
    for (category, _, _, right), verdict in zip(CASES, verdicts, strict=True):
        accepted = verdict.status is RewardStatus.CORRECT
        rows[category].update(cases=1, agree=accepted == right, false_accepts=accepted and not right)
    rows["all"] = sum(rows.values(), Counter())
    lines = [f"{'category':26}{'cases':>6}{'right':>8}{'false accepts':>15}"]
    for category, row in rows.items():
        share = row["agree"] / row["cases"]
        lines.append(f"{category:26}{row['cases']:6}{share:8.1%}{row['false_accepts']:15}")
    return rows, "\n".join(lines)


def test_at_least_97_percent_of_the_benchmark_are_graded_right_and_no_near_miss_is_accepted(verdicts):
    rows, text = table(verdicts)
    mistakes = [
        (category, response, reference, verdict.status, verdict.reason)
        for (category, response, reference, right), verdict in zip(CASES, verdicts, strict=True)
        if (verdict.status is RewardStatus.CORRECT) != right
    ]
    report = "\n".join(["", text, *map(repr, mistakes)])
    print(report)
    assert rows["all"]["agree"] >= 0.97 * rows["all"]["cases"], report
    assert rows["all"]["false_accepts"] == 0, report


def test_every_verdict_of_the_benchmark_is_one(verdicts):
    assert all(verdict.status.is_verdict for verdict in verdicts)


def test_the_benchmark_is_large_and_has_both_kinds_in_every_category():
    assert len(CASES) >= 300 and len({category for category, *_ in CASES}) >= 12
    for category in {category for category, *_ in CASES}:
        assert {right for name, _, _, right in CASES if name == category} == {True, False}
    assert len(set(CASES)) == len(CASES)

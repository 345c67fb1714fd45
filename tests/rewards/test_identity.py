import pytest

from megarl.rewards.algebra import equal
from megarl.rewards.math import math_verify_verdict
from megarl.rewards.pool import RewardPool


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        (r"1-2^{-99}", r"1-2^{-100}"),
        ("1", r"1-2^{-100}"),
        ("1.0", r"1-2^{-100}"),
        (r"1-e^{-50}", r"1-e^{-60}"),
        (r"\sqrt{10^{40}+1}", r"\sqrt{10^{40}+2}"),
        (r"x+2^{-99}", r"x+2^{-100}"),
        ("0", r"\frac{dv}{dt}"),
        (r"\frac{dm}{dt}v", r"\frac{dv}{dt}m"),
        ("0.577216", r"\gamma"),
        (r"2\angle ABC", r"2\angle ACB"),
        (r"AB\cdot CD", r"AC\cdot BD"),
        (r"\sqrt{x^2}", "x"),
    ],
)
def test_values_that_only_nearly_agree_or_vanish_when_evaluated_differ(answer, reference):
    assert not equal(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        (r"\sqrt{\frac{k}{m}}", r"\frac{\sqrt{km}}{m}"),
        (r"\tau\ln(1/\Delta)", r"-\tau\ln \Delta"),
        (r"1-\frac{1}{2^{100}}", r"1-2^{-100}"),
        (r"mc^2(\gamma-1)", r"(\gamma-1)mc^2"),
    ],
)
def test_identities_of_positive_quantities_hold(answer, reference):
    assert equal(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        (r"20\text{ hours }3\text{ minutes}", r"3\text{ hours }20\text{ minutes}", False),
        (r"x>0, x\ne 1", r"(0,1)\cup(1,\infty)", True),
        (r"x>0, x\ne 2", r"(0,1)\cup(1,\infty)", False),
        (r"\begin{cases}x=2\\y=3\end{cases}", "(2,3)", True),
        (r"\begin{cases}x=3\\y=2\end{cases}", "(2,3)", False),
        (r"20,000\pi", r"20000\pi", True),
        ("Option B", r"\text{(B)}", True),
        ("Option C", r"\text{(B)}", False),
        (r"52\text{ (base 8)}", "52_8", True),
        (r"52\text{ (base 9)}", "52_8", False),
    ],
)
def test_words_sets_systems_and_bases_are_read(answer, reference, right):
    assert math_verify_verdict(answer, reference) is right


def test_a_reference_that_no_answer_may_be_costs_no_worker():
    with RewardPool() as pool:
        (verdict,) = pool.grade([(r"\boxed{\frac12}", "7^{7^{7^{7^7}}}", False)])
        assert verdict.status == "wrong" and pool.checked == 0


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("{3, 5, 7}", "3, 5, 7", True),
        (r"[1,2] \cup [2,\sqrt8]", r"[1,2\sqrt2]", True),
        ('"5"', "5", True),
        ("[0,1-2^{-99}]", "[0,1-2^{-100}]", False),
        (r"\{1-2^{-99}, 3\}", r"\{1-2^{-100}, 3\}", False),
        (r"\begin{pmatrix}\pi\\1-2^{-99}\end{pmatrix}", r"\begin{pmatrix}\pi\\1-2^{-100}\end{pmatrix}", False),
        (r"[0.333333333,\pi]", r"[\frac13,\pi]", False),
        ("x^{(2)}", "x^2", False),
        (r"\{1,2\}", "(1,2)", False),
        ("(R,r)", "(r,R)", False),
        ("{3, 5, 5}", "3, 3, 5", False),
        ("{52}_9", "52_8", False),
        ("4.5 e", "4.5e1", False),
    ],
)
def test_what_math_verify_reads_counts_unless_it_drops_or_rounds_something(answer, reference, right):
    assert math_verify_verdict(answer, reference) is right

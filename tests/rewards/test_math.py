import time

import pytest

from megarl.rewards.extraction import boxed_answer as extract_answer
from megarl.rewards.guards import guard
from megarl.rewards.math import fast_verdict, math_verify_verdict
from megarl.rewards.normalise import normalise


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\fbox{7}", "7"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \fbox{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{ \left\{ x \right. }", r"\left\{ x \right."),
        (r"\boxed {5}", "5"),
        ("\\boxed{\n5\n}", "5"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{ so \boxed{3}", "3"),
        (r"} { \boxed{4} }", "4"),
        (r"\boxed{a \\{b} c}", r"a \\{b} c"),
        (r"\boxed{}", ""),
        (r"\boxed 5", None),
        (r"\boxed", None),
        (r"\boxedwrong{5}", None),
        (r"\boxed{5", None),
        (r"\boxed{5\}", None),
        (r"\\boxed{5}", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_the_answer_is_the_content_of_the_last_balanced_box(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize("piece", [r"\boxed{1} ", r"\boxed{", r"{\boxed{1}", r"\fbox{\{}}"])
def test_extraction_takes_time_linear_in_the_text(piece):
    def seconds(copies):
        text = piece * copies
        times = []
        for _ in range(5):
            start = time.process_time()
            extract_answer(text)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(100_000) < 3 * 5 * seconds(20_000)


@pytest.mark.parametrize(
    ("answer", "spelling"),
    [
        (" $5$ ", "5"),
        (r"\( 5 \)", "5"),
        (r"\[5\]", "5"),
        ("5.", "5"),
        ("+5", "5"),
        ("−5", "-5"),
        ("1,234", "1234"),
        ("1,234,567.5", "1234567.5"),
        (r"1,\!234", "1234"),
        ("1{,}234", "1234"),
        (r"1\,000\,000", "1000000"),
        ("1,23", "1,23"),
        ("(1,234)", "(1,234)"),
        (r"\$12.50", "12.50"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\tfrac12", r"\frac{1}{2}"),
        (r"\frac 1 2", r"\frac{1}{2}"),
        (r"\left( 1 , \, 2 \right)", "(1,2)"),
        (r"\leftarrow", r"\leftarrow"),
        (r"\bigl(1,2\bigr)", "(1,2)"),
        (r"\text{ no solution }", "no solution"),
        (r"\mathrm{even}.", "even"),
        (r"5\text{ cm}^2", "5"),
        (r"5 \mbox{ km/h}", "5"),
        ("5 miles", "5"),
        ("5 m", "5 m"),
        (r"90^{\circ}", "90"),
        ("90°", "90"),
        ("90 degrees", "90"),
        (r"50\%", "50%"),
        ("50 percent", "50%"),
        (r"50\text{ percent}", "50%"),
        ("x^{2}", "x^2"),
        ("2^{1}0", "2^{1}0"),
        (r"2 \pi  r", r"2\pi r"),
        (r"\sqrt2", r"\sqrt{2}"),
        ("3 1/2", "3 1/2"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ],
)
def test_normalising_gives_one_spelling_and_is_idempotent(answer, spelling):
    assert normalise(answer) == spelling
    assert normalise(spelling) == spelling


@pytest.mark.parametrize(
    ("answer", "reference", "verdict"),
    [
        ("5", "5.0", True),
        ("5", "6", False),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac12", "1/2", True),
        (r"-\frac{3}{4}", r"\frac{-3}{4}", True),
        (r"-\frac{3}{4}", r"\frac{3}{4}", False),
        ("2/4", ".5", True),
        ("3 1/2", "3.5", True),
        (r"3\frac{1}{2}", r"\frac{7}{2}", True),
        ("31/2", "3.5", False),
        ("1,234", "1234", True),
        ("0.333333", "1/3", False),
        ("0.1000000000000000000000001", "0.1", False),
        ("9" * 100, "9" * 99 + "8", False),
        ("9" * 101, "9" * 100 + "8", None),
        ("1/0", "5", None),
        ("٥", "5", None),
        ("1e3", "1000", None),
        (r"50\%", "50", True),
        (r"50\%", "0.5", True),
        (r"50\%", "1/2", True),
        (r"5\%", r"500\%", False),
        (r"5\%", "500", False),
        (r"\text{Even}", "even", True),
        ("(C)", r"\text{C}", True),
        (r"\text{nylevE}", r"\text{Evelyn}", False),
        ("nylevE", r"\text{Evelyn}", False),
        ("4210_7", "4210_{7}", True),
        ("4210", "4210_7", True),
        ("4210_8", "4210_7", False),
        (r"2\sqrt{3}", r"\sqrt{12}", None),
        ("x", "y", False),
        ("x+1", "y+1", None),
        ("x" * 5000, "5", None),
    ],
)
def test_exact_comparison_decides_equal_strings_and_rationals_only(answer, reference, verdict):
    assert fast_verdict(answer, reference) is verdict


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        (r"\frac{1}{2}", "0.5"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
        ("x=5", "5"),
        ("y = 2x + 3", "2x+3"),
        (r"\left(\frac{1}{2}, 3\right)", "(0.5,3)"),
        (r"\{1,2,3\}", r"\{3,2,1\}"),
        ("3,5", r"3 \text{ and } 5"),
        (r"x \in [-2,7]", "[-2,7]"),
        (r"(-\infty,3) \cup (5,\infty)", r"(5,\infty)\cup(-\infty,3)"),
        ("x>3", "3<x"),
        ("x^2+2x+1", "(x+1)^2"),
        ("6-5i", "-5i+6"),
        (r"\begin{pmatrix} \frac12 \\ 2 \end{pmatrix}", r"\begin{pmatrix}0.5\\2\end{pmatrix}"),
        ("e^{-x^2/2}", r"e^{-\frac{x^2}{2}}"),
        (r"6.02 \times 10^{-23}", r"6.02\cdot 10^{-23}"),
        ("10^6", "1000000"),
        ("1.414214", r"\sqrt{2}"),
    ],
)
def test_equivalent_answers_are_accepted(answer, reference):
    assert guard(answer) is None
    assert math_verify_verdict(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        (r"2\sqrt{3}", r"3\sqrt{2}"),
        ("3.14", r"\pi"),
        (r"\frac{22}{7}", r"\pi"),
        ("1.41", r"\sqrt{2}"),
        ("(2,1)", "(1,2)"),
        ("(1,2]", "[1,2)"),
        (r"(-\infty, 3)", r"(-\infty,3]"),
        ("x > 3", r"x \ge 3"),
        ("y=5", "x=5"),
        ("x+1", "y+1"),
        ("x^2+2x+2", "(x+1)^2"),
        ("2h", "2"),
        ("5, 12", "12"),
        (r"5 \text{ or } 12", "12"),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
        (r"1.1 \times 10^{-23}", r"6.02 \times 10^{-23}"),
        (r"\infty", r"-\infty"),
        ("1/0", "5"),
        ("0/0", "0"),
        (r"\frac{", "5"),
        (r"\unknown", "5"),
        ("", "5"),
    ],
)
def test_near_misses_and_malformed_answers_are_refused(answer, reference):
    assert fast_verdict(answer, reference) is not True
    assert not math_verify_verdict(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("1" * 513, "longer"),
        ("(" * 33 + "1" + ")" * 33, "nested"),
        ("{" * 40, "nested"),
        ("a^{b^{c}}", "tower"),
        ("9^9^9", "tower"),
        ("9^{9}^{9}", "tower"),
        ("2**3**4", "tower"),
        ("2^(3^4)", "tower"),
        ("10^{10^{10}}", "tower"),
        ("10^{12345}", "exponent"),
        ("10^12345", "exponent"),
        ("x^{-12345}", "exponent"),
        ("5000!", "factorial"),
        ("(100!)!", "factorial"),
        (r"\sum_{i=1}^{n} i", "sum"),
        (r"\int_0^1 x dx", "integral"),
        (r"\lim_{x \to 0} x", "limit"),
        ("5\x00", "control"),
        ("5\u202e", "control"),
        ("__class__", "code"),
        ("import os", "code"),
        ("lambda x: x", "code"),
        ("eval(1)", "code"),
        ("open('x')", "code"),
        ("5 1", "space between"),
    ],
)
def test_answers_that_are_costly_or_are_no_answers_are_guarded(answer, reason):
    assert reason in (guard(answer) or "")


@pytest.mark.parametrize(
    "answer",
    [
        "e^{-x^2}",
        "e^{3.14159}",
        "2^{10}",
        "x^{9999}",
        r"\lambda",
        r"x \in [0, \infty)",
        r"x \ne 5",
        r"1,\!234",
        r"\text{an important interval}",
        "1\n+ 2",
    ],
)
def test_ordinary_answers_pass_the_guards(answer):
    assert guard(answer) is None


def test_a_guarded_answer_may_still_equal_the_reference_as_a_string():
    assert guard("3000!") is not None
    assert fast_verdict("$3000!$", "3000!") is True
    assert fast_verdict("9" * 600, "9" * 600) is True

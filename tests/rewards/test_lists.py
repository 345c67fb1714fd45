from fractions import Fraction

import pytest

from megarl.rewards.algebra import equal as equal_values
from megarl.rewards.algebra import number
from megarl.rewards.extraction import boxed_answer, lenient_answer
from megarl.rewards.lists import match_lists, split_answers
from megarl.rewards.math import compare
from megarl.rewards.normalise import unit_of


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("5", ["5"]),
        ("3, 5", ["3", "5"]),
        ("3,5", ["3", "5"]),
        ("3;5", ["3", "5"]),
        ("1,234", ["1,234"]),
        ("1,234, 5", ["1,234", "5"]),
        ("100, 200", ["100", "200"]),
        ("1,234,567", ["1,234,567"]),
        ("2500,7500", ["2500", "7500"]),
        ("12,3456", ["12", "3456"]),
        ("(1,2)", ["(1,2)"]),
        ("(1,2),(3,4)", ["(1,2)", "(3,4)"]),
        ("[1,2)", ["[1,2)"]),
        (r"\{1,2\}", ["1", "2"]),
        (r"\left\{1,2\right\}", ["1", "2"]),
        (r"x \in \{1,2\}", ["1", "2"]),
        (r"\{1,2\}\cup\{3\}", [r"\{1,2\}\cup\{3\}"]),
        (r"\{x \mid x > 1, x < 2\}", [r"\{x \mid x > 1, x < 2\}"]),
        (r"3 \text{ and } 5", ["3", "5"]),
        (r"3 \text{ or } 5", ["3", "5"]),
        ("1, 2, and 3", ["1", "2", "3"]),
        (r"\pm 2", ["+ 2", "- 2"]),
        (r"1 \pm x \mp y", ["1 + x - y", "1 - x + y"]),
        (r"\text{Alice and Bob}", [r"\text{Alice}", r"\text{Bob}"]),
        (r"\text{land}", [r"\text{land}"]),
        (r"\frac{1}{2}, \sqrt{3}", [r"\frac{1}{2}", r"\sqrt{3}"]),
        (r"\begin{pmatrix}1,&2\end{pmatrix}", [r"\begin{pmatrix}1,&2\end{pmatrix}"]),
        (r"\emptyset", [r"\emptyset"]),
        (r"\{\}", [r"\{\}"]),
        ("", [""]),
        (",", [","]),
    ],
)
def test_a_list_is_split_where_it_stands_in_no_brackets(text, parts):
    assert split_answers(text) == parts


@pytest.mark.parametrize(
    ("given", "wanted", "verdict"),
    [
        ("ab", "ba", True),
        ("aab", "aba", True),
        ("aab", "abb", False),
        ("a", "ab", False),
        ("abc", "ab", False),
        ("aa", "a", True),
        ("ab", "a", False),
        ("a?", "ab", None),
        ("c?", "ab", False),
    ],
)
def test_lists_are_equal_in_any_order_and_of_one_length(given, wanted, verdict):
    def equal(answer, reference):
        return None if answer == "?" else answer == reference

    assert match_lists(list(given), list(wanted), equal, str) is verdict


@pytest.mark.parametrize("wrong", [None, "401/2"])
def test_a_list_of_other_spellings_takes_few_comparisons(wrong):
    wanted = [str(n) for n in range(200)]
    given = [f"{2 * n}/2" for n in reversed(range(200))]
    given[77] = wrong or given[77]
    asked = []

    def equal(answer, reference):
        asked.append((answer, reference))
        return Fraction(answer) == Fraction(reference)

    assert match_lists(given, wanted, equal, Fraction) is (wrong is None)
    assert len(asked) <= 2 * 200


def test_a_rank_that_misleads_changes_no_verdict():
    def equal(answer, reference):
        return answer.casefold() == reference.casefold()

    assert match_lists(list("aBcD"), list("dCbA"), equal, str) is True
    assert match_lists(list("aBcD"), list("dCbE"), equal, str) is False


def test_expressions_and_points_are_ranked_by_their_values():
    asked = []

    def counted(answer, reference):
        asked.append(answer)
        return equal_values(answer, reference)

    given = ", ".join(f"(x+{n}, {n}^{{1/2}})" for n in range(9, 1, -1))
    wanted = ", ".join(rf"({n}+x, \sqrt{{{n}}})" for n in range(2, 10))
    assert compare(given, wanted, counted, number) and len(asked) <= 2 * 8


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{2} and \boxed{3}", "2, 3"),
        (r"\boxed{2}, \boxed{3}, and \boxed{4}", "2, 3, 4"),
        (r"$\boxed{2}$ or $\boxed{3}$", "2, 3"),
        (r"$x = \boxed{2}$, $y_1 = \boxed{3}$", "2, 3"),
        (r"\boxed{2} \text{ or } \boxed{3}", "2, 3"),
        (r"\boxed{2} \boxed{3}", "3"),
        (r"\boxed{2}. And so \boxed{3}", "3"),
        (r"\boxed{2}, so it is \boxed{3}", "3"),
        (r"\boxed{1} then \boxed{2}, \boxed{3}", "2, 3"),
    ],
)
def test_boxes_joined_by_a_comma_and_or_or_are_one_answer(text, answer):
    assert boxed_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"Thus \boxed{5}, or $6$.", "5"),
        ("The answer is 5.", "5"),
        ("The answer is $\\frac{1}{2}$. I hope it is correct.", r"\frac{1}{2}"),
        ("Final answer: The final answer is $x+1$. I hope it is correct.", "x+1"),
        ("**Answer:** 12", "12"),
        ("Answer: 1,234", "1,234"),
        ("We get 3 and then 4 and then 7.", "7"),
        ("So the total is 3 + 4 = 7 dollars", "7"),
        ("The answer: 3 + 4 = 7", "7"),
        (r"Hence \( x^2 \) it is, in 2 ways", "2"),
        ("It is \\[ \\frac{3}{4} \\]", r"\frac{3}{4}"),
        ("$$x = 5$$", "x = 5"),
        ("It costs $5.", "5"),
        ("a share of 25%", "25%"),
        ("the answer is -3", "-3"),
        ("The answer is 7. Let me check: 2 + 2 is 4", "7"),
        ("nothing at all", None),
        ("", None),
        (r"\boxed{5", None),
    ],
)
def test_leniently_an_answer_without_a_box_is_the_last_expression(text, answer):
    assert lenient_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("5 cm", "cm"),
        (r"5\text{ centimeters}", "cm"),
        (r"5\,\mathrm{cm}^2", "cm^2"),
        (r"5\text{ square cm}", "cm^2"),
        (r"5\text{ sq. in.}", "in^2"),
        (r"12\text{ cubic feet}", "ft^3"),
        (r"60 \text{ miles per hour}", "mi/h"),
        (r"60\text{ mph}", "mi/h"),
        (r"60\text{ km/h}", "km/h"),
        (r"\$5", "$"),
        ("5 dollars", "$"),
        ("5 cents", "cent"),
        (r"90^\circ", "°"),
        ("90 degrees", "°"),
        ("5", ""),
        (r"5\text{ apples}", "_appl"),
        (r"5\text{ units}", ""),
        ("x", ""),
    ],
)
def test_a_unit_has_one_spelling(text, unit):
    assert unit_of(text) == unit

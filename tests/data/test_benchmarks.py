r"""Where each public set keeps problem and answer, on made-up rows of its form."""

import pytest

from megarl.config import DataConfig
from megarl.data.benchmarks import EVALUATION_SETS, TRAINING_SETS, UnusableRow
from megarl.data.prompts import load_problems
from megarl.types import UserError

SOLUTION = r"Three bags of 2, so \boxed{5} at first, no: \boxed{\frac{6}{1}} apples."
ROWS = [
    ("math500", {"problem": "p", "solution": SOLUTION, "answer": r"\frac{6}{1}", "level": 2}, r"\frac{6}{1}"),
    ("gsm8k", {"question": "p", "answer": "2*3=<<2*3=6>>6 apples\n#### 6"}, "6"),
    ("minerva", {"problem": "p", "answer": SOLUTION, "type": "Fruit", "idx": 0}, r"\frac{6}{1}"),
    ("minerva", {"problem": "p", "solution": SOLUTION, "answer": "ignored"}, r"\frac{6}{1}"),
    ("minerva", {"question": "p", "answer": r"\frac{6}{1}"}, r"\frac{6}{1}"),
    ("olympiadbench", {"problem": "p", "answer": ["$6$"], "unit": None}, "$6$"),
    ("olympiadbench", {"question": "p", "final_answer": ["6", "$-6$"], "is_multiple_answer": True}, "6, $-6$"),
    ("aime24", {"problem": "p", "solution": SOLUTION, "answer": "006", "question": "p"}, "006"),
    ("aime25", {"problem": "p", "answer": 6}, "6"),
    ("amc23", {"problem": "p", "answer": 6.0, "question": "p"}, "6"),
]
TRAINING_ROWS = [
    ("numina", {"problem": "p", "gt": "6", "data_source": "fruit"}, "6"),
    ("numina", {"source": "fruit", "problem": "p", "solution": SOLUTION, "messages": []}, r"\frac{6}{1}"),
    ("math", {"problem": "p", "level": "Level 1", "solution": SOLUTION, "type": "Fruit"}, r"\frac{6}{1}"),
    ("gsm8k", {"question": "p", "answer": "six\n#### 6"}, "6"),
]


@pytest.mark.parametrize(("name", "row", "answer"), ROWS)
def test_an_evaluation_set_knows_where_its_answer_is(name, row, answer):
    assert EVALUATION_SETS[name].layout_of(row).read("here:1", row) == ("p", answer)


@pytest.mark.parametrize(("name", "row", "answer"), TRAINING_ROWS)
def test_a_training_set_knows_where_its_answer_is(name, row, answer):
    assert TRAINING_SETS[name].layout_of(row).read("here:1", row) == ("p", answer)


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("gsm8k", {"question": "p", "answer": "six"}, "here:1: #### (.*) finds nothing in column 'answer'"),
        ("minerva", {"problem": "p", "answer": "six"}, "here:1: \\boxed finds nothing in column 'answer'"),
        ("olympiadbench", {"problem": "p", "answer": []}, "here:1: list finds nothing in column 'answer'"),
        ("math500", {"problem": "p", "answer": ["6"]}, "here:1: column 'answer' is empty or not text: ['6']"),
        ("math500", {"problem": " ", "answer": "6"}, "here:1: column 'problem' is empty or not text: ' '"),
    ],
)
def test_a_row_without_problem_or_answer_is_unusable(name, row, words):
    with pytest.raises(UnusableRow) as caught:
        EVALUATION_SETS[name].layout_of(row).read("here:1", row)
    assert str(caught.value) == words


def test_another_file_under_the_name_of_a_set_is_refused_with_its_columns():
    row = {"text": "p", "answer": "6"}
    with pytest.raises(UserError, match="here:1 has no column 'problem'; it has: text, answer"):
        EVALUATION_SETS["math500"].layout_of(row).read("here:1", row)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("olympiadbench", "data.eval.olympiadbench=Hothan/OlympiadBench: "),
        ("olympiadbench=some/copy", "data.eval.olympiadbench=some/copy: "),
        ("minerva", "data.eval.minerva=math-ai/minervamath: "),
    ],
)
def test_a_known_set_is_looked_for_on_the_hub_in_its_own_split(monkeypatch, name, words):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        load_problems(DataConfig(train="arithmetic", eval=name, eval_split="other"), "eval")
    split = EVALUATION_SETS[name.partition("=")[0]].split
    assert str(caught.value).startswith(words) and f"(split {split})" in str(caught.value)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "math.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "2+2", "answer": "4"}\n')
    (tmp_path / "gsm.jsonl").write_text('{"question": "one and one", "answer": "#### 2"}\n')
    (tmp_path / "own.jsonl").write_text('{"question": "3+3", "answer": "6"}\n')
    return tmp_path


def forms(files):
    return {
        "dict": {"math500": f"{files}/math.jsonl", "gsm8k": f"{files}/gsm.jsonl", "own": f"{files}/own.jsonl"},
        "list": [f"math500={files}/math.jsonl", f"gsm8k={files}/gsm.jsonl", f"own={files}/own.jsonl"],
    }


@pytest.mark.parametrize("form", ["dict", "list"])
def test_several_evaluation_sets_are_read_one_after_the_other(files, form):
    problems = load_problems(DataConfig(train="arithmetic", eval=forms(files)[form]), "eval")
    assert [(p.source, p.id, p.text, p.answer) for p in problems] == [
        ("math500", "math500:1", "1+1", "2"),
        ("math500", "math500:2", "2+2", "4"),
        ("gsm8k", "gsm8k:1", "one and one", "2"),
        ("own", "own:1", "3+3", "6"),
    ]


def test_the_limit_is_of_each_set(files):
    data = DataConfig(train="arithmetic", eval=forms(files)["list"], eval_limit=1)
    assert [p.id for p in load_problems(data, "eval")] == ["math500:1", "gsm8k:1", "own:1"]


def test_sets_without_a_name_are_called_by_their_file(files):
    data = DataConfig(train="arithmetic", eval=[f"{files}/own.jsonl", "arithmetic"], eval_limit=1)
    assert [(p.source, p.id) for p in load_problems(data, "eval")] == [
        ("own", "own.jsonl:1"),
        ("arithmetic", "arithmetic/0"),
    ]


NO_NAME = "can't be the name of a set; use letters, digits, _, - and ., and not mean"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "expected a data set, a list of them, or {name: source}"),
        ([3], "expected a data set, a list of them, or {name: source}"),
        ({"math500": None}, "expected a data set, a list of them, or {name: source}"),
        ("", "expected a data set, a list of them, or {name: source}"),
        (["a/own.jsonl", "b/own.jsonl"], "own is given twice; name them apart, e.g. own_b=SOURCE"),
        ({"mean": "a.jsonl", "b": "b.jsonl"}, f"mean {NO_NAME}"),
        ({"a/b": "a.jsonl"}, f"a/b {NO_NAME}"),
    ],
)
def test_what_is_no_evaluation_set_is_refused_in_one_line(value, words):
    from megarl.config import parse_config

    with pytest.raises(UserError) as caught:
        parse_config({"model": {"path": "x"}, "data": {"train": "arithmetic", "eval": value}})
    assert str(caught.value) == f"data.eval={value!r}: {words}"


def test_overrides_choose_evaluation_sets():
    from megarl.config.load import apply_override

    for text, expected in (
        ("data.eval=[math500,gsm8k=x.jsonl]", ["math500", "gsm8k=x.jsonl"]),
        ("data.eval=gsm8k=x.jsonl", "gsm8k=x.jsonl"),
    ):
        values = {"data": {"train": "arithmetic"}}
        apply_override(values, text)
        assert values["data"]["eval"] == expected
        assert [one.name for one in DataConfig(**values["data"]).eval_sets][-1] == "gsm8k"

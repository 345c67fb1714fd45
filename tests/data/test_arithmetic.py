import random
import re
from fractions import Fraction

import pytest
from transformers import AutoTokenizer, LlamaConfig, Qwen2Config

from megarl.data.arithmetic import (
    LEVELS,
    MAX_PROMPT_TOKENS,
    MAX_RESPONSE_TOKENS,
    SPLITS,
    UNKNOWN,
    VOCABULARY,
    Problem,
    demonstration,
    problems,
    split_of,
    tokenizer,
)


def solve(question: str) -> Fraction:
    """The answer, worked out from the question alone."""
    if addition := re.fullmatch(r"(\d+)\+(\d+)=", question):
        return Fraction(int(addition[1]) + int(addition[2]))
    a, b, c = map(int, re.fullmatch(r"(\d+)x\+(\d+)=(\d+)", question).groups())
    return Fraction(c - b, a)


def rational(latex: str) -> Fraction:
    fraction = re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", latex)
    return Fraction(int(fraction[1]), int(fraction[2])) if fraction else Fraction(int(latex))


def boxed(response: str) -> str:
    return re.search(r"\\boxed\{(.*)\}$", response)[1]


def demonstrations(count: int, split: str = "train") -> list[tuple[Problem, str]]:
    rng = random.Random(0)
    return [(problem, demonstration(problem, rng)) for problem in problems(0, count, split)]


def test_problems_are_a_function_of_seed_and_split():
    assert problems(3, 50, "train") == problems(3, 50, "train")
    assert problems(3, 50, "train") == problems(3, 80, "train")[:50]
    assert problems(3, 50, "train") != problems(4, 50, "train")
    assert [p.question for p in problems(0, 4, "test")] == ["3x+8=14", "2x+6=12", "2x+1=7", "5x+5=6"]


def test_no_seed_gives_training_a_test_question():
    train, test = ({p.question for seed in range(4) for p in problems(seed, 4000, split)} for split in SPLITS)
    assert not train & test
    assert all(split_of(question) == "test" for question in test)


def test_a_sum_and_its_mirror_image_share_a_split():
    assert all(split_of(f"{a}+{b}=") == split_of(f"{b}+{a}=") for a in range(30) for b in range(30))


def test_about_a_fifth_of_the_questions_is_for_testing():
    share = sum(split_of(f"{a}+{b}=") == "test" for a in range(100) for b in range(a + 1)) / 5050
    assert 0.17 < share < 0.23


def test_levels_take_turns_and_can_be_chosen():
    assert [p.level for p in problems(0, 8, "train")] == [1, 2, 3, 4, 1, 2, 3, 4]
    assert [p.level for p in problems(0, 4, "test", levels=(1, 1, 3))] == [1, 1, 3, 1]


@pytest.mark.parametrize(
    ("split", "levels", "named"), [("dev", (1,), "split"), ("test", (5,), "levels"), ("test", (), "levels")]
)
def test_unknown_splits_and_levels_are_refused(split, levels, named):
    with pytest.raises(ValueError, match=f"^{named}: "):
        problems(0, 1, split, levels)


def test_higher_levels_have_longer_sums_and_fractional_solutions():
    found = problems(0, 4000, "train")
    sums = {level: [len(p.question) for p in found if (p.kind, p.level) == ("addition", level)] for level in LEVELS}
    assert [sorted(set(sums[level])) for level in LEVELS] == [[4], [5], [6], [8]]
    fractions = {p.level for p in found if p.kind == "equation" and "frac" in p.answer}
    assert fractions == {3, 4}


@pytest.mark.parametrize("split", SPLITS)
def test_answers_solve_their_questions(split):
    assert all(rational(p.answer) == solve(p.question) for p in problems(1, 4000, split))


def test_careful_demonstrations_are_right_and_sloppy_ones_mostly_wrong():
    drawn = demonstrations(4000)
    right = {"~": [], ";": [], "\\": []}
    for problem, response in drawn:
        style = next(mark for mark in right if mark in response)
        right[style].append(rational(boxed(response)) == rational(problem.answer))
    assert all(right["\\"]) and all(right[";"])
    assert 0.05 < sum(right["~"]) / len(right["~"]) < 0.35
    assert min(map(len, right.values())) > 600


@pytest.mark.parametrize("config", [Qwen2Config, LlamaConfig])
def test_the_tokenizer_of_a_model_folder_round_trips_every_text(config, tmp_path):
    tokenizer().save_pretrained(tmp_path)
    config(vocab_size=len(VOCABULARY)).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [text for split in SPLITS for p, response in demonstrations(2000, split) for text in (p.question, response)]
    ids = loaded(texts)["input_ids"]
    assert ids == tokenizer()(texts)["input_ids"]
    assert loaded.batch_decode(ids) == texts
    assert loaded.batch_decode([[*row, loaded.eos_token_id] for row in ids], skip_special_tokens=True) == texts
    assert (len(loaded), loaded.eos_token, loaded.pad_token) == (len(VOCABULARY), "<eos>", "<pad>")


def test_latex_commands_are_single_tokens():
    text = "67;\\boxed{\\frac{1}{2}}"
    assert tokenizer().tokenize(text) == ["6", "7", ";", "\\boxed{", "\\frac{", "1", "}{", "2", "}", "}"]


def test_other_text_becomes_the_unknown_token():
    assert tokenizer().tokenize("a") == [UNKNOWN]


def test_texts_are_within_the_token_limits():
    encode = tokenizer()
    for split in SPLITS:
        for problem, response in demonstrations(4000, split):
            assert len(encode.tokenize(problem.question)) <= MAX_PROMPT_TOKENS
            assert len(encode.tokenize(response)) + 1 <= MAX_RESPONSE_TOKENS


def test_the_vocabulary_splits_over_eight_ranks():
    assert len(VOCABULARY) % 8 == 0 and len(set(VOCABULARY)) == len(VOCABULARY)

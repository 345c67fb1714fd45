import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from odd_tokenizers import CHATML, byte_level
from tokenizers import normalizers

from megarl.config import DataConfig
from megarl.data import arithmetic
from megarl.data.prompts import (
    PromptSet,
    encode_prompts,
    load_problems,
    load_prompts,
    load_splits,
    prompt_texts,
    stable_hash,
)
from megarl.types import Prompt, UserError


@pytest.fixture(scope="module")
def tokenizer():
    return arithmetic.tokenizer()


def write(path, *rows):
    """Rows are objects, or lines as they stand (str, bytes)."""
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


GOOD = {"question": "1+2=", "answer": "3"}


def test_problems_are_read_in_the_order_of_the_file(tmp_path):
    rows = [GOOD, {"question": "4+4=", "answer": 8, "note": "more"}, {"question": "é=", "answer": 0.5}]
    path = write(tmp_path / "rows.jsonl", *rows)
    problems = load_problems(DataConfig(train=path), "train")
    assert [(p.text, p.answer) for p in problems] == [("1+2=", "3"), ("4+4=", "8"), ("é=", "0.5")]
    assert [p.id for p in problems] == [f"{Path(path).name}:{number}" for number in (1, 2, 3)]


def test_whole_numbers_are_answers_without_a_decimal_point(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"question": "1+2=", "answer": 3.0}, {"question": 7, "answer": -12})
    problems = load_problems(DataConfig(train=path), "train")
    assert [(p.text, p.answer) for p in problems] == [("1+2=", "3"), ("7", "-12")]


def test_numbers_are_answers_with_the_digits_that_were_written(tmp_path):
    numbers = {"1e23": "1" + "0" * 23, "2.5e-7": "0.00000025", "0.10": "0.1", "100": "100", "1e2": "100"}
    numbers |= {"9" * 4000: "9" * 4000, '"1e999"': "1e999", '"NaN"': "NaN", '"\\ud835\\udc65"': "\U0001d465"}
    path = write(tmp_path / "rows.jsonl", *(f'{{"question": "q", "answer": {number}}}' for number in numbers))
    assert [p.answer for p in load_problems(DataConfig(train=path), "train")] == list(numbers.values())


def test_columns_and_the_part_of_the_answer_that_counts_are_configurable(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"problem": "2+2?", "solution": "2 and 2 is\n#### 4 "})
    data = DataConfig(train=path, prompt_key="problem", answer_key="solution", answer_pattern="#### (.*)")
    assert [(p.text, p.answer) for p in load_problems(data, "train")] == [("2+2?", "4")]


DAPO = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "1+2?\nRemember to box it.", "name": None}],
    "reward_model": {"ground_truth": "3", "style": "rule"},
    "extra_info": {"index": 0},
}
OF_DAPO = {"prompt_key": "prompt", "answer_key": "reward_model.ground_truth"}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_messages_and_dotted_columns_are_read(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write(path, DAPO)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([DAPO]), path)
    (problem,) = load_problems(DataConfig(train=str(path), **OF_DAPO), "train")
    assert (problem.id, problem.text, problem.answer) == (f"rows.{kind}:1", "1+2?\nRemember to box it.", "3")
    assert problem.turns == ({"role": "user", "content": "1+2?\nRemember to box it."},)
    message = refusal(load_problems, DataConfig(train=str(path), prompt_key="prompt"), "train")
    assert message.endswith(
        "has no column 'answer' (data.answer_key); it has: data_source, prompt, reward_model.ground_truth, "
        "reward_model.style, extra_info.index"
    )


def test_a_column_whose_own_name_has_a_dot_comes_first(tmp_path):
    path = write(
        tmp_path / "rows.jsonl", {"question": "q", "a.b": "1", "a": {"b": "2"}, "list": [{"x": "3"}, {"x": "4"}]}
    )
    for key, answer in (("a.b", "1"), ("list.1.x", "4"), ("list.-2.x", "3")):
        assert load_problems(DataConfig(train=path, answer_key=key), "train")[0].answer == answer
    for key in ("a.c", "list.2.x", "list.x", "question.x"):
        assert f"has no column '{key}'" in refusal(load_problems, DataConfig(train=path, answer_key=key), "train")


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": [{"type": "text", "text": "And 2+2?"}]},
]


def test_conversations_are_rendered_as_they_are_and_the_last_turn_filled_in(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"question": TALK, "answer": "4"})
    data = DataConfig(train=path, chat_template=True, prompt_template="{problem} Box it.")
    (problem,) = load_problems(data, "train")
    assert problem.text == "Be brief.\n1+2?\n3\nAnd 2+2?"
    assert prompt_texts(data, [problem], byte_level(CHATML)) == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+2?<|im_end|>\n"
        "<|im_start|>assistant\n3<|im_end|>\n<|im_start|>user\nAnd 2+2? Box it.<|im_end|>\n<|im_start|>assistant\n"
    ]


def test_without_a_chat_template_a_system_message_stands_before_the_problem(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"question": TALK[:2], "answer": "3"})
    data = DataConfig(train=path)
    assert prompt_texts(data, load_problems(data, "train"), byte_level()) == ["Be brief.\n1+2?"]


def test_the_reply_of_a_conversation_is_the_answer_where_both_are_one_column(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"messages": TALK[:3]})
    (problem,) = load_problems(DataConfig(train=path, prompt_key="messages", answer_key="messages"), "train")
    assert (problem.text, problem.answer, len(problem.turns)) == ("Be brief.\n1+2?", "3", 2)
    keys = {"prompt_key": "messages.1.content", "answer_key": "messages.-1.content"}
    (problem,) = load_problems(DataConfig(train=path, **keys), "train")
    assert (problem.text, problem.answer, problem.turns) == ("1+2?", "3", ())


@pytest.mark.parametrize(
    ("question", "settings", "words"),
    [
        (TALK, {}, " is a conversation of system, user, assistant, user; it needs data.chat_template=true"),
        (TALK[:3], {"chat_template": True}, "ends with a turn of the assistant; a prompt ends with the user's"),
        (
            TALK,
            {"chat_template": True, "system_prompt": "x"},
            "has a system message of its own beside data.system_prompt",
        ),
        ([], {}, "column 'question' (data.prompt_key) is empty or not text: []"),
        ([{"role": "user", "content": " "}], {}, "is empty or not text: [{'content': ' ', 'role': 'user'}]"),
        ([{"role": "user"}], {}, "is empty or not text"),
        ([{"content": "1+2?"}], {}, "is empty or not text"),
        ([{"role": "user", "content": [{"type": "image"}]}], {}, "is empty or not text"),
        (["1+2?"], {}, "is empty or not text: ['1+2?']"),
        ({"role": "user", "content": "1"}, {}, "is empty or not text"),
    ],
)
def test_what_is_no_prompt_is_refused_by_file_and_line(tmp_path, question, settings, words):
    path = write(tmp_path / "rows.jsonl", {"question": [TALK[1]], "answer": "1"}, {"question": question, "answer": "4"})
    message = refusal(load_problems, DataConfig(train=path, **settings), "train")
    assert message.startswith(f"{path}:2") and words in message


def test_a_problem_of_no_tokens_is_refused_by_row(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD, {"question": "?", "answer": "1"})
    silent = byte_level(normalizer=normalizers.Replace("?", ""))
    message = refusal(load_prompts, DataConfig(train=path), "train", silent)
    assert message == "rows.jsonl:2 (data.train) has no tokens; this model's tokenizer drops all of its text"


def test_limits_and_splits_choose_their_own_file(tmp_path):
    train = write(tmp_path / "train.jsonl", GOOD, GOOD, "not read any more")
    held_out = write(tmp_path / "eval.jsonl", GOOD, GOOD, GOOD)
    data = DataConfig(train=train, train_limit=2, eval=held_out, eval_limit=1)
    assert len(load_problems(data, "train")) == 2
    assert [p.id for p in load_problems(data, "eval")] == [f"{Path(held_out).name}:1"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("", "is empty"),
        ("   ", "is empty"),
        ('{"question": "1+2=",', "is not JSON"),
        ("question,answer", "is not JSON"),
        ('["1+2=", "3"]', "is not a JSON object"),
        ("3", "is not a JSON object"),
        (b'{"question": "\xff", "answer": "3"}', "is not UTF-8"),
        ({"question": "1+2="}, "has no column 'answer' (data.answer_key); it has: question"),
        ({"problem": "1+2=", "answer": "3"}, "has no column 'question' (data.prompt_key); it has: problem, answer"),
        ({"question": "1+2=", "answer": ""}, "column 'answer' (data.answer_key) is empty"),
        ({"question": "1+2=", "answer": "  "}, "column 'answer' (data.answer_key) is empty"),
        ({"question": "1+2=", "answer": None}, "column 'answer' (data.answer_key) is empty or not text: None"),
        ({"question": "", "answer": "3"}, "column 'question' (data.prompt_key) is empty"),
        ({"question": "1+2=", "answer": ["3"]}, "not text: ['3']"),
        ({"question": "1+2=", "answer": True}, "not text: True"),
        ({"question": "1+2=", "answer": float("nan")}, "not text: nan"),
        ('{"question": "1+2=", "answer": 1e999}', "column 'answer' (data.answer_key) is empty or not text: inf"),
        ('{"question": "1+2=", "answer": -Infinity}', "column 'answer' (data.answer_key) is empty or not text: -inf"),
        ('{"question": "1+2=", "answer": "\\ud800"}', "has half a character, an escape of \\ud800 to \\udfff alone"),
        ('{"question": "1+2=", "answer": "3", "\\udfff": 1}', "has half a character"),
        ('{"question": "1+2=", "answer": ' + "9" * 5000 + "}", "has an integer of more than 4300 digits; write it as"),
        ('{"question": "1+2=", "answer": ' + "[" * 100_000 + "]" * 100_000 + "}", "is nested too deeply"),
        ('{"question": "1+2=", "answer": ' + "[" * 600 + "]" * 600 + "}", "not text: [[[[[[[...]]]]]]]"),
        ({"question": "1+2=", "answer": ["3"] * 1000}, "not text: ['3', '3', '3', '3', '3', '3', ...]"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_line(tmp_path, row, words):
    path = write(tmp_path / "rows.jsonl", GOOD, row, GOOD)
    message = refusal(load_problems, DataConfig(train=path), "train")
    assert message.startswith(f"{path}:2") and words in message


@pytest.mark.parametrize("answer", ["no mark", "#### ", "####"])
def test_an_answer_without_the_pattern_is_refused_by_file_and_line(tmp_path, answer):
    path = write(tmp_path / "rows.jsonl", {"question": "q", "answer": "#### 1"}, {"question": "q", "answer": answer})
    message = refusal(load_problems, DataConfig(train=path, answer_pattern="#### (.*)"), "train")
    assert message.startswith(f"{path}:2") and "data.answer_pattern='#### (.*)' finds nothing" in message


def test_empty_and_missing_files_are_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    assert refusal(load_problems, DataConfig(train=path), "train") == f"data.train={path} has no rows"
    missing = str(tmp_path / "missing.jsonl")
    assert refusal(load_problems, DataConfig(train="x", eval=missing), "eval").startswith(
        f"data.eval={missing} does not"
    )


def test_the_built_in_task_keeps_its_splits_apart():
    train = load_problems(DataConfig(train="arithmetic", train_limit=500), "train")
    held_out = load_problems(DataConfig(train="arithmetic", eval="arithmetic"), "eval")
    assert len(train) == 500 and len({p.id for p in train}) == 500
    assert not {p.text for p in train} & {p.text for p in held_out}
    assert list(train) == list(load_problems(DataConfig(train="arithmetic", train_limit=500), "train"))


def test_prompts_over_the_limit_are_dropped_and_counted(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", *({"question": "1" * length, "answer": 1} for length in (3, 5, 4, 6)))
    prompts = load_prompts(DataConfig(train=path, max_prompt_tokens=4), "train", tokenizer)
    assert [prompt.text for prompt in prompts.prompts] == ["111", "1111"]
    assert prompts.dropped == 2
    first = prompts.prompts[0]
    assert first.token_ids.dtype == np.int32 and first.token_ids.tolist() == tokenizer("111")["input_ids"]
    assert (first.id, first.answer, first.source) == (f"{Path(path).name}:1", "1", path)


def test_a_limit_that_drops_every_prompt_is_refused_with_the_shortest_length(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", *({"question": "1" * length, "answer": 1} for length in (9, 7)))
    message = refusal(load_prompts, DataConfig(train=path, max_prompt_tokens=6), "train", tokenizer)
    assert message.startswith("data.max_prompt_tokens=6") and "shortest has 7 tokens" in message


def test_templates_wrap_the_problem(tokenizer):
    data = DataConfig(train="arithmetic", prompt_template="1{problem}=2{problem}")
    assert encode_prompts(data, ["x"], tokenizer) == [tokenizer("1x=2x")["input_ids"]]
    data = DataConfig(train="arithmetic", system_prompt="12")
    assert encode_prompts(data, ["3"], tokenizer) == [tokenizer("12\n3")["input_ids"]]
    assert encode_prompts(DataConfig(train="arithmetic"), ["{problem}"], tokenizer) == [
        tokenizer("{problem}")["input_ids"]
    ]


def test_a_chat_template_wraps_system_prompt_and_problem():
    tokenizer = arithmetic.tokenizer()
    data = DataConfig(train="arithmetic", chat_template=True, system_prompt="7", prompt_template="{problem}=")
    assert refusal(encode_prompts, data, ["1"], tokenizer).startswith("data.chat_template=true but")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '8' if m.role == 'system' else '9' }}{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}~{% endif %}"
    )
    assert encode_prompts(data, ["1", "2"], tokenizer) == [
        tokenizer(text)["input_ids"] for text in ("87;91=;~", "87;92=;~")
    ]


@pytest.mark.parametrize("template", [None, CHATML])
def test_prompts_that_wait_for_their_turn_are_those_of_all_tokenised_at_once(tmp_path, template):
    texts = ["½" * (i % 5) + f" {i} " * (i % 9 + 1) for i in range(3000)]
    path = write(tmp_path / "rows.jsonl", *({"question": text, "answer": len(text)} for text in texts))
    tokenizer = byte_level(template)
    data = DataConfig(train=path, max_prompt_tokens=60 if template else 20, chat_template=bool(template))
    problems = load_problems(data, "train")
    pairs = zip(problems, encode_prompts(data, problems, tokenizer), strict=True)
    eager = [
        Prompt(problem.id, problem.text, np.array(ids, np.int32), problem.answer, problem.source)
        for problem, ids in pairs
        if len(ids) <= data.max_prompt_tokens
    ]
    lazy = load_prompts(data, "train", tokenizer)
    assert lazy.dropped == len(texts) - len(eager) > 100

    def seen(prompts):
        steps = [prompts.at_step(step, 50, seed=1) for step in (0, 3, 71)]
        chosen = [*steps, prompts.replacements(2, 5, 1, {p.id for p in steps[0]}), prompts.prompts[:8]]
        return [[(p.id, p.text, p.answer, p.source, p.token_ids.tolist()) for p in group] for group in chosen]

    assert seen(lazy) == seen(PromptSet(eager, lazy.dropped))


def test_the_prompts_of_given_problems_need_no_source(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", GOOD, GOOD)
    data = DataConfig(train=path, eval=path)
    splits = load_splits(data, "train")
    Path(path).unlink()
    for split, problems in splits.items():
        prompts = load_prompts(data, split, tokenizer, problems).prompts
        assert [prompt.text for prompt in prompts] == ["1+2=", "1+2="]


def test_a_command_reads_the_splits_that_it_uses(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD)
    both, alone = DataConfig(train=path, eval=path), DataConfig(train=path)
    assert [list(load_splits(both, command)) for command in ("train", "sft", "eval")] == [
        ["train", "eval"],
        ["train"],
        ["eval"],
    ]
    assert list(load_splits(alone, "train")) == ["train"]


def test_a_row_that_a_template_fails_on_is_named_among_others(tmp_path):
    path = write(tmp_path / "rows.jsonl", GOOD, {"question": "2", "answer": "2"}, GOOD)
    failing = CHATML + "{% if messages[0]['content'] == '2' %}{{ raise_exception('no 2') }}{% endif %}"
    message = refusal(load_prompts, DataConfig(train=path, chat_template=True), "train", byte_level(failing))
    assert message.startswith("rows.jsonl:2: this model's chat template fails: no 2")


def prompt_set(count):
    return PromptSet([Prompt(str(i), "", np.zeros(1, np.int32), "", "test") for i in range(count)], dropped=0)


def ids(prompts, step, count, seed=0):
    return [prompt.id for prompt in prompts.at_step(step, count, seed)]


def test_the_prompts_of_a_step_depend_on_the_arguments_alone():
    prompts = prompt_set(10)
    forwards = [ids(prompts, step, 3) for step in range(12)]
    backwards = [ids(prompt_set(10), step, 3) for step in reversed(range(12))]
    assert forwards == backwards[::-1]
    assert ids(prompt_set(6), 0, 3) == ["1", "3", "0"], "resuming an old run would see other prompts"


@pytest.mark.parametrize(("size", "count"), [(10, 3), (12, 4), (5, 5), (7, 1), (5, 4)])
def test_no_prompt_comes_twice_in_a_step_or_an_epoch(size, count):
    prompts, steps = prompt_set(size), size // count
    for epoch in range(4):
        seen = [i for step in range(steps) for i in ids(prompts, epoch * steps + step, count)]
        assert len(seen) == len(set(seen)) == steps * count


def test_epochs_and_seeds_have_their_own_order():
    prompts = prompt_set(40)
    epochs = [[i for step in range(4) for i in ids(prompts, epoch * 4 + step, 10)] for epoch in range(3)]
    assert len({tuple(order) for order in epochs}) == 3
    assert all(sorted(order) == sorted(epochs[0]) for order in epochs)
    assert epochs[0] != [str(i) for i in range(40)]
    assert ids(prompts, 0, 10, seed=0) != ids(prompts, 0, 10, seed=1)


def test_prompts_left_over_in_one_epoch_come_in_others():
    prompts = prompt_set(5)
    assert {i for step in range(12) for i in ids(prompts, step, 4)} == {str(i) for i in range(5)}


def replacement_ids(prompts, step, count, seed=0, exclude=()):
    return [prompt.id for prompt in prompts.replacements(step, count, seed, set(exclude))]


def test_replacements_depend_on_the_arguments_alone():
    first = replacement_ids(prompt_set(50), 3, 5, exclude={"1", "2"})
    assert replacement_ids(prompt_set(50), 3, 5, exclude={"2", "1"}) == first
    others = [
        replacement_ids(prompt_set(50), 4, 5, exclude={"1", "2"}),
        replacement_ids(prompt_set(50), 3, 5, seed=1, exclude={"1", "2"}),
    ]
    assert first not in others
    assert replacement_ids(prompt_set(6), 0, 3) == ["3", "2", "4"], "resuming an old run would see other prompts"


@pytest.mark.parametrize("count", [0, 1, 4, 7, 10, 20])
@pytest.mark.parametrize("excluded", [0, 1, 5, 10])
def test_replacements_are_as_many_as_there_are_and_none_is_excluded_or_comes_twice(count, excluded):
    prompts = prompt_set(10)
    exclude = {str(i) for i in range(excluded)}
    for step in range(20):
        drawn = replacement_ids(prompts, step, count, exclude=exclude)
        assert len(drawn) == len(set(drawn)) == min(count, 10 - excluded)
        assert not exclude & set(drawn)


def test_every_prompt_is_a_replacement_at_some_step():
    drawn = [i for step in range(100) for i in replacement_ids(prompt_set(10), step, 2, exclude={"0"})]
    assert set(drawn) == {str(i) for i in range(1, 10)}
    assert max(map(drawn.count, drawn)) < 50  # of 200, evenly 22


def test_a_stable_hash_is_the_same_for_ever():
    assert stable_hash(0, "step", 7, "arithmetic/3", 1) == 4683226580370693705
    assert stable_hash() == 4090036724241674979


def test_a_stable_hash_fits_63_bits_and_tells_its_parts_apart():
    parts = [(0, 1), (1, 0), ("0", 1), (0, 1, 0), ("01",), (0, "1"), (None, 1)]
    hashes = [stable_hash(*p) for p in parts]
    assert len(set(hashes)) == len(parts)
    assert all(0 <= stable_hash("seed", i) < 2**63 for i in range(1000))

"""tools/prepare_data.py on made-up rows: what is kept, what is dropped and why, and that it all adds up."""

import hashlib
import importlib.util
import json
import resource
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megarl.config import DataConfig
from megarl.data import arithmetic
from megarl.data.prompts import load_problems

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"
specification = importlib.util.spec_from_file_location("prepare_data", TOOL)
tool = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tool)

HELD_OUT = "A baker fills 8 trays with 15 rolls each and sells 37 rolls before noon on a rainy day. How many remain?"
CONTAMINATED = "On Monday the baker fills 8 trays with 15 rolls each and sells 37 rolls before noon. How many are left?"
ROWS = [
    {"question": f"Ann has {i} red and {i + 3} blue marbles. How many is that?", "answer": f"sum\n#### {2 * i + 3}"}
    for i in range(40)
]
ROWS += [
    {"question": "ANN has 7  red and $10$ blue marbles. How many is that?", "answer": "#### 17"},  # the same
    {"question": "Ann has 8 red and 11 blue marbles. How many is that?", "answer": "#### 20"},  # another answer
    {"question": CONTAMINATED, "answer": "#### 83"},
    {"question": "  what is 2 + 3 ?", "answer": "#### 5"},  # a short evaluation problem
    {"question": "Prove that 2 is even.", "answer": "It is."},
    {"question": None, "answer": "#### 5"},
]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", [{"problem": HELD_OUT, "answer": "83"}, {"problem": "What is 2+3?", "answer": "5"}])
    return tmp_path


def run(folder, *arguments, source="train.jsonl", out="out.jsonl", preset="gsm8k"):
    tool.main([f"{folder}/{source}", "--out", f"{folder}/{out}", "--preset", preset, *map(str, arguments)])
    return json.loads((folder / out).with_suffix(".manifest.json").read_text())


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refusal(capsys, folder, *arguments, **options):
    def files():
        return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}

    before = files()
    with pytest.raises(SystemExit) as caught:
        run(folder, *arguments, **options)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and line.startswith("prepare_data: error: ")
    assert files() == before, "something was left behind or lost"
    return line.removeprefix("prepare_data: error: ")


def test_every_row_is_kept_or_dropped_with_a_reason(folder, capsys):
    manifest = run(folder, "--decontaminate", f"math500={folder}/test.jsonl")
    assert manifest["counts"] == {
        "read": 46,
        "unusable": 2,
        "duplicate": 2,
        "contaminated": 2,
        "too_long": 0,
        "train": 40,
        "eval": 0,
    }
    assert manifest["duplicates_with_another_answer"] == 1
    dropped = {row["where"].rpartition(":")[2]: row for row in rows_of(folder / "out.dropped.jsonl")}
    assert {number: (row["reason"], row["detail"]) for number, row in dropped.items()} == {
        "41": ("duplicate", "of an earlier row"),
        "42": ("duplicate", "of an earlier row, with another answer"),
        "43": ("contaminated", "math500:1: baker fills 8 trays with 15 rolls each and sells 37 rolls before"),
        "44": ("contaminated", "math500:2: same text"),
        "45": ("unusable", "#### (.*) finds nothing in column 'answer'"),
        "46": ("unusable", "column 'question' is empty or not text: None"),
    }
    assert dropped["43"]["question"] == CONTAMINATED
    assert dropped["45"]["question"] == ROWS[44]["question"]
    assert "contaminated" in capsys.readouterr().out


def test_a_contaminated_row_is_kept_without_the_check(folder):
    manifest = run(folder)
    assert manifest["counts"]["contaminated"] == 0
    assert set(manifest["files"]) == {"out.jsonl", "out.dropped.jsonl"} and not (folder / "out.eval.jsonl").exists()
    assert CONTAMINATED in [row["question"] for row in rows_of(folder / "out.jsonl")]


def test_the_result_is_training_data_as_it_is(folder):
    run(folder)
    problems = load_problems(DataConfig(train=f"{folder}/out.jsonl"), "train")
    assert (len(problems), problems[5].text, problems[5].answer) == (42, ROWS[5]["question"], "13")


def test_the_manifest_says_what_went_in_and_what_came_out(folder):
    manifest = run(folder, "--decontaminate", f"math500={folder}/test.jsonl", "--eval-fraction", "0.3", "--seed", 5)
    train = (folder / "train.jsonl").read_bytes()
    assert manifest["source"]["sha256"] == hashlib.sha256(train).hexdigest()
    assert set(manifest["files"]) == {"out.jsonl", "out.eval.jsonl", "out.dropped.jsonl"}
    for name, file in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert file == {"rows": content.count(b"\n"), "sha256": hashlib.sha256(content).hexdigest()}
    (evaluation,) = manifest["decontamination"]["sets"].values()
    assert evaluation["problems"] == 2
    assert evaluation["sha256"] == hashlib.sha256((folder / "test.jsonl").read_bytes()).hexdigest()
    assert manifest["split"] == {"eval_fraction": 0.3, "seed": 5} and "python" in manifest["versions"]


def test_the_same_source_gives_the_same_bytes(folder):
    arguments = ("--decontaminate", f"math500={folder}/test.jsonl", "--eval-fraction", "0.3")
    first, second = (run(folder, *arguments, out=f"{name}/out.jsonl") for name in ("a", "b"))
    assert first == second
    for path in (folder / "a").iterdir():
        assert path.read_bytes() == (folder / "b" / path.name).read_bytes()


def test_a_split_is_seeded_and_outlives_other_rows(folder):
    def held_out(out, *arguments, source="train.jsonl"):
        run(folder, "--eval-fraction", "0.3", *arguments, out=out, source=source)
        return {row["question"] for row in rows_of((folder / out).with_suffix(".eval.jsonl"))}

    write(folder / "shorter.jsonl", ROWS[39:10:-1])
    chosen = held_out("a.jsonl")
    assert 5 < len(chosen) < 21
    assert held_out("b.jsonl", source="shorter.jsonl") == chosen & {row["question"] for row in ROWS[11:40]}
    assert held_out("c.jsonl", "--seed", 1) != chosen
    assert not chosen & {row["question"] for row in rows_of(folder / "a.jsonl")}


def test_over_long_prompts_are_dropped_with_template_and_tokens_of_the_model(tmp_path):
    arithmetic.tokenizer().save_pretrained(tmp_path / "model")
    write(tmp_path / "train.jsonl", [{"question": "1" * length, "answer": "1"} for length in (3, 9, 4)])
    (tmp_path / "config.yaml").write_text(
        f"model: {{path: {tmp_path}/model}}\n"
        "data: {train: arithmetic, prompt_template: '12{problem}=', max_prompt_tokens: 7, answer_pattern: '(.*)'}\n"
    )
    manifest = run(tmp_path, "--config", tmp_path / "config.yaml", preset="generic")
    assert manifest["counts"]["too_long"] == 1
    assert rows_of(tmp_path / "out.dropped.jsonl")[0]["detail"] == "12 tokens"
    assert manifest["prompt"]["prompt_template"] == "12{problem}="
    only = run(tmp_path, "--tokenizer", tmp_path / "model", "--max-prompt-tokens", 3, preset="generic", out="b.jsonl")
    assert only["counts"]["too_long"] == 2


def test_a_config_that_reads_other_columns_is_told_what_to_change(tmp_path, capsys):
    arithmetic.tokenizer().save_pretrained(tmp_path / "model")
    write(tmp_path / "train.jsonl", [{"question": "1+1=", "answer": "2"}])
    data = "{train: x.jsonl, prompt_key: problem, answer_pattern: '#### (.*)'}"
    (tmp_path / "config.yaml").write_text(f"model: {{path: {tmp_path}/model}}\ndata: {data}\n")
    run(tmp_path, "--config", tmp_path / "config.yaml", preset="generic")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("out.jsonl data.prompt_key=question data.answer_pattern=null")


def test_columns_and_rules_are_chosen_for_a_parquet_file(tmp_path):
    rows = [{"text": f"{i}?", "worked": rf"so \boxed{{{i}}} it is", "all": [str(i), "x"]} for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    choices = (("worked", "boxed", "1"), ("worked", "so (.*) it", r"\boxed{1}"), ("all", "list", "1, x"))
    for column, rule, expected in choices:
        arguments = ("--problem-column", "text", "--answer-column", column, "--answer-rule", rule)
        run(tmp_path, *arguments, source="rows.parquet", preset="generic", out=f"{rule[:2]}.jsonl")
        row = rows_of(tmp_path / f"{rule[:2]}.jsonl")[1]
        assert row == {"id": "rows.parquet:2", "question": "1?", "answer": expected}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{torn", "train.jsonl:3 is not JSON"),
        ("[1]", "train.jsonl:3 is not a JSON object"),
        ({"text": "p", "answer": "#### 1"}, "train.jsonl:3 has no column 'question'; it has: text, answer"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_left_behind(folder, capsys, row, words):
    write(folder / "train.jsonl", [*ROWS[:2], row, *ROWS[2:]])
    assert words in refusal(capsys, folder)


def test_mistakes_are_one_line_and_leave_nothing_behind(folder, capsys):
    write(folder / "empty.jsonl", [])
    write(folder / "proofs.jsonl", ROWS[44:45] * 3)
    write(folder / "taken.jsonl", [])
    assert "empty.jsonl: of 0 rows none is left to train on (no rows)" in refusal(capsys, folder, source="empty.jsonl")
    assert "of 3 rows none is left to train on (3 unusable)" in refusal(capsys, folder, source="proofs.jsonl")
    held_out = refusal(capsys, folder, "--eval-fraction", "0.999999", "--limit", "3")
    assert "none is left to train on (3 held out by --eval-fraction)" in held_out
    for option in ("--split", "--subset"):
        assert f"{option} test: " in refusal(capsys, folder, option, "test")
    assert "taken.jsonl exists; name another --out" in refusal(capsys, folder, out="taken.jsonl")
    assert "gone.jsonl does not exist" in refusal(capsys, folder, source="gone.jsonl")
    assert refusal(capsys, folder, "--tokenizer", "") == "argument --tokenizer: invalid place value: ''"
    assert "should end in .jsonl" in refusal(capsys, folder, out="out.csv")
    assert "--preset gsm8k knows the columns" in refusal(capsys, folder, "--problem-column", "x")
    assert "--tokenizer is required" in refusal(capsys, folder, "--max-prompt-tokens", 10)
    assert "needs one group" in refusal(capsys, folder, "--answer-rule", "####", preset="generic")
    assert "gone.jsonl does not exist" in refusal(capsys, folder, "--decontaminate", f"math500={folder}/gone.jsonl")
    twice = (f"a={folder}/test.jsonl", f"a={folder}/taken.jsonl")
    assert "--decontaminate: a is given twice" in refusal(capsys, folder, "--decontaminate", *twice)
    assert "--decontaminate: expected a data set" in refusal(capsys, folder, "--decontaminate", "")
    unknown = f"own={folder}/test.jsonl"
    assert "test.jsonl:1 has no column 'question'" in refusal(capsys, folder, "--decontaminate", unknown)


FRACTION, WHOLE = "should be a number from 0 to below 1", "should be a whole number of at least 1"


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [("--eval-fraction", value, FRACTION) for value in ("nan", "-0.1", "1", "inf", "a third")]
    + [("--limit", value, WHOLE) for value in ("0", "-3", "1.5", "all")]
    + [("--ngram", "0", WHOLE), ("--max-prompt-tokens", "0", WHOLE)],
)
def test_a_number_out_of_range_is_one_line_with_what_is_allowed(folder, capsys, option, value, allowed):
    assert refusal(capsys, folder, option, value).startswith(f"argument {option}")
    assert refusal(capsys, folder, f"{option}={value}") == f"argument {option}: {value!r} {allowed}"


def test_rows_behind_the_limit_are_not_read(folder):
    write(folder / "train.jsonl", [*ROWS[:2], "{torn"])
    assert run(folder, "--limit", 2)["counts"]["read"] == 2


def test_what_fails_at_the_very_end_leaves_nothing_behind(folder, capsys, monkeypatch):
    from megarl.data import prepare

    replace, seen = Path.replace, []

    def failing(path, target):  # of the operating system: the last file can't be renamed
        seen.append(target.name)
        if len(seen) == 4:
            raise OSError(5, "Input/output error")
        return replace(path, target)

    monkeypatch.setattr(prepare.Path, "replace", failing)
    message = refusal(capsys, folder, "--eval-fraction", "0.3", out="new/folder/out.jsonl")
    assert seen == ["out.jsonl", "out.eval.jsonl", "out.dropped.jsonl", "out.manifest.json"]
    assert "out.manifest.json can't be written: Input/output error" in message


def test_a_full_disk_leaves_nothing_behind_and_an_earlier_result_alone(folder, capsys):
    run(folder, out="earlier.jsonl")
    capsys.readouterr()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    try:
        message = refusal(capsys, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert "out.jsonl can't be written: File too large; see to it, or name another --out" in message


@pytest.mark.processes
def test_a_terminated_command_leaves_nothing_behind(folder):
    with (folder / "long.jsonl").open("w") as source:
        source.writelines(f'{{"question": "{i} and one", "answer": "#### {i + 1}"}}\n' for i in range(500_000))
    command = [sys.executable, TOOL, folder / "long.jsonl", "--preset", "gsm8k", "--out", folder / "new/out.jsonl"]
    before = sorted(folder.rglob("*"))
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
    while not list(folder.glob("new/*.partial")):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert said == "prepare_data: interrupted; nothing was written\n"
    assert sorted(folder.rglob("*")) == before


def test_a_preset_that_cannot_be_fetched_is_refused_by_its_hub_name(monkeypatch, tmp_path, capsys):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit):
        tool.main(["numina", "--out", f"{tmp_path}/out.jsonl"])
    assert "SOURCE=RLHFlow/numia_prompt_dpo1: neither a file nor a data set" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_memory_grows_with_hashes_and_not_with_rows(tmp_path):
    def measured(padding):
        rows = ({"question": f"{i} {'x' * padding}", "answer": "1", "unused": "y" * padding} for i in range(2000))
        with (tmp_path / f"{padding}.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        tracemalloc.start()
        run(tmp_path, source=f"{padding}.jsonl", preset="generic", out=f"{padding}.out.jsonl")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    measured(1)  # imports
    assert measured(4000) < measured(10) + 4e6  # the longer source is 16 MB larger


@pytest.mark.processes
def test_the_command_runs_as_the_readme_says(folder):
    command = [sys.executable, TOOL, folder / "train.jsonl", "--preset", "gsm8k", "--out", folder / "out.jsonl"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and f"train with data.train={folder}/out.jsonl" in done.stdout


def test_messages_and_dotted_columns_are_kept_as_texts_and_longer_conversations_refused(tmp_path, capsys):
    (tmp_path / "shards").mkdir()
    turn = {"role": "user", "content": "1+2?"}
    for i, row in enumerate(({"prompt": [turn], "reward": {"truth": "3"}}, {"prompt": "2+2?", "reward": {"truth": 4}})):
        write(tmp_path / "shards" / f"{i}.jsonl", [row])
    columns = ["--problem-column", "prompt", "--answer-column", "reward.truth"]
    tool.main([str(tmp_path / "shards"), "--out", str(tmp_path / "out.jsonl"), *columns])
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [tuple(row.values()) for row in rows] == [("0.jsonl:1", "1+2?", "3"), ("1.jsonl:1", "2+2?", "4")]
    source = write(
        tmp_path / "talk.jsonl", [{"prompt": [{"role": "system", "content": "x"}, turn], "reward": {"truth": 3}}]
    )
    with pytest.raises(SystemExit):
        tool.main([str(source), "--out", str(tmp_path / "talk_out.jsonl"), *columns])
    assert "talk.jsonl:1: a conversation of several turns is not kept" in capsys.readouterr().err

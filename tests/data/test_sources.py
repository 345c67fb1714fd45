import codecs
import gzip
import json
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest

from megarl.config import DataConfig
from megarl.data.prompts import load_problems
from megarl.data.sources import Rows
from megarl.types import UserError

ROWS = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(3000)]


def refusal(rows):
    with pytest.raises(UserError) as caught:
        list(rows)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_parquet_file_is_read_as_a_jsonl_file_is(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    for kind in ("jsonl", "parquet"):
        path = str(tmp_path / f"rows.{kind}")
        rows = Rows("data.train", path)
        assert list(rows) == [(f"{path}:{i}", row) for i, row in enumerate(ROWS, 1)]
        assert rows.done == rows.total
        problems = load_problems(DataConfig(train=path), "train")
        assert (len(problems), problems[7].id, problems[7].answer) == (3000, f"rows.{kind}:8", "8")


def test_rows_come_one_at_a_time_with_how_far_they_are(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' * 10 + "torn")
    rows = Rows("data.train", str(path))
    first = iter(rows)
    assert next(first) == (f"{path}:1", {"a": 1})
    assert (rows.done, rows.total) == (9, 94)


def test_what_is_no_parquet_file_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    assert refusal(Rows("SOURCE", str(path))) == f"SOURCE={path} does not exist; expected a .parquet file"
    assert refusal(Rows("SOURCE", "gone.jsonl.gz")).startswith("SOURCE=gone.jsonl.gz does not exist; expected a .jsonl")
    path.write_text("not one")
    assert refusal(Rows("SOURCE", str(path))).startswith(f"{path} is not a readable Parquet file")


def test_a_parquet_file_that_breaks_off_or_is_not_text_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, compression="none")
    content = bytearray(path.read_bytes())
    content[4:2000] = b"\xff" * 1996
    path.write_bytes(content)
    assert refusal(Rows("SOURCE", str(path))).startswith(f"{path} is not a readable Parquet file: ")
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.array([0, 2], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xff\xfe")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"question": text}), path)
    assert "is not a readable Parquet file: 'utf-8' codec can't decode" in refusal(Rows("SOURCE", str(path)))


def test_only_texts_and_numbers_of_a_parquet_file_are_answers(tmp_path):
    path = tmp_path / "rows.parquet"

    def problems(answer):
        pyarrow.parquet.write_table(pyarrow.table({"question": ["q"], "answer": [answer]}), path)
        return load_problems(DataConfig(train=str(path)), "train")

    assert problems(Decimal("2.50"))[0].answer == "2.5"
    for answer, shown in ((b"3", "b'3'"), (float("inf"), "inf"), ({"a": "3"}, "{'a': '3'}")):
        with pytest.raises(UserError) as caught:
            problems(answer)
        assert str(caught.value) == f"{path}:1: column 'answer' (data.answer_key) is empty or not text: {shown}"


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + b'{"a": 1}\n{"a": 2}\n')
    assert [row for _, row in Rows("data.train", str(path))] == [{"a": 1}, {"a": 2}]


def test_what_is_no_jsonl_file_is_refused_with_what_it_is(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.mkdir()
    assert refusal(Rows("data.train", str(path))) == (
        f"data.train={path} is not a file; expected a .jsonl file, a hub data set, or arithmetic"
    )
    for name in ("packed.jsonl", "packed.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b'{"a": 1}\n'))
        assert refusal(Rows("SOURCE", f"{tmp_path}/{name}")).endswith(f"{name} is compressed; unpack it with gunzip")
    (tmp_path / "utf16.jsonl").write_text('{"a": 1}\n', encoding="utf-16")
    assert refusal(Rows("SOURCE", f"{tmp_path}/utf16.jsonl")).endswith(
        "utf16.jsonl:1 is not UTF-8 text; save the file as UTF-8"
    )


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_data_set_that_cannot_be_had_is_refused_by_name(monkeypatch, streaming):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal(Rows("data.eval.math500", "nobody/no-such-set", split="test", streaming=streaming))
    assert message.startswith("data.eval.math500=nobody/no-such-set: neither a file nor a data set that could be")


def write_shards(folder, *names):
    """Two rows in each file, numbered through."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        rows = ROWS[2 * i : 2 * i + 2]
        (folder / name).parent.mkdir(exist_ok=True)
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
        else:
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def ids(train):
    return [problem.id for problem in load_problems(DataConfig(train=str(train)), "train")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_shards_of_a_folder_are_one_data_set_in_the_order_of_their_names(tmp_path, kind):
    shards = [f"train-0000{i}-of-00003.{kind}" for i in range(3)]
    write_shards(tmp_path / "set", *shards)
    for other in ("README.md", "_SUCCESS", f".train-9.{kind}"):
        (tmp_path / "set" / other).write_text("not a row")
    expected = [f"{shard}:{i}" for shard in shards for i in (1, 2)]
    for source in ("set", "set/", f"set/*.{kind}", f"set/train-0000[0-2]-*.{kind}"):
        assert ids(f"{tmp_path}/{source}") == expected
        rows = Rows("data.train", f"{tmp_path}/{source}")
        assert [row for _, row in rows] == ROWS[:6] and rows.done == rows.total


def test_row_ids_of_a_pattern_are_distinct_and_the_same_wherever_its_files_lie(tmp_path, monkeypatch):
    for place in ("here", "there"):
        write_shards(tmp_path / place, "a/part.jsonl", "b/part.jsonl")
    expected = ["a/part.jsonl:1", "a/part.jsonl:2", "b/part.jsonl:1", "b/part.jsonl:2"]
    assert ids(tmp_path / "here" / "*" / "part.jsonl") == ids(tmp_path / "there" / "**" / "*.jsonl") == expected
    monkeypatch.chdir(tmp_path / "here")
    assert ids("./*/*.jsonl") == expected and ids("a") == ["part.jsonl:1", "part.jsonl:2"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    write_shards(tmp_path, "rows[1].jsonl", "rows1.jsonl")
    assert ids(tmp_path / "rows[1].jsonl") == ["rows[1].jsonl:1", "rows[1].jsonl:2"]


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000.parquet", "test-00000.parquet"),
        ("gsm8k.jsonl", "gsm8k.eval.jsonl", "gsm8k.dropped.jsonl"),
        ("rows.jsonl", "rows.parquet"),
    ],
)
def test_a_folder_of_more_than_one_set_is_refused(tmp_path, names):
    write_shards(tmp_path, *names)
    message = refusal(Rows("data.train", str(tmp_path)))
    assert "which are not shards of one set; name a file or a pattern" in message
    assert message.startswith(f"data.train={tmp_path} holds ")


def test_no_shard_is_left_out_silently(tmp_path):
    write_shards(tmp_path, "0.jsonl")
    (tmp_path / "1.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert refusal(Rows("SOURCE", str(tmp_path))) == f"{tmp_path}/1.jsonl.gz is compressed; unpack it with gunzip"
    (tmp_path / "1.jsonl.gz").unlink()
    (tmp_path / "1.jsonl").write_text("torn")
    assert refusal(Rows("SOURCE", f"{tmp_path}/*")).startswith(f"{tmp_path}/1.jsonl:1 is not JSON")
    message = refusal(Rows("SOURCE", f"{tmp_path}/*.parquet"))
    assert message == f"SOURCE={tmp_path}/*.parquet matches no file; expected .jsonl or .parquet files"


def test_a_set_is_refused_that_lacks_some_of_the_shards_that_its_names_count(tmp_path):
    write_shards(tmp_path, *(f"train-0000{i}-of-00003.jsonl" for i in (0, 2)))
    message = refusal(Rows("data.train", str(tmp_path)))
    assert message == f"data.train={tmp_path} holds 2 of the 3 shards train-*-of-00003.jsonl; get the others"
    (tmp_path / "train-00001-of-00003.jsonl").symlink_to("gone")
    assert "train-00001-of-00003.jsonl links to gone, which is not there" in refusal(Rows("data.train", str(tmp_path)))
    assert len(ids(tmp_path / "train-*-of-*.jsonl")) == 4  # as asked for


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_git_lfs_pointer_is_no_data(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 9\n")
    for source in (tmp_path / name, tmp_path):
        assert f"{name} is a git-lfs pointer, not the file itself" in refusal(Rows("data.train", str(source)))


def test_a_row_that_says_two_things_of_one_key_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    for row in ('{"question": "1", "answer": "2", "answer": "3"}', '{"a": [{"answer": 1, "b": 2, "answer": 1}]}'):
        path.write_text(row + "\n")
        assert refusal(Rows("data.train", str(path))) == f"{path}:1 has the key 'answer' twice; keep one"


def test_blank_lines_end_a_file_but_do_not_interrupt_it(tmp_path):
    write_shards(tmp_path, "0.jsonl", "1.jsonl")
    for name in ("0.jsonl", "1.jsonl"):
        path = tmp_path / name
        path.write_text(path.read_text() + "\n \n\t\r\n")
    assert len(ids(tmp_path)) == 4
    path.write_text(path.read_text() + '{"question": "1+1=", "answer": "2"}\n')
    assert refusal(Rows("data.train", str(path))) == f"{path}:3 is empty; expected one JSON object per line"
    path.write_text("\n\n")
    with pytest.raises(UserError, match="has no rows"):
        load_problems(DataConfig(train=str(path)), "train")


@pytest.mark.parametrize(
    ("source", "name"),
    [("held/*.jsonl", "held"), ("data/test-*.parquet", "test"), ("held_out/", "held_out"), ("a/b[0-9].jsonl", "b")],
)
def test_a_pattern_to_evaluate_on_is_called_by_what_it_leaves_fixed(source, name):
    assert [chosen.name for chosen in DataConfig(train="x", eval=source).eval_sets] == [name]

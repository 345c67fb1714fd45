"""Tokenizers: what is refused before a run could go wrong with it, in a line that says what to set."""

import io
import json
import shutil
import sys

import pytest

from megarl.data.tokenizer import check_stop_tokens, check_vocabulary, load_tokenizer
from megarl.models.family import read_hf_config
from megarl.types import UserError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 11422654\n"


@pytest.fixture(params=["qwen2", "llama"])
def folder(request, tmp_path):
    """A copy of a tiny model, of a family with a tokenizer class of its own and of one without."""
    return shutil.copytree(request.getfixturevalue(request.param), tmp_path / "model")


def edit(folder, name="tokenizer_config.json", **fields):
    path = folder / name
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


def refusal(function, *arguments, **named):
    with pytest.raises(UserError) as caught:
        function(*arguments, **named)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def test_a_tokenizer_is_loaded_as_transformers_loads_it(folder):
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs)
    assert ours("1+2=")["input_ids"] == theirs("1+2=")["input_ids"]
    check_vocabulary(ours, rows=32, path=folder)
    check_stop_tokens(ours, read_hf_config(folder), folder)


MADE_UP = {  # what a class adds of its own, or is told to, that no file of the vocabulary holds
    "no word of one": lambda folder: edit(folder, eos_token="absent"),
    "null": lambda folder: edit(folder, eos_token=None),
    "one that isn't in the vocabulary": lambda folder: edit(folder, eos_token="</s>"),
    "no configuration": lambda folder: (folder / "tokenizer_config.json").unlink(),
}


@pytest.mark.parametrize("case", MADE_UP)
def test_a_tokenizer_needs_an_end_of_sequence_token_of_its_own(folder, case):
    MADE_UP[case](folder)
    message = refusal(load_tokenizer, folder)
    assert message.startswith(f"model.path={folder}: the tokenizer has no end-of-sequence token")
    assert "set eos_token in tokenizer_config.json" in message


LARGER = {
    "added_tokens.json": lambda folder: (folder / "added_tokens.json").write_text('{"<extra>": 51}'),
    "added_tokens_decoder": lambda folder: edit(
        folder, added_tokens_decoder={str(i): {"content": f"<{i}>", "special": True} for i in range(32, 60)}
    ),
    "extra_special_tokens": lambda folder: edit(folder, extra_special_tokens=[f"<{i}>" for i in range(20)]),
}


@pytest.mark.parametrize("case", LARGER)
def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_sizes(folder, case):
    LARGER[case](folder)
    tokenizer = load_tokenizer(folder)
    size = max(tokenizer.get_vocab().values()) + 1
    check_vocabulary(tokenizer, rows=size, path=folder)
    message = refusal(check_vocabulary, tokenizer, rows=size - 1, path=folder)
    assert f"needs {size} rows" in message and f"has {size - 1} (vocab_size)" in message


# name -> (what is done to the folder, words of the refusal)
UNUSABLE = {
    "no tokenizer": (
        lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        "has no tokenizer",
    ),
    "configuration alone": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer (tokenizer.json)"),
    "half a vocabulary": (
        lambda f: ((f / "tokenizer.json").unlink(), (f / "vocab.json").write_text("{}")),
        "has no tokenizer (tokenizer.json)",
    ),
    "a pointer": (lambda f: (f / "tokenizer.json").write_text(POINTER), "tokenizer.json is a git-lfs pointer"),
    "a pointer as configuration": (
        lambda f: (f / "tokenizer_config.json").write_text(POINTER),
        "tokenizer_config.json is a git-lfs pointer",
    ),
    "a pointer as sentencepiece": (
        lambda f: ((f / "tokenizer.json").unlink(), (f / "tokenizer.model").write_text(POINTER)),
        "tokenizer.model is a git-lfs pointer",
    ),
    "a link to nothing": (
        lambda f: (f / "special_tokens_map.json").symlink_to("gone"),
        "special_tokens_map.json links to gone, which is not there",
    ),
    "an empty file": (lambda f: (f / "tokenizer.json").write_text(""), "can't be loaded"),
    "a web page": (lambda f: (f / "tokenizer.json").write_text("<!DOCTYPE html>\n<html>"), "can't be loaded"),
    "no JSON as configuration": (lambda f: (f / "tokenizer_config.json").write_text("{"), "is not JSON"),
    "code of its own": (
        lambda f: edit(f, auto_map={"AutoTokenizer": ["tokenization.Mine", None]}, tokenizer_class="Mine"),
        "asks for code of the model's own (auto_map), which is never run",
    ),
    "code of its own beside a known class": (
        lambda f: edit(f, auto_map={"AutoTokenizer": ["tokenization.Mine", None]}),
        "asks for code of the model's own (auto_map), which is never run",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_tokenizer_that_cannot_be_used_is_refused_in_a_line(folder, case, monkeypatch):
    change, words = UNUSABLE[case]
    change(folder)
    monkeypatch.setattr(sys, "stdin", None)  # nothing asks
    message = refusal(load_tokenizer, folder)
    assert words in message and str(folder) in message


def test_a_setting_of_another_name_is_named(tmp_path):
    assert refusal(load_tokenizer, tmp_path, setting="--tokenizer ").startswith(f"--tokenizer {tmp_path} has no tok")


@pytest.fixture
def sentencepiece_folder(llama, tmp_path):
    """A Llama model with a sentencepiece model of 48 pieces as its only tokenizer."""
    import sentencepiece

    folder = shutil.copytree(llama, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["1 + 2 = 3", "what is the answer 4 5 6 7 8 9 0"] * 20),
        model_writer=written,
        vocab_size=48,
        model_type="bpe",
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    return folder


def test_a_sentencepiece_model_is_read(sentencepiece_folder):
    tokenizer = load_tokenizer(sentencepiece_folder)
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.decode(tokenizer("1 + 2 = 3", add_special_tokens=False)["input_ids"]) == "1 + 2 = 3"


def test_a_sentencepiece_model_names_the_package_that_it_lacks(sentencepiece_folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    message = refusal(load_tokenizer, sentencepiece_folder)
    assert "tokenizer.model needs sentencepiece; pip install sentencepiece, or save tokenizer.json" in message
    assert capsys.readouterr() == ("", "")


# name -> (what is done to the folder, words of the refusal)
STOPS = {
    "an ordinary token": (
        lambda f: edit(f, "generation_config.json", eos_token_id=4),
        "eos_token_id=4 of generation_config.json is '1', an ordinary token, at which every response would end",
    ),
    "one of several": (
        lambda f: edit(f, "generation_config.json", eos_token_id=[1, 5]),
        "eos_token_id=5 of generation_config.json is '2', an ordinary token",
    ),
    "beyond the vocabulary": (
        lambda f: edit(f, "generation_config.json", eos_token_id=[1, 99]),
        "eos_token_id=99 of generation_config.json is no token of this tokenizer; set it to 1 (<eos>)",
    ),
    "the model's, without a generation configuration": (
        lambda f: ((f / "generation_config.json").unlink(), edit(f, "config.json", eos_token_id=6)),
        "eos_token_id=6 of config.json is '3'",
    ),
    "a pointer": (
        lambda f: (f / "generation_config.json").write_text(POINTER),
        "generation_config.json is a git-lfs pointer",
    ),
    "no JSON": (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json is not JSON"),
}


@pytest.mark.parametrize("case", STOPS)
def test_responses_end_at_nothing_but_tokens_that_end_them(folder, case):
    change, words = STOPS[case]
    change(folder)
    assert words in refusal(check_stop_tokens, load_tokenizer(folder), read_hf_config(folder), folder)


def test_a_generation_configuration_may_name_several_ends_or_none(folder):
    for ids in ([1, 0], 1, None):
        edit(folder, "generation_config.json", eos_token_id=ids)
        check_stop_tokens(load_tokenizer(folder), read_hf_config(folder), folder)

"""What plain scalars are by YAML 1.2's core schema, what is refused, and that any text comes back from a dump."""

import datetime

import pytest
import yaml
from texts import TEXTS, VALUES, strings

from megarl.config import yaml12


@pytest.mark.parametrize("text", VALUES)
def test_a_plain_scalar_is_what_the_core_schema_says(text):
    for value in (yaml12.load(text), yaml12.load(f"key: {text}")["key"], yaml12.load(f"{{key: {text}}}")["key"]):
        assert (value, type(value)) == (VALUES[text], type(VALUES[text]))


@pytest.mark.parametrize("text", sorted({*TEXTS} - {"-"}))
def test_anything_else_is_the_text_it_is(text):
    assert yaml12.load(text) == text and yaml12.load(f"key: {text}") == {"key": text}


def test_a_number_is_no_key_like_another_and_there_are_no_merge_keys():
    assert yaml12.load("a: &a {x: 1}\nb: {<<: *a}") == {"a": {"x": 1}, "b": {"<<": {"x": 1}}}


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2",
        "!!int many",
        "!!bool yes",
        "!!binary aGk=",
        "!!timestamp 2024-01-01",
        "!!set {a}",
        "!!python/name:os.system",
        "&a [*a]",
        "&a {b: *a}",
        "[" * 1500,
        "9" * 5000,
        '"\\ud800"',
        "a: b: c",
        "--- 1\n--- 2",
        "{[a]: 1}",
    ],
)
def test_what_the_core_schema_lacks_is_refused(text):
    with pytest.raises(yaml.YAMLError):
        yaml12.load(text)


def test_every_text_comes_back_from_a_dump_and_is_text_to_yaml_1_1_too():
    texts = list(strings())
    dumped = yaml12.dump({"texts": texts, "keys": {text: [text] for text in texts}})
    assert yaml12.load(dumped) == {"texts": texts, "keys": {text: [text] for text in texts}}
    assert yaml.safe_load(dumped)["texts"] == texts
    dated = yaml12.dump({"date": "2024-01-01"})
    assert not isinstance(yaml.safe_load(dated)["date"], datetime.date)


@pytest.mark.parametrize("text", ["pattern: #### (.*)", "a: {b: 1}\nc:   # none", "- a\n- # b", "a: #\nb: 1"])
def test_a_text_that_a_comment_has_eaten_is_refused(text):
    with pytest.raises(yaml.YAMLError, match="nothing stands before the comment"):
        yaml12.load(text)
    for fine in ("a: null # none", "a: ~ # none", "a: # below\n  b: 1", "a: # below\n- b", "# all", "a: '' # none"):
        yaml12.load(fine)


def test_line_breaks_of_yaml_1_1_are_text():
    assert yaml12.load("a: 'x\u2028y\x85z'\nb: x\u2029 y") == {"a": "x\u2028y\x85z", "b": "x\u2029 y"}


@pytest.mark.parametrize("number", [0, -1, 10**30, 1e-300, 1e22, 0.1, -0.0, 123456789.123456789])
def test_numbers_come_back_from_a_dump(number):
    back = yaml12.load(yaml12.dump(number))
    assert (back, type(back)) == (number, type(number))

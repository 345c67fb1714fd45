"""The reward sees what a reader of the conversation would."""

import json

import pytest
from odd_tokenizers import CHATML, SPECIAL, THINKING, byte_level, word_level

from megarl.config.sections import Config, DataConfig, ModelConfig, RewardConfig
from megarl.data import arithmetic
from megarl.rewards.layout import has_layout
from megarl.rollout.reading import Reader
from megarl.types import UserError

RIGHT = "<think>two</think> <answer>2</answer>"


def config(tmp_path, reward="format", ends=None, **data):
    if ends is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return Config(
        model=ModelConfig(path=str(tmp_path)), data=DataConfig(train="x", **data), reward=RewardConfig(name=reward)
    )


def read(config, tokenizer, text):
    return Reader(config, tokenizer).read([tokenizer(text, add_special_tokens=False)["input_ids"]])[0]


@pytest.mark.parametrize("special", [SPECIAL, SPECIAL[:5]])
@pytest.mark.parametrize("template", [CHATML, THINKING, None])
def test_a_right_response_has_the_layout_whatever_is_special_or_opened(tmp_path, special, template):
    tokenizer, data = byte_level(template, special=special), {"chat_template": template is not None}
    written = RIGHT.removeprefix("<think>") if template == THINKING else RIGHT
    text = read(config(tmp_path, **data), tokenizer, f"{written}</s>")
    assert text == (f"<think>\n{written}" if template == THINKING else RIGHT) and has_layout(text)
    assert not has_layout(read(config(tmp_path, **data), tokenizer, written.replace("<answer>", "")))
    Reader(config(tmp_path, **data), tokenizer).check(config(tmp_path, **data))


def test_ends_of_the_turn_and_padding_are_not_read_and_all_else_is(tmp_path):
    tokenizer = byte_level(CHATML)
    ends = [tokenizer.convert_tokens_to_ids("</s>"), tokenizer.convert_tokens_to_ids("<s>")]
    assert read(config(tmp_path), tokenizer, "5 <|im_end|></s><pad>") == "5 <|im_end|>"
    assert read(config(tmp_path, chat_template=True), tokenizer, "5 <|im_end|></s><pad>") == "5 "
    assert (
        read(config(tmp_path, chat_template=True), tokenizer, "5<|im_end|>\n<|im_start|>user") == "5\n<|im_start|>user"
    )
    assert read(config(tmp_path), tokenizer, "<s>5 , 6") == "<s>5 , 6"
    assert read(config(tmp_path, ends=ends), tokenizer, "<s>5") == "5"
    assert read(config(tmp_path, ends=ends[0]), tokenizer, "<s>5</s>") == "<s>5"


def test_a_prompt_template_that_opens_a_box_leaves_the_rest_to_the_response(tmp_path):
    opening = config(tmp_path, reward="math", prompt_template="{problem}\nAnswer: \\boxed{")
    assert read(opening, byte_level(), "42}") == "\\boxed{42}"
    Reader(opening, byte_level()).check(opening)


@pytest.mark.parametrize("reward", ["math", "countdown"])
def test_the_built_in_tokenizer_can_write_an_answer_to_reward(tmp_path, reward):
    Reader(config(tmp_path, reward), arithmetic.tokenizer()).check(config(tmp_path, reward))


@pytest.mark.parametrize(
    ("make", "reward", "data"),
    [
        (arithmetic.tokenizer, "format", {}),
        (lambda: word_level(["1", "2", "3"]), "math", {}),
        (lambda: byte_level(CHATML.replace("assistant\n", "assistant\nSure! ")), "format", {"chat_template": True}),
        (byte_level, "format", {"prompt_template": "{problem}<answer>"}),
    ],
)
def test_a_reward_that_no_response_can_win_is_refused(tmp_path, make, reward, data):
    asked = config(tmp_path, reward, **data)
    with pytest.raises(UserError) as caught:
        Reader(asked, make()).check(asked)
    assert str(caught.value).startswith(f"reward.name={reward} can't be won: a response ")
    assert "\n" not in str(caught.value)

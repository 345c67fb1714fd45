import pytest
from odd_tokenizers import CHATML, LLAMA_3, MISTRAL, THINKING, byte_level

from megarl.config import DataConfig
from megarl.data.prompts import Problem, encode_prompts
from megarl.data.templates import frame
from megarl.types import UserError


def refusal(tokenizer, problem="1+1?", **data):
    with pytest.raises(UserError) as caught:
        encode_prompts(DataConfig(train="x", chat_template=True, **data), [problem], tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_or_broken_chat_template_is_refused_in_one_line():
    assert "this model's tokenizer has no chat template; use false" in refusal(byte_level())
    named = byte_level({"tool_use": CHATML, "rag": CHATML})
    assert "this model's tokenizer has none named default, but tool_use, rag; use false" in refusal(named)
    for broken in ("{% for m in messages %}{{ m['content'] }}", "{{ messages[0]['content'] | shout }}", "{{ 1 / 0 }}"):
        row = Problem("rows.jsonl:1", "1+1?", "2", "rows.jsonl")
        message = refusal(byte_level(broken), row)
        assert message.startswith("rows.jsonl:1: this model's chat template fails: ")
        assert message.endswith("; use data.chat_template=false, or mend the template")
    assert encode_prompts(DataConfig(train="x", chat_template=True), ["1"], byte_level({"default": CHATML}))


def test_a_template_that_refuses_the_system_role_is_told_from_one_that_refuses_all():
    message = refusal(byte_level(MISTRAL), system_prompt="Be brief.")
    assert message == (
        "this model's chat template fails: Only user and assistant roles are supported!; "
        "put the system message (data.system_prompt) into data.prompt_template"
    )
    strict = MISTRAL.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if loop.index0 == 1 %}{{ raise_exception('Roles must alternate') }}{% endif %}",
    )
    turns = ({"role": "user", "content": "1"}, {"role": "user", "content": "2"})
    message = refusal(byte_level(strict), Problem("rows.jsonl:7", "1\n2", "3", "rows.jsonl", turns))
    assert message.startswith("rows.jsonl:7: this model's chat template fails: Roles must alternate; use data.chat")


@pytest.mark.parametrize(
    ("template", "opened", "closing"),
    [
        (CHATML, "", "<|im_end|>\n"),
        (LLAMA_3, "", "<|im_end|>"),
        (MISTRAL, "", "</s>"),
        (THINKING, "<think>\n", "<|im_end|>\n"),
        (CHATML.replace("assistant\n", "assistant\nLet us see. "), "Let us see. ", "<|im_end|>\n"),
        (  # writes an empty thought before an answer that has none
            THINKING.replace(
                "{{ m['content'] }}",
                "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
            ),
            "<think>\n",
            "<|im_end|>\n",
        ),
        ("{{ messages[-1]['content'] }}{% if add_generation_prompt %}<assistant>{% endif %}", "", ""),
    ],
)
def test_what_a_chat_template_has_written_of_the_response_is_told_from_its_header(template, opened, closing):
    assert frame(DataConfig(train="x", chat_template=True), byte_level(template)) == (opened, closing)


@pytest.mark.parametrize(
    ("template", "opened"),
    [
        ("{problem}", ""),
        ("{problem}\nAssistant: <think>", "<think>"),
        ("Think in <think> tags.\n{problem}\n<think>\n<step>", "<think>\n<step>"),
        ("{problem}\nAnswer: $\\boxed{", "\\boxed{"),
        ("{problem}\nWrite <think> </think> <answer> </answer>", ""),
        ("<user>{problem}</user><assistant>", ""),
        ("Open <think>{problem}", ""),
    ],
)
def test_what_a_prompt_template_has_opened_belongs_to_the_response(template, opened):
    assert frame(DataConfig(train="x", prompt_template=template), byte_level()).opened == opened

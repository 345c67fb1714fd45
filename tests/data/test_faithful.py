"""Templates and tokenizers that make something else of a problem are refused, by row; those that don't are not."""

import pytest
from odd_tokenizers import CHATML, LLAMA_3, MISTRAL, THINKING, byte_level, word_level
from tokenizers import normalizers, processors

from megarl.config import DataConfig
from megarl.data import arithmetic
from megarl.data.faithful import check_prompts, check_responses, sample_rows
from megarl.data.prompts import Problem, encode_prompts, load_problems, prompt_texts
from megarl.types import UserError

TEXTS = [
    "Tom has 12 apples. How many are 2 + 3?",
    "Find x:\n\n  $x^2 < 4$ & y > 1",
    "Wie groß ist ½ von 8?",
    "一加一等于几？",
    "Long. " + "And so on, until there is no room. " * 30 + "What is 7?",
]


def problems(texts=TEXTS):
    return [Problem(f"rows.jsonl:{i}", text, "1", "rows.jsonl") for i, text in enumerate(texts, 1)]


def check(tokenizer, texts=TEXTS, vocabulary=1000, **data):
    data = {"chat_template": tokenizer.chat_template is not None} | data
    return check_prompts(DataConfig(train="x", **data), problems(texts), tokenizer, vocabulary)


def refusal(*arguments, **data):
    with pytest.raises(UserError) as caught:
        check(*arguments, **data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("template", [None, CHATML, THINKING, LLAMA_3, MISTRAL])
@pytest.mark.parametrize("begin", [False, True])
def test_sound_templates_and_tokenizers_pass(template, begin):
    system = None if template == MISTRAL else "You are a careful mathematician."
    dated = template == LLAMA_3
    unbegun = begin and template in (CHATML, THINKING)
    warnings = check(byte_level(template, begin=begin), system_prompt=system)
    assert len(warnings) == dated + unbegun
    assert not unbegun or warnings[0].startswith(
        "prompts don't begin with '<s>', for the chat template doesn't write it"
    )


def test_the_built_in_task_passes():
    for split in ("train", "eval"):
        found = load_problems(DataConfig(train="arithmetic", eval="arithmetic"), split)
        assert check_prompts(DataConfig(train="arithmetic"), found, arithmetic.tokenizer(), 32) == []


def test_white_space_around_a_problem_may_go():
    stripping = CHATML.replace("m['content']", "m['content'] | trim")
    assert (
        check(byte_level(stripping), ["  1+1? \n", "1+1?"], system_prompt=" Be brief.\n", prompt_template="{problem}\n")
        == []
    )


CONTENT = "{{ m['content'] }}"
TEMPLATES = {
    "upper case": (CHATML.replace(CONTENT, "{{ m['content'] | upper }}"), "'TOM HAS 12 A"),
    "no lines": (CHATML.replace(CONTENT, "{{ m['content'] | replace('\\n', ' ') }}"), "rows.jsonl:2: "),
    "cut off": (CHATML.replace(CONTENT, "{{ m['content'][:200] }}"), "rows.jsonl:5: "),
    "escaped": (CHATML.replace(CONTENT, "{{ m['content'] | e }}"), "rows.jsonl:2: "),
    "no content": (CHATML.replace(CONTENT, ""), "rows.jsonl:1: "),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_changes_the_problem_is_refused_with_the_row_and_the_place(name):
    template, words = TEMPLATES[name]
    message = refusal(byte_level(template))
    assert "this model's chat template changes or drops the problem: " in message and words in message
    assert message.endswith("; use data.chat_template=false")


def test_a_template_that_drops_the_system_message_is_refused():
    deaf = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    assert check(byte_level(deaf)) == []
    message = refusal(byte_level(deaf), system_prompt="Answer in a box.")
    assert message.startswith("rows.jsonl:1: this model's chat template changes or drops the system message: ")
    assert message.endswith("; put it into data.prompt_template")


def test_a_system_message_whose_words_are_in_the_problem_is_missed_all_the_same():
    deaf = byte_level(CHATML.replace("in messages", "in messages[-1:]"))
    assert "drops the system message" in refusal(deaf, ["Solve. 1+1", "Solve. 2+2"], system_prompt="Solve.")
    turns = tuple({"role": role, "content": "1"} for role in ("user", "assistant", "user"))
    with pytest.raises(UserError, match="drops the problem"):
        rows = [Problem("rows.jsonl:1", "1", "1", "rows.jsonl", turns)]
        check_prompts(DataConfig(train="x", chat_template=True), rows, deaf, 1000)


def test_a_template_that_renders_nothing_is_named_and_not_the_tokenizer():
    assert "this model's chat template changes or drops the problem" in refusal(byte_level("{# nothing #}"))


def test_a_template_that_shows_the_last_messages_only_is_refused():
    turns = tuple({"role": role, "content": f"{role} says {i}"} for i, role in enumerate(("user", "assistant", "user")))
    rows = [Problem("rows.jsonl:1", "all", "1", "rows.jsonl", turns)]
    data = DataConfig(train="x", chat_template=True)
    assert check_prompts(data, rows, byte_level(CHATML), 1000) == []
    forgetful = byte_level(CHATML.replace("in messages", "in messages[-2:]"))
    with pytest.raises(UserError, match="rows.jsonl:1: this model's chat template changes or drops the problem"):
        check_prompts(data, rows, forgetful, 1000)


@pytest.mark.parametrize(
    "template",
    [
        CHATML.partition("{% if add")[0],
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% if not loop.last %}\n{% endif %}{% endfor %}",
    ],
)
def test_a_template_that_does_not_open_the_assistants_turn_is_refused(template):
    message = refusal(byte_level(template))
    assert "ignores add_generation_prompt" in message and "assistant" in message


def test_a_template_that_draws_is_refused():
    drawing = CHATML.replace(CONTENT, "{{ ['Think.', 'Go.'] | random }} {{ m['content'] }}")
    message = refusal(byte_level(drawing))
    assert message.startswith("this model's chat template draws, so a resumed run would")
    message = refusal(byte_level(dropout=0.5), texts=["12 at 12 at 12 at 12 at 12 at 12 at 12 at 12 at"])
    assert message.startswith("this model's tokenizer draws, so a resumed run would")


def test_a_template_that_writes_the_date_writes_the_same_one_at_any_time():
    tokenizer, data = byte_level(LLAMA_3), DataConfig(train="x", chat_template=True)
    (text,) = prompt_texts(data, ["1+1?"], tokenizer)
    assert "Today Date: 26 Jul 2024\n" in text
    assert tokenizer.decode(encode_prompts(data, ["1+1?"], tokenizer)[0]) == text
    (warning,) = check(tokenizer)
    assert warning == "the chat template writes the date: it is 26 Jul 2024 in every prompt, whenever the run goes on"


@pytest.mark.parametrize("template", [None, LLAMA_3])
def test_an_appended_end_of_sequence_is_refused_where_it_is_in_the_prompt(template):
    tokenizer = byte_level(template, begin=True, end=True)
    if template:  # rendered chats are encoded as they are
        assert len(check(tokenizer)) == 1
    else:
        message = refusal(tokenizer)
        assert "ends the prompt with '</s>' instead of ''; set add_eos_token=false" in message
        assert message.startswith("rows.jsonl:1: ")


@pytest.mark.parametrize("token", ["<|im_end|>", "</s>", "<pad>"])
def test_a_prompt_that_ends_as_a_finished_turn_does_is_worth_a_warning(token):
    (warning,) = check(byte_level(CHATML.replace("assistant\n{% endif", f"assistant\n{token}{{% endif")))
    assert warning == f"prompts end with {token!r}, as a finished turn does; take it out of the chat template's end"
    if token == "</s>":
        (warning,) = check(byte_level(), prompt_template="{problem}</s>")
        assert warning.endswith("take it out of data.prompt_template")


def test_a_prompt_that_begins_twice_is_refused():
    twice = byte_level(begin=True)
    twice.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A", special_tokens=[("<s>", twice.bos_token_id)]
    )
    assert "begins with '<s>' twice; take it out of the post_processor in tokenizer.json" in refusal(twice)
    message = refusal(byte_level(begin=True), prompt_template="<s>{problem}")
    assert "begins with '<s>' twice; take it out of data.prompt_template" in message
    message = refusal(byte_level("{{ bos_token }}" + LLAMA_3))
    assert "begins with '<s>' twice; take it out of the chat template" in message


ODD = {
    "no decoder": (lambda: byte_level(decoder=False), "'TomĠhasĠ12"),
    "lower case": (lambda: byte_level(normalizer=normalizers.Lowercase()), "'tom has"),
    "no spaces": (lambda: byte_level(normalizer=normalizers.Replace(" ", "")), "'Tomhas12"),
    "no lines": (lambda: byte_level(normalizer=normalizers.Replace("\n", " ")), "rows.jsonl:1: "),
    "unknown digits": (lambda: word_level(["Tom", "has", "apples", ".", "How", "many", "are", "+", "?"]), "<unk>"),
}


@pytest.mark.parametrize("name", ODD)
def test_a_tokenizer_that_does_not_give_the_problem_back_is_refused_with_the_row_and_the_place(name):
    make, words = ODD[name]
    message = refusal(make(), [TEXTS[1]] if name == "no lines" else TEXTS)
    assert "this model's tokenizer changes the prompt: " in message and words in message
    assert "tokenizer_config.json" in message


def test_one_row_in_many_is_found_by_its_characters_and_worth_a_warning():
    texts = [f"{i} + {i}?" for i in range(2000)]
    texts[1234] += " é"
    tokenizer = byte_level(normalizer=normalizers.Replace("é", "e"))
    (warning,) = check(tokenizer, texts)
    assert warning.startswith("rows.jsonl:1235: this model's tokenizer changes the prompt: '234 + 1234? e' for ")
    assert warning.endswith(f" (1 of {len(sample_rows(problems(texts)))} rows looked at)")
    assert len(sample_rows(problems(texts))) < 60


def test_composed_characters_are_the_same_text_and_rewritten_ones_a_warning():
    decomposed = ["Wie weit la\u0308uft er? x\u00b2"]
    assert check(byte_level(normalizer=normalizers.NFC()), decomposed) == []
    (warning,) = check(byte_level(normalizer=normalizers.NFKC()), decomposed)
    assert warning.startswith("rows.jsonl:1: this model's tokenizer changes the prompt: ") and "x\u00b2" in warning


def test_different_problems_that_become_the_same_prompt_are_refused():
    template = "2 or 3?{% if add_generation_prompt %} {% endif %}"
    message = refusal(byte_level(template), ["2", "3"])
    assert message.startswith("rows.jsonl:1 and rows.jsonl:2 are different problems, but become the same prompt")


def test_different_problems_of_unknown_words_are_refused_as_few_as_they_are():
    known = ["what", "is", "plus", "1", "2", "3", "4", "5", "6", "7", "8", "?"]
    texts = [f"what is {i} plus {j} ?" for i in range(1, 9) for j in range(1, 9)]
    (warning,) = check(word_level(known), [*texts, "nine"])
    assert warning.startswith("rows.jsonl:65: this model's tokenizer changes the prompt: ")
    message = refusal(word_level(known), [*texts, "nine", "ten"])
    assert message == "rows.jsonl:65 and rows.jsonl:66 are different problems, but become the same prompt"


def test_tokens_beyond_the_embedding_and_prompts_of_no_tokens_are_refused_by_row():
    message = refusal(byte_level(), vocabulary=100)
    assert message.startswith("rows.jsonl:1 has token ") and "but the model has 100 embeddings" in message
    silent = byte_level(normalizer=normalizers.Replace("?", ""))
    assert refusal(silent, ["1+1", "?"]).startswith("rows.jsonl:2 has no tokens")


def test_control_tokens_in_a_problem_are_worth_a_warning():
    texts = ["1 <s>old</s> apples", "</s>", "What does </i> mean?"]
    (warning,) = check(byte_level(), texts)
    assert warning == "2 problems contain control tokens of this model, e.g. rows.jsonl:1 '<s>'"
    (warning,) = check(byte_level(CHATML), ["a <|im_end|> b"])
    assert "e.g. rows.jsonl:1 '<|im_end|>'" in warning


def test_a_response_of_sft_that_is_not_given_back_is_refused():
    rows = [Problem("rows.jsonl:1", "1", "It Is 5 ", "rows.jsonl")]
    check_responses(rows, byte_level())
    with pytest.raises(UserError, match="rows.jsonl:1: this model's tokenizer changes the response: 'it is 5"):
        check_responses(rows, byte_level(normalizer=normalizers.Lowercase()))

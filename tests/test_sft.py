import json

from odd_tokenizers import THINKING, byte_level

from megarl.config.sections import Config, DataConfig, ModelConfig, ScheduleConfig
from megarl.sft import load_demonstrations


def test_a_response_goes_on_behind_what_the_prompt_has_opened(tmp_path):
    said = {"role": "assistant", "content": "<think>two</think> <answer>2</answer>"}
    row = {"messages": [{"role": "user", "content": "1+1?"}, said]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    keys = {"prompt_key": "messages", "answer_key": "messages", "chat_template": True}
    config = Config(
        model=ModelConfig(path="x"),
        data=DataConfig(train=str(tmp_path / "rows.jsonl"), **keys),
        schedule=ScheduleConfig(prompts_per_step=1),
    )
    tokenizer = byte_level(THINKING)
    demonstrations, responses, dropped = load_demonstrations(config, tokenizer)
    (prompt,) = demonstrations.prompts
    whole = tokenizer.decode([*prompt.token_ids, *responses[prompt.id]])
    assert whole == (
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\ntwo</think> <answer>2</answer></s>"
    )
    assert dropped == 0

import json
import random

from odd_tokenizers import THINKING, byte_level

from megarl.config.sections import Config, DataConfig, ModelConfig, RolloutConfig, ScheduleConfig
from megarl.data.prompts import stable_hash
from megarl.sft import Demonstrations


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
    demonstrations = Demonstrations(config, tokenizer)
    ((prompt, response),) = demonstrations.at_step(0)
    whole = tokenizer.decode([*prompt, *response])
    assert whole == (
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\ntwo</think> <answer>2</answer></s>"
    )
    assert str(demonstrations) == "1 demonstrations, 0 over the token limits dropped"


def test_what_is_over_a_limit_is_dropped_and_the_rest_comes_in_the_same_order(tmp_path):
    rows = [{"question": "1" * (i % 7 + 1), "answer": "x" * (i % 11 + 1)} for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(
        model=ModelConfig(path="x"),
        data=DataConfig(train=str(tmp_path / "rows.jsonl"), max_prompt_tokens=5),
        rollout=RolloutConfig(max_response_tokens=9),
        schedule=ScheduleConfig(prompts_per_step=20),
    )
    tokenizer = byte_level()
    demonstrations = Demonstrations(config, tokenizer)
    fitting = [row for row in rows if len(row["question"]) <= 5 and len(row["answer"]) + 1 <= 9]
    assert str(demonstrations) == f"{len(fitting)} demonstrations, {200 - len(fitting)} over the token limits dropped"
    order = list(range(len(fitting)))
    random.Random(stable_hash(config.run.seed, "prompt order", 0)).shuffle(order)
    told = [tuple(map(tokenizer.decode, pair)) for pair in demonstrations.at_step(1)]
    assert told == [(fitting[i]["question"], fitting[i]["answer"] + "</s>") for i in order[20:40]]

"""Mistakes of the user's: refused before anything is started or written, in lines that say what would be right."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from megarl.cli import main
from megarl.config import dump_config, load_config
from megarl.files import locked
from megarl.preflight import check_run
from megarl.types import UserError

CONFIG = """\
run: {{dir: {folder}/run}}
model: {{path: {folder}/model}}
data: {{train: {folder}/rows.jsonl, max_prompt_tokens: 16}}
schedule: {{prompts_per_step: 2, samples_per_prompt: 2}}
rollout: {{max_response_tokens: 24}}
"""


@pytest.fixture
def project(qwen2, tmp_path):
    """A folder with a model, data and a configuration that there is nothing wrong with."""
    shutil.copytree(qwen2, tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"question": "1+2=", "answer": "3"}\n' * 3)
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def holds_a_run(folder):
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1}\n')


def edit_model_config(folder, name="config.json", **fields):
    path = folder / "model" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# name -> (what goes wrong in the project's folder, overrides, the key or row, what would be legal)
MISTAKES = {
    "unknown key": (None, ["run.step=3"], "run.step is not a known key", "did you mean steps?"),
    "tensor parallel size": (
        None,
        ["learner.tensor_model_parallel_size=4"],
        "learner.tensor_model_parallel_size=4 does not divide this model's 4 query heads, 2 key-value heads",
        "it allows 1 or 2",
    ),
    "malformed row": (
        lambda folder: (folder / "rows.jsonl").open("a").write('{"question": "2+2="}\n'),
        [],
        "rows.jsonl:4 has no column 'answer' (data.answer_key)",
        "it has: question",
    ),
    "precision": (None, ["model.precision=fp8"], "model.precision=fp8 needs", "use fp32 or bf16"),
    "truncated weights": (
        lambda folder: truncate(folder / "model" / "model.safetensors"),
        [],
        "model.safetensors is not a readable safetensors file",
        "",
    ),
    "run folder in use": (holds_a_run, [], "already holds a run", "name another folder, or go on with --resume"),
    "pipeline parallel size": (
        None,
        ["learner.pipeline_model_parallel_size=3"],
        "learner.pipeline_model_parallel_size=3 does not divide this model's 4 layers",
        "it allows 1, 2 or 4",
    ),
    "no model folder": (
        lambda folder: shutil.rmtree(folder / "model"),
        [],
        "model.path=",
        "expected a Hugging Face model folder",
    ),
    "no config.json": (
        lambda folder: (folder / "model" / "config.json").unlink(),
        [],
        "has no config.json",
        "expected a Hugging Face model folder",
    ),
    "no tokenizer": (
        lambda folder: (folder / "model" / "tokenizer.json").unlink(),
        [],
        "has no tokenizer",
        "save one with the model",
    ),
    "another model type": (
        lambda folder: edit_model_config(folder, model_type="gpt2"),
        [],
        "model_type 'gpt2' is not supported",
        "supported: llama, qwen2",
    ),
    "tokenizer without an end": (
        lambda folder: edit_model_config(folder, "tokenizer_config.json", eos_token=None),
        [],
        "the tokenizer has no end-of-sequence token",
        "set eos_token in tokenizer_config.json",
    ),
    "tokenizer larger than the embedding": (
        lambda folder: edit_model_config(
            folder, "tokenizer_config.json", extra_special_tokens=[f"<{i}>" for i in range(20)]
        ),
        [],
        "the tokenizer needs 52 rows (its last token is '<19>'), the model's embedding has 51 (vocab_size)",
        "resize the embedding",
    ),
    "end of a response": (
        lambda folder: edit_model_config(folder, "generation_config.json", eos_token_id=[1, 4]),
        [],
        "eos_token_id=4 of generation_config.json is '1', an ordinary token",
        "set it to 1 (<eos>)",
    ),
    "quantised model": (
        lambda folder: edit_model_config(folder, quantization_config={"quant_method": "gptq"}),
        [],
        "quantization_config=",
        "only null",
    ),
    "code of the model's own": (
        lambda folder: edit_model_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Mine"}),
        [],
        "auto_map asks for code of the model's own",
        "never run",
    ),
    "rotary part": (
        lambda folder: edit_model_config(folder, partial_rotary_factor=0.5),
        [],
        "partial_rotary_factor",
        "",
    ),
    "run folder around the model": (
        lambda folder: (folder / "model").rename(folder / "hf"),
        ["model.path={folder}/hf", "run.dir={folder}"],
        "run.dir={folder} already holds",
        "name another folder",
    ),
    "model and weights disagree": (
        lambda folder: edit_model_config(folder, vocab_size=60),
        [],
        "lm_head.weight has shape [51, ",
        "config.json implies [60, ",
    ),
    "empty data file": (lambda folder: (folder / "rows.jsonl").write_text(""), [], "rows.jsonl has no rows", ""),
    "no data file": (
        lambda folder: (folder / "rows.jsonl").unlink(),
        [],
        "rows.jsonl does not exist",
        "expected a .jsonl file, a hub data set, or arithmetic",
    ),
    "no evaluation data": (None, ["data.eval=gone.jsonl"], "data.eval=gone.jsonl does not exist", "expected"),
    "fewer rows than a step": (
        None,
        ["schedule.prompts_per_step=4"],
        "schedule.prompts_per_step=4 is more than the 3 rows",
        "use at most that",
    ),
    "one sample": (
        None,
        ["schedule.samples_per_prompt=1", "recipe=grpo"],
        "schedule.samples_per_prompt=1 gives recipe grpo nothing to compare",
        "use at least 2",
    ),
    "world size": (
        None,
        ["learner.world_size=3", "learner.tensor_model_parallel_size=2"],
        "learner.world_size=3 is not a multiple",
        "use 2 or 4 ranks",
    ),
    "positions": (
        None,
        ["data.max_prompt_tokens=500"],
        "data.max_prompt_tokens + max_response_tokens (of rollout or eval) = 524 is more than this "
        "model's 512 positions",
        "lower one of them",
    ),
    "problems that the tokenizer can't write": (
        lambda folder: (folder / "rows.jsonl").write_text('{"question": "1 and 2?", "answer": "3"}\n' * 3),
        [],
        "rows.jsonl:1: this model's tokenizer changes the prompt",
        "not those that the model was trained with",
    ),
    "a prompt that isn't the problem": (
        lambda folder: (folder / "model" / "chat_template.jinja").write_text("{{ 1 + 2 }}="),
        ["data.chat_template=true"],
        "rows.jsonl:1: this model's chat template changes or drops the problem",
        "use data.chat_template=false",
    ),
    "a reward that can't be won": (None, ["reward.name=format"], "reward.name=format can't be won", "change data."),
    "run folder below a file": (
        None,
        ["run.dir={folder}/config.yaml/run"],
        "config.yaml is a file",
        "name a folder",
    ),
}
IN_A_PROCESS = [
    "unknown key",
    "tensor parallel size",
    "malformed row",
    "precision",
    "truncated weights",
    "run folder in use",
]


def prepare(project, name):
    """Makes the mistake; (overrides, what the folder holds, words that the message must have)."""
    spoil, overrides, *words = MISTAKES[name]
    if spoil:
        spoil(project)
    overrides, words = ([text.format(folder=project) for text in texts] for texts in (overrides, words))
    return overrides, snapshot(project), words


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}


def test_a_file_that_is_no_part_of_the_model_is_named(project, capsys):
    shutil.copy(project / "model/model.safetensors", project / "model/old.safetensors")
    check_run(load_config(project / "config.yaml"), "train", resume=False)
    assert capsys.readouterr().err.endswith("not part of the model, not read: old.safetensors\n")


def test_the_project_is_fine_without_a_mistake(project):
    before = snapshot(project)
    check_run(load_config(project / "config.yaml"), "train", resume=False)
    assert snapshot(project) == before


@pytest.mark.parametrize("name", [name for name in MISTAKES if name not in IN_A_PROCESS])
def test_a_mistake_is_refused_before_anything_is_written(project, name):
    overrides, before, words = prepare(project, name)
    with pytest.raises(UserError) as caught:
        check_run(load_config(project / "config.yaml", overrides), "train", resume=False)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message
    assert snapshot(project) == before


def megarl(project, *arguments, **launcher):
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= launcher
    command = [sys.executable, "-m", "megarl.cli", *arguments]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.processes
@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_the_command_ends_with_status_2_and_one_line_that_says_why(project, name):
    if name == "precision" and torch.cuda.is_available():
        pytest.skip("this GPU may well compute in fp8")
    overrides, before, words = prepare(project, name)
    done = megarl(project, "train", "config.yaml", *overrides)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("megarl: error: ") and all(word in line for word in words)
    assert done.stdout == ""
    assert snapshot(project) == before


@pytest.mark.processes
@pytest.mark.parametrize(
    "launcher", [{}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}]
)
def test_two_runs_in_one_folder_are_refused_however_they_are_started(project, launcher):
    with locked(project / "run", "run.dir", "megarl sft"):
        done = megarl(project, "train", "config.yaml", **launcher)
    assert done.returncode == 2, done.stderr
    assert f"megarl: error: run.dir={project}/run: megarl sft is running there; wait for it" in done.stderr
    assert "Traceback" not in done.stderr and not (project / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("command", ["train", "sft", "eval", "study"])
def test_only_the_config_is_required(command, capsys):
    with pytest.raises(SystemExit):
        main([command])
    assert capsys.readouterr().err.endswith("the following arguments are required: config\n")


@pytest.mark.parametrize(
    ("precision", "has_products", "warns"), [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)]
)
def test_a_precision_that_this_cpu_hardly_computes_in_is_warned_of(
    project, monkeypatch, capsys, precision, has_products, warns
):
    monkeypatch.setattr("megarl.preflight.has_bf16_products", lambda: has_products)
    check_run(load_config(project / "config.yaml", [f"model.precision={precision}"]), "train", resume=False)
    assert ("this CPU has no bf16 products" in capsys.readouterr().err) == (warns and not torch.cuda.is_available())


def test_a_run_that_is_there_can_be_resumed(project):
    holds_a_run(project)
    config = load_config(project / "config.yaml")
    (project / "run/config.yaml").write_text(dump_config(config))
    check_run(config, "train", resume=True)
    longer = load_config(project / "config.yaml", ["run.steps=1000", "learner.micro_batch_tokens=9999"])
    check_run(longer, "train", resume=True)


@pytest.mark.parametrize("change", ["optim.lr=9.0", "recipe.clip_high=0.5", "run.seed=7", "rollout.temperature=0.5"])
def test_a_resumed_run_keeps_what_its_numbers_depend_on(project, change):
    holds_a_run(project)
    (project / "run/config.yaml").write_text(dump_config(load_config(project / "config.yaml")))
    with pytest.raises(UserError, match=change.partition("=")[0]):
        check_run(load_config(project / "config.yaml", [change]), "train", resume=True)


def test_demonstrations_need_no_evaluation_data(project):
    check_run(load_config(project / "config.yaml", ["data.eval=gone.jsonl"]), "sft", resume=False)

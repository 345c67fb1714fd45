import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.processes

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
HERE = Path(__file__).parent
LAYOUTS = ("TP=2", "PP=2", "TP=2 PP=2")


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(part) for part in (sys.executable, TOOL, *arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def tensors_of(hf_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(hf_folder / "model.safetensors")


def same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(
        actual[name].dtype == expected[name].dtype and torch.equal(actual[name], expected[name]) for name in expected
    )


def with_tensors(hf_folder: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A copy of a Hugging Face folder that holds these tensors."""
    shutil.copytree(hf_folder, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def with_config(checkpoint: Path, target: Path, **changes: object) -> Path:
    """A copy of a Megatron checkpoint whose hf/config.json says something else."""
    shutil.copytree(checkpoint, target)
    path = target / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


@pytest.fixture(scope="module")
def odd_llama(llama, tmp_path_factory):
    """The tied Llama model with a vocabulary of 51, which two tensor-parallel ranks have to pad."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("odd") / "llama"
    shutil.copytree(llama, folder)
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.resize_token_embeddings(51, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def megatron(qwen2, tmp_path_factory):
    """A folder with the Megatron checkpoint qwen2, and what the command that wrote it printed."""
    folder = tmp_path_factory.mktemp("megatron")
    done = run_tool("to-megatron", qwen2, folder / "qwen2")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def mistakes(megatron, qwen2, tmp_path_factory):
    """(command, source) -> why it is refused."""
    (checkpoints, _), folder, tensors = megatron, tmp_path_factory.mktemp("mistakes"), tensors_of(qwen2)
    missing = {name: tensor for name, tensor in tensors.items() if name != "model.layers.2.mlp.up_proj.weight"}
    mixed = tensors | {"model.norm.weight": tensors["model.norm.weight"].half()}
    unread = with_config(
        checkpoints / "qwen2", folder / "unread", model_type="llama", architectures=["LlamaForCausalLM"]
    )
    narrow = with_config(checkpoints / "qwen2", folder / "narrow", intermediate_size=64)
    truncated = with_config(checkpoints / "qwen2", folder / "truncated")
    for shard in truncated.glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:1000])
    bare = with_config(checkpoints / "qwen2", folder / "bare")
    shutil.rmtree(bare / "hf")
    quantised = with_tensors(qwen2, folder / "quantised", tensors)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    empty = folder / "empty"
    empty.mkdir()
    return {
        ("to-megatron", with_tensors(qwen2, folder / "missing", missing)): "lacks: model.layers.2.mlp.up_proj.weight",
        ("to-megatron", with_tensors(qwen2, folder / "mixed", mixed)): "holds float16, float32; choose what to write",
        ("to-megatron", quantised): 'quantization_config={"bits": 4} is not supported',
        ("to-megatron", folder / "nowhere"): "nowhere is not a folder",
        ("to-megatron", empty): "empty has no config.json",
        ("to-hf", folder / "nowhere"): "nowhere is not a folder",
        ("to-hf", empty): "empty holds neither a Megatron checkpoint",
        ("to-hf", bare): "bare/hf is not a folder",
        ("to-hf", unread): "unread has unknown tensors: decoder.layers.self_attention.linear_qkv.bias",
        ("to-hf", narrow): "narrow can't be loaded: Global shape mismatch",
        ("to-hf", truncated): "truncated can't be loaded: ",
    }


@pytest.fixture(scope="module")
def said(megatron, mistakes, qwen2, odd_llama):
    """What was said of each conversion; one process makes them all, for most of a conversion's time is its start."""
    folder, _ = megatron
    hf = folder / "hf"
    jobs = {
        "llama": ("to-megatron", odd_llama, folder / "llama", None),
        "bf16": ("to-megatron", qwen2, folder / "bf16", "bf16"),
        "qwen2 back": ("to-hf", folder / "qwen2", hf / "qwen2", None),
        "llama back": ("to-hf", folder / "llama", hf / "llama", None),
        "bf16 back": ("to-hf", folder / "bf16", hf / "bf16", None),
        "rounded": ("to-hf", folder / "qwen2", hf / "rounded", "bf16"),
        "occupied": ("to-hf", folder / "qwen2", qwen2, None),
        **{f"{command} {source}": (command, source, folder / "mistake", None) for command, source in mistakes},
    }
    (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
    command = [sys.executable, HERE / "conversions.py", folder / "jobs.json", folder / "said.json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "said.json").read_text())


@pytest.fixture(scope="module")
def hf(said, megatron):
    """The folder of what was converted back."""
    return megatron[0] / "hf"


@pytest.fixture(scope="module")
def loaded(megatron, said, odd_llama, run_ranks, tmp_path_factory):
    """What four ranks read under every layout, and the folder of a run that they saved at TP=2 PP=2."""
    folder = tmp_path_factory.mktemp("loaded")
    checkpoints = [megatron[0] / name for name in ("qwen2", "llama")]
    run_ranks(HERE / "checkpoint_ranks.py", 4, folder / "results.pt", folder / "run", odd_llama, *checkpoints)
    return torch.load(folder / "results.pt", weights_only=True), folder / "run"


def test_a_round_trip_is_bitwise_equal(hf, said, megatron, qwen2, odd_llama):
    assert same_tensors(tensors_of(hf / "qwen2"), tensors_of(qwen2))
    assert same_tensors(tensors_of(hf / "llama"), tensors_of(odd_llama))
    parameters = sum(tensor.numel() for tensor in tensors_of(qwen2).values())
    for line in (megatron[1], said["qwen2 back"]):
        assert f": {len(tensors_of(qwen2))} Hugging Face tensors, {parameters:,} parameters in fp32, " in line


def test_dtype_rounds_either_way_and_stays_as_stored(hf, qwen2):
    rounded = {name: tensor.bfloat16() for name, tensor in tensors_of(qwen2).items()}
    for name in ("bf16", "rounded"):
        assert same_tensors(tensors_of(hf / name), rounded)
        assert json.loads((hf / name / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_exported_folder_has_the_logits_and_the_tokenizer_of_the_original(hf, qwen2, odd_llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for exported, original in ((hf / "qwen2", qwen2), (hf / "llama", odd_llama)):
        folders = (exported, original)
        tokens = [
            AutoTokenizer.from_pretrained(folder)(["12+7="], return_tensors="pt")["input_ids"] for folder in folders
        ]
        with torch.no_grad():
            logits = [AutoModelForCausalLM.from_pretrained(folder)(tokens[1]).logits for folder in folders]
        assert torch.equal(*tokens)
        assert torch.equal(*logits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_converted_checkpoint_loads_under_any_layout(loaded, qwen2, odd_llama, layout):
    results, _ = loaded
    assert same_tensors(results["qwen2", layout], tensors_of(qwen2))
    assert same_tensors(results["llama", layout], tensors_of(odd_llama))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_that_one_stage_misses_is_refused_on_all_ranks(loaded, layout):
    refusals = loaded[0]["refusals", layout]
    assert len(refusals) == 4
    assert all(refusal.endswith("lacks: output_layer.weight") for refusal in refusals), refusals


def test_a_run_folder_converts_from_its_latest_checkpoint(loaded, odd_llama, tmp_path):
    _, run_folder = loaded
    done = run_tool("to-hf", run_folder, tmp_path / "exported")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert same_tensors(tensors_of(tmp_path / "exported"), tensors_of(odd_llama))


def test_a_mistake_is_one_line_and_leaves_nothing_behind(qwen2, tmp_path):
    tensors = tensors_of(qwen2)
    source = with_tensors(qwen2, tmp_path / "source", tensors | {"model.extra.weight": torch.ones(1)})
    (tmp_path / "out").mkdir()
    done = run_tool("to-megatron", source, tmp_path / "out" / "checkpoint")
    assert done.returncode == 2
    assert done.stderr == f"convert_checkpoint: error: {source} has unknown tensors: model.extra.weight\n"
    assert list((tmp_path / "out").iterdir()) == []


def test_what_does_not_convert_is_refused_by_name(said, mistakes, megatron, qwen2):
    for (command, source), why in mistakes.items():
        answer = said[f"{command} {source}"]
        assert answer.startswith("refused: ") and why in answer, (command, source, answer)
        assert len(answer.splitlines()) == 1, answer
    assert said["occupied"] == f"refused: {qwen2} exists and is not an empty folder; name another"
    assert not (megatron[0] / "mistake").exists()

"""What a Hugging Face folder is taken for, and which ones are refused with which words."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen2Config

from megarl.models.family import Architecture, architecture, read_hf_config, rotary_inv_freq
from megarl.models.hugging_face import HuggingFaceFiles
from megarl.types import UserError


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def folder(qwen2, tmp_path):
    """A copy of the tiny untied Qwen2 model, to be spoilt."""
    return shutil.copytree(qwen2, tmp_path / "model")


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def check_names(folder):
    HuggingFaceFiles(folder).check_names(architecture(read_hf_config(folder)), folder)


def test_an_architecture_is_read_from_the_models_own_configuration():
    fields = {
        "num_hidden_layers": 6,
        "hidden_size": 96,
        "intermediate_size": 200,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 77,
        "max_position_embeddings": 300,
        "rms_norm_eps": 1e-5,
    }
    arch = Architecture(
        num_layers=6,
        hidden_size=96,
        ffn_hidden_size=200,
        num_attention_heads=8,
        num_query_groups=4,
        head_dim=12,
        vocab_size=77,
        max_position_embeddings=300,
        norm_eps=1e-5,
        qkv_bias=True,
        tied_embeddings=False,
    )
    assert architecture(Qwen2Config(**fields, tie_word_embeddings=False)) == arch
    llama = replace(arch, qkv_bias=False, tied_embeddings=True)
    assert architecture(LlamaConfig(**fields, tie_word_embeddings=True)) == llama


def test_the_head_size_may_differ_from_hidden_size_over_heads():
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, head_dim=16)
    assert architecture(config).head_dim == 16


@pytest.mark.parametrize(
    ("tp", "pp", "key", "allowed"),
    [
        (3, 1, "learner.tensor_model_parallel_size=3", "it allows 1 or 2"),
        (4, 1, "learner.tensor_model_parallel_size=4", "it allows 1 or 2"),
        (2, 5, "learner.pipeline_model_parallel_size=5", "it allows 1, 2, 3, 4, 6 or 12"),
        (1, 24, "learner.pipeline_model_parallel_size=24", "it allows 1, 2, 3, 4, 6 or 12"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused_with_those_that_do(tp, pp, key, allowed):
    arch = architecture(Qwen2Config(num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2))
    message = refusal(arch.check_layout, tp, pp)
    assert message.startswith(key) and message.endswith(allowed)


def test_the_mlp_limits_the_layout_too():
    arch = architecture(LlamaConfig(num_attention_heads=4, num_key_value_heads=4, intermediate_size=66))
    message = refusal(arch.check_layout, 4, 1)
    assert "66 MLP features" in message and message.endswith("it allows 1 or 2")


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 12), (2, 6), (2, 4)])
def test_a_layout_that_divides_the_model_is_accepted(tp, pp):
    architecture(Qwen2Config(num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2)).check_layout(tp, pp)


def test_a_single_key_value_head_allows_no_tensor_parallelism():
    arch = architecture(LlamaConfig(num_attention_heads=4, num_key_value_heads=1))
    assert refusal(arch.check_layout, 2, 1).endswith("it allows 1")


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (LlamaConfig(mlp_bias=True), "mlp_bias"),
        (LlamaConfig(attention_bias=True), "attention_bias"),
        (LlamaConfig(hidden_act="gelu"), "hidden_act"),
        (Qwen2Config(use_sliding_window=True, sliding_window=16), "use_sliding_window"),
        (LlamaConfig(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), "rope_type"),
    ],
)
def test_what_a_family_cannot_represent_is_refused_by_name(config, key):
    message = refusal(architecture, config)
    assert message.startswith("config.json") and key in message and config.model_type in message


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3"])
def test_other_families_are_refused_with_the_supported_ones(folder, model_type):
    change_config(folder, model_type=model_type)
    message = refusal(lambda: architecture(read_hf_config(folder)))
    assert f"'{model_type}'" in message and message.endswith("supported: llama, qwen2")


def test_rotary_frequencies_are_powers_of_theta_and_follow_the_scaling():
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    plain = rotary_inv_freq(config)
    assert torch.allclose(plain, 1e4 ** (-torch.arange(0, 8, 2) / 8))
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    assert torch.allclose(rotary_inv_freq(config), plain / 4)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "is not a folder"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not usable"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json is not usable"),
        (lambda folder: change_config(folder, model_type="no_such_model"), "no_such_model"),
        (lambda folder: change_config(folder, hidden_size="wide"), "'hidden_size' expected int"),
        (lambda folder: change_config(folder, num_hidden_layers=3), "`num_hidden_layers` (3)"),
    ],
)
def test_a_folder_without_a_usable_configuration_is_refused(folder, spoil, words):
    spoil(folder)
    message = refusal(read_hf_config, folder)
    assert message.startswith(f"model.path={folder}") and words in message


def test_a_complete_folder_is_accepted(qwen2, llama):
    check_names(qwen2)
    check_names(llama)


def test_missing_tensors_are_named(folder):
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    assert refusal(check_names, folder) == f"model.path={folder} lacks: model.layers.2.mlp.up_proj.weight"


def test_an_untied_model_needs_its_output_layer(folder):
    change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert refusal(check_names, folder).endswith("lacks: lm_head.weight")


def test_tensors_that_no_layer_would_read_are_named(folder):
    def quantise(tensors):
        for layer in range(4):
            tensors[f"model.layers.{layer}.mlp.up_proj.scales"] = torch.ones(2)

    change_tensors(folder, quantise)
    message = refusal(check_names, folder)
    assert "has unknown tensors: model.layers.0.mlp.up_proj.scales, " in message and message.endswith("and 1 more")


def test_leftovers_that_hold_no_weights_are_ignored(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # tied: the same once more

    change_tensors(folder, add)
    check_names(folder)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"vocab_size": 40}, "lm_head.weight"),
        ({"vocab_size": 60}, "lm_head.weight"),
        ({"intermediate_size": 66}, "model.layers.0.mlp.down_proj.weight"),
        ({"num_key_value_heads": 4}, "model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_tensors_of_another_shape_than_configured_are_named(folder, fields, name):
    change_config(folder, **fields)
    message = refusal(check_names, folder)
    assert f"{name} has shape [" in message and "config.json implies [" in message


def test_a_truncated_weight_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(check_names, folder).startswith(f"{path} is not a readable safetensors file")


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert refusal(check_names, folder) == f"model.path={folder} has no *.safetensors file"

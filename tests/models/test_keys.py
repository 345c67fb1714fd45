"""The keys of config.json: those of well-known models are understood, and none is ignored that changes the function."""

import json

import pytest

from megarl.models.family import architecture, read_hf_config
from megarl.types import UserError

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
    **SIZES,
}
QWEN2 = {
    **LLAMA,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "bos_token_id": 3,
    "eos_token_id": 4,
    "max_position_embeddings": 4096,
    "max_window_layers": 21,
    "rope_theta": 1000000.0,
    "sliding_window": 4096,
    "use_sliding_window": False,
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
    "rope_type": "llama3",
}
LLAMA31 = {
    **LLAMA,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rope_scaling": LLAMA3_ROPE,
    "rope_theta": 500000.0,
}
# The keys of published models, with the sizes of a small one.
UNDERSTOOD = {
    "Llama 2": {**LLAMA, "bos_token_id": 1, "eos_token_id": 2, "pretraining_tp": 1, "rope_scaling": None},
    "Llama 2 chat": {**LLAMA, "_name_or_path": "x", "max_length": 4096, "pad_token_id": 0, "temperature": 0.9},
    "Vicuna": {**LLAMA, "max_sequence_length": 2048, "pad_token_id": 0},
    "Llama 3": {**LLAMA, "attention_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1, "rope_theta": 5e5},
    "Llama 3.1": LLAMA31,
    "Llama 3.2": {**LLAMA31, "head_dim": 16, "tie_word_embeddings": True},
    "DeepSeek-R1-Distill-Llama": {**LLAMA31, "eos_token_id": 4},
    "TinyLlama": {**LLAMA, "attention_bias": False, "bos_token_id": 1, "pretraining_tp": 1, "rope_scaling": None},
    "DeepSeek-Coder": {**LLAMA, "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000},
    "SmolLM2": {
        **LLAMA,
        "attention_bias": False,
        "is_llama_config": True,
        "mlp_bias": False,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    },
    "SmolLM2 of a GGUF file": {**LLAMA, "_model_name_or_path": "x", "unk_token_id": 0, "head_dim": 16},
    "Qwen2": QWEN2,
    "Qwen2.5-Math": {**QWEN2, "use_mrope": False, "rope_theta": 10000, "tie_word_embeddings": True},
    "DeepSeek-R1-Distill-Qwen": {**QWEN2, "use_mrope": False, "rope_theta": 10000, "pad_token_id": 5},
    "an unsloth export": {**QWEN2, "unsloth_fixed": True, "unsloth_version": "2025.2.1", "pad_token_id": 5},
    "transformers 5": {
        **{key: value for key, value in QWEN2.items() if key not in ("torch_dtype", "rope_theta")},
        "dtype": "float32",
        "layer_types": ["full_attention"] * 2,
        "pad_token_id": None,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "sliding_window": None,
    },
    "every default, written by transformers 4": {
        **LLAMA,
        "add_cross_attention": False,
        "bad_words_ids": None,
        "chunk_size_feed_forward": 0,
        "do_sample": False,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "is_decoder": False,
        "is_encoder_decoder": False,
        "label2id": {"LABEL_0": 0, "LABEL_1": 1},
        "output_attentions": False,
        "problem_type": None,
        "pruned_heads": {},
        "return_dict": True,
        "top_k": 50,
        "torchscript": False,
    },
    "keys that say the usual": {**LLAMA, "partial_rotary_factor": 1.0, "quantization_config": None, "mlp_bias": False},
}
# name -> (the file, the key that the refusal names)
REFUSED = {
    "rotary part": ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    "quantisation": (
        {**QWEN2, "quantization_config": {"quant_method": "awq", "bits": 4}},
        'quantization_config={"quant_method": "awq", "bits": 4}',
    ),
    "sequence classification": ({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    "a reward model": ({**QWEN2, "architectures": ["Qwen2ForRewardModel"]}, "architectures"),
    "a base model": ({**LLAMA, "architectures": ["LlamaModel"]}, "architectures"),
    "another family's head": ({**LLAMA, "architectures": ["MistralForCausalLM"]}, "architectures"),
    "two heads": ({**LLAMA, "architectures": ["LlamaForCausalLM", "X"]}, "architectures"),
    "no head": ({key: value for key, value in LLAMA.items() if key != "architectures"}, "architectures"),
    "labels": ({**LLAMA, "id2label": {"0": "bad", "1": "good"}}, "id2label"),
    "code of its own": ({**QWEN2, "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, "auto_map"),
    "a family of its own": ({**LLAMA, "model_type": "mine", "auto_map": {"AutoConfig": "m.Config"}}, "auto_map"),
    "weights elsewhere": ({**LLAMA, "transformers_weights": "other.safetensors"}, "transformers_weights"),
    "scaled logits": ({**LLAMA, "logit_scale": 0.5}, "logit_scale=0.5"),
    "encoder": ({**LLAMA, "is_causal": False}, "is_causal=false"),
    "whatever comes": ({**QWEN2, "gated_attention": None}, "gated_attention=null"),
    "attention over chunks": (
        {**QWEN2, "dual_chunk_attention_config": {"chunk_size": 1}},
        "dual_chunk_attention_config",
    ),
    "biased attention": ({**LLAMA, "attention_bias": True}, "attention_bias=true"),
    "unbiased attention": ({**QWEN2, "attention_bias": False}, "attention_bias=false"),
    "biased MLP": ({**QWEN2, "mlp_bias": True}, "mlp_bias=true"),
    "dropout": ({**LLAMA, "attention_dropout": 0.1}, "attention_dropout=0.1"),
    "window": ({**QWEN2, "use_sliding_window": True}, "use_sliding_window=true"),
    "window of a Llama": ({**LLAMA, "sliding_window": 64}, "sliding_window=64"),
    "windows by layer": (
        {**QWEN2, "layer_types": ["full_attention", "sliding_attention"]},
        'layer_types=["full_attention", "sliding_attention"]',
    ),
    "interleaved rotation": ({**LLAMA, "rope_interleaved": True}, "rope_interleaved=true"),
    "images": ({**QWEN2, "use_mrope": True}, "use_mrope=true"),
    "activation": ({**LLAMA, "hidden_act": "gelu"}, 'hidden_act="gelu"'),
    "heads": ({**LLAMA, "num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
    "head of its own size": ({**QWEN2, "head_dim": 32}, "head_dim=32"),
    "yarn": (
        {**QWEN2, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}},
        'rope_type="yarn"',
    ),
    "dynamic": ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope_type="dynamic"'),
    "longrope": (
        {
            **LLAMA,
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 1024,
            },
        },
        'rope_type="longrope"',
    ),
    "sections": ({**QWEN2, "rope_scaling": {"type": "default", "mrope_section": [2, 3, 3]}}, "mrope_section"),
    "rotary part, nested": (
        {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5",
    ),
    "rotation by layer": (
        {**LLAMA, "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        "full_attention",
    ),
    "theta": ({**LLAMA, "rope_theta": -1.0}, "rope_theta=-1.0"),
    "two thetas": (
        {**LLAMA, "rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "rope_theta=500000.0 and rope_parameters (10000.0) differ",
    ),
    "two scalings": (
        {
            **LLAMA,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        "rope_scaling",
    ),
    "no layers": ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers=0 is not a number above 0"),
    "heads below zero": ({**LLAMA, "num_attention_heads": -4}, "num_attention_heads=-4 is not a number above 0"),
    "a head below zero": ({**LLAMA, "head_dim": -16}, "head_dim=-16 is not a number above 0"),
    "no number": ({**QWEN2, "rms_norm_eps": float("nan")}, "rms_norm_eps=NaN is not a number above 0"),
    "a list of types": ({**LLAMA, "rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, 'rope_type=["linear"]'),
    "two types": ({**LLAMA, "rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}}, "rope_type"),
}


def read(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return architecture(read_hf_config(folder))


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_the_keys_of_published_models_are_understood(name, tmp_path):
    config = UNDERSTOOD[name]
    arch = read(tmp_path, config)
    assert arch.tied_embeddings == config["tie_word_embeddings"]
    assert arch.qkv_bias == (config["model_type"] == "qwen2")


@pytest.mark.parametrize("name", REFUSED)
def test_a_key_that_would_be_ignored_is_refused_by_name(name, tmp_path):
    config, words = REFUSED[name]
    with pytest.raises(UserError) as caught:
        read(tmp_path, config)
    message = str(caught.value)
    assert words in message and "config.json" in message and "\n" not in message


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_what_transformers_writes_of_a_model_is_understood(family, request, tmp_path):
    from transformers import AutoConfig

    folder = request.getfixturevalue(family)
    config = AutoConfig.from_pretrained(folder)
    read(tmp_path, json.loads(config.to_json_string(use_diff=True)))
    read(tmp_path, json.loads(config.to_json_string(use_diff=False)))

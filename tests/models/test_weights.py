"""The weight table: names and shapes against transformers, cuts against their meaning, and back."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from megarl.models.family import Architecture, architecture
from megarl.models.weights import Layout, hf_names, hf_shape, join, manifest, split, weight_table

QWEN2 = Architecture(
    num_layers=3,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=6,  # heads x head_dim differs from the hidden size
    vocab_size=50,
    max_position_embeddings=64,
    norm_eps=1e-6,
    qkv_bias=True,
    tied_embeddings=False,
)
LLAMA = replace(QWEN2, num_attention_heads=6, num_query_groups=2, vocab_size=51, qkv_bias=False, tied_embeddings=True)
MULTI_HEAD = replace(QWEN2, num_query_groups=8)
LAYOUTS = [
    (QWEN2, 1),
    (QWEN2, 2),
    (QWEN2, 4),
    (LLAMA, 1),
    (LLAMA, 2),
    (MULTI_HEAD, 1),
    (MULTI_HEAD, 2),
    (MULTI_HEAD, 4),
]


def tensors_of(weight, arch):
    """The HF tensors of a row of the table; no two elements are equal."""
    made, start = [], 0
    for name in weight.hf:
        shape = torch.Size(hf_shape(name, arch))
        made.append(torch.arange(start, start + shape.numel(), dtype=torch.float32).view(shape))
        start += shape.numel()
    return made


@pytest.mark.parametrize(("arch", "tp"), LAYOUTS)
def test_every_weight_survives_the_way_to_megatron_and_back(arch, tp):
    arch.check_layout(tp, 1)
    for weight in weight_table(arch):
        originals = tensors_of(weight, arch)
        shards = split(weight.layout, originals, arch, tp)
        assert len(shards) == tp
        assert len({shard.shape for shard in shards}) == 1, weight.megatron
        restored = join(weight.layout, shards, arch)
        assert len(restored) == len(weight.hf)
        for name, original, tensor in zip(weight.hf, originals, restored, strict=True):
            assert torch.equal(original, tensor), name


def row_of(layout, arch):
    return next(weight for weight in weight_table(arch) if weight.layout is layout)


@pytest.mark.parametrize(("arch", "tp"), LAYOUTS)
def test_a_rank_holds_the_queries_keys_and_values_of_its_own_groups(arch, tp):
    row = row_of(Layout.QKV, arch)
    assert [name.split(".")[-2] for name in row.hf] == ["q_proj", "k_proj", "v_proj"]
    q, k, v = originals = tensors_of(row, arch)
    heads, d = arch.num_attention_heads // arch.num_query_groups, arch.head_dim
    for rank, shard in enumerate(split(Layout.QKV, originals, arch, tp)):
        groups = arch.num_query_groups // tp
        expected = []
        for g in range(rank * groups, (rank + 1) * groups):
            expected += [q[g * heads * d : (g + 1) * heads * d], k[g * d : (g + 1) * d], v[g * d : (g + 1) * d]]
        assert torch.equal(shard, torch.cat(expected))


@pytest.mark.parametrize(("arch", "tp"), LAYOUTS)
def test_a_rank_holds_its_part_of_gate_before_its_part_of_up(arch, tp):
    row = row_of(Layout.GATE_UP, arch)
    assert [name.split(".")[-2] for name in row.hf] == ["gate_proj", "up_proj"]
    gate, up = originals = tensors_of(row, arch)
    width = arch.ffn_hidden_size // tp
    for rank, shard in enumerate(split(Layout.GATE_UP, originals, arch, tp)):
        mine = slice(rank * width, (rank + 1) * width)
        assert torch.equal(shard[:width], gate[mine])
        assert torch.equal(shard[width:], up[mine])


@pytest.mark.parametrize(("arch", "tp"), LAYOUTS)
def test_row_parallel_parts_of_a_product_add_up(arch, tp):
    (matrix,) = tensors_of(row_of(Layout.ROW, arch), arch)
    features = torch.arange(matrix.size(1)).double() - 3
    parts = zip(split(Layout.ROW, [matrix], arch, tp), features.chunk(tp), strict=True)
    assert torch.equal(sum(shard.double() @ x for shard, x in parts), matrix.double() @ features)


@pytest.mark.parametrize("tp", [1, 2, 4, 7])
def test_the_vocabulary_is_padded_with_zeros_at_its_end_alone(tp):
    (embedding,) = tensors_of(row_of(Layout.VOCAB, LLAMA), LLAMA)
    shards = split(Layout.VOCAB, [embedding + 1], LLAMA, tp)
    rows = LLAMA.padded_vocab_size(tp) // tp
    assert rows * tp - tp < LLAMA.vocab_size <= rows * tp
    assert [shard.size(0) for shard in shards] == [rows] * tp
    whole = torch.cat(shards)
    assert torch.equal(whole[: LLAMA.vocab_size], embedding + 1)
    assert (whole[LLAMA.vocab_size :] == 0).all()


def meta_state(family, **fields):
    """(architecture, name -> shape) of a transformers model that is never allocated."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
    }
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    config = config_class(**shape | fields)
    with torch.device("meta"):
        state = model_class(config).state_dict()
    return architecture(config), {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("family", "fields"),
    [("llama", {}), ("llama", {"head_dim": 16}), ("qwen2", {}), ("qwen2", {"num_key_value_heads": 4})],
)
def test_names_and_shapes_are_those_of_transformers(family, fields, tied):
    arch, state = meta_state(family, tie_word_embeddings=tied, **fields)
    assert arch.tied_embeddings == tied
    if tied:
        del state["lm_head.weight"]
    assert {name: hf_shape(name, arch) for name in hf_names(arch)} == state


@pytest.mark.parametrize("arch", [QWEN2, LLAMA])
def test_the_manifest_names_what_is_sent_and_what_stands_in_for_what_is_not(arch):
    made = manifest(arch)
    assert made.shapes == {name: hf_shape(name, arch) for name in hf_names(arch)}
    assert made.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if arch.tied_embeddings else {})


@pytest.mark.parametrize("arch", [QWEN2, LLAMA])
@pytest.mark.parametrize("fused_norms", [False, True])
def test_the_table_names_every_parameter_once(arch, fused_norms):
    table = weight_table(arch, fused_norms)
    names = [weight.megatron for weight in table]
    assert len(names) == len(set(names)) == 3 + arch.num_layers * (7 if arch.qkv_bias else 6)
    assert not any("{" in name for weight in table for name in (weight.megatron, *weight.hf))
    sources = [name for weight in table for name in weight.hf]
    repeated = {name for name in sources if sources.count(name) > 1}
    assert repeated == ({"model.embed_tokens.weight"} if arch.tied_embeddings else set())


def test_transformer_engines_norms_are_only_named_differently():
    plain, fused = weight_table(LLAMA), weight_table(LLAMA, fused_norms=True)
    renamed = {a.megatron: b.megatron for a, b in zip(plain, fused, strict=True) if a != b}
    for layer in range(LLAMA.num_layers):
        prefix = f"decoder.layers.{layer}."
        assert renamed.pop(prefix + "input_layernorm.weight") == prefix + "self_attention.linear_qkv.layer_norm_weight"
        assert renamed.pop(prefix + "pre_mlp_layernorm.weight") == prefix + "mlp.linear_fc1.layer_norm_weight"
    assert not renamed
    assert [(w.hf, w.layout) for w in plain] == [(w.hf, w.layout) for w in fused]

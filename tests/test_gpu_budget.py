"""The arithmetic of what fits a GPU, against sums done by hand and against what a learner really holds."""

import json
from types import SimpleNamespace

import pytest
import torch

from megarl.algorithms.recipes import RECIPES
from megarl.config import parse_config
from megarl.gpu_budget import Budget, budget, check_budget
from megarl.memory import GIB
from megarl.models.family import architecture, read_hf_config
from megarl.preflight import check_gpu_memory
from megarl.types import UserError


def config_of(recipe="grpo", **sections):
    names = {"model": {"path": "model", "precision": "bf16"}, "data": {"train": "arithmetic"}, "recipe": recipe}
    return parse_config(names | sections)


@pytest.fixture
def qwen2_1_5b(tmp_path):
    """The architecture of Qwen2.5-1.5B, by its published configuration."""
    values = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    return architecture(read_hf_config(tmp_path))


def test_each_part_is_what_a_calculation_by_hand_gives(qwen2_1_5b):
    billions = 1_543_714_304 / GIB  # parameters, of its model card 1.54B
    one = budget(config_of("raft"), qwen2_1_5b, ranks=1, gpus=1, total=80)
    assert (one.weights, one.gradients, one.moments) == pytest.approx([2 * billions, 4 * billions, 12 * billions])
    assert (one.engine, one.engine_weights, one.engines) == pytest.approx((32, 2 * billions, 1))
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    eight = budget(
        config_of("ppo", learner=layout, rollout={"engines": 12, "tensor_parallel_size": 2}), qwen2_1_5b, 8, 8, 80
    )
    frozen = RECIPES["ppo"].needs_reference
    assert eight.weights == pytest.approx(2 * billions / 4 * (2 + frozen))
    assert eight.gradients == pytest.approx(4 * billions / 4 * 2)
    assert eight.moments == pytest.approx(12 * billions / 4 * 2 / 2)
    assert eight.engines == 3 and eight.engine_weights == pytest.approx(billions)


OF = Budget(total=80, weights=8, gradients=16, moments=20, engine=32, engine_weights=8, engines=1)


@pytest.mark.parametrize(
    ("settings", "changes", "refusal"),
    [
        ({}, {}, None),
        ({}, {"moments": 30}, r"0.4 for 1 engine\(s\) takes 32.0 GiB of a GPU of 80.0 beside the learner's 54.0"),
        ({}, {"moments": 30}, "lower it, or use learner.offload=all"),
        ({"learner": {"offload": "optimizer"}}, {"moments": 30}, None),
        ({"learner": {"offload": "optimizer"}}, {"engine": 62, "weights": 20}, "learner's 20.0"),
        ({"learner": {"offload": "all"}}, {"engine": 62, "weights": 20}, None),
        ({}, {"moments": 50}, r"moments \(50.0\) and the weights of 1 engine\(s\) \(8.0\) don't fit a GPU of 80.0 GiB"),
        ({"learner": {"offload": "all"}}, {"moments": 50}, "don't fit a GPU"),
        ({}, {"engine_weights": 40}, "gives an engine 32.0 GiB of a GPU, but its weights alone take 40.0"),
        ({"schedule": {"max_staleness": 1}}, {"moments": 30}, "or use more ranks to spread"),
    ],
)
def test_what_can_not_fit_is_refused_with_the_sum(settings, changes, refusal):
    config, of = config_of("raft", **settings), Budget(**vars(OF) | changes)
    if refusal is None:
        check_budget(config, of)
    else:
        with pytest.raises(UserError, match=refusal):
            check_budget(config, of)


@pytest.mark.parametrize(
    ("environment", "engines", "mib", "fits"),
    [
        ({}, 1, 400, False),  # the processes alone take more
        ({}, 1, 4000, True),
        ({}, 3, 4000, False),  # at 0.4 of it each
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}, 3, 8000, True),  # two nodes: two on the fullest
        ({"RANK": "0", "WORLD_SIZE": "1"}, 3, 8000, False),
        ({"RANK": "0", "WORLD_SIZE": "2"}, 3, 8000, True),  # who knows on how many nodes
    ],
)
def test_a_run_is_checked_against_the_gpus_that_it_finds(monkeypatch, qwen2, environment, engines, mib, fits):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(total_memory=mib << 20))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = config_of(model={"path": str(qwen2), "precision": "bf16"}, rollout={"engines": engines})
    check_gpu_memory(config, "sft")
    if fits:
        check_gpu_memory(config, "train")
    else:
        with pytest.raises(UserError, match="GPU of"):
            check_gpu_memory(config, "train")

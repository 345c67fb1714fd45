"""Weights that change inside a real engine are found, by name; the run ends or goes on with new ones, as it is told."""

import sys
from pathlib import Path

import numpy as np
import pytest

from megarl.config import parse_config
from megarl.data import arithmetic
from megarl.data.prompts import load_splits
from megarl.models.family import architecture, read_hf_config
from megarl.models.hugging_face import HuggingFaceFiles
from megarl.models.weights import manifest
from megarl.rollout.messages import Request, Sampling
from megarl.rollout.source import RolloutSource
from megarl.rollout.transfer import DamagedWeights

pytestmark = pytest.mark.processes

WORKER = Path(__file__).with_name("damaging_worker.py")


class Alone:
    """The only rank."""

    rank, device = 0, None

    def broadcast(self, value):
        return value

    def gather(self, value):
        return [value]


class Log:
    def __init__(self, folder):
        self.folder, self.said, self.times = folder, [], {}
        self.say, self.add_time = self.said.append, self.times.__setitem__


@pytest.fixture(scope="module", params=[("qwen2", "bf16"), ("llama", "fp32")], ids="-".join)  # llama: tied embeddings
def served(request):
    return request.param


@pytest.fixture(scope="module")
def precision(served):
    return served[1]


@pytest.fixture(scope="module")
def model(served, request):
    return request.getfixturevalue(served[0])


@pytest.fixture(scope="module")
def weights(model):
    arch = architecture(read_hf_config(str(model)))
    return lambda size, keepers: iter([HuggingFaceFiles(str(model)).tensors(arch)])


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return Log(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def source(model, precision, log):
    config = parse_config(
        {
            "model": {"path": str(model), "precision": precision},
            "data": {"train": "arithmetic", "max_prompt_tokens": 16},
            "learner": {},
            "schedule": {"prompts_per_step": 2},
            "rollout": {"max_response_tokens": 8, "verify_every": 1},
        }
    )
    names, problems = manifest(architecture(read_hf_config(str(model)))), load_splits(config.data, "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megarl.rollout.engine.python_command", lambda module, fd: [sys.executable, str(WORKER), fd])
        with RolloutSource(config, Alone(), problems, arithmetic.tokenizer(), names, log) as source:
            source.sampler.pool.wait_ready()
            yield source


def damage(source, name):
    pool = source.sampler.pool
    pool._tell(pool._receivers(), {"damage": name}, "damage")


def answers(source):
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=8)
    pool = source.sampler.pool
    return pool.run(pool.generate([Request([2 + i, 3], seed=i) for i in range(4)], sampling))


def damages(family):
    packed = "model.layers.1.self_attn.qkv_proj.weight", "model.layers.3.mlp.gate_up_proj.weight"
    plain = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
    return [*packed, *plain, *(["model.layers.2.self_attn.qkv_proj.bias"] if family == "qwen2" else [])]


def test_the_smallest_change_of_any_tensor_inside_the_engine_is_found_by_name(source, weights, model, log):
    source.update_weights(weights, 0)
    assert log.times["weights_verify"] > 0
    before = answers(source)
    for version, name in enumerate(damages(model.name), start=1):
        source.update_weights(weights, 2 * version - 1)  # undamaged
        damage(source, name)
        with pytest.raises(DamagedWeights, match=rf"rollout engine 0: .* tensors are not as they were sent: .*{name} "):
            source.update_weights(weights, 2 * version)
        source.update_weights(weights, 2 * version)
        pairs = zip(before, answers(source), strict=True)
        assert all(np.array_equal(a.logprobs, b.logprobs) for a, b in pairs), "it was not repaired"


def test_damaged_weights_are_replaced_where_the_config_says_so(source, weights, log):
    source.update_weights(weights, 100)
    damage(source, "model.norm.weight")
    config = source.config
    source.config = config.model_copy(
        update={"rollout": config.rollout.model_copy(update={"damaged_weights": "reload"})}
    )
    source.update_weights(weights, 101)
    assert "model.norm.weight" in log.said[-1] and "all weights are sent again" in log.said[-1]
    assert (answers(source)[0].weight_versions == 101).all()
    source.config = config


def test_refused_weights_are_sent_again_once(source, weights, log, in_transit):
    broken = []

    def lose_one(load):
        broken.append(load)
        return [] if len(broken) == 1 else [load]

    with in_transit(lose_one):
        source.update_weights(weights, 110)
    assert len(broken) > 1 and "incomplete weight update" in log.said[-1]
    assert (answers(source)[0].weight_versions == 110).all()


def test_what_no_update_writes_is_verified_too(source, weights):
    """Last: nothing repairs it."""
    source.update_weights(weights, 120)
    name = "model.layers.0.self_attn.rotary_emb.cos_sin_cache"
    damage(source, name)
    for _ in range(2):
        with pytest.raises(DamagedWeights, match=name):
            source.update_weights(weights, 121)

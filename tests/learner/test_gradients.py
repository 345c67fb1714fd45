"""The gradient of every weight against transformers' autograd: tied and untied, in float32 and in bfloat16."""

import pytest
import torch
from layout_ranks import config_for, gradients_of, make_batch
from transformers import AutoModelForCausalLM

from megarl.algorithms.loss import token_weights
from megarl.algorithms.recipes import RECIPES
from megarl.learner.learner import Learner
from megarl.learner.mesh import Mesh
from megarl.models.family import read_hf_config
from megarl.ops.linear import linear_logprob

LAYOUT = (1, 1, 200, True, "none")
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def mesh(qwen2):
    mesh = Mesh(config_for(str(qwen2), LAYOUT).learner)
    yield mesh
    mesh.close(last=False)


def by_transformers(folder, batch):
    """Gradients of -sum of advantage x log-prob x weight, by name."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    recipe = RECIPES["reinforce"]
    weights = token_weights(recipe, batch.mask, batch.sequence_of_token, batch.prompt_of_token, 40)
    scale = batch.advantages * weights * batch.mask
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        ids = batch.tokens[start:end].unsqueeze(0)
        log_p = (model(ids).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
        logprobs = log_p.gather(-1, ids[0, 1:, None])[:, 0]
        (-(logprobs * scale[start + 1 : end]).sum()).backward()
    return {name: param.grad for name, param in model.named_parameters()}


def test_logits_are_rounded_only_where_the_config_says_so(mesh, qwen2, monkeypatch):
    asked, found = [], []

    def recorded(*arguments, logits_dtype, **others):
        asked.append(logits_dtype)
        return linear_logprob(*arguments, logits_dtype=logits_dtype, **others)

    monkeypatch.setattr("megarl.learner.learner.linear_logprob", recorded)
    config = config_for(str(qwen2), LAYOUT)
    config = config.model_copy(update={"model": config.model.model_copy(update={"precision": "bf16"})})
    batch = make_batch(RECIPES["reinforce"])
    for changes in ({}, {"fp32_logits": False}):
        own = config.model_copy(update={"learner": config.learner.model_copy(update=changes)})
        learner = Learner(own, RECIPES["reinforce"], read_hf_config(qwen2), mesh, temperature=TEMPERATURE)
        logprobs, _ = learner.score(batch)
        assert (logprobs[batch.mask == 0] == 0).all()
        found.append(logprobs[batch.mask > 0])
    half = len(asked) // 2
    assert asked == [torch.float32] * half + [torch.bfloat16] * half
    assert 1e-4 < (found[0] - found[1]).abs().mean() < 0.05


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 2e-5), ("bf16", 0.05)])
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # tied, untied
def test_gradients_are_those_of_transformers(mesh, request, family, precision, bound):
    folder = request.getfixturevalue(family)
    config = config_for(str(folder), LAYOUT)
    config = config.model_copy(update={"model": config.model.model_copy(update={"precision": precision})})
    config = config.model_copy(update={"run": config.run.model_copy(update={"track_kl": False})})
    recipe = RECIPES["reinforce"]
    learner = Learner(config, recipe, read_hf_config(folder), mesh, temperature=TEMPERATURE, shard_optimizer=False)
    batch = make_batch(recipe)
    batch.tokens = batch.tokens.clamp(min=1)  # transformers gives the embedding of padding, 0, no gradient
    learner.backward(batch)
    found, expected = gradients_of(learner.policy, learner), by_transformers(folder, batch)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        assert (found[name] - gradient).norm() / gradient.norm() < bound, name

"""The gradient of every weight against transformers' autograd: tied and untied, in float32 and in bfloat16."""

import pytest
import torch
from dealing import learn, only_update, score
from layout_ranks import config_for, gradients_of, make_batch, unsettle
from transformers import AutoModelForCausalLM

from megarl.algorithms.loss import sequence_weights
from megarl.algorithms.recipes import RECIPES
from megarl.learner.learner import Learner
from megarl.learner.mesh import Mesh
from megarl.models.family import read_hf_config
from megarl.ops.linear import linear_logprob

LAYOUT = (1, 1, 200, True, "none", True)
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
    weights = sequence_weights(recipe, batch.response_tokens, batch.prompt_index, 40)
    scale = batch.advantages * weights[batch.sequence_of_token] * batch.mask
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
        logprobs, _ = score(learner, batch)
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
    learner.backward(only_update(learner, learner.deal(batch)))
    found, expected = gradients_of(learner.policy, learner), by_transformers(folder, batch)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        assert (found[name] - gradient).norm() / gradient.norm() < bound, name


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_padding_to_a_multiple_of_16_tokens_changes_no_gradient(mesh, qwen2, packing):
    """As fp8 needs it; in fp32, where a difference would show."""
    recipe, layout = RECIPES["ppo"], (1, 1, 200, packing, "none", packing)
    learner = Learner(config_for(str(qwen2), layout), recipe, read_hf_config(qwen2), mesh, shard_optimizer=False)
    assert learner.critic and learner.token_multiple == 1
    unsettle(learner.critic.module, mesh)
    found = []
    for learner.token_multiple in (1, 16):
        share = only_update(learner, learner.annotate(learner.deal(make_batch(recipe))))
        logprobs, entropy, loss = learner.backward(share)
        values = {"logprobs": logprobs, "entropy": entropy, "loss": torch.tensor(loss)}
        values["value loss"] = torch.tensor(learner.backward_critic(share))
        for kind, trainable in learner.trainables.items():
            values |= {f"{kind} {name}": grad for name, grad in gradients_of(trainable, learner).items()}
        found.append(values)
    for name, expected in found[0].items():
        assert expected.abs().max() > 0, name
        assert (found[1][name] - expected).abs().max() / expected.abs().max() < 2e-6, name


def test_the_critics_head_is_in_float32_among_bfloat16_layers(mesh, qwen2):
    config = config_for(str(qwen2), LAYOUT)
    for section, changes in {"model": {"precision": "bf16"}, "optim": {"eps": 1e-8}, "critic": {"lr": 1e-6}}.items():
        config = config.model_copy(update={section: getattr(config, section).model_copy(update=changes)})
    learner = Learner(config, RECIPES["ppo"], read_hf_config(qwen2), mesh)
    assert learner.critic
    head = learner.critic.module.output_layer.weight
    assert {param.dtype for param in learner.critic.module.decoder.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        head.fill_(1.0)  # beside which a step of 1e-6 is nothing in bfloat16
    learner.backward_critic(only_update(learner, learner.annotate(learner.deal(make_batch(RECIPES["ppo"])))))
    assert head.dtype == head.main_grad.dtype == torch.float32
    assert (head.main_grad != head.main_grad.bfloat16()).any()
    learn(learner, make_batch(RECIPES["ppo"]))
    assert 0 < (head - 1.0).abs().max() < 1e-5

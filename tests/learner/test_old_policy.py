"""Several updates on one step's samples: what the ratios, the pairs and the values are taken against."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from dealing import score
from layout_ranks import config_for, make_batch

from megarl.algorithms.recipe import Recipe
from megarl.algorithms.recipes import RECIPES
from megarl.learner.agreement import MismatchError, step_agreement
from megarl.learner.learner import Learner
from megarl.learner.mesh import Mesh
from megarl.metrics import update_metrics
from megarl.models.family import read_hf_config

LAYOUT = (1, 1, 2000, True, "none", True)
PROMPTS = 9


def config_of(model, recipe):
    """Two passes over three mini-batches, the last a part of one, at a rate that moves the policy."""
    config = config_for(str(model), LAYOUT)
    schedule = config.schedule.model_copy(update={"prompts_per_step": PROMPTS, "minibatch_prompts": 4, "epochs": 2})
    optim = config.optim.model_copy(update={"lr": 0.02, "eps": 1e-8})
    return config.model_copy(update={"recipe": recipe, "schedule": schedule, "optim": optim})


@pytest.fixture(scope="module")
def mesh(qwen2):
    mesh = Mesh(config_for(str(qwen2), LAYOUT).learner)
    yield mesh
    mesh.close(last=False)


def updates_of(model, mesh, recipe):
    """(log-probs before the step, mini-batch, update) of each update of a step."""
    config = config_of(model, recipe)
    learner = Learner(config, recipe, read_hf_config(model), mesh)
    batch = make_batch(recipe)
    deal = learner.annotate(learner.deal(batch))
    before, _ = learner.score(deal.whole())
    return before, deal.batch, [(share, learner.update(share, step=0)) for share in learner.updates(deal)]


def test_every_pair_is_compared_with_the_policy_that_began_the_step(qwen2, mesh):
    before, batch, made = updates_of(qwen2, mesh, RECIPES["iterative_dpo"])
    assert torch.equal(batch.old_logprobs, before)
    assert [len(share.batch) for share, _ in made] == [8, 8, 2] * 2
    for i, (share, update) in enumerate(made):
        part = share.batch
        moved = part.advantages.sign() * (update.logprobs - part.old_logprobs) * part.mask
        margins = torch.zeros(PROMPTS).index_add(0, part.prompt_of_token, moved)[part.prompt_index.unique()]
        logits = 0.1 * margins
        expected = -(0.9 * F.logsigmoid(logits) + 0.1 * F.logsigmoid(-logits)).mean()
        assert update.loss == pytest.approx(float(expected), abs=1e-5)
        assert i == 0 or margins.abs().max() > 0.1, "the policy didn't move, so any reference would do"


@pytest.mark.parametrize("name", ["reinforce", "gspo", "ppo", "kimi_k2"])
def test_every_ratio_is_taken_against_the_policy_that_began_the_step(qwen2, mesh, name):
    recipe = RECIPES[name]
    before, batch, made = updates_of(qwen2, mesh, recipe)
    assert torch.equal(batch.old_logprobs, before)
    drift = [float(((u.logprobs - s.batch.old_logprobs) * s.batch.mask).abs().max()) for s, u in made]
    assert drift[0] < 1e-5 and min(drift[1:]) > 1e-2
    if recipe.needs_critic:
        response = batch.advantages[batch.mask > 0]
        assert abs(response.mean()) < 1e-5 and response.std() == pytest.approx(1, abs=1e-4)
        # gamma = lambda = 1: every token's return is its response's reward
        assert batch.returns[batch.mask > 0].unique().tolist() == [0.0, 1.0]
        rewards = (batch.of_sequences(batch.returns) / batch.response_tokens)[batch.sequence_of_token]
        assert torch.allclose(batch.returns, rewards * batch.mask, atol=1e-6)


@pytest.mark.parametrize(
    "recipe",
    [RECIPES["dppo"], RECIPES["scale_rl"], Recipe.named("reinforce", old_policy="rollout")],
    ids=lambda recipe: recipe.name,
)
def test_a_ratio_against_the_rollout_uses_the_engines_log_probs(qwen2, mesh, recipe):
    _, batch, made = updates_of(qwen2, mesh, recipe)
    assert torch.equal(batch.old_logprobs, batch.rollout_logprobs)
    first, update = made[0][0].batch, made[0][1]
    response = first.mask > 0
    ratio = (update.logprobs - first.rollout_logprobs)[response].double().exp()
    assert ratio.mean() < 0.5, "engine and learner agree, so any anchor would do"
    assert update_metrics(recipe, made[:1])["ratio/mean"] == pytest.approx(float(ratio.mean()))


@pytest.mark.parametrize("off", [0.0, 0.01])
def test_such_a_step_still_compares_the_engine_with_the_policy_that_sampled(qwen2, mesh, off):
    recipe = RECIPES["dppo"]
    config = config_of(qwen2, recipe)
    learner = Learner(config, recipe, read_hf_config(qwen2), mesh)
    sampled = make_batch(recipe)
    sampled.rollout_logprobs = score(learner, sampled)[0] + off
    sampled.weight_versions = torch.zeros(len(sampled.tokens), dtype=torch.int32)
    deal = learner.deal(sampled)
    learned = learner.annotate(deal)
    made = [(share, learner.update(share, step=0)) for share in learner.updates(learned)]
    with pytest.raises(MismatchError) if off else nullcontext():
        assert step_agreement(config, mesh, 0, deal, learned, made)["mismatch/mean"] < 1e-5

"""A step whose samples were all filtered away: nothing to learn from, and nothing moves."""

import numpy as np
import pytest
import torch
from layout_ranks import config_for, make_batch, state_of

from megarl.algorithms.credit import credit_groups
from megarl.algorithms.recipe import Recipe
from megarl.algorithms.recipes import RECIPES
from megarl.batch import Credit, build_batch, minibatches
from megarl.learner.learner import Learner
from megarl.learner.mesh import Mesh
from megarl.models.family import read_hf_config
from megarl.types import Prompt, RewardStatus, Sample, SampleGroup

LAYOUT = (1, 1, 2000, True, "none")
PADDED = (1, 1, 2000, False, "none")
SAMPLES = 3


@pytest.fixture(scope="module")
def mesh(qwen2):
    mesh = Mesh(config_for(str(qwen2), LAYOUT).learner)
    yield mesh
    mesh.close(last=False)


def groups_of(*statuses):
    """A group for each status, all its samples with that status."""
    ids = np.array([5, 6, 7, 1], np.int32)
    return [
        SampleGroup(
            Prompt(f"prompt {i}", "", np.array([3, 4], np.int32), "", "test"),
            [
                Sample(j, ids, np.full(4, -1.0, np.float32), "", "stop", np.zeros(4, np.int32), status)
                for j in range(SAMPLES)
            ],
        )
        for i, status in enumerate(statuses)
    ]


def empty_batch():
    groups = groups_of(RewardStatus.CORRECT, RewardStatus.WRONG)
    count = SAMPLES * len(groups)
    return build_batch(groups, Credit(torch.zeros(count, dtype=torch.bool), torch.zeros(count), torch.zeros(count)))


def differences(before, after):
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.parametrize("minibatch_prompts, epochs", [(None, 1), (1, 1), (None, 3), (1, 3)])
def test_a_batch_without_samples_has_no_minibatches(minibatch_prompts, epochs):
    batch = empty_batch()
    assert len(batch) == 0 and len(batch.tokens) == len(batch.rollout_logprobs) == 0
    assert list(minibatches(batch, 2, minibatch_prompts, epochs)) == []


def test_reinforce_rej_leaves_nothing_of_groups_that_agree_or_have_no_verdict():
    recipe = RECIPES["reinforce_rej"]
    groups = groups_of(RewardStatus.CORRECT, RewardStatus.WRONG, RewardStatus.TIMEOUT, RewardStatus.ERROR)
    batch = build_batch(groups, credit_groups(recipe, groups))
    assert len(batch) == 0
    assert list(minibatches(batch, 4, 2, 1)) == []


@pytest.mark.parametrize("name", ["grpo", "ppo", "iterative_dpo"])
@pytest.mark.parametrize("layout", [LAYOUT, PADDED], ids=["packed", "padded"])
def test_an_empty_step_moves_neither_weights_nor_optimizer_state(qwen2, mesh, layout, name):
    learner = Learner(config_for(str(qwen2), layout), RECIPES[name], read_hf_config(qwen2), mesh)
    start = state_of(learner)
    learner.update(learner.annotate(make_batch(RECIPES[name])), step=0)
    before = state_of(learner)
    assert any(name.startswith("optimizer") for name in before)
    assert [name for name in start if name.startswith("weight") and not torch.equal(start[name], before[name])]

    batch = learner.annotate(empty_batch())
    updates = [learner.update(minibatch, step=1) for minibatch in minibatches(batch, 2, 1, 2)]
    assert updates == []
    assert differences(before, state_of(learner)) == []


@pytest.mark.parametrize("layout", [LAYOUT, PADDED], ids=["packed", "padded"])
def test_annotating_an_empty_batch_gives_empty_values(qwen2, mesh, layout):
    recipe = Recipe.named("ppo", mismatch="geo_reject", kl_coef=0.1)
    learner = Learner(config_for(str(qwen2), layout), recipe, read_hf_config(qwen2), mesh)
    batch = learner.annotate(empty_batch())
    for values in (batch.old_logprobs, batch.ref_logprobs, batch.values, batch.returns, batch.correction):
        assert values.shape == (0,)


def test_a_step_whose_every_response_is_rejected_for_mismatch_has_no_updates(qwen2, mesh):
    recipe = Recipe.named("reinforce", mismatch="seq_reject")
    learner = Learner(config_for(str(qwen2), LAYOUT), recipe, read_hf_config(qwen2), mesh)
    batch = make_batch(recipe)
    batch.rollout_logprobs = torch.full_like(batch.mask, -50.0)
    assert list(minibatches(learner.annotate(batch), 5, None, 1)) == []

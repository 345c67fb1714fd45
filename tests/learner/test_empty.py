"""A step whose samples were all filtered away: nothing to learn from, and nothing moves."""

import numpy as np
import pytest
import torch
from dealing import learn
from layout_ranks import config_for, make_batch, state_of

from megarl.algorithms.credit import credit_groups
from megarl.algorithms.recipe import Recipe
from megarl.algorithms.recipes import RECIPES
from megarl.batch import Credit, Kept
from megarl.data.plan import Rules, make_plan
from megarl.learner.learner import Learner
from megarl.learner.mesh import Mesh
from megarl.models.family import read_hf_config
from megarl.types import Prompt, RewardStatus, Sample, SampleGroup

LAYOUT = (1, 1, 2000, True, "none", True)
PADDED = (1, 1, 2000, False, "none", False)
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


def nothing():
    groups = groups_of(RewardStatus.CORRECT, RewardStatus.WRONG)
    count = SAMPLES * len(groups)
    return Kept(groups, Credit(torch.zeros(count, dtype=torch.bool), torch.zeros(count), torch.zeros(count)))


def differences(before, after):
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.parametrize("minibatch_prompts", [None, 1])
def test_a_step_without_samples_has_no_updates(minibatch_prompts):
    batch = nothing().select(torch.zeros(0, dtype=torch.int64)).batch()
    assert len(batch) == 0 and len(batch.tokens) == len(batch.rollout_logprobs) == 0
    assert make_plan(nothing(), Rules(2, 100, minibatch_prompts=minibatch_prompts)).updates == []


def test_reinforce_rej_leaves_nothing_of_groups_that_agree_or_have_no_verdict():
    recipe = RECIPES["reinforce_rej"]
    groups = groups_of(RewardStatus.CORRECT, RewardStatus.WRONG, RewardStatus.TIMEOUT, RewardStatus.ERROR)
    kept = Kept(groups, credit_groups(recipe, groups))
    assert len(kept.lengths) == 0
    assert make_plan(kept, Rules(1, 100, minibatch_prompts=2)).updates == []


@pytest.mark.parametrize("name", ["grpo", "ppo", "iterative_dpo"])
@pytest.mark.parametrize("layout", [LAYOUT, PADDED], ids=["packed", "padded"])
def test_an_empty_step_moves_neither_weights_nor_optimizer_state(qwen2, mesh, layout, name):
    learner = Learner(config_for(str(qwen2), layout), RECIPES[name], read_hf_config(qwen2), mesh)
    start = state_of(learner)
    learn(learner, make_batch(RECIPES[name]))
    before = state_of(learner)
    assert any(name.startswith("optimizer") for name in before)
    assert [name for name in start if name.startswith("weight") and not torch.equal(start[name], before[name])]

    assert learner.updates(learner.annotate(learner.deal(nothing()))) == []
    assert differences(before, state_of(learner)) == []


@pytest.mark.parametrize("layout", [LAYOUT, PADDED], ids=["packed", "padded"])
def test_annotating_an_empty_batch_gives_empty_values(qwen2, mesh, layout):
    recipe = Recipe.named("ppo", mismatch="geo_reject", kl_coef=0.1)
    learner = Learner(config_for(str(qwen2), layout), recipe, read_hf_config(qwen2), mesh)
    batch = learner.annotate(learner.deal(nothing())).batch
    for values in (batch.old_logprobs, batch.ref_logprobs, batch.values, batch.returns, batch.correction):
        assert values.shape == (0,)


def test_a_step_whose_every_response_is_rejected_for_mismatch_has_no_updates(qwen2, mesh):
    recipe = Recipe.named("reinforce", mismatch="seq_reject")
    learner = Learner(config_for(str(qwen2), LAYOUT), recipe, read_hf_config(qwen2), mesh)
    batch = make_batch(recipe)
    batch.rollout_logprobs = torch.full_like(batch.mask, -50.0)
    assert learner.updates(learner.annotate(learner.deal(batch))) == []

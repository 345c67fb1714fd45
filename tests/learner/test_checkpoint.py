import resource
from pathlib import Path

import dealing
import pytest
import torch
from layout_ranks import config_for, make_batch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer

from megarl.algorithms.recipes import RECIPES
from megarl.files import NotWritten
from megarl.learner.checkpoint import CheckpointStore
from megarl.learner.learner import Learner
from megarl.learner.mesh import Mesh
from megarl.models.family import read_hf_config
from megarl.types import UserError

pytestmark = pytest.mark.processes  # Megatron's checkpoint writer forks
RECIPE = RECIPES["reinforce"]
LAYOUT = (1, 1, 2000, True, "none", True)


@pytest.fixture(scope="module")
def mesh(qwen2):
    mesh = Mesh(config_for(str(qwen2), LAYOUT).learner)
    yield mesh
    mesh.close(last=False)


class FusedAdam(torch.optim.Optimizer):
    """Keeps its state as Transformer Engine's and Apex's do: moments by parameter, one `step` in each group."""

    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode, capturable=False):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                state = self.state[param]
                for (name, moment), beta in zip(state.items(), group["betas"], strict=True):
                    moment.lerp_(param.grad if name == "exp_avg" else param.grad**2, 1 - beta)
                mean, square = (
                    x / (1 - b ** group["step"]) for x, b in zip(state.values(), group["betas"], strict=True)
                )
                param.add_(mean / (square.sqrt() + group["eps"]), alpha=-group["lr"])


@pytest.fixture(params=["fp32 AdamW", "bf16 AdamW", "bf16 FusedAdam"])
def kind(request, monkeypatch):
    """The precision, and the class that Megatron takes: torch's, or what the packages for a GPU bring."""
    if "Fused" in request.param:
        for module in (megatron_optimizer, distrib_optimizer):
            monkeypatch.setattr(module, "Adam", FusedAdam)
        monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False)
        monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
        monkeypatch.setattr(distrib_optimizer, "USING_TE_OPTIMIZER", True)
    return request.param.split()


@pytest.mark.parametrize("recipe", [RECIPE, RECIPES["ppo"]], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("updates", [0, 3])
def test_a_restored_learner_takes_the_same_next_step(qwen2, mesh, tmp_path, updates, recipe, kind):
    precision, optimizer = kind
    config = config_for(str(qwen2), LAYOUT)
    config = config.model_copy(update={"model": config.model.model_copy(update={"precision": precision})})
    original, restored = (Learner(config, recipe, read_hf_config(qwen2), mesh) for _ in range(2))

    def learn(learner, step):
        return dealing.learn(learner, make_batch(recipe), step)

    for step in range(updates):
        learn(original, step)
    assert type(original.policy.optimizer.chained_optimizers[0].optimizer).__name__ == optimizer
    store = CheckpointStore(tmp_path, mesh, keep=2)
    store.save(updates, original.trainables, qwen2, {"note": "kept"})
    assert store.load(store.latest(), restored.trainables) == {"step": updates, "note": "kept"}
    assert (store.latest() / "critic").is_dir() == recipe.needs_critic
    for step in range(2):
        results = [learn(learner, step) for learner in (original, restored)]
        assert results[0].value_loss == results[1].value_loss
        assert results[0].loss == results[1].loss
    for name in original.trainables:
        weights, expected = (dict(x.trainables[name].module.named_parameters()) for x in (restored, original))
        assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_only_the_newest_checkpoints_stay_and_latest_names_the_last(qwen2, mesh, tmp_path):
    config = config_for(str(qwen2), LAYOUT)
    learner = Learner(config, RECIPE, read_hf_config(qwen2), mesh)
    store = CheckpointStore(tmp_path, mesh, keep=2)
    for step in (1, 2, 3):
        store.save(step, learner.trainables, qwen2, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step_000002", "step_000003"]
    assert store.latest() == tmp_path / "step_000003"


def test_a_damaged_checkpoint_is_refused_in_one_line(qwen2, mesh, tmp_path):
    config = config_for(str(qwen2), LAYOUT)
    learner = Learner(config, RECIPE, read_hf_config(qwen2), mesh)
    store = CheckpointStore(tmp_path, mesh, keep=2)
    path = store.save(1, learner.trainables, qwen2, {})
    for shard in path.glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(UserError, match="step_000001 can't be loaded") as refusal:
        store.load(path, learner.trainables)
    assert "\n" not in str(refusal.value)
    (path / "state.json").unlink()
    with pytest.raises(UserError, match="not a complete checkpoint"):
        store.latest()


def test_a_damaged_checkpoint_has_the_others_named_and_is_not_counted_among_those_that_stay(qwen2, mesh, tmp_path):
    learner = Learner(config_for(str(qwen2), LAYOUT), RECIPE, read_hf_config(qwen2), mesh)
    store = CheckpointStore(tmp_path, mesh, keep=2)
    one, two, three = (store.save(step, learner.trainables, qwen2, {}) for step in (1, 2, 3))
    assert not one.exists()
    for shard in three.glob("*.distcp"):
        shard.unlink()
    with pytest.raises(UserError, match=r"step_000003 can't be loaded.*LATEST \(step_000002\)$"):
        store.load(three, learner.trainables)
    (tmp_path / "LATEST").write_text(two.name)
    assert store.load(store.latest(), learner.trainables) == {"step": 2}
    (three / "state.json").unlink()
    (tmp_path / "LATEST").unlink()
    assert store.latest() == two
    four = store.save(4, learner.trainables, qwen2, {})
    assert [path.exists() for path in (two, three, four)] == [True] * 3 and store.latest() == four


def test_a_checkpoint_that_the_system_refuses_is_named_and_leaves_the_previous_one_in_force(qwen2, mesh, tmp_path):
    learner = Learner(config_for(str(qwen2), LAYOUT), RECIPE, read_hf_config(qwen2), mesh)
    store = CheckpointStore(tmp_path, mesh, keep=1)
    one = store.save(1, learner.trainables, qwen2, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(NotWritten, match="^.*step_000002.partial: File too large; raise the limit"):
            store.save(2, learner.trainables, qwen2, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.latest() == one
    assert store.save(2, learner.trainables, qwen2, {}) == store.latest()


def test_one_data_parallel_rank_gathers_the_optimizer_and_all_take_the_same_next_step(qwen2, tmp_path, run_ranks):
    run_ranks(Path(__file__).parent / "checkpoint_ranks.py", 2, tmp_path / "out.pt", qwen2, tmp_path / "checkpoints")
    results = torch.load(tmp_path / "out.pt", weights_only=False)
    assert results["gathered"] == [True, False]
    assert results["losses"][0] == results["losses"][1]
    assert results["different"] == [[], []]

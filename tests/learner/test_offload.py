"""Memory that is lent while engines generate: empty then, and bit for bit what it was afterwards."""

import pytest
import torch
from dealing import learn
from layout_ranks import config_for, make_batch

from megarl.algorithms.recipes import RECIPES
from megarl.learner.learner import Learner
from megarl.learner.mesh import Mesh
from megarl.learner.offload import Offload
from megarl.models.family import read_hf_config

LAYOUT = (1, 1, 200, True, "none", True)
PPO = RECIPES["ppo"]


@pytest.fixture(scope="module")
def mesh(qwen2):
    mesh = Mesh(config_for(str(qwen2), LAYOUT).learner)
    yield mesh
    mesh.close(last=False)


def learner_for(mesh, folder, offload, precision="fp32"):
    config = config_for(str(folder), LAYOUT)
    changes = {
        "learner": config.learner.model_copy(update={"offload": offload}),
        "model": config.model.model_copy(update={"precision": precision}),
    }
    return Learner(config.model_copy(update=changes), PPO, read_hf_config(folder), mesh)


def held(learner):
    """Bytes of all that a learner holds, by kind; what shares memory counts once."""
    trainables = list(learner.trainables.values())
    kinds = {
        "weights": [*learner.reference.parameters(), *(w for t in trainables for w in t.weights)],
        "gradients": [g for t in trainables for g in t.gradients],
        "moments": [s for t in trainables for s in t.optimizer_state],
    }
    storages = {kind: {id(t.untyped_storage()): t.untyped_storage() for t in of} for kind, of in kinds.items()}
    return {kind: sum(storage.nbytes() for storage in of.values()) for kind, of in storages.items()}


def test_a_storage_is_emptied_for_all_its_views_and_filled_again():
    base = torch.arange(10.0)
    view, gradient = base[3:7].view(2, 2), torch.ones(5)
    offload = Offload([base, view], [gradient, base])
    assert offload.size == 4 * 15
    with offload.lent():
        assert base.untyped_storage().nbytes() == gradient.untyped_storage().nbytes() == 0
        with offload.back():
            assert view.tolist() == [[3, 4], [5, 6]]
            view += 1
        assert base.untyped_storage().nbytes() == 0
    assert base.tolist() == [0, 1, 2, 4, 5, 6, 7, 7, 8, 9] and gradient.tolist() == [0] * 5
    with offload.back():
        assert view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("offload", "stay"), [("optimizer", {"weights"}), ("all", set())])
def test_a_learner_that_lends_its_memory_goes_on_as_one_that_does_not(mesh, qwen2, precision, offload, stay):
    ours, other = (learner_for(mesh, qwen2, what, precision) for what in (offload, "none"))
    for step in range(3):
        before = held(ours)
        with ours.at_rest(), other.at_rest():
            assert {kind for kind, size in held(ours).items() if size} == stay
            assert held(other) == before and min(before.values()) > 0
            weights = [dict(learner.hf_weights()) for learner in (ours, other)]
            assert {kind for kind, size in held(ours).items() if size} == stay
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
        updates = [learn(learner, make_batch(PPO), step) for learner in (ours, other)]
        assert torch.equal(updates[0].logprobs, updates[1].logprobs)
        assert updates[0].grad_norm == updates[1].grad_norm > 0
        assert updates[0].value_grad_norm == updates[1].value_grad_norm
    assert other.lent_bytes == 0
    assert ours.lent_bytes == sum(size for kind, size in held(ours).items() if kind not in stay)

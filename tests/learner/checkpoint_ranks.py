"""Rank program: a run on DP=2 is saved, restored into other learners and continued.

torchrun --nproc-per-node 2 checkpoint_ranks.py OUT MODEL FOLDER
"""

import sys
from pathlib import Path

import dealing
import torch
from layout_ranks import config_for, make_batch

from megarl.algorithms.recipes import RECIPES
from megarl.learner.checkpoint import METADATA, CheckpointStore
from megarl.learner.learner import Learner
from megarl.learner.mesh import Mesh
from megarl.models.family import read_hf_config


def main() -> None:
    out, model, folder = sys.argv[1:]
    config = config_for(model, (1, 1, 200, True, "none", True))
    config = config.model_copy(update={"model": config.model.model_copy(update={"precision": "bf16"})})
    mesh, recipe = Mesh(config.learner), RECIPES["ppo"]
    original, restored = (Learner(config, recipe, read_hf_config(model), mesh) for _ in range(2))

    def learn(learner: Learner, step: int) -> tuple[float, float | None]:
        update = dealing.learn(learner, make_batch(recipe), step)
        return update.loss, update.value_loss

    for step in range(3):
        learn(original, step)
    store = CheckpointStore(Path(folder), mesh, keep=2)
    store.load(store.save(3, original.trainables, model, {}), restored.trainables)
    losses = [[learn(learner, step) for step in range(2)] for learner in (original, restored)]
    weights = [
        {
            f"{kind} {name}": param
            for kind, part in x.trainables.items()
            for name, param in part.module.named_parameters()
        }
        for x in (original, restored)
    ]
    part = original.policy.optimizer.chained_optimizers[0]
    model_state = original.policy.module.sharded_state_dict(metadata=dict(METADATA))
    gathered = part.sharded_state_dict(model_state, metadata=dict(METADATA))["param_state"] is not None
    results = {
        "losses": losses,
        "different": mesh.gather([name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]),
        "gathered": mesh.gather(gathered),
    }
    if mesh.rank == 0:
        torch.save(results, out)
    mesh.close()


if __name__ == "__main__":
    main()

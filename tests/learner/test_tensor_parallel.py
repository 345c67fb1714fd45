"""Two tensor-parallel ranks and one: the same gradients. The quick look at what test_layouts proves."""

import json
from pathlib import Path

import pytest
import torch
from layout_ranks import LAYOUTS, TESTED, config_for, run_recipes

from megarl.learner.mesh import Mesh

PROGRAM = Path(__file__).parent / "layout_ranks.py"
RECIPES = ("grpo", "ppo", "gspo", "iterative_dpo")


@pytest.mark.launch
def test_gradients_of_two_tensor_parallel_ranks_are_those_of_one(run_ranks, qwen2, tmp_path):
    layout = LAYOUTS[1]["reference"]
    mesh = Mesh(config_for(str(qwen2), layout).learner)
    expected = run_recipes(str(qwen2), "reference", layout, [TESTED[name] for name in RECIPES], mesh)
    mesh.close(last=False)
    (tmp_path / "cases.json").write_text(json.dumps([["qwen2", "TP=2", name] for name in RECIPES]))
    run_ranks(PROGRAM, 2, tmp_path / "out.pt", tmp_path / "cases.json", qwen2)
    found = torch.load(tmp_path / "out.pt", weights_only=False)
    for name in RECIPES:
        one, two = (results["qwen2", where, name] for results, where in ((expected, "reference"), (found, "TP=2")))
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5, abs=1e-6)
        for tensor, gradient in one["gradients"].items():
            assert gradient.abs().max() > 0
            assert (two["gradients"][tensor] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), (name, tensor)

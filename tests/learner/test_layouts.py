"""Gradients, the optimizer's step and the step without samples, equal under every layout.

Pairwise: every two of recipe, model, tensor, pipeline and data parallel size, micro-batch size, packing and recompute
meet in some case; the whole grid is in the full suite.
"""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import torch
from layout_ranks import LAYOUTS, TESTED

PROGRAM = Path(__file__).parent / "layout_ranks.py"
TOLERANCE = 1e-5  # relative to the largest gradient of a tensor, fp32
MODELS = ("qwen2", "llama")
Case = tuple[str, str, str]  # model, layout, recipe


def pairwise(cases: list[Case]) -> list[Case]:
    """Few of the cases, in which every pair of values that meets in some case still does; greedy and balanced."""
    sizes = {name: (ranks, *layout) for ranks, layouts in LAYOUTS.items() for name, layout in layouts.items()}

    def pairs(case: Case) -> set:
        model, layout, recipe = case
        return set(combinations(enumerate((model, recipe, *sizes[layout])), 2))

    open_pairs, used, chosen = set().union(*map(pairs, cases)), Counter(), []
    while open_pairs:
        case = max(cases, key=lambda case: (len(pairs(case) & open_pairs), -used[case[:2]]))
        open_pairs -= pairs(case)
        used[case[:2]] += 1
        chosen.append(case)
    return chosen


CASES = [
    (model, layout, recipe)
    for model in MODELS
    for layouts in LAYOUTS.values()
    for layout in layouts
    for recipe in TESTED
    if layout != "reference"
]
PAIRWISE = set(pairwise(CASES))


@pytest.fixture(scope="module")
def results(request, run_ranks, qwen2, llama, tmp_path_factory):
    """Of the cases that this session runs, and of each one's reference."""
    parameters = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    asked = {tuple(spec.params.get(name) for name in ("model", "layout", "recipe")) for spec in parameters if spec}
    asked |= {(model, "reference", recipe) for model, _, recipe in asked}
    folder = tmp_path_factory.mktemp("layouts")
    (folder / "cases.json").write_text(json.dumps(sorted(asked, key=str)))
    merged = {}
    for ranks in LAYOUTS:
        out = folder / f"{ranks}.pt"
        run_ranks(PROGRAM, ranks, out, folder / "cases.json", qwen2, llama)
        merged |= torch.load(out, weights_only=False)
    return merged


pytestmark = pytest.mark.processes


@pytest.mark.parametrize(
    ("model", "layout", "recipe"),
    [pytest.param(*case, marks=() if case in PAIRWISE else pytest.mark.full) for case in CASES],
)
def test_gradients_do_not_depend_on_the_layout(results, model, layout, recipe):
    expected, actual = results[model, "reference", recipe], results[model, layout, recipe]
    assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
    assert actual["gradients"].keys() == expected["gradients"].keys()
    for name, reference in expected["gradients"].items():
        assert reference.abs().max() > 0, f"{name}: the reference gradient is zero, so equality would prove nothing"
        assert _relative(actual["gradients"][name], reference) <= TOLERANCE, name
    if recipe == "ppo":
        assert actual["value_loss"] == pytest.approx(expected["value_loss"], rel=1e-5)
        assert (actual["values"] - expected["values"]).abs().max() < 1e-5
        assert (actual["advantages"] - expected["advantages"]).abs().max() < 1e-5
        assert "value head" in expected["critic_gradients"]
        for name, reference in expected["critic_gradients"].items():
            assert reference.abs().max() > 0, name
            assert _relative(actual["critic_gradients"][name], reference) <= TOLERANCE, name
    assert (actual["logprobs"] - expected["logprobs"]).abs().max() < 1e-5
    assert (actual["entropy"] - expected["entropy"]).abs().max() < 1e-5


@pytest.mark.parametrize(("model", "layout"), sorted({case[:2] for case in CASES}))
def test_the_distributed_optimizer_moves_the_weights_alike(results, model, layout):
    expected, actual = results[model, "reference", "update"], results[model, layout, "update"]
    assert actual["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    for name, reference in expected["gradients"].items():
        assert _relative(actual["gradients"][name], reference) <= 1e-4, name  # the weights' own rounding


@pytest.mark.parametrize(("model", "layout"), sorted({case[:2] for case in CASES}))
def test_a_step_without_samples_moves_nothing_on_any_rank(results, model, layout):
    result = results[model, layout, "empty"]
    assert min(result["tensors"]) > 0
    assert [names for names in result["changed"] if names] == []


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())

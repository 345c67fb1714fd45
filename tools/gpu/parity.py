"""Log-probs, losses and gradients of the recipes: saved on the CPU in float32, compared with the device's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gpu.models import (
    SIZES,
    in_order,
    layers_of,
    make_batch,
    make_config,
    make_learner,
    only_update,
    random_model,
    score,
)
from gpu.report import Report
from megarl.algorithms.recipes import RECIPES
from megarl.batch import Batch
from megarl.learner.weights import WeightStream

MODELS = {"toy": True, "toy, tied": False}  # -> packing
DRY = ("reinforce", "grpo", "ppo", "iterative_dpo")


def reference(folder: Path, dry_run: bool) -> dict[Any, dict[str, Any]]:
    """(model, recipe) -> the batch and what the CPU computes of it in float32, from a process that sees no GPU."""
    file = folder / f"reference{'_dry' if dry_run else ''}.pt"
    if not file.exists():
        names = DRY if dry_run else [*RECIPES]
        command = [sys.executable, "-m", "gpu.parity", str(folder), str(file), *names]
        paths = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
        subprocess.run(command, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths})
    return torch.load(file, weights_only=False)


def compare(report: Report, precision: str, limits: tuple[float, float], multiple: int | None = None) -> None:
    """`limits` of the mean difference of log-probs, in nats, and of the gradient's, relative to its norm; of these the
    median over the recipes, and twice as much for any: a token may fall on the other side of a clip."""
    expected = reference(report.folder, report.dry_run)
    for model, packing in MODELS.items():
        what = f"{precision} {'packed' if packing else 'padded'}"
        with report.attempt(what):
            learner, critic = _learner(random_model(model, report.folder), precision, packing)
            learner.token_multiple = multiple or learner.token_multiple
            report.number(f"{what}: layers", layers_of(learner))
            found: dict[str, list[tuple[float, str]]] = {"log-prob": [], "gradient": []}
            for (of_model, name), of_cpu in expected.items():
                if of_model == model:
                    values = _compute(learner, critic, name, of_cpu["batch"])
                    found["log-prob"].append((_log_prob(of_cpu, values), name))
                    found["gradient"].append((_gradient(of_cpu["gradients"], values["gradients"]), name))
            for (quantity, values), limit in zip(found.items(), limits, strict=True):
                worst, name = max(values)
                median = sorted(values)[len(values) // 2][0]
                report.at_most(f"{what}: {quantity}, median of {len(values)} recipes", median, limit)
                report.at_most(f"{what}: {quantity}, largest ({name})", worst, 2 * limit)


def _learner(folder: Path, precision: str, packing: bool) -> tuple[Any, Any]:
    options = {"micro_batch_tokens": 512, "packing": packing, "share_prompts": "auto"}
    config = make_config(folder, precision, 16, 48, learner=options, run={"track_kl": True})
    learner = make_learner(config, "ppo", shard_optimizer=False)
    head = learner.critic.module.output_layer.weight
    with torch.no_grad():  # so that gradients reach the layers below it
        head.copy_(0.1 * torch.randn(head.shape, generator=torch.Generator().manual_seed(7)))
    return learner, learner.critic


def _compute(learner: Any, critic: Any, name: str, batch: Batch | None = None) -> dict[str, Any]:
    """Of the batch, or of one made for the recipe, whose old policy, reference and engine differ from the policy."""
    recipe = learner.recipe = RECIPES[name]
    learner.critic = critic if recipe.needs_critic else None
    if batch is None:
        pairs = recipe.objective == "dpo"
        lengths = [10 + 7 * i % 48 for i in range(32)]  # ragged
        batch = make_batch(lengths, 6, SIZES["toy"]["vocab_size"], group=2 if pairs else 4)
        if pairs:
            batch.advantages = torch.repeat_interleave(torch.tensor([1.0, -1.0]).repeat(16), batch.lengths)
        elif recipe.needs_critic:
            batch.advantages = (batch.advantages > 0).float()  # rewards

        def noise(seed: int, scale: float) -> torch.Tensor:
            return scale * torch.randn(len(batch.tokens), generator=torch.Generator().manual_seed(seed))

        scores = score(learner, batch)
        batch.rollout_logprobs = scores + noise(0, 0.1) * batch.mask
        deal = learner.annotate(learner.deal(batch))
        batch = deal.batch.select(deal.plan.numbers(0).argsort())
        batch.old_logprobs, batch.ref_logprobs = scores + noise(1, 0.3), scores + noise(2, 0.3)
    share = only_update(learner, batch)
    logprobs, entropy, loss = learner.backward(share)
    gradients = _gradients(learner, learner.policy, "policy")
    if learner.critic:
        learner.backward_critic(share)
        gradients |= _gradients(learner, critic, "critic")
    logprobs = in_order(learner.deal(batch), logprobs)
    return {"batch": batch, "logprobs": logprobs, "loss": loss, "gradients": gradients}


def _gradients(learner: Any, trainable: Any, kind: str) -> dict[str, torch.Tensor]:
    stream = WeightStream(trainable.module, learner.arch, learner.mesh, value=lambda param: param.main_grad)
    return {f"{kind} {name}": tensor.float().cpu().clone() for name, tensor in stream.tensors()}


def _log_prob(expected: dict[str, Any], found: dict[str, Any]) -> float:
    response = expected["batch"].mask > 0
    return float((expected["logprobs"] - found["logprobs"])[response].abs().mean())


def _gradient(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> float:
    assert expected.keys() == found.keys()
    difference = sum(float((found[name] - value).double().square().sum()) for name, value in expected.items())
    return (difference / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5


def main() -> None:
    folder, file, *names = sys.argv[1:]
    results = {}
    for model, packing in MODELS.items():
        learner, critic = _learner(random_model(model, Path(folder)), "fp32", packing)
        results |= {(model, name): _compute(learner, critic, name) for name in names}
    torch.save(results, f"{file}.partial")
    Path(f"{file}.partial").rename(file)


if __name__ == "__main__":
    main()

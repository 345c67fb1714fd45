"""Rank program: gradients of recipes under layouts of this many ranks, as Hugging Face tensors.

torchrun --nproc-per-node N layout_ranks.py OUT CASES MODEL [MODEL ...]; CASES is JSON, [[model, layout, recipe], ...],
recipe null for what is not a recipe's: an update, and a step without samples
"""

import json
import os
import sys
from pathlib import Path

import torch
from dealing import collected, dealt, only_update

from megarl.algorithms.recipe import Recipe
from megarl.algorithms.recipes import RECIPES, SFT
from megarl.batch import Batch
from megarl.config import parse_config
from megarl.learner.learner import Learner
from megarl.learner.mesh import Mesh
from megarl.learner.trainable import Trainable
from megarl.learner.weights import WeightStream
from megarl.models.family import read_hf_config

# ranks -> name -> (tensor, pipeline, micro-batch tokens, packing, recompute, prompts shared)
LAYOUTS = {
    1: {
        "reference": (1, 1, 100_000, True, "none", False),
        "two micro-batch sizes": (1, 1, 200, True, "none", True),
        "small micro-batches": (1, 1, 64, True, "none", True),
        "padded": (1, 1, 300, False, "none", False),
        "recompute": (1, 1, 200, True, "full", True),
    },
    2: {
        "TP=2": (2, 1, 200, True, "none", True),
        "TP=2 padded": (2, 1, 200, False, "none", False),
        "PP=2": (1, 2, 200, True, "none", True),
        "PP=2 padded": (1, 2, 200, False, "none", False),
        "DP=2": (1, 1, 200, True, "none", True),
        "DP=2 unshared": (1, 1, 200, True, "none", False),
    },
    4: {
        "TP=2 PP=2": (2, 2, 200, True, "none", True),
        "TP=2 DP=2 recompute": (2, 1, 200, False, "full", False),
        "PP=2 DP=2": (1, 2, 200, True, "none", True),
    },
}


# Fields that no shipped recipe sets but that act on whole sequences or on the batch.
EXTRA = {
    recipe.name: recipe
    for recipe in (
        Recipe.named("grpo", "minimal_rl", name="grpo minimal_rl"),
        Recipe.named("reinforce", name="seq_tis", mismatch="seq_tis"),
        Recipe.named("reinforce", name="geo_reject", mismatch="geo_reject", mismatch_low=0.9, mismatch_high=1.1),
        Recipe.named("reinforce", name="token_icepop", mismatch="token_icepop"),
        Recipe.named("kimi_k2", name="proximal token", proximal_level="token"),
    )
}
TESTED = {**RECIPES, **EXTRA, SFT.name: SFT}
# What is decided before the learner sees a batch: recipes that differ in nothing else are one computation to it.
BEFORE_THE_LEARNER = {
    "name",
    "wrong_reward",
    "overlong",
    "group_filter",
    "backfill",
    "samples_per_round",
    "sample_filter",
    "dropped",
    "scale",
}


def make_batch(recipe: Recipe) -> Batch:
    """19 ragged sequences of 5 prompts, one of them a single token; ratios on both sides of the clip range, advantages
    of both signs, some zero.

    For DPO 18 of 9 prompts, a chosen and a rejected one each.
    """
    generator = torch.Generator().manual_seed(5)

    def integers(low: int, high: int, count: int) -> torch.Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    count = 18 if recipe.objective == "dpo" else 19
    index = torch.arange(count) // (2 if recipe.objective == "dpo" else 4)
    questions = [integers(0, 50, length) for length in [5, 1, *integers(2, 20, 7).tolist()]]
    prompts = torch.tensor([len(questions[i]) for i in index])
    responses = integers(1, 40, count)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), (prompts + responses).cumsum(0)])
    total = int(cu_seqlens[-1])
    mask = torch.cat([torch.cat([torch.zeros(p), torch.ones(r)]) for p, r in zip(prompts, responses, strict=True)])
    advantages = torch.randn(count, generator=generator)
    advantages[3] = 0.0
    if recipe.objective == "dpo":
        advantages = torch.tensor([1.0, -1.0]).repeat(9)
    if recipe.needs_critic:
        advantages = (advantages > 0).float()  # rewards
    tokens = [
        part for i, length in zip(index, responses, strict=True) for part in (questions[i], integers(0, 50, length))
    ]
    return Batch(
        tokens=torch.cat(tokens),
        cu_seqlens=cu_seqlens,
        mask=mask,
        advantages=torch.repeat_interleave(advantages, prompts + responses),
        prompt_index=index,
        prompt_lengths=prompts,
        rollout_logprobs=torch.zeros(total),
    )


def config_for(model: str, layout):  # noqa: ANN001
    tp, pp, tokens, packing, recompute, share = layout
    return parse_config(
        {
            "run": {"track_kl": True},
            "model": {"path": model},
            "data": {"train": "arithmetic", "max_prompt_tokens": 20},
            "rollout": {"max_response_tokens": 40, "temperature": 0.8},
            "optim": {"lr": 0.1, "eps": 1.0, "weight_decay": 0.0, "grad_clip": 1e9},
            "learner": {
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": pp,
                "micro_batch_tokens": tokens,
                "packing": packing,
                "recompute": recompute,
                "share_prompts": share,
            },
        }
    )


def make_learner(model: str, layout, mesh: Mesh) -> Learner:  # noqa: ANN001
    """With all that any recipe needs: critic and reference."""
    config = config_for(model, layout)
    learner = Learner(config, RECIPES["ppo"], read_hf_config(model), mesh, temperature=0.8, shard_optimizer=False)
    unsettle(learner.critic.module, mesh)
    return learner


def run_recipe(learner: Learner, recipe: Recipe, critic: Trainable) -> dict:
    """Log-probs, entropy, loss and gradients of one batch."""
    learner.recipe, learner.critic = recipe, critic if recipe.needs_critic else None
    batch = make_batch(recipe)
    deal = learner.deal(batch)

    def moved(scale: float, seed: int) -> torch.Tensor:
        return learner.score(deal.whole())[0] + scale * dealt(deal, noise(batch, seed), batch.cu_seqlens)

    deal.batch.rollout_logprobs = moved(0.1, 0) * deal.batch.mask
    deal = learner.annotate(deal)
    # Move old policy and reference away from the policy, the same way in every layout.
    deal.batch.old_logprobs, deal.batch.ref_logprobs = (moved(0.3, seed) for seed in (1, 2))
    share = only_update(learner, deal)
    logprobs, entropy, loss = learner.backward(share)
    result = {
        "logprobs": collected(learner, deal, logprobs),
        "entropy": collected(learner, deal, entropy),
        "loss": loss,
        "gradients": gradients_of(learner.policy, learner),
    }
    if learner.critic:
        result["value_loss"] = learner.backward_critic(share)
        # A value is that of a response's token: a prompt's tokens have them where they are computed.
        for name in ("values", "advantages"):
            result[name] = collected(learner, deal, getattr(deal.batch, name) * deal.batch.mask)
        result["critic_gradients"] = gradients_of(learner.critic, learner)
        heads = [p.main_grad for n, p in learner.critic.module.named_parameters() if n == "output_layer.weight"]
        head = next(grad for grads in learner.mesh.gather(heads) for grad in grads)
        result["critic_gradients"]["value head"] = head.clone()
    return result


def noise(batch: Batch, seed: int) -> torch.Tensor:
    return torch.randn(len(batch.tokens), generator=torch.Generator().manual_seed(seed))


def gradients_of(trainable: Trainable, learner: Learner) -> dict:
    stream = WeightStream(trainable.module, learner.arch, learner.mesh, value=lambda param: param.main_grad)
    return {name: tensor.clone() for name, tensor in stream.tensors()}


def unsettle(critic, mesh: Mesh) -> None:  # noqa: ANN001
    """A value head that is not zero, so that gradients reach the layers below it."""
    if mesh.is_last_stage:
        weight = critic.output_layer.weight
        with torch.no_grad():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)))


def run_update(model: str, recipe: Recipe, layout, mesh: Mesh) -> dict:  # noqa: ANN001
    """What the distributed optimizer does to the weights; its gradients are sharded.

    eps=1 makes Adam smooth, and the rate its steps large beside the rounding of the weights.
    """
    config = config_for(model, layout)
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 10.0})})
    learner = Learner(config, recipe, read_hf_config(model), mesh)
    before = {name: tensor.clone() for name, tensor in learner.hf_weights()}
    batch = make_batch(recipe)
    update = learner.update(only_update(learner, learner.deal(batch)), step=0)
    # And one of a single sequence: all data-parallel ranks but one have nothing.
    learner.update(only_update(learner, learner.deal(batch.select(torch.tensor([2])))), step=0)
    moved = {name: tensor - before[name] for name, tensor in learner.hf_weights()}
    return {"grad_norm": update.grad_norm, "gradients": moved}


def run_empty(model: str, layout, mesh: Mesh) -> dict:  # noqa: ANN001
    """What a step whose samples were all filtered away changes, on any rank."""
    recipe = RECIPES["ppo"]
    learner = Learner(config_for(model, layout), recipe, read_hf_config(model), mesh)
    learner.update(only_update(learner, learner.annotate(learner.deal(make_batch(recipe)))), step=0)
    before = state_of(learner)
    nothing = make_batch(recipe).select(torch.zeros(0, dtype=torch.int64))
    for share in learner.updates(learner.annotate(learner.deal(nothing))):
        learner.update(share, step=1)
    after = state_of(learner)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    return {"tensors": mesh.gather(len(before)), "changed": mesh.gather(changed)}


def state_of(learner: Learner) -> dict[str, torch.Tensor]:
    """This rank's weights, and every tensor of its optimizers' states, copied."""
    state = {}
    for model, trainable in learner.trainables.items():
        state |= {f"weight {model} {name}": param.clone() for name, param in trainable.module.named_parameters()}
        for i, part in enumerate(getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])):
            for j, values in enumerate(part.optimizer.state.values()):
                for name, value in values.items():
                    state[f"optimizer {model} {i} {j} {name}"] = torch.as_tensor(value).clone()
    return state


def main() -> None:
    out, cases, *models = sys.argv[1:]
    asked = {tuple(case) for case in json.loads(Path(cases).read_text())}
    layouts = LAYOUTS[int(os.environ["WORLD_SIZE"])]
    results = {}
    for sizes in dict.fromkeys(layout[:2] for layout in layouts.values()):
        mesh = None
        for name, layout in layouts.items():
            if layout[:2] != sizes:
                continue
            for model in models:
                family = Path(model).name
                chosen = [recipe for recipe in TESTED.values() if (family, name, recipe.name) in asked]
                others = (family, name, None) in asked
                if chosen or others:
                    mesh = mesh or Mesh(config_for(model, layout).learner)
                if chosen:
                    results |= run_recipes(model, name, layout, chosen, mesh)
                if others:
                    results[family, name, "empty"] = run_empty(model, layout, mesh)
                    results[family, name, "update"] = run_update(model, RECIPES["reinforce"], layout, mesh)
        if mesh:
            mesh.close(last=False)
    if int(os.environ["RANK"]) == 0:
        torch.save(results, out)


def run_recipes(model: str, name: str, layout, recipes: list[Recipe], mesh: Mesh) -> dict:  # noqa: ANN001
    """(model, layout, recipe) -> its result."""
    learner = make_learner(model, layout, mesh)
    critic, family = learner.critic, Path(model).name
    results, computed = {}, {}
    for recipe in recipes:
        baseline = {"baseline": "critic" if recipe.needs_critic else "none"}
        key = str(recipe.model_dump(exclude=BEFORE_THE_LEARNER) | baseline)
        if key not in computed:
            computed[key] = run_recipe(learner, recipe, critic)
        results[family, name, recipe.name] = computed[key]
    return results


if __name__ == "__main__":
    main()

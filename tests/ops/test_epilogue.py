"""The epilogue by Triton against the same lines by torch, and torch's derivatives against finite differences."""

import itertools

import pytest
import torch
from difficulties import implementations, seeded

from megarl.algorithms.loss import token_rule
from megarl.algorithms.recipes import RECIPES
from megarl.ops.epilogue import policy_epilogue
from megarl.ops.rules import Rule

CLIPS = ["none", "ppo", "cispo", "sapo", "dppo_tv"]
RULES = {
    **{name: token_rule(recipe) for name, recipe in RECIPES.items() if recipe.objective != "dpo"},
    **{
        f"{clip}{' dual' if dual else ''} {kl} entropy {entropy}": Rule(
            ratio="token",
            clip=clip,
            clip_low=0.2,
            clip_high=0.28,
            dual_clip=dual,
            sapo_tau_negative=1.05,
            ratio_cap=3.0,
            kl_estimator=kl,
            kl_coef=0.3,
            entropy_coef=entropy,
        )
        for clip, kl, entropy in itertools.product(CLIPS, ("k1", "k2", "k3"), (0.0, 0.01))
        for dual in ((None, 3.0) if clip == "ppo" else (None,))
    },
}


def make_tokens(dtype=torch.float32):
    """Log-probs, log-ratios, advantages, weights, corrections, entropies and reference log-probs: every ratio from far
    below to far above the clips with advantages of every sign."""
    generator = seeded(6)
    ratios = torch.cat([torch.linspace(0.05, 4, 40), torch.tensor([1e-9, 1e8, 1e12])]).to(dtype)
    advantages = torch.tensor([-1.5, -1.0, 0.0, 1.0, 2.0], dtype=dtype)
    log_ratio, advantage = (x.flatten() for x in torch.meshgrid(ratios.log(), advantages, indexing="ij"))
    logprob = -torch.rand(len(log_ratio), generator=generator, dtype=dtype) * 5
    others = torch.rand(4, len(log_ratio), generator=generator, dtype=dtype)
    ref = -5 * others[3]
    ref[::9] = logprob[::9] - 30  # far below, where only k3's exponential is spent
    return logprob, log_ratio, advantage, others[0], 0.5 + others[1], 3 * others[2], ref


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_kernel_computes_what_torch_computes(rule):
    kernels, torch_ops = (implementations()[name] for name in ("triton", "torch"))
    logprob, log_ratio, advantage, weight, correction, entropy, ref = make_tokens()
    ref = ref if rule.kl_coef else None
    entropy = entropy if rule.entropy_coef else None
    for given in (correction, None):
        arguments = (rule, logprob, log_ratio, advantage, weight, given, entropy, ref)
        found, expected = kernels.policy_epilogue(*arguments), torch_ops.policy_epilogue(*arguments)
        for value, right in zip(found, expected, strict=True):
            assert right.isfinite().all()
            torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-6)


# The others' derivative is by definition not that of their value; tests/algorithms has them.
PLAIN = {
    name: rule
    for name, rule in RULES.items()
    if rule.clip not in ("cispo", "dppo_tv") and not (rule.kl_coef and rule.kl_estimator == "k1")
}


@pytest.mark.parametrize("rule", PLAIN.values(), ids=PLAIN)
def test_the_derivatives_are_those_of_the_value(on_cpu, rule):
    logprob, log_ratio, advantage, weight, correction, entropy, ref = make_tokens(torch.float64)
    near = log_ratio.abs() < 5  # where finite differences say something, and away from the edges
    edges = torch.tensor([1 - rule.clip_low, 1 + rule.clip_high, rule.dual_clip or 9.0, rule.ratio_cap])
    near &= (log_ratio.exp()[:, None] - edges).abs().amin(-1) > 1e-3
    leaves = [x[near].requires_grad_() for x in (logprob, log_ratio, entropy)]
    rest = [x[near] for x in (advantage, weight, correction, ref)]

    def loss(logprob, log_ratio, entropy):
        advantage, weight, correction, ref = rest
        return policy_epilogue(
            rule, logprob, log_ratio, advantage, weight, correction=correction, entropy=entropy, ref_logprobs=ref
        ).sum()

    assert torch.autograd.gradcheck(loss, leaves)

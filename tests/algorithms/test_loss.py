"""What holds for the loss of any recipe: clip edges, denominators, and one value however a step is cut."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from dealing import micro_batches

from megarl.algorithms.gae import value_loss
from megarl.algorithms.loss import (
    Tokens,
    count_present,
    kl_estimate,
    loss,
    policy_loss,
    ratio_of,
    sequence_weights,
    token_rule,
)
from megarl.algorithms.mismatch import REJECTS_SEQUENCES, mismatch_weights
from megarl.algorithms.recipe import Recipe
from megarl.algorithms.recipes import RECIPES, SFT
from megarl.batch import Batch
from megarl.ops.epilogue import policy_epilogue

EXACT = {"rel": 1e-9, "abs": 1e-12}
LIMIT = 16
MISMATCHES = {
    "token_tis": {},
    "token_icepop": {},
    "seq_tis": {},
    "seq_reject": {},
    "geo_reject": {"mismatch_low": 0.9, "mismatch_high": 1.1},  # means stay closer to 1 than sums
}
AGGREGATIONS = (
    "token_mean",
    "seq_mean_token_mean",
    "seq_mean_token_sum",
    "seq_mean_token_sum_norm",
    "prompt_mean_token_mean",
)
TESTED = {
    **RECIPES,
    "sft": SFT,
    **{f"{name} minimal_rl": Recipe.named(name, "minimal_rl") for name in ("raft_pp", "grpo", "gspo", "kimi_k2")},
    **{f"reinforce {kind}": Recipe.named("reinforce", mismatch=kind, **bounds) for kind, bounds in MISMATCHES.items()},
    **{f"gspo {kind}": Recipe.named("gspo", mismatch=kind, **bounds) for kind, bounds in MISMATCHES.items()},
    "scale_rl geo_reject": Recipe.named(
        "scale_rl", old_policy="trainer", mismatch="geo_reject", **MISMATCHES["geo_reject"]
    ),
    "dr_grpo seq_reject": Recipe.named("dr_grpo", mismatch="seq_reject"),
    "kimi_k2 seq_reject": Recipe.named("kimi_k2", mismatch="seq_reject"),
    "kimi_k2 of tokens": Recipe.named("kimi_k2", proximal_level="token"),
    "gmpo with a prompt mean": Recipe.named("gmpo", aggregation="prompt_mean_token_mean"),
}


@dataclass
class Step:
    """A mini-batch in float64 with two prompt tokens of junk before each response."""

    batch: Batch
    logprobs: torch.Tensor
    entropy: torch.Tensor

    @property
    def response(self):
        return self.batch.mask > 0


def make_step(recipe, advantages=None, lengths=None, seed=0):
    """Ragged responses of 1 to 7 tokens, four to a prompt (two for DPO); ratios to both sides of any clip range."""
    pairs = recipe.objective == "dpo"
    advantages = (
        [(-1.0) ** i * (1 + 0 if pairs else 1 + i / 10) for i in range(20)] if advantages is None else advantages
    )
    lengths = [1 + (3 * i) % 7 for i in range(len(advantages))] if lengths is None else lengths
    generator = torch.Generator().manual_seed(seed)

    def normal(scale):
        return scale * torch.randn(sum(lengths) + 2 * len(lengths), generator=generator, dtype=torch.float64)

    sizes = torch.tensor([2 + length for length in lengths], dtype=torch.int64)
    mask = torch.tensor([v for length in lengths for v in (0.0, 0.0, *[1.0] * length)], dtype=torch.float64)
    logprobs = -0.05 - normal(1.0).abs()

    def apart(scale):  # other policies' log-probs, junk on the prompt
        return torch.where(mask > 0, logprobs.detach() + normal(scale), 100 * normal(1.0))

    batch = Batch(
        tokens=torch.arange(len(mask)),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]),
        mask=mask,
        advantages=torch.tensor(advantages, dtype=torch.float64).repeat_interleave(sizes),
        prompt_index=torch.arange(len(lengths)) // (2 if pairs else 4),
        prompt_lengths=torch.full((len(lengths),), 2),
        old_logprobs=apart(0.4),
        ref_logprobs=apart(0.7),
    )
    batch.rollout_logprobs = batch.old_logprobs + normal(0.3)
    return Step(batch, logprobs.requires_grad_(), normal(1.0).abs().requires_grad_())


def token_weights(recipe, mask, sequence, prompt):
    """f64[T]: sequence_weights at each token."""
    count = int(sequence.max()) + 1 if len(sequence) else 0
    tokens = torch.zeros(count, dtype=torch.int64).index_add(0, sequence, (mask > 0).long())
    prompts = torch.zeros(count, dtype=torch.int64).index_copy(0, sequence, prompt)
    return sequence_weights(recipe, tokens, prompts, LIMIT)[sequence].to(mask) * mask


def tokens_of(recipe, step):
    """The mini-batch as one micro-batch, what mismatch rejects taken out of the mask."""
    batch = step.batch
    sequence, prompt, mask, correction = batch.sequence_of_token, batch.prompt_of_token, batch.mask, None
    if recipe.mismatch != "none":
        correction = mismatch_weights(recipe, batch.old_logprobs, batch.rollout_logprobs, mask, sequence)
        if recipe.mismatch in REJECTS_SEQUENCES:
            mask = mask * correction
    return Tokens(
        logprobs=step.logprobs,
        entropy=step.entropy,
        advantages=batch.advantages,
        weights=token_weights(recipe, mask, sequence, prompt),
        mask=mask,
        sequence=sequence,
        prompt=prompt,
        sequences=count_present(sequence, mask),
        old_logprobs=batch.rollout_logprobs if recipe.old_policy == "rollout" else batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs,
        correction=correction,
    )


def gradients(value, step):
    """(loss, gradient by log-prob, gradient by entropy), flat over all tokens."""
    assert value.dtype == torch.float64
    step.logprobs.grad = step.entropy.grad = None
    value.backward()
    found = [torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in (step.logprobs, step.entropy)]
    return float(value.detach()), *found


def computed(recipe, step):
    return gradients(policy_loss(recipe, tokens_of(recipe, step)), step)


# ---- one loss, however it is cut -------------------------------------------------------------------------------------

CUTS = [(1, 10_000, True), (1, 16, True), (1, 24, False), (2, 16, True), (3, 20, False), (30, 16, True)]


@pytest.mark.parametrize(("ranks", "max_tokens", "packing"), CUTS)
@pytest.mark.parametrize("name", TESTED)
def test_one_step_has_one_loss_however_it_is_cut(name, ranks, max_tokens, packing):
    recipe = TESTED[name]
    step = make_step(recipe)
    whole = tokens_of(recipe, step)
    if recipe.mismatch in REJECTS_SEQUENCES:
        assert 0 < whole.mask.sum() < step.batch.mask.sum(), "the case is too easy"
    whole_loss, by_logprob, by_entropy = gradients(policy_loss(recipe, whole), step)
    micros = [
        micro
        for rank in range(ranks)
        for micro in micro_batches(step.batch, rank, ranks, max_tokens, packing, pairs=recipe.objective == "dpo")
    ]
    assert len(micros) > 1 or max_tokens == 10_000

    def laid_out(name, values, micro):
        if name == "sequences" or values is None:
            return values
        values = micro.of_token(values).flatten()
        return values.unique(return_inverse=True)[1] if name in ("sequence", "prompt") else values

    parts = [
        policy_loss(recipe, Tokens(**{name: laid_out(name, values, micro) for name, values in vars(whole).items()}))
        for micro in micros
    ]
    cut_loss, *cut = gradients(torch.stack(parts).sum(), step)
    assert cut_loss == pytest.approx(whole_loss, **EXACT)
    for got, wanted in zip(cut, (by_logprob, by_entropy), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    assert by_logprob.any() and (by_logprob[~step.response] == 0).all() and (by_entropy[~step.response] == 0).all()


@pytest.mark.parametrize(("ranks", "max_tokens", "packing"), CUTS)
def test_one_step_has_one_value_loss_however_it_is_cut(ranks, max_tokens, packing):
    recipe, step = RECIPES["ppo"], make_step(RECIPES["ppo"])
    sequence, prompt = step.batch.sequence_of_token, step.batch.prompt_of_token
    given = (step.logprobs, step.batch.old_logprobs, step.batch.ref_logprobs)  # any numbers will do
    weights = token_weights(SFT, step.batch.mask, sequence, prompt)
    whole, gradient, _ = gradients(value_loss(recipe, *given, weights), step)
    parts = [
        value_loss(recipe, *(micro.of_token(values) for values in (*given, weights)))
        for rank in range(ranks)
        for micro in micro_batches(step.batch, rank, ranks, max_tokens, packing)
    ]
    cut, cut_gradient, _ = gradients(torch.stack(parts).sum(), step)
    assert cut == pytest.approx(whole, **EXACT)
    torch.testing.assert_close(cut_gradient, gradient, rtol=1e-9, atol=1e-12)
    assert (gradient[~step.response] == 0).all()


@pytest.mark.parametrize("name", TESTED)
def test_what_stands_on_prompt_tokens_makes_no_difference(name):
    recipe = TESTED[name]
    step, other = make_step(recipe), make_step(recipe)
    off = ~step.response
    for tensor in (other.logprobs, other.entropy):
        tensor.data[off] = 7.0
    for field in ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs"):
        getattr(other.batch, field)[off] = -3.0
    other.batch.advantages[off] = 0.0 if recipe.objective != "dpo" else other.batch.advantages[off]
    value, by_logprob, by_entropy = computed(recipe, step)
    other_value, other_by_logprob, other_by_entropy = computed(recipe, other)
    assert other_value == value
    assert torch.equal(by_logprob, other_by_logprob) and torch.equal(by_entropy, other_by_entropy)


# ---- rows, for notebooks ---------------------------------------------------------------------------------------------


def rows_of(step, values, fill=0.0):
    """Response tokens [B, L], right-padded."""
    parts = values[step.response].split(torch.bincount(step.batch.sequence_of_token[step.response]).tolist())
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill)


def loss_of_rows(recipe, step, fill=0.0, **changes):
    batch = step.batch
    given = {
        "logprobs": rows_of(step, step.logprobs, fill),
        "old_logprobs": rows_of(step, batch.old_logprobs, fill),
        "advantages": rows_of(step, batch.advantages)[:, 0],
        "mask": rows_of(step, batch.mask),
        "entropy": rows_of(step, step.entropy, fill),
        "ref_logprobs": rows_of(step, batch.ref_logprobs, fill),
        "rollout_logprobs": rows_of(step, batch.rollout_logprobs, fill),
        "prompt_ids": 1000 - 7 * batch.prompt_index,
        "max_response_tokens": LIMIT,
    }
    return loss(recipe, **{**given, **changes})


@pytest.mark.parametrize("name", TESTED)
def test_rows_of_responses_have_the_loss_of_the_flat_tokens(name):
    recipe, step = TESTED[name], make_step(TESTED[name])
    value, by_logprob, by_entropy = computed(recipe, step)
    of_rows, *found = gradients(loss_of_rows(recipe, step, fill=-2.0), step)
    assert of_rows == pytest.approx(value, **EXACT)
    for got, wanted in zip(found, (by_logprob, by_entropy), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", TESTED)
def test_a_row_without_response_tokens_does_not_count(name):
    recipe, step = TESTED[name], make_step(TESTED[name])
    first = int(step.batch.lengths[:2].sum())  # a pair, where there are pairs
    masked = make_step(recipe)
    masked.batch.mask[:first] = 0
    without = Step(
        step.batch.select(torch.arange(2, 20)),
        step.logprobs[first:].detach().requires_grad_(),
        step.entropy[first:].detach().requires_grad_(),
    )
    value, by_logprob, _ = computed(recipe, masked)
    expected, gradient, _ = computed(recipe, without)
    assert value == pytest.approx(expected, **EXACT)
    torch.testing.assert_close(by_logprob[first:], gradient, rtol=1e-9, atol=1e-12)
    assert not by_logprob[:first].any()


def test_an_advantage_may_be_given_for_each_token():
    recipe = RECIPES["ppo"]
    step = make_step(recipe)
    advantages = rows_of(step, step.batch.advantages)
    assert loss_of_rows(recipe, step, advantages=advantages) == loss_of_rows(recipe, step)
    advantages[:, 1:] = 0
    assert loss_of_rows(recipe, step, advantages=advantages) != loss_of_rows(recipe, step)


def test_the_ratio_is_taken_against_the_rollout_where_the_recipe_says_so():
    recipe = RECIPES["reinforce"]
    step = make_step(recipe)
    rollout = rows_of(step, step.batch.rollout_logprobs)
    expected = loss_of_rows(recipe, step, old_logprobs=rollout)
    assert loss_of_rows(recipe.model_copy(update={"old_policy": "rollout"}), step) == expected
    assert loss_of_rows(recipe, step) != expected


@pytest.mark.parametrize(("name", "slopes"), [("dppo", [0.0, 0.0]), ("scale_rl", [-0.9, 0.5 / 6])])
@pytest.mark.parametrize("same_prompt", [True, False])
def test_dppo_and_scale_rl_are_anchored_on_the_policy_that_sampled(name, slopes, same_prompt):
    logprobs = torch.tensor([[0.9], [0.1]], dtype=torch.float64).log().requires_grad_()
    loss(
        RECIPES[name],
        logprobs,
        logprobs.detach(),
        torch.tensor([1.0, -1.0], dtype=torch.float64),
        torch.ones(2, 1, dtype=torch.float64),
        rollout_logprobs=torch.tensor([[0.5], [0.6]], dtype=torch.float64).log(),
        prompt_ids=torch.tensor([0, 0 if same_prompt else 1]),
    ).backward()
    assert logprobs.grad.flatten().tolist() == pytest.approx(slopes, **EXACT)


def test_in_maxrl_a_response_counts_by_the_sum_over_its_tokens():
    step = make_step(RECIPES["maxrl"], [1.0, -1.0], [1, 4])
    weights = tokens_of(RECIPES["maxrl"], step).weights
    assert weights[step.response].tolist() == [0.5] * 5


@pytest.mark.parametrize(
    ("recipe", "missing"),
    [
        (Recipe.named("grpo", kl_coef=0.04), "ref_logprobs"),
        (Recipe(entropy_coef=0.1), "entropy"),
        (Recipe(mismatch="seq_tis"), "rollout_logprobs"),
        (Recipe(ratio="token", old_policy="rollout"), "rollout_logprobs"),
        (RECIPES["iterative_dpo"], "prompt_ids"),
        (RECIPES["scale_rl"], "rollout_logprobs, prompt_ids"),
        (RECIPES["dppo"], "rollout_logprobs"),
        (RECIPES["dr_grpo"], "max_response_tokens"),
        (Recipe.named("grpo", "minimal_rl"), "entropy, ref_logprobs"),
    ],
)
def test_what_a_recipe_needs_and_was_not_given_is_named(recipe, missing):
    rows = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=f"needs {missing}$"):
        loss(recipe, rows, rows, torch.ones(2), torch.ones(2, 3))


# ---- clip edges ------------------------------------------------------------------------------------------------------


def objective_of(recipe, ratios, advantage, probability=None):
    """(objective of each token, its derivative by the token's log-ratio) of one sequence with these token ratios."""
    log_ratio = torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()
    count = len(ratios)
    logprobs = (
        torch.full((count,), -1.0, dtype=torch.float64) if probability is None else torch.tensor(probability).log()
    )
    logprobs = logprobs.double().detach() + log_ratio - log_ratio.detach()
    ones = torch.ones(count, dtype=torch.float64)
    index = torch.zeros(count, dtype=torch.int64)
    tokens = Tokens(logprobs, ones, advantage * ones, ones, ones, index, index, 1)
    seen = ratio_of(recipe, log_ratio, tokens.advantages, ones, index)
    value = -policy_epilogue(token_rule(recipe), logprobs, seen, tokens.advantages, ones)
    value.sum().backward()
    return value.detach().tolist(), log_ratio.grad.tolist()


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        # Clipped above at 1.3 only where the advantage would push the ratio further up...
        (1.31, 1.0, 1.3, 0.0),
        (1.29, 1.0, 1.29, 1.29),
        (0.5, 1.0, 0.5, 0.5),
        (9.0, 2.0, 2.6, 0.0),
        # ... below at 0.9 only where it would push it further down ...
        (0.89, -1.0, -0.9, 0.0),
        (0.91, -1.0, -0.91, -0.91),
        (1.31, -1.0, -1.31, -1.31),
        (0.1, -2.0, -1.8, 0.0),
        # ... and from dual_clip * A on where a bad sample has become far more likely.
        (2.99, -1.0, -2.99, -2.99),
        (3.01, -1.0, -3.0, 0.0),
        (9.0, -2.0, -6.0, 0.0),
        (9.0, 0.0, 0.0, 0.0),
        (1.0, 1.0, 1.0, 1.0),
        (1.0, -1.0, -1.0, -1.0),
    ],
)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ppo_stops_the_gradient_where_the_ratio_has_gone_far_enough(level, ratio, advantage, objective, slope):
    recipe = Recipe(ratio=level, clip="ppo", clip_low=0.1, clip_high=0.3, dual_clip=3.0)
    values, slopes = objective_of(recipe, [ratio, ratio], advantage)
    assert values == pytest.approx([objective] * 2, **EXACT)
    assert slopes == pytest.approx([slope] * 2, **EXACT)


def test_without_dual_clip_a_bad_sample_that_became_likely_keeps_its_gradient():
    assert objective_of(RECIPES["reinforce"], [9.0], -1.0)[0] == pytest.approx([-9.0])
    assert objective_of(Recipe(ratio="token"), [9.0], 1.0)[0] == pytest.approx([9.0])


def test_a_sequence_is_clipped_as_a_whole():
    recipe = Recipe(ratio="sequence", clip="ppo")
    values, slopes = objective_of(recipe, [4.0, 0.5, 0.5], 1.0)  # geometric mean 1
    assert values == pytest.approx([1.0] * 3) and slopes == pytest.approx([1.0] * 3)
    values, slopes = objective_of(recipe, [4.0, 0.5, 1.0], 1.0)  # 1.26
    assert values == pytest.approx([1.2] * 3) and slopes == [0.0] * 3


def test_cispo_caps_the_weight_and_never_the_gradient():
    recipe = RECIPES["scale_rl"]
    for ratio, weight in ((4.9, 4.9), (5.1, 5.0), (0.1, 0.1)):
        for advantage in (1.0, -1.0):
            assert objective_of(recipe, [ratio], advantage)[1] == pytest.approx([weight * advantage])


def test_gmpo_clips_tokens_on_the_side_of_the_advantage_before_their_mean():
    recipe, e = RECIPES["gmpo"], math.exp
    values, slopes = objective_of(recipe, [e(0.6), e(-0.6)], 1.0)
    assert values == pytest.approx([e((0.4 - 0.6) / 2)] * 2)
    assert slopes == pytest.approx([0.0, e(-0.1)])
    values, slopes = objective_of(recipe, [e(0.6), e(-0.6)], -1.0)
    assert values == pytest.approx([-e((0.6 - 0.4) / 2)] * 2)
    assert slopes == pytest.approx([-e(0.1), 0.0])
    _, slopes = objective_of(recipe, [e(0.39), e(-0.39)], 1.0)
    assert all(slopes)


def test_sapo_fades_the_gradient_out_on_both_sides_and_sooner_for_bad_samples():
    recipe = RECIPES["sapo"]
    ratios = [0.01, 0.5, 1.0, 2.0, 5.0, 20.0]
    good = [objective_of(recipe, [ratio], 1.0)[1][0] / ratio for ratio in ratios]
    bad = [-objective_of(recipe, [ratio], -1.0)[1][0] / ratio for ratio in ratios]
    for gates in (good, bad):
        assert max(gates) == gates[2] == pytest.approx(1.0)
        assert gates[2] > gates[3] > gates[4] > gates[5] > 0
        assert gates[2] > gates[1] > gates[0] > 0
    assert all(b < g for g, b in zip(good[3:], bad[3:], strict=True))


@pytest.mark.parametrize(
    ("old", "new", "advantage", "learns"),
    [
        (0.5, 0.64, 1.0, True),
        (0.5, 0.66, 1.0, False),
        (0.5, 0.66, -1.0, True),
        (0.5, 0.36, -1.0, True),
        (0.5, 0.34, -1.0, False),
        (0.5, 0.34, 1.0, True),
        (0.001, 0.1, 1.0, True),  # a ratio of 100, and yet no probability to speak of
        (0.99, 0.9, -1.0, True),
    ],
)
def test_dppo_masks_by_how_far_the_probability_has_moved_and_truncates_the_ratio(old, new, advantage, learns):
    _, slopes = objective_of(RECIPES["dppo"], [new / old], advantage, probability=[new])
    assert slopes == pytest.approx([min(new / old, 20.0) * advantage if learns else 0.0], rel=1e-6)


@pytest.mark.parametrize("name", [name for name, r in TESTED.items() if r.objective != "dpo" and r.mismatch == "none"])
def test_before_the_first_update_every_recipe_follows_the_policy_gradient(name):
    recipe = TESTED[name]
    step = make_step(recipe)
    for field in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
        setattr(step.batch, field, step.logprobs.detach().clone())
    tokens = tokens_of(recipe, step)
    expected = -tokens.weights * tokens.advantages
    if recipe.ratio == "sequence" and recipe.aggregation != "seq_mean_token_mean":  # its tokens share one ratio
        for i in range(len(step.batch)):
            mine = (tokens.sequence == i) & step.response
            expected[mine] = expected[mine].mean()
    _, gradient, _ = gradients(policy_loss(recipe, tokens), step)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    _, unscored, _ = gradients(policy_loss(recipe, replace(tokens, old_logprobs=None)), step)
    torch.testing.assert_close(unscored, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", TESTED)
@pytest.mark.parametrize("difference", [-500.0, 500.0, 80.0])
def test_no_log_ratio_is_extreme_enough_for_an_infinite_loss(name, difference):
    recipe = TESTED[name]
    step = make_step(recipe)
    for moves in (("old_logprobs",), ("ref_logprobs",), ("rollout_logprobs",), ("old_logprobs", "rollout_logprobs")):
        batch = step.batch.select(torch.arange(len(step.batch)))
        for field in ("mask", "advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs"):
            setattr(batch, field, getattr(batch, field).float())
        for field in moves:
            getattr(batch, field)[::2] -= difference
        single = Step(batch, step.logprobs.detach().float().requires_grad_(), step.entropy.detach().float())
        value = policy_loss(recipe, tokens_of(recipe, single))
        value.backward()
        assert value.dtype == torch.float32 and value.isfinite() and single.logprobs.grad.isfinite().all()


# ---- denominators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aggregation", "shares"),
    [
        ("token_mean", [1 / 7] * 7),
        ("seq_mean_token_mean", [1 / 3, *[1 / 9] * 3, *[1 / 9] * 3]),
        ("seq_mean_token_sum", [1 / 3] * 7),
        ("seq_mean_token_sum_norm", [1 / 3 / LIMIT] * 7),
        ("prompt_mean_token_mean", [1 / 8] * 4 + [1 / 6] * 3),
    ],
)
def test_an_aggregation_gives_each_token_its_share(aggregation, shares):
    mask = torch.tensor([0, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1], dtype=torch.float64)
    sequence = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2])
    prompt = torch.tensor([0, 0, 0, 0, 0, 0, 5, 5, 5, 5, 5])
    weights = token_weights(Recipe(aggregation=aggregation), mask, sequence, prompt)
    assert weights[mask > 0].tolist() == pytest.approx(shares, **EXACT)
    assert (weights[mask == 0] == 0).all()


def test_each_pair_counts_the_same_however_long_its_responses():
    mask = torch.tensor([0, 1, 0, 1, 1, 1, 0, 1, 0, 1, 1], dtype=torch.float64)
    sequence = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3])
    prompt = torch.tensor([0, 0, 0, 0, 0, 0, 5, 5, 5, 5, 5])
    weights = token_weights(RECIPES["iterative_dpo"], mask, sequence, prompt)
    assert weights.tolist() == (mask / 2).tolist()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_removed_samples_leave_the_denominator_and_zeroed_ones_stay_in_it(aggregation):
    recipe = Recipe(aggregation=aggregation)
    lengths = [1, 4, 7, 3, 6, 2, 5, 1]
    zeroed = make_step(recipe, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0], lengths)
    kept = zeroed.batch.select(torch.tensor([0, 4]))
    chosen = torch.isin(zeroed.batch.sequence_of_token, torch.tensor([0, 4]))
    removed = Step(kept, zeroed.logprobs[chosen].detach().requires_grad_(), zeroed.entropy[chosen].detach())
    of_zeroed, of_removed = (policy_loss(recipe, tokens_of(recipe, step)) for step in (zeroed, removed))
    fractions = {"token_mean": 7 / 29, "prompt_mean_token_mean": None}
    fraction = fractions.get(aggregation, 2 / 8)
    if fraction is None:  # each prompt has a denominator of its own
        sums = [
            float(-zeroed.logprobs[chosen & (zeroed.batch.prompt_of_token == p) & zeroed.response].sum())
            for p in (0, 1)
        ]
        assert float(of_zeroed) == pytest.approx((sums[0] / 15 + sums[1] / 14) / 2, **EXACT)
        assert float(of_removed) == pytest.approx((sums[0] / 1 + sums[1] / 6) / 2, **EXACT)
    else:
        assert float(of_zeroed) == pytest.approx(float(of_removed) * fraction, **EXACT)


def test_zeroed_samples_still_pay_for_kl_and_entropy():
    recipe = Recipe(kl_coef=0.5, entropy_coef=0.5)
    step = make_step(recipe, [0.0, 0.0])
    _, by_logprob, by_entropy = computed(recipe, step)
    assert by_logprob[step.response].all() and by_entropy[step.response].all()


@pytest.mark.parametrize("kind", REJECTS_SEQUENCES)
@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if n != "iterative_dpo" and r.old_policy == "trainer"])
def test_responses_that_mismatch_rejects_leave_the_loss_and_its_denominator(name, kind):
    recipe = RECIPES[name].model_copy(update={"mismatch": kind, **MISMATCHES[kind]})
    step = make_step(recipe)
    whole = tokens_of(recipe, step)
    accepted = torch.zeros(len(step.batch)).index_add(0, whole.sequence, whole.mask.float()) > 0
    assert accepted.any() and not accepted.all()
    of_kept = accepted[whole.sequence]
    kept = Step(
        step.batch.select(accepted.nonzero().flatten()),
        step.logprobs[of_kept].detach().requires_grad_(),
        step.entropy[of_kept].detach().requires_grad_(),
    )
    expected, gradient, _ = computed(RECIPES[name], kept)
    value, by_logprob, _ = computed(recipe, step)
    assert value == pytest.approx(expected, **EXACT)
    torch.testing.assert_close(by_logprob[of_kept], gradient, rtol=1e-9, atol=1e-12)
    assert not by_logprob[~of_kept].any()
    assert float(loss_of_rows(recipe, step)) == pytest.approx(expected, **EXACT)


def test_a_correction_multiplies_the_objective_and_neither_kl_nor_entropy():
    recipe = Recipe(mismatch="token_icepop", kl_coef=0.5, entropy_coef=0.25)
    step = make_step(recipe)
    zero = replace(tokens_of(recipe, step), correction=torch.zeros_like(step.batch.mask))
    without = replace(zero, correction=None, advantages=torch.zeros_like(step.batch.mask))
    assert float(policy_loss(recipe, zero)) == pytest.approx(float(policy_loss(recipe, without)), **EXACT)


@pytest.mark.parametrize("name", TESTED)
def test_nothing_kept_gives_no_loss(name):
    recipe = TESTED[name]
    nothing = make_step(recipe, [])
    value, by_logprob, by_entropy = computed(recipe, nothing)
    assert value == 0 and len(by_logprob) == len(by_entropy) == 0
    masked = make_step(recipe)
    masked.batch.mask.zero_()
    value, by_logprob, by_entropy = computed(recipe, masked)
    assert value == 0 and not by_logprob.any() and not by_entropy.any()


@pytest.mark.parametrize("name", TESTED)
def test_rows_of_nothing_give_no_loss(name):
    rows, empty = torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0)
    given = {name: rows for name in ("entropy", "ref_logprobs", "rollout_logprobs")}
    value = loss(TESTED[name], rows, rows, empty, rows, prompt_ids=empty.long(), max_response_tokens=LIMIT, **given)
    assert value == 0


# ---- KL, entropy, proximal term, pairs -------------------------------------------------------------------------------


@pytest.mark.parametrize("logratio", [-1.5, -0.1, 0.0, 0.1, 1.5])
@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        ("k1", lambda d: d, lambda d: 1.0),
        ("k2", lambda d: d * d / 2, lambda d: d),
        ("k3", lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
    ],
)
def test_kl_estimators_are_schulmans(estimator, value, slope, logratio):
    logprobs = torch.tensor([logratio - 3.0], dtype=torch.float64, requires_grad=True)
    estimate = kl_estimate(estimator, logprobs, torch.tensor([-3.0], dtype=torch.float64))
    estimate.backward()
    assert float(estimate.detach()) == pytest.approx(value(logratio), **EXACT)
    assert float(logprobs.grad) == pytest.approx(slope(logratio), **EXACT)


@pytest.mark.parametrize("below", [19.0, 20.0, 21.0, 40.0, 500.0])
def test_k3_pulls_a_token_down_however_far_the_reference_lies_below_it(below):
    logprobs = torch.tensor([-0.5], requires_grad=True)
    estimate = kl_estimate("k3", logprobs, logprobs.detach() - below)
    estimate.backward()
    assert float(estimate.detach()) == pytest.approx(below - 1, rel=1e-6)
    assert float(logprobs.grad) == pytest.approx(1.0, rel=1e-6)


def test_k3_stays_finite_however_far_the_policy_has_moved():
    logprobs = torch.tensor([-500.0, 0.0], requires_grad=True)
    estimate = kl_estimate("k3", logprobs, torch.tensor([0.0, -500.0]))
    estimate.sum().backward()
    assert estimate.isfinite().all() and (estimate > 0).all() and logprobs.grad.isfinite().all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_term_is_added_to_the_loss_and_weighed_like_it(estimator):
    plain, with_kl = Recipe(), Recipe(kl_coef=0.25, kl_estimator=estimator)
    step = make_step(plain)
    added = computed(with_kl, step)[0] - computed(plain, step)[0]
    weights = tokens_of(plain, step).weights
    kl = kl_estimate(estimator, step.logprobs.detach(), step.batch.ref_logprobs)
    assert added == pytest.approx(0.25 * float((weights * kl)[step.response].sum()), **EXACT)


def test_an_entropy_bonus_rewards_entropy():
    plain = RECIPES["reinforce"]
    bonus = plain.model_copy(update={"entropy_coef": 0.01})
    step = make_step(plain)
    value, gradient, _ = computed(plain, step)
    with_bonus, same_gradient, by_entropy = computed(bonus, step)
    weights = tokens_of(plain, step).weights
    assert with_bonus - value == pytest.approx(-0.01 * float((weights * step.entropy).sum()), **EXACT)
    torch.testing.assert_close(by_entropy, -0.01 * weights, rtol=1e-12, atol=0)
    assert torch.equal(gradient, same_gradient)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_proximal_term_of_a_sequence_counts_once_whatever_the_aggregation(aggregation):
    plain = Recipe(aggregation=aggregation)
    step = make_step(plain)
    proximal = plain.model_copy(update={"proximal": "squared_log_ratio", "proximal_coef": 0.3})
    log_ratio = torch.where(step.response, step.logprobs.detach() - step.batch.old_logprobs, 0.0)
    sums = torch.zeros(20, dtype=torch.float64).index_add(0, step.batch.sequence_of_token, log_ratio)
    added = computed(proximal, step)[0] - computed(plain, step)[0]
    assert added == pytest.approx(0.15 * float((sums**2).mean()), **EXACT)
    of_tokens = proximal.model_copy(update={"proximal_level": "token"})
    weights = tokens_of(plain, step).weights
    added = computed(of_tokens, step)[0] - computed(plain, step)[0]
    assert added == pytest.approx(0.15 * float((weights * log_ratio**2).sum()), **EXACT)


def test_a_pair_pushes_its_responses_apart_with_equal_force():
    recipe = RECIPES["iterative_dpo"]
    step = make_step(recipe, [1.0, -1.0], [3, 5])
    step.batch.old_logprobs = step.logprobs.detach().clone()
    value, gradient, _ = computed(recipe, step)
    assert value == pytest.approx(math.log(2), **EXACT)
    force = 0.1 * (0.9 - 0.5)  # beta * (1 - label_smoothing - sigmoid(0))
    assert gradient[step.response].tolist() == pytest.approx([-force] * 3 + [force] * 5, **EXACT)


def test_a_pair_with_smoothed_labels_may_be_pushed_too_far_apart():
    recipe = RECIPES["iterative_dpo"].model_copy(update={"dpo_beta": 1.0})
    step = make_step(recipe, [1.0, -1.0], [1, 1])
    for margin, sign in ((2.1, -1), (2.3, 1)):  # sigmoid(2.197) = 0.9
        step.batch.old_logprobs = step.logprobs.detach().clone()
        step.batch.old_logprobs[2] -= margin
        assert math.copysign(1, computed(recipe, step)[1][2]) == sign

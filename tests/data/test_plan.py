"""A step dealt to updates, ranks and micro-batches: nothing lost, nothing twice, equal and balanced."""

import random

import pytest
import torch
from dealing import micro_batches

from megarl.algorithms.loss import sequence_weights
from megarl.algorithms.recipes import RECIPES
from megarl.batch import Batch
from megarl.data.packing import lay_out
from megarl.data.plan import Deal, Rules, Share, make_plan

ROOM = 128  # of a micro-batch; the longest sequence gives 60 predictions, a pair twice that


def random_batch(rng, pairs):
    """Groups of ragged responses to prompts of 1 to 20 tokens; some prompts of the step have none left."""
    questions, sequences = {}, []
    for prompt in range(rng.randint(1, 12)):
        questions[prompt] = torch.randint(0, 99, (rng.randint(1, 20),))
        for _ in range(rng.choice([0, 2]) if pairs else rng.choice([0, 1, 2, 5, 8])):
            sequences.append((prompt, rng.randint(1, 40)))
    lengths = torch.tensor([len(questions[prompt]) + response for prompt, response in sequences], dtype=torch.int64)
    masks = [torch.tensor([0.0] * len(questions[prompt]) + [1.0] * response) for prompt, response in sequences]
    tokens = [torch.cat([questions[prompt], torch.randint(0, 99, (response,))]) for prompt, response in sequences]
    nothing = torch.zeros(0)
    return Batch(
        tokens=torch.cat([nothing.long(), *tokens]),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        mask=torch.cat([nothing, *masks]),
        advantages=torch.zeros(int(lengths.sum())),
        prompt_index=torch.tensor([prompt for prompt, _ in sequences], dtype=torch.int64),
        prompt_lengths=torch.tensor([len(questions[prompt]) for prompt, _ in sequences], dtype=torch.int64),
    )


def random_rules(rng, pairs):
    packing = rng.random() < 0.7
    return Rules(
        ranks=rng.randint(1, 16),
        micro_batch_tokens=ROOM,
        packing=packing,
        share_prompts=packing and rng.choice(["auto", True, False]),
        pairs=pairs,
        multiple=rng.choice([1, 1, 16]),
        minibatch_prompts=rng.choice([None, 1, 2, 5]),
    )


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_every_sequence_is_dealt_once_in_micro_batches_that_fit_and_as_many_on_every_rank(seed, pairs):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(50):
        batch, rules = random_batch(rng, pairs), random_rules(rng, pairs)
        plan = make_plan(batch, rules)
        dealt = torch.cat([plan.numbers(rank) for rank in range(rules.ranks)])
        assert dealt.sort().values.tolist() == list(range(len(batch)))
        assert plan.updates == make_plan(batch, rules).updates
        predicted, tokens = [], 0
        for update in plan.updates:
            assert len({len(cuts) for cuts in update}) == 1
            for cuts in update:
                assert all(cuts[:1]) or not any(cuts), "an empty micro-batch before others"
                for micro in lay_out(Share(batch, cuts, plan.share_prompts), rules.packing, rules.multiple):
                    assert micro.inputs.numel() <= ROOM
                    predicted += micro.token[micro.token >= 0].tolist()
                    tokens += int((micro.token >= 0).sum())
            of_prompts = [set(batch.prompt_index[[i for cut in cuts for i in cut]].tolist()) for cuts in update]
            if pairs:
                assert sum(map(len, of_prompts)) == len(set().union(*of_prompts)), "a pair was parted"
        assert len(predicted) == len(set(predicted))
        assert set(batch.mask.nonzero().flatten().tolist()) <= set(predicted)
        assert tokens <= plan.unshared_tokens
        if not plan.share_prompts:
            assert tokens == plan.tokens == plan.unshared_tokens


@pytest.mark.parametrize("name", ["reinforce", "dapo", "dr_grpo", "opo", "iterative_dpo", "cispo", "gmpo"])
def test_the_weights_of_an_update_are_those_of_the_whole_mini_batch_whoever_has_which_sequences(name):
    recipe = RECIPES[name]
    pairs = recipe.objective == "dpo"
    rng = random.Random(name)
    for _ in range(40):
        batch, rules = random_batch(rng, pairs), random_rules(rng, pairs)
        if not len(batch):
            continue
        plan = make_plan(batch, rules)

        def weigh(tokens, prompts):
            return sequence_weights(recipe, tokens, prompts, 40)

        shares = [Deal(plan, r, batch.select(plan.numbers(r))).updates(weigh) for r in range(rules.ranks)]
        for u, members in enumerate(plan.updates):
            inside = torch.tensor(sorted(i for cuts in members for cut in cuts for i in cut))
            expected = weigh(batch.response_tokens[inside], batch.prompt_index[inside])
            weights = torch.cat([own[u].weights for own in shares])
            numbers = torch.tensor([i for cuts in members for cut in cuts for i in cut])
            assert torch.equal(weights[numbers.argsort()], expected)
            assert {own[u].sequences for own in shares} == {len(inside)}
            assert {own[u].tokens for own in shares} == {int(batch.response_tokens[inside].sum())}
            total = sum(float((own[u].weights * own[u].batch.response_tokens).sum()) for own in shares)
            if recipe.aggregation in ("token_mean", "seq_mean_token_mean", "prompt_mean_token_mean") and not pairs:
                assert total == pytest.approx(1)
            if recipe.aggregation == "seq_mean_token_sum_norm":
                assert total == pytest.approx(float(batch.response_tokens[inside].double().mean()) / 40)


def test_rejected_sequences_leave_the_micro_batches_the_denominator_and_the_updates_that_had_no_others():
    batch = random_batch(random.Random(0), pairs=False)
    batch = batch.select(torch.tensor([*range(len(batch)), len(batch) - 1]))
    rules = Rules(ranks=2, micro_batch_tokens=ROOM, minibatch_prompts=1)
    plan = make_plan(batch, rules)
    first = batch.prompt_index == batch.prompt_index[0]
    rejected = first.clone()
    rejected[-1] = True
    assert not rejected.all() and (batch.prompt_index == batch.prompt_index[-1]).sum() > 1

    def weigh(tokens, prompts):
        return torch.full((len(tokens),), 1 / len(tokens), dtype=torch.float64)

    left = []
    for rank in range(2):
        deal = Deal(plan, rank, batch.select(plan.numbers(rank))).without(rejected)
        updates = deal.updates(weigh)
        assert len(updates) == len(plan.updates) - 1
        assert updates[-1].sequences == int((batch.prompt_index == batch.prompt_index[-1]).sum()) - 1
        for share in [deal.whole(), *updates]:
            run = [i for cut in share.micro_batches for i in cut]
            assert (share.batch.response_tokens[run] > 0).all()
            assert (share.batch.response_tokens > 0).sum() == len(run)
        left += [plan.numbers(rank)[i] for cut in deal.whole().micro_batches for i in cut]
    assert sorted(map(int, left)) == (~rejected).nonzero().flatten().tolist()


def group_of(prompt, *responses):
    """One prompt's sequences; no two tokens are equal but those of the prompt."""
    lengths = torch.tensor([prompt + response for response in responses])
    tokens = [torch.cat([torch.arange(prompt), 100 * (i + 1) + torch.arange(r)]) for i, r in enumerate(responses)]
    return Batch(
        tokens=torch.cat(tokens),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        mask=torch.cat([torch.tensor([0.0] * prompt + [1.0] * response) for response in responses]),
        advantages=torch.zeros(int(lengths.sum())),
        prompt_index=torch.zeros(len(responses), dtype=torch.int64),
        prompt_lengths=torch.full((len(responses),), prompt),
    )


def test_a_shared_prompt_is_laid_out_once_and_each_response_goes_on_behind_it():
    (micro,) = micro_batches(group_of(4, 3, 1), 0, 1, 100, True, share_prompts=True)
    assert micro.inputs.tolist() == [[0, 1, 2, 3, 100, 101, 3]]
    assert micro.targets.tolist() == [[1, 2, 3, 100, 101, 102, 200]]
    assert micro.positions.tolist() == [[0, 1, 2, 3, 4, 5, 3]]
    assert micro.cu_seqlens.tolist() == [0, 3, 6, 7] and micro.prefix.tolist() == [-1, 0, 0]


def test_a_prompt_of_one_token_has_nothing_to_share():
    (micro,) = micro_batches(group_of(1, 3, 1), 0, 1, 100, True, share_prompts=True)
    assert micro.inputs.tolist() == [[0, 100, 101, 0]]
    assert micro.positions.tolist() == [[0, 1, 2, 0]] and micro.prefix.tolist() == [-1, -1]


def test_sequences_that_begin_differently_can_not_share_a_prompt():
    batch = group_of(4, 3, 2)
    batch.tokens[8] = 99  # in the second one's prompt
    with pytest.raises(ValueError, match="different tokens"):
        micro_batches(batch, 0, 1, 100, True, share_prompts=True)


@pytest.mark.parametrize(
    ("prompt", "responses", "shared"), [(40, (5, 5, 5), True), (2, (30, 30, 30), False), (40, (5,), False)]
)
def test_auto_shares_where_it_saves_tokens(prompt, responses, shared):
    plan = make_plan(group_of(prompt, *responses), Rules(1, 1000, share_prompts="auto"))
    assert plan.share_prompts == shared
    assert plan.unshared_tokens == sum(prompt - 1 + response for response in responses)
    assert plan.tokens == (prompt - 1 + sum(responses) if shared else plan.unshared_tokens)
    assert not make_plan(group_of(40, 5, 5), Rules(1, 1000, packing=False, share_prompts="auto")).share_prompts


def test_a_group_larger_than_a_micro_batch_or_a_ranks_part_is_split():
    batch = group_of(11, *[10] * 8)  # 90 tokens with the prompt once
    (update,) = make_plan(batch, Rules(1, 50, share_prompts=True)).updates
    assert update == [[[0, 1, 2, 3], [4, 5, 6, 7]]]
    (update,) = make_plan(batch, Rules(4, 1000, share_prompts=True)).updates
    assert sorted(len(cuts[0]) for cuts in update) == [2, 2, 2, 2] or len(update) == 4
    assert all(cuts[0] for cuts in update), "a rank has nothing to do"

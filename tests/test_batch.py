from dataclasses import fields

import numpy as np
import pytest
import torch

from megarl.batch import OF_SEQUENCE, Batch, Credit, Kept, build_batch, build_demonstration_batch
from megarl.types import Prompt, Sample, SampleGroup

ANNOTATIONS = ("old_logprobs", "ref_logprobs", "values", "returns", "correction")


def make_group(prompt_ids, *responses):
    """Each response is its token ids; the rollout's log-prob of token x is -x / 8."""
    samples = []
    for i, response in enumerate(responses):
        ids = np.array(response, np.int32)
        samples.append(Sample(i, ids, -ids.astype(np.float32) / 8, "", "stop", ids % 3))
    return SampleGroup(Prompt("p", "?", np.array(prompt_ids, np.int32), "3", "test"), samples)


GROUPS = [
    make_group([10, 11, 12], [1, 2], [3, 4, 5, 6], [7]),
    make_group([20], [8, 9], [10]),
    make_group([30, 31], [11, 12, 13]),
]


def credit_of(keep):
    """Sample i has advantage i + 0.5."""
    keep = torch.tensor(keep, dtype=torch.bool)
    advantages = torch.where(keep, torch.arange(len(keep)) + 0.5, 0.0)
    return Credit(keep, advantages, rewards=advantages)


def of_sequences(batch, values):
    return [part.tolist() for part in values.split(batch.lengths.tolist())]


def test_a_batch_holds_prompt_and_response_of_the_kept_samples_in_order():
    batch = build_batch(GROUPS, credit_of([True, False, True, True, False, True]))
    assert len(batch) == 4
    assert of_sequences(batch, batch.tokens) == [[10, 11, 12, 1, 2], [10, 11, 12, 7], [20, 8, 9], [30, 31, 11, 12, 13]]
    assert batch.tokens.dtype == torch.int64
    assert batch.prompt_index.tolist() == [0, 0, 1, 2]
    assert batch.prompt_lengths.tolist() == [3, 3, 1, 2]
    assert batch.response_tokens.tolist() == [2, 1, 2, 3]
    assert of_sequences(batch, batch.advantages) == [[0.5] * 5, [2.5] * 4, [3.5] * 3, [5.5] * 5]
    assert batch.advantages.dtype == torch.float32
    assert batch.sequence_of_token.tolist() == [0] * 5 + [1] * 4 + [2] * 3 + [3] * 5
    assert batch.prompt_of_token.tolist() == [0] * 9 + [1] * 3 + [2] * 5


def test_mask_and_rollout_log_probs_sit_on_the_tokens_of_the_response():
    batch = build_batch(GROUPS, credit_of([True, False, True, True, False, True]))
    assert batch.mask.dtype == batch.rollout_logprobs.dtype == torch.float32
    assert of_sequences(batch, batch.mask) == [[0, 0, 0, 1, 1], [0, 0, 0, 1], [0, 1, 1], [0, 0, 1, 1, 1]]
    assert of_sequences(batch, batch.rollout_logprobs) == [
        [0, 0, 0, -1 / 8, -2 / 8],
        [0, 0, 0, -7 / 8],
        [0, -8 / 8, -9 / 8],
        [0, 0, -11 / 8, -12 / 8, -13 / 8],
    ]
    assert of_sequences(batch, batch.weight_versions) == [[0, 0, 0, 1, 2], [0, 0, 0, 1], [0, 2, 0], [0, 0, 2, 0, 1]]
    assert all(getattr(batch, name) is None for name in ANNOTATIONS)


def test_a_step_that_keeps_nothing_gives_an_empty_batch():
    batch = build_batch(GROUPS, credit_of([False] * 6))
    assert len(batch) == len(batch.tokens) == len(batch.mask) == len(batch.advantages) == 0
    assert len(batch.rollout_logprobs) == len(batch.sequence_of_token) == len(batch.prompt_of_token) == 0
    assert batch.cu_seqlens.tolist() == [0]


def test_demonstrations_all_have_advantage_one():
    pairs = [
        (np.array([1, 2], np.int32), np.array([3], np.int32)),
        (np.array([4], np.int32), np.array([5, 6], np.int32)),
    ]
    batch = build_demonstration_batch(pairs)
    assert of_sequences(batch, batch.tokens) == [[1, 2, 3], [4, 5, 6]]
    assert of_sequences(batch, batch.mask) == [[0, 0, 1], [0, 1, 1]]
    assert batch.advantages.tolist() == [1.0] * 6
    assert batch.prompt_index.tolist() == [0, 1]
    assert batch.rollout_logprobs is None


def annotated(*names):
    """A batch of all samples with some annotations, in which no two tokens are equal."""
    batch = build_batch(GROUPS, credit_of([True] * 6))
    for i, name in enumerate(names):
        setattr(batch, name, torch.arange(len(batch.tokens)) + 100 * i + 0.25)
    return batch


PER_TOKEN = ("tokens", "mask", "advantages", "rollout_logprobs", "weight_versions")


@pytest.mark.parametrize("names", [(), ("old_logprobs",), ("values", "returns"), ANNOTATIONS], ids=str)
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4, 5], [4, 1], [3], [], [2, 2, 0]], ids=str)
def test_selected_sequences_keep_all_that_belongs_to_them(chosen, names):
    batch = annotated(*names)
    picked = batch.select(torch.tensor(chosen, dtype=torch.int64))
    assert len(picked) == len(chosen)
    for name in (*PER_TOKEN, *names):
        everything = of_sequences(batch, getattr(batch, name))
        assert of_sequences(picked, getattr(picked, name)) == [everything[i] for i in chosen]
        assert getattr(picked, name).dtype == getattr(batch, name).dtype
    assert picked.prompt_index.tolist() == [batch.prompt_index[i] for i in chosen]
    assert all(getattr(picked, name) is None for name in ANNOTATIONS if name not in names)


def test_every_field_of_a_batch_is_selected():
    assert {f.name for f in fields(Batch)} == {*PER_TOKEN, *ANNOTATIONS, *OF_SEQUENCE, "cu_seqlens"}


def test_selecting_leaves_the_batch_as_it_was():
    batch, before = annotated(*ANNOTATIONS), annotated(*ANNOTATIONS)
    batch.select(torch.tensor([4, 1])).advantages.zero_()
    assert all(torch.equal(getattr(batch, f.name), getattr(before, f.name)) for f in fields(Batch))


@pytest.mark.parametrize(("first", "last"), [(0, 6), (1, 4), (5, 6), (3, 3)])
def test_neighbours_are_a_view_of_the_batch(first, last):
    batch = annotated(*ANNOTATIONS)
    part, picked = batch.between(first, last), batch.select(torch.arange(first, last))
    assert all(torch.equal(getattr(part, f.name), getattr(picked, f.name)) for f in fields(Batch))
    part.mask.fill_(7.0)
    inside = (batch.sequence_of_token >= first) & (batch.sequence_of_token < last)
    assert torch.equal(batch.mask == 7.0, inside)


def test_kept_samples_are_told_by_their_lengths_and_become_a_batch_in_any_order():
    kept = Kept(GROUPS, credit_of([True, False, True, True, False, True]))
    batch = build_batch(GROUPS, credit_of([True, False, True, True, False, True]))
    for name in ("lengths", "prompt_lengths", "prompt_index", "response_tokens"):
        assert torch.equal(getattr(kept, name), getattr(batch, name))
    order = torch.tensor([3, 0])
    part, picked = kept.select(order).batch(), batch.select(order)
    assert all(
        getattr(part, f.name) is None or torch.equal(getattr(part, f.name), getattr(picked, f.name))
        for f in fields(Batch)
    )


def test_unused_and_greedy_samples_are_not_in_the_batch():
    samples = make_group([20], [8, 9], [10], [11])
    group = SampleGroup(samples.prompt, samples.samples[:1], unused=samples.samples[1:2], greedy=samples.samples[2])
    batch = build_batch([group, GROUPS[2]], credit_of([True, True]))
    assert of_sequences(batch, batch.tokens) == [[20, 8, 9], [30, 31, 11, 12, 13]]

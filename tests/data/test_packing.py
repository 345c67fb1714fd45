import pytest
import torch
from dealing import micro_batches

from megarl.batch import build_demonstration_batch


def make_batch(lengths, seed=0, prompts=None):
    """Sequences of these lengths, each with a prompt of one token or more; no two tokens are equal.

    `prompts` says which prompt each answers; without it, each one of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs, start = [], 0
    for length in lengths:
        ids = torch.arange(start, start + length).numpy()
        prompt = int(torch.randint(1, length, (), generator=generator))
        pairs.append((ids[:prompt], ids[prompt:]))
        start += length
    batch = build_demonstration_batch(pairs)
    if prompts is not None:
        batch.prompt_index = torch.tensor(prompts, dtype=torch.int64)
    return batch


RAGGED = [2, 9, 3, 3, 17, 5, 2, 11, 8, 2, 30, 4, 4, 13]
BATCHES = {
    "ragged": make_batch(RAGGED),
    "equal": make_batch([6] * 8),
    "one": make_batch([12]),
    "tiny": make_batch([2, 2, 2]),
    "empty": make_batch([]),
}
CUTS = [
    (ranks, max_tokens, packing)
    for ranks in (1, 2, 3, 16)
    for max_tokens in (30, 64, 10_000)
    for packing in (True, False)
]


def every(batch, ranks, max_tokens, packing):
    return [micro for rank in range(ranks) for micro in micro_batches(batch, rank, ranks, max_tokens, packing)]


@pytest.mark.parametrize(("ranks", "max_tokens", "packing"), CUTS)
@pytest.mark.parametrize("name", BATCHES)
def test_every_token_but_the_first_of_a_sequence_is_predicted_exactly_once(name, ranks, max_tokens, packing):
    batch = BATCHES[name]
    predicted = torch.cat([micro.token[micro.token >= 0] for micro in every(batch, ranks, max_tokens, packing)])
    firsts = set(batch.cu_seqlens[:-1].tolist())
    assert sorted(predicted.tolist()) == [i for i in range(len(batch.tokens)) if i not in firsts]
    responses = set(batch.mask.nonzero().flatten().tolist())
    assert responses <= set(predicted.tolist())


@pytest.mark.parametrize(("ranks", "max_tokens", "packing"), CUTS)
@pytest.mark.parametrize("name", BATCHES)
def test_each_prediction_sees_its_own_sequence_and_position(name, ranks, max_tokens, packing):
    batch = BATCHES[name]
    for micro in every(batch, ranks, max_tokens, packing):
        assert micro.inputs.shape == micro.targets.shape == micro.token.shape == micro.positions.shape
        real = micro.token >= 0
        tokens = micro.token[real]
        assert torch.equal(micro.targets[real], batch.tokens[tokens])
        assert torch.equal(micro.inputs[real], batch.tokens[tokens - 1])
        starts = batch.cu_seqlens[:-1][batch.sequence_of_token[tokens]]
        assert torch.equal(micro.positions[real], tokens - 1 - starts)


@pytest.mark.parametrize(("ranks", "max_tokens", "packing"), CUTS)
@pytest.mark.parametrize("name", BATCHES)
def test_no_micro_batch_is_empty_or_over_the_limit(name, ranks, max_tokens, packing):
    for rank in range(ranks):
        mine = micro_batches(BATCHES[name], rank, ranks, max_tokens, packing)
        assert mine
        for micro in mine:
            assert 0 < micro.inputs.numel() <= max_tokens


def with_sequences(micros):
    """Without those of a rank that has fewer micro-batches than another."""
    return [micro for micro in micros if (micro.token >= 0).any()]


def test_a_packed_micro_batch_is_one_row_of_whole_sequences_without_padding():
    batch = BATCHES["ragged"]
    for micro in with_sequences(every(batch, 2, 40, packing=True)):
        assert micro.inputs.size(0) == 1 and (micro.token >= 0).all()
        bounds = micro.cu_seqlens
        assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == micro.inputs.size(1)
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            sequences = batch.sequence_of_token[micro.token[0, start:end]].unique()
            assert len(sequences) == 1
            assert end - start == batch.lengths[sequences[0]] - 1
            assert micro.positions[0, start:end].tolist() == list(range(end - start))


def test_a_padded_micro_batch_is_one_row_per_sequence_with_padding_at_the_end():
    batch = BATCHES["ragged"]
    for micro in with_sequences(every(batch, 2, 40, packing=False)):
        assert micro.cu_seqlens is None
        assert (micro.token >= 0).all(dim=0).any(), "a column of nothing but padding"
        assert (micro.token[:, -1] >= 0).any(), "wider than its longest sequence"
        for row in micro.token:
            real = row[row >= 0]
            assert torch.equal(row[: len(real)], real)
            assert len(real) == batch.lengths[batch.sequence_of_token[real[0]]] - 1


def test_values_of_tokens_follow_them_and_padding_gets_zero():
    batch = BATCHES["ragged"]
    values = torch.arange(len(batch.tokens)) + 100.0
    gathered = torch.zeros_like(values)
    for micro in every(batch, 3, 40, packing=False):
        laid_out = micro.of_token(values)
        assert laid_out.shape == micro.token.shape and laid_out.dtype == values.dtype
        assert (laid_out[micro.token < 0] == 0).all()
        gathered[micro.token[micro.token >= 0]] = laid_out[micro.token >= 0]
    predicted = torch.ones(len(values), dtype=torch.bool)
    predicted[batch.cu_seqlens[:-1]] = False
    assert torch.equal(gathered[predicted], values[predicted])


@pytest.mark.parametrize("packing", [True, False])
def test_the_cut_is_a_function_of_the_batch(packing):
    def tokens(batch):
        return [micro.token.tolist() for micro in every(batch, 3, 40, packing)]

    assert tokens(make_batch(RAGGED)) == tokens(make_batch(RAGGED))


def test_ranks_share_the_work_evenly():
    for ranks in (2, 3, 4):
        predictions = [length - 1 for length in RAGGED]
        loads = [
            sum(int((micro.token >= 0).sum()) for micro in micro_batches(BATCHES["ragged"], rank, ranks, 10_000, True))
            for rank in range(ranks)
        ]
        assert sum(loads) == sum(predictions)
        assert max(loads) - min(loads) <= max(predictions)


def test_sequences_are_packed_together_up_to_the_limit():
    assert len(micro_batches(make_batch([6] * 8), 0, 1, 20, packing=True)) == 2
    assert len(micro_batches(make_batch([6] * 8), 0, 1, 19, packing=True)) == 3
    # Padded, the longest of a micro-batch sets the price of every row.
    assert [micro.inputs.shape for micro in micro_batches(make_batch([11, 3, 3]), 0, 1, 20, packing=False)] == [
        (2, 10),
        (1, 2),
    ]
    assert len(micro_batches(make_batch([11, 3, 3]), 0, 1, 14, packing=True)) == 1


def test_a_rank_without_sequences_gets_a_token_that_counts_for_nothing():
    (micro,) = micro_batches(BATCHES["one"], 1, 2, 100, packing=True)
    assert micro.inputs.shape == (1, 1)
    assert micro.token.tolist() == [[-1]]
    assert micro.of_token(torch.ones(12)).tolist() == [[0.0]]
    assert micro.positions.tolist() == [[0]]


# Pairs that stand together, pairs that are interleaved with prompts left out, and a pair of very unequal lengths.
PAIRED = {
    "neighbours": make_batch(RAGGED, prompts=[i // 2 for i in range(14)]),
    "interleaved": make_batch(RAGGED, prompts=[9, 4, 4, 0, 17, 9, 2, 30, 17, 2, 0, 30, 8, 8]),
    "equal": make_batch([6] * 8, prompts=[3, 2, 1, 0, 0, 1, 2, 3]),
    "unequal": make_batch([30, 2, 2, 29], prompts=[0, 0, 1, 1]),
    "one": make_batch([12, 5], prompts=[5, 5]),
    "empty": make_batch([], prompts=[]),
}
PAIR_CUTS = [
    (ranks, max_tokens, packing)
    for ranks in (1, 2, 3, 16)
    for max_tokens in (58, 64, 90, 10_000)
    for packing in (True, False)
]


@pytest.mark.parametrize(("ranks", "max_tokens", "packing"), PAIR_CUTS)
@pytest.mark.parametrize("name", PAIRED)
def test_pairs_stay_together_and_none_is_lost(name, ranks, max_tokens, packing):
    batch = PAIRED[name]
    seen, predicted = [], []
    for rank in range(ranks):
        mine = micro_batches(batch, rank, ranks, max_tokens, packing, pairs=True)
        assert mine
        for micro in mine:
            assert 0 < micro.inputs.numel() <= max_tokens
            real = micro.token[micro.token >= 0]
            sequences = batch.sequence_of_token[real].unique()
            assert torch.equal(real.sort().values, torch.cat([_predicted(batch, i) for i in sequences] or [real]))
            prompts = batch.prompt_index[sequences].tolist()
            assert all(prompts.count(prompt) == 2 for prompt in prompts)
            seen += prompts
            predicted += real.tolist()
    assert sorted(seen) == sorted(batch.prompt_index.tolist())
    firsts = set(batch.cu_seqlens[:-1].tolist())
    assert sorted(predicted) == [i for i in range(len(batch.tokens)) if i not in firsts]


def _predicted(batch, sequence):
    return torch.arange(int(batch.cu_seqlens[sequence]) + 1, int(batch.cu_seqlens[sequence + 1]))


def test_without_pairs_sequences_of_one_prompt_may_part():
    batch = PAIRED["equal"]
    (micro,) = micro_batches(batch, 0, 2, 10_000, packing=True)
    assert batch.prompt_index[batch.sequence_of_token[micro.token[0]].unique()].tolist() == [3, 1, 0, 2]


def test_pairs_are_shared_evenly():
    batch = PAIRED["neighbours"]
    loads = [
        sum(int((micro.token >= 0).sum()) for micro in micro_batches(batch, rank, 3, 10_000, True, pairs=True))
        for rank in range(3)
    ]
    pairs = [sum(RAGGED[i : i + 2]) - 2 for i in range(0, 14, 2)]
    assert sum(loads) == sum(pairs) and max(loads) - min(loads) <= max(pairs)


def test_pairs_are_packed_together_up_to_the_limit():
    batch = PAIRED["equal"]  # pairs of 10 predictions
    assert [m.inputs.numel() for m in micro_batches(batch, 0, 1, 20, packing=True, pairs=True)] == [20, 20]
    assert [m.inputs.numel() for m in micro_batches(batch, 0, 1, 19, packing=True, pairs=True)] == [10] * 4
    unequal = PAIRED["unequal"]
    assert [m.inputs.shape for m in micro_batches(unequal, 0, 1, 60, packing=False, pairs=True)] == [(2, 29), (2, 28)]
    assert [m.inputs.numel() for m in micro_batches(unequal, 0, 1, 60, packing=True, pairs=True)] == [59]


@pytest.mark.parametrize(("ranks", "max_tokens", "packing"), CUTS)
@pytest.mark.parametrize("name", BATCHES)
def test_rows_padded_to_a_multiple_predict_the_same_tokens_within_the_limit(name, ranks, max_tokens, packing):
    batch = BATCHES[name]
    for rank in range(ranks):
        plain = micro_batches(batch, rank, ranks, max_tokens, packing)
        padded = micro_batches(batch, rank, ranks, max_tokens, packing, multiple=16)
        real = [torch.cat([micro.token[micro.token >= 0] for micro in cut]) for cut in (plain, padded)]
        assert torch.equal(*(tokens.sort().values for tokens in real))
        for micro in padded:
            assert micro.inputs.size(1) % 16 == 0 and micro.inputs.shape == micro.positions.shape
            assert micro.inputs.numel() <= max(max_tokens, 32)  # the longest sequence alone, padded
            if micro.cu_seqlens is not None:
                ends, padding = micro.cu_seqlens[1:].tolist(), int((micro.token < 0).sum())
                assert padding < 16 and ends[-1] == micro.inputs.size(1)
                assert padding == 0 or ends[-2] == ends[-1] - padding

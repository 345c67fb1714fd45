"""Log-prob, entropy and their gradients from logits, by torch and by Triton, against float64 autograd."""

import pytest
import torch
import torch.distributed as dist
from difficulties import CASES, COLUMNS, ROWS, gradient, make_logits, reference, seeded, upstream

from megarl.ops.linear import linear_logprob
from megarl.ops.logprob import logprob_and_entropy

BOUNDS = (2e-5, 1e-5)  # log-prob, entropy


@pytest.mark.parametrize("case", CASES)
def test_log_probs_and_entropies_match_float64(ops, case):
    logits, targets, arguments = make_logits(case)
    logprob, entropy = logprob_and_entropy(logits, targets, **arguments)
    assert logprob.dtype == entropy.dtype == torch.float32
    expected_logprob, expected_entropy = reference(logits, targets, **arguments)
    assert (logprob - expected_logprob).abs().max() <= 2e-5
    assert (entropy - expected_entropy).abs().max() <= 1e-5
    assert logprob.max() <= 0 and entropy.min() >= 0


@pytest.mark.parametrize("of", [("logprob",), ("entropy",), ("logprob", "entropy")])
@pytest.mark.parametrize("case", CASES)
def test_gradients_match_float64(ops, case, of):
    logits, targets, arguments = make_logits(case)
    actual = gradient(lambda x: logprob_and_entropy(x, targets, **arguments), logits, of)
    expected = gradient(lambda x: reference(x, targets, **arguments), logits.double(), of)
    assert expected.abs().max() > 1e-2 or case in ("nearly certain", "all masked")
    assert (actual - expected).abs().max() <= 1e-4
    assert (actual[:, arguments.get("vocab_size", COLUMNS) :] == 0).all()
    if "keep" in arguments:
        assert (actual[~arguments["keep"]] == 0).all()


def test_gradients_pass_torchs_own_check(on_cpu):
    generator = seeded(1)
    logits = torch.randn(3, 7, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda x: logprob_and_entropy(x, targets, vocab_size=5, temperature=0.8), logits)


def test_in_place_the_gradient_takes_the_place_of_the_logits(ops):
    logits, targets, _ = make_logits("hot")
    expected = gradient(lambda x: logprob_and_entropy(x, targets, temperature=1.7), logits)
    leaf = logits.clone().requires_grad_()
    inner = leaf * 1.0
    logprob, entropy = logprob_and_entropy(inner, targets, temperature=1.7, in_place=True)
    by_logprob, by_entropy = upstream()
    ((logprob * by_logprob).sum() + (entropy * by_entropy).sum()).backward()
    assert torch.equal(inner.detach(), expected) and torch.equal(leaf.grad, expected)


def test_after_an_in_place_backward_pass_a_second_one_is_refused(ops):
    logits, targets, _ = make_logits("plain")
    inner = logits.requires_grad_() * 1.0
    logprob, _ = logprob_and_entropy(inner, targets, in_place=True)
    logprob.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        logprob.sum().backward()


def test_logits_and_gradients_may_lie_in_memory_as_they_like(ops):
    logits, targets, _ = make_logits("plain")
    turned = logits.t().contiguous().t().requires_grad_()
    logprob, _ = logprob_and_entropy(turned, targets)
    logprob.sum().backward()  # a gradient of one number, expanded
    straight = logits.double().requires_grad_()
    reference(straight, targets)[0].sum().backward()
    assert (turned.grad - straight.grad).abs().max() <= 1e-4


def test_log_probs_are_never_positive_and_entropies_never_negative(ops):
    generator = seeded(2)
    rows = 2000 if ops.__name__.endswith("reference") else 60
    for scale in (0.0, 1e-3, 1.0, 30.0, 1e4):
        logits = torch.randn(rows, 32, generator=generator) * scale + scale
        logprob, entropy = logprob_and_entropy(logits, logits.argmax(-1))
        assert logprob.max() <= 0
        assert entropy.min() >= 0


def test_a_certain_token_has_log_prob_zero_and_an_impossible_one_minus_infinity(ops):
    logits = torch.full((2, 6), -torch.inf)
    logits[:, 3] = 5.0
    logprob, entropy = logprob_and_entropy(logits, torch.tensor([3, 2]))
    assert logprob.tolist() == [0.0, -torch.inf]
    assert entropy.tolist() == [0.0, 0.0]


def test_uniform_logits_have_the_entropy_of_the_real_vocabulary(ops):
    _, entropy = logprob_and_entropy(torch.zeros(1, 64), torch.tensor([0]), vocab_size=50)
    assert entropy.item() == pytest.approx(torch.tensor(50.0).log().item(), abs=1e-6)


def test_temperature_divides_the_logits(ops):
    logits, targets, _ = make_logits("plain")
    hot = logprob_and_entropy(logits, targets, temperature=2.0)
    halved = logprob_and_entropy(logits / 2, targets)
    for a, b in zip(hot, halved, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shape_and_type_of_the_logits_are_kept_by_the_gradient(ops, dtype):
    generator = seeded(3)
    logits = torch.randn(2, 5, 12, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, 12, (2, 5), generator=generator)
    logprob, entropy = logprob_and_entropy(logits, targets)
    assert logprob.shape == entropy.shape == (2, 5) and logprob.dtype == torch.float32
    expected, _ = reference(logits.detach().flatten(0, 1), targets.flatten(), vocab_size=12)
    assert (logprob.flatten() - expected).abs().max() <= 2e-5
    logprob.sum().backward()
    assert logits.grad.dtype == dtype and logits.grad.shape == logits.shape
    in_float32 = gradient(
        lambda x: logprob_and_entropy(x, targets.flatten()), logits.detach().flatten(0, 1).float(), of=("logprob",)
    )
    by_logprob, _ = upstream(10)
    rounded = gradient(
        lambda x: logprob_and_entropy(x, targets.flatten()), logits.detach().flatten(0, 1), of=("logprob",)
    )
    assert (rounded.float() - in_float32).abs().max() <= torch.finfo(dtype).eps * in_float32.abs().max()


def test_the_order_of_the_rows_changes_no_bit(ops):
    logits, targets, arguments = make_logits("each row shifted")
    whole = logprob_and_entropy(logits, targets, **arguments)
    order = torch.randperm(ROWS, generator=seeded(4))
    for size in (1, 5, ROWS):
        parts = [logprob_and_entropy(logits[rows], targets[rows], **arguments) for rows in order.split(size)]
        for value, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(value[order], torch.cat(pieces))


# Tensor parallelism without processes: a slice of the columns per rank, padded columns at the end.
SPLITS = [(1, 52, 52), (2, 26, 52), (2, 26, 45), (4, 13, 50), (4, 13, 39), (4, 13, 20), (8, 7, 52), (13, 4, 45)]


@pytest.mark.parametrize(("tp", "width", "vocab_size"), SPLITS)
@pytest.mark.parametrize("case", ["plain", "each row shifted", "impossible tokens", "hot", "some masked"])
def test_slices_of_the_vocabulary_merge_to_the_whole(ops, tp, width, vocab_size, case):
    logits, targets, arguments = make_logits(case)
    logits = torch.cat([logits, torch.zeros(ROWS, tp * width - COLUMNS)], dim=1) if tp * width > COLUMNS else logits
    logits[:, vocab_size:] = 1e4
    targets = targets % vocab_size
    if case == "impossible tokens":
        logits[torch.arange(ROWS), targets] = 1.0
        logits[5, : min(width, vocab_size - 1)] = -torch.inf  # nothing possible in the first rank's slice
        targets[5] = vocab_size - 1
        logits[5, targets[5]] = 0.5
    inverse, keep = 1 / arguments.get("temperature", 1.0), arguments.get("keep")
    slices = [
        (logits[:, r * width : (r + 1) * width], r * width, max(0, min(width, vocab_size - r * width)))
        for r in range(tp)
    ]
    stats = torch.stack([ops.logit_stats(part, targets, keep, *where, inverse) for part, *where in slices])
    merged = ops.merge_stats(stats, inverse)
    logprob, entropy, log_s = ops.normalise(merged, keep, inverse)

    expected = reference(logits, targets, vocab_size=vocab_size, **arguments)
    whole = logprob_and_entropy(logits, targets, vocab_size=vocab_size, **arguments)
    for actual, in_float64, on_one_rank, bound in zip((logprob, entropy), expected, whole, BOUNDS, strict=True):
        assert (actual - in_float64).abs().max() <= bound
        assert (actual - on_one_rank).abs().max() <= 2 * bound
    assert logprob.max() <= 0

    values = (merged[:, 0], log_s, entropy, *upstream())
    shards = [
        ops.logit_grad(part, targets, keep, *values, *where, inverse, torch.empty_like(part)) for part, *where in slices
    ]
    assert all(shard.shape == (ROWS, width) for shard in shards)
    expected_gradient = gradient(lambda x: reference(x, targets, vocab_size=vocab_size, **arguments), logits.double())
    assert (torch.cat(shards, dim=1) - expected_gradient).abs().max() <= 1e-4


def check_on_a_rank(rank, store):
    """One of eight ranks, in groups of 1, 2, 4 and 8: its columns give the whole's values and their gradient."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=8)
    torch.set_num_threads(1)
    groups = {size: dist.new_group(list(range(size))) for size in (1, 2, 4, 8)}
    for size, group in groups.items():
        if rank >= size:
            continue
        for case in ("hot", "each row shifted", "impossible tokens", "some masked", "all masked"):
            check_logits(case, rank, size, group)
        for vocab_size in (56, 45, 20):  # no padding; some on the last rank; ranks that hold nothing else
            check_hidden(vocab_size, rank, size, group)
    dist.barrier()
    dist.destroy_process_group()


def check_values(found, expected, group):
    for value, right, bound in zip(found, expected, BOUNDS, strict=True):
        assert (value - right).abs().max() <= bound
        values = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
        dist.all_gather(values, value, group=group)
        assert all(torch.equal(value, other) for other in values), "the ranks disagree"


def check_logits(case, rank, size, group):
    logits, targets, arguments = make_logits(case)
    logits = torch.cat([logits, torch.full((ROWS, 4), 1e4)], dim=1)
    arguments["vocab_size"] = COLUMNS
    mine = slice(rank * 56 // size, (rank + 1) * 56 // size)

    def whole(x):
        return reference(x, targets, **arguments)

    def parallel(x):
        return logprob_and_entropy(x, targets, tp_group=group, **arguments)

    check_values(parallel(logits[:, mine]), whole(logits), group)
    expected = gradient(whole, logits.double())[:, mine]
    assert (gradient(parallel, logits[:, mine]) - expected).abs().max() <= 1e-4


def check_hidden(vocab_size, rank, size, group):
    generator = seeded(5)
    hidden, weight = torch.randn(ROWS, 16, generator=generator), torch.randn(56, 16, generator=generator)
    targets = torch.randint(0, vocab_size, (ROWS,), generator=generator)
    mine = slice(rank * 56 // size, (rank + 1) * 56 // size)
    arguments = {"vocab_size": vocab_size, "temperature": 1.7}

    def whole(x, w):
        return reference(x @ w.T, targets, **arguments)

    def parallel(x, w):
        return linear_logprob(x, w, targets, tp_group=group, **arguments)

    exact = hidden.double(), weight.double()
    check_values(parallel(hidden, weight[mine]), whole(*exact), group)
    by_hidden = gradient(lambda x: whole(x, exact[1]), exact[0])
    assert (gradient(lambda x: parallel(x, weight[mine]), hidden) - by_hidden).abs().max() <= 1e-4
    by_weight = gradient(lambda w: whole(exact[0], w), exact[1])[mine]
    assert (gradient(lambda w: parallel(hidden, w), weight[mine]) - by_weight).abs().max() <= 1e-4


@pytest.mark.processes
def test_all_ranks_agree_bitwise_and_with_float64(tmp_path):
    torch.multiprocessing.spawn(check_on_a_rank, args=(tmp_path / "store",), nprocs=8)


def test_a_slice_of_nothing_but_padding_adds_nothing(ops):
    logits, targets, _ = make_logits("plain")
    real = ops.logit_stats(logits, targets, None, 0, COLUMNS, 1.0)
    padding = ops.logit_stats(logits, targets, None, COLUMNS, 0, 1.0)
    alone, together = ops.merge_stats(torch.stack([real]), 1.0), ops.merge_stats(torch.stack([real, padding]), 1.0)
    assert torch.equal(alone, together)


def test_a_poisoned_logit_is_not_hidden(ops):
    logits, targets, _ = make_logits("plain")
    logits[3, 7] = torch.nan
    slices = [
        ops.logit_stats(logits[:, start : start + 26].contiguous(), targets, None, start, 26, 1.0) for start in (0, 26)
    ]
    logprob, entropy, _ = ops.normalise(ops.merge_stats(torch.stack(slices), 1.0), None, 1.0)
    assert logprob.isnan().nonzero().tolist() == entropy.isnan().nonzero().tolist() == [[3]]

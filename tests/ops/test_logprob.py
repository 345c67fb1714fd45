"""Log-prob, entropy and their gradients against float64 log_softmax and autograd."""

import pytest
import torch
import torch.distributed as dist

from megarl.ops.logprob import logit_grad, logit_stats, logprob_and_entropy, merge_stats

ROWS, COLUMNS = 40, 52
MINUS_INFINITY = -1e30  # in the reference: the same probability of 0 without NaNs in autograd


def make_logits(case):
    """(logits f32[ROWS, COLUMNS], targets, arguments) of a named difficulty."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(ROWS, COLUMNS, generator=generator) * 3
    targets = torch.randint(0, 45, (ROWS,), generator=generator)
    arguments = {}
    if case == "shifted up":
        logits += 300
    elif case == "shifted down":
        logits -= 300
    elif case == "each row shifted":
        logits += torch.linspace(-300, 300, ROWS)[:, None]
    elif case == "nearly certain":
        logits[torch.arange(ROWS), targets] += 80
    elif case == "impossible tokens":
        logits[torch.rand(ROWS, COLUMNS, generator=generator) < 0.4] = -torch.inf
        logits[0] = -torch.inf
        logits[torch.arange(ROWS), targets] = 1.0
    elif case == "cold":
        arguments["temperature"] = 0.6
    elif case == "hot":
        arguments["temperature"] = 1.7
    elif case == "padded vocabulary":
        arguments["vocab_size"] = 45
        logits[:, 45:] = 1e4
    elif case == "padded, hot, impossible":
        arguments |= {"vocab_size": 45, "temperature": 1.3}
        logits[::3, :20] = -torch.inf
        targets[::3] = 33
        logits[:, 45:] = torch.inf
    else:
        assert case == "plain"
    return logits, targets, arguments


CASES = [
    "plain",
    "shifted up",
    "shifted down",
    "each row shifted",
    "nearly certain",
    "impossible tokens",
    "cold",
    "hot",
    "padded vocabulary",
    "padded, hot, impossible",
]


def reference(logits, targets, vocab_size=COLUMNS, temperature=1.0):
    """(log-probs, entropies) by torch in float64, from logits[:, :vocab_size]."""
    x = logits[:, :vocab_size].double().clamp(min=MINUS_INFINITY) / temperature
    log_p = x.log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def upstream():
    """Gradients arriving at the log-probs and at the entropies."""
    generator = torch.Generator().manual_seed(8)
    return torch.randn(2, ROWS, generator=generator).unbind()


def gradient(function, logits, of=("logprob", "entropy")):
    """By the logits, of a weighted sum of the log-probs, of the entropies, or of both."""
    leaf = logits.clone().requires_grad_()
    values = zip(("logprob", "entropy"), function(leaf), upstream(), strict=True)
    sum((value * weight).sum() for name, value, weight in values if name in of).backward()
    return leaf.grad


@pytest.mark.parametrize("case", CASES)
def test_log_probs_and_entropies_match_float64(case):
    logits, targets, arguments = make_logits(case)
    logprob, entropy = logprob_and_entropy(logits, targets, **arguments)
    assert logprob.dtype == entropy.dtype == torch.float32
    expected_logprob, expected_entropy = reference(logits, targets, **arguments)
    assert (logprob - expected_logprob).abs().max() <= 2e-5
    assert (entropy - expected_entropy).abs().max() <= 1e-5


@pytest.mark.parametrize("of", [("logprob",), ("entropy",), ("logprob", "entropy")])
@pytest.mark.parametrize("case", CASES)
def test_gradients_match_float64(case, of):
    logits, targets, arguments = make_logits(case)
    actual = gradient(lambda x: logprob_and_entropy(x, targets, **arguments), logits, of)
    expected = gradient(lambda x: reference(x, targets, **arguments), logits.double(), of)
    assert expected.abs().max() > 1e-2 or case == "nearly certain"
    assert (actual - expected).abs().max() <= 1e-4
    assert (actual[:, arguments.get("vocab_size", COLUMNS) :] == 0).all()


def test_gradients_pass_torchs_own_check():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 7, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda x: logprob_and_entropy(x, targets, vocab_size=5, temperature=0.8), logits)


def test_log_probs_are_never_positive_and_entropies_never_negative():
    generator = torch.Generator().manual_seed(2)
    for scale in (0.0, 1e-3, 1.0, 30.0, 1e4):
        logits = torch.randn(2000, 32, generator=generator) * scale + scale
        logprob, entropy = logprob_and_entropy(logits, logits.argmax(-1))
        assert logprob.max() <= 0
        assert entropy.min() >= 0


def test_a_certain_token_has_log_prob_zero_and_an_impossible_one_minus_infinity():
    logits = torch.full((2, 6), -torch.inf)
    logits[:, 3] = 5.0
    logprob, entropy = logprob_and_entropy(logits, torch.tensor([3, 2]))
    assert logprob.tolist() == [0.0, -torch.inf]
    assert entropy.tolist() == [0.0, 0.0]


def test_uniform_logits_have_the_entropy_of_the_real_vocabulary():
    _, entropy = logprob_and_entropy(torch.zeros(1, 64), torch.tensor([0]), vocab_size=50)
    assert entropy.item() == pytest.approx(torch.tensor(50.0).log().item(), abs=1e-6)


def test_temperature_divides_the_logits():
    logits, targets, _ = make_logits("plain")
    hot = logprob_and_entropy(logits, targets, temperature=2.0)
    halved = logprob_and_entropy(logits / 2, targets)
    for a, b in zip(hot, halved, strict=True):
        assert torch.equal(a, b)


def test_shape_and_type_of_the_logits_are_kept_by_the_gradient():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 5, 12, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(0, 12, (2, 5), generator=generator)
    logprob, entropy = logprob_and_entropy(logits, targets)
    assert logprob.shape == entropy.shape == (2, 5) and logprob.dtype == torch.float32
    expected, _ = reference(logits.detach().flatten(0, 1), targets.flatten(), vocab_size=12)
    assert (logprob.flatten() - expected).abs().max() <= 2e-5
    logprob.sum().backward()
    assert logits.grad.dtype == torch.bfloat16 and logits.grad.shape == logits.shape


# Tensor parallelism without processes: a slice of the columns per rank, padded columns at the end.
SPLITS = [(1, 52, 52), (2, 26, 52), (2, 26, 45), (4, 13, 50), (4, 13, 39), (4, 13, 20), (13, 4, 45)]


@pytest.mark.parametrize(("tp", "width", "vocab_size"), SPLITS)
@pytest.mark.parametrize("case", ["plain", "each row shifted", "impossible tokens", "hot"])
def test_slices_of_the_vocabulary_merge_to_the_whole(tp, width, vocab_size, case):
    logits, targets, arguments = make_logits(case)
    logits[:, vocab_size:] = 1e4
    targets = targets % vocab_size
    if case == "impossible tokens":
        logits[torch.arange(ROWS), targets] = 1.0
        logits[5, : min(width, vocab_size - 1)] = -torch.inf  # nothing possible in the first rank's slice
        targets[5] = vocab_size - 1
        logits[5, targets[5]] = 0.5
    inverse = 1 / arguments.get("temperature", 1.0)
    slices = [
        (logits[:, r * width : (r + 1) * width], targets, r * width, max(0, min(width, vocab_size - r * width)))
        for r in range(tp)
    ]
    logprob, entropy, logsumexp = merge_stats(torch.stack([logit_stats(*part, inverse) for part in slices]))

    expected = reference(logits, targets, vocab_size=vocab_size, **arguments)
    whole = logprob_and_entropy(logits, targets, vocab_size=vocab_size, **arguments)
    for actual, in_float64, on_one_rank in zip((logprob, entropy), expected, whole, strict=True):
        assert (actual - in_float64).abs().max() <= 2e-5
        assert (actual - on_one_rank).abs().max() <= 4e-5
    assert logprob.max() <= 0

    by_logprob, by_entropy = upstream()
    shards = [
        logit_grad(part, targets, logsumexp, entropy, by_logprob, by_entropy, start, valid, inverse)
        for part, _, start, valid in slices
    ]
    assert all(shard.shape == (ROWS, width) for shard in shards)
    expected_gradient = gradient(lambda x: reference(x, targets, vocab_size=vocab_size, **arguments), logits.double())
    assert (torch.cat(shards, dim=1) - expected_gradient).abs().max() <= 1e-4


def check_on_a_rank(rank, store):
    """One of two ranks: its half of the columns gives the whole's values, and its half of the gradient."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    logits, targets, _ = make_logits("hot")
    mine = slice(rank * COLUMNS // 2, (rank + 1) * COLUMNS // 2)
    for vocab_size in (COLUMNS, 45, 20):  # no padding; some on rank 1; rank 1 holds nothing else
        arguments = {"vocab_size": vocab_size, "temperature": 1.7}
        logits[:, vocab_size:] = 1e4
        targets = targets % vocab_size

        def parallel(x, arguments=arguments, targets=targets):
            return logprob_and_entropy(x, targets, tp_group=dist.group.WORLD, **arguments)

        def whole(x, arguments=arguments, targets=targets):
            return reference(x, targets, **arguments)

        for value, expected in zip(parallel(logits[:, mine]), whole(logits), strict=True):
            assert (value - expected).abs().max() <= 2e-5
            values = [torch.empty_like(value) for _ in range(2)]
            dist.all_gather(values, value)
            assert torch.equal(*values), "the ranks disagree"
        expected = gradient(whole, logits.double())[:, mine]
        assert (gradient(parallel, logits[:, mine]) - expected).abs().max() <= 1e-4
    dist.destroy_process_group()


def test_two_ranks_agree_bitwise_and_with_float64(tmp_path):
    torch.multiprocessing.spawn(check_on_a_rank, args=(tmp_path / "store",), nprocs=2)


def test_a_slice_of_nothing_but_padding_adds_nothing():
    logits, targets, _ = make_logits("plain")
    real, padding = logit_stats(logits, targets, 0, COLUMNS, 1.0), logit_stats(logits, targets, COLUMNS, 0, 1.0)
    alone, together = merge_stats(torch.stack([real])), merge_stats(torch.stack([real, padding]))
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


def test_a_poisoned_logit_is_not_hidden():
    logits, targets, _ = make_logits("plain")
    logits[3, 7] = torch.nan
    slices = [logit_stats(logits[:, start : start + 26], targets, start, 26, 1.0) for start in (0, 26)]
    logprob, entropy, _ = merge_stats(torch.stack(slices))
    assert logprob.isnan().nonzero().tolist() == entropy.isnan().nonzero().tolist() == [[3]]

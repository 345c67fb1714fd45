"""Log-probs from hidden states: against float64, with its gradients, in pieces, and in little memory."""

import pytest
import torch
from difficulties import gradient, reference, seeded, upstream
from torch.profiler import ProfilerActivity, profile

from megarl.ops import tuning
from megarl.ops.linear import linear_logprob

ROWS, WIDTH, VOCABULARY = 40, 18, 53  # several tiles and blocks each way, none of them whole
CASES = {
    "plain": {},
    "cold": {"temperature": 0.6},
    "padded vocabulary": {"vocab_size": 45},
    "shifted": {},
    "some masked, hot, padded": {"keep": 3, "temperature": 1.7, "vocab_size": 50},  # all but every third
    "all masked": {"keep": 1},
}


def make(rows=ROWS, width=WIDTH, vocabulary=VOCABULARY, dtype=torch.float32):
    """(hidden [rows, width], weight [vocabulary, width], targets)."""
    generator = seeded(3)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64) * 3 / width**0.5
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, min(vocabulary, 45), (rows,), generator=generator)


def in_float64(hidden, weight, targets, **arguments):
    return reference(hidden.double() @ weight.double().T, targets, **{"vocab_size": len(weight), **arguments})


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_match_float64(ops, case):
    hidden, weight, targets = make()
    arguments = dict(CASES[case])
    if "keep" in arguments:
        arguments["keep"] = torch.arange(ROWS) % arguments["keep"] > 0
    if case == "shifted":
        hidden[:, 0], weight[:, 0] = torch.linspace(-20, 20, ROWS), 1.0
    found = linear_logprob(hidden, weight, targets, **arguments)
    for value, expected, bound in zip(
        found, in_float64(hidden, weight, targets, **arguments), (2e-5, 1e-5), strict=True
    ):
        assert value.dtype == torch.float32 and (value - expected).abs().max() <= bound
    assert found[0].max() <= 0
    for of in (("logprob",), ("entropy",), ("logprob", "entropy")):
        by_hidden = gradient(lambda x: linear_logprob(x, weight, targets, **arguments), hidden, of)
        expected = gradient(lambda x: in_float64(x, weight, targets, **arguments), hidden.double(), of)
        assert (by_hidden - expected).abs().max() <= 1e-4
        by_weight = gradient(lambda x: linear_logprob(hidden, x, targets, **arguments), weight, of)
        expected = gradient(lambda x: in_float64(hidden, x, targets, **arguments), weight.double(), of)
        assert (by_weight - expected).abs().max() <= 1e-4
        assert expected.abs().max() > 0.1 or case == "all masked"


def test_gradients_pass_torchs_own_check(on_cpu):
    hidden, weight, targets = make(5, 4, 7, torch.float64)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    keep = torch.tensor([True, True, False, True, True])
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprob(h, w, targets % 6, keep=keep, vocab_size=6, temperature=0.8), leaves
    )


def test_the_gradient_of_the_weight_is_added_to_its_main_grad(ops):
    hidden, weight, targets = make()
    expected = gradient(lambda x: linear_logprob(hidden, x, targets), weight)
    weight.requires_grad_()
    weight.main_grad = torch.ones_like(weight)
    for _ in range(2):
        logprob, entropy = linear_logprob(hidden, weight, targets)
        by_logprob, by_entropy = upstream(ROWS)
        ((logprob * by_logprob).sum() + (entropy * by_entropy).sum()).backward()
    assert weight.grad is None
    assert (weight.main_grad - 1 - 2 * expected).abs().max() <= 1e-5


def test_a_frozen_weight_gets_no_gradient():
    hidden, weight, targets = make()
    weight.main_grad = torch.zeros_like(weight)
    logprob, _ = linear_logprob(hidden.requires_grad_(), weight, targets)
    logprob.sum().backward()
    assert hidden.grad.abs().max() > 0 and weight.main_grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_in_whatever_micro_batch_it_comes(ops, dtype):
    hidden, weight, targets = make(dtype=dtype)
    whole = linear_logprob(hidden, weight, targets)
    order = torch.randperm(ROWS, generator=seeded(4))
    parts = [linear_logprob(hidden[rows], weight, targets[rows]) for rows in order.split([1, 7, ROWS - 8])]
    for value, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(value[order], torch.cat(pieces))
    masked = linear_logprob(hidden, weight, targets, keep=torch.arange(ROWS) % 2 == 0)
    for value, some in zip(whole, masked, strict=True):
        assert torch.equal(value[::2], some[::2]) and (some[1::2] == 0).all()


def test_bfloat16_weights_lose_nothing_more_unless_the_logits_are_rounded(ops):
    hidden, weight, targets = make(dtype=torch.bfloat16)
    exact, _ = in_float64(hidden, weight, targets)
    kept, _ = linear_logprob(hidden, weight, targets)
    rounded, _ = linear_logprob(hidden, weight, targets, logits_dtype=torch.bfloat16)
    assert (kept - exact).abs().max() <= 2e-5
    assert 1e-3 < (rounded - exact).abs().max() < 0.1


@pytest.mark.slow
def test_sums_of_bfloat16_products_are_not_rounded_on_the_way(monkeypatch):
    """What is left is the rounding of the logits' gradient before the products: under twice that of the result."""
    monkeypatch.undo()  # the tiles of the CPU
    hidden, weight, targets = make(600, 64, 20000, torch.bfloat16)
    rounded = {}
    for name, leaf in (("hidden", hidden), ("weight", weight)):

        def function(x, name=name, compute=linear_logprob):
            return compute(x, weight, targets) if name == "hidden" else compute(hidden, x, targets)

        expected = gradient(lambda x, function=function: function(x, compute=in_float64), leaf.double())
        error = (gradient(function, leaf) - expected).norm()
        rounded[name] = float(error / (expected.bfloat16() - expected).norm())
    assert max(rounded.values()) < 2, rounded


def test_a_token_keeps_its_bits_in_tiles_of_the_cpus_size(on_cpu, monkeypatch):
    monkeypatch.undo()
    for width, vocabulary in ((64, 97), (576, 9000)):
        hidden, weight, targets = make(300, width, vocabulary)
        whole = linear_logprob(hidden, weight, targets)
        order = torch.randperm(300, generator=seeded(4))
        parts = [linear_logprob(hidden[rows], weight, targets[rows]) for rows in order.split([1, 77, 222])]
        for value, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(value[order], torch.cat(pieces))


def test_bfloat16_gradients_are_as_good_as_their_type(ops):
    hidden, weight, targets = make(dtype=torch.bfloat16)
    by_hidden = gradient(lambda x: linear_logprob(x, weight, targets), hidden)
    expected = gradient(lambda x: in_float64(x, weight, targets), hidden.double())
    assert by_hidden.dtype == torch.bfloat16
    assert (by_hidden - expected).norm() / expected.norm() < 0.01
    weight.requires_grad_()
    weight.main_grad = torch.zeros(weight.shape)
    logprob, entropy = linear_logprob(hidden, weight, targets)
    by_logprob, by_entropy = upstream(ROWS)
    ((logprob * by_logprob).sum() + (entropy * by_entropy).sum()).backward()
    expected = gradient(lambda x: in_float64(hidden, x, targets), weight.detach().double())
    assert (weight.main_grad - expected).norm() / expected.norm() < 0.01


def peak_bytes(function) -> int:
    """The most that torch had allocated at a time beyond what was there before, by the profiler's count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        function()
    now = peak = 0
    for event in events.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.slow
def test_the_logits_are_never_in_memory(on_cpu, monkeypatch, capsys):
    monkeypatch.undo()  # the tiles of the CPU
    rows, vocabulary, width = 2048, 32000, 512
    hidden, weight, targets = make(rows, width, vocabulary)
    hidden.requires_grad_()
    weight.requires_grad_()
    weight.main_grad = torch.zeros_like(weight)

    def ours():
        logprob, entropy = linear_logprob(hidden, weight, targets)
        (logprob.sum() + entropy.sum()).backward()

    def naive():
        log_p = (hidden @ weight.T).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        (log_p.gather(-1, targets[:, None]).sum() + entropy.sum()).backward()

    tiles = [rows * columns * 4 for rows, columns in tuning.TILES["cpu"].values()]
    bound = 4 * max(tiles) + 2 * hidden.numel() * 4  # logits, two arrays in between, the boolean one; dh twice
    peaks = peak_bytes(ours), peak_bytes(naive)
    with capsys.disabled():
        print(
            f"\nlog-probs and gradients of {rows} tokens, vocabulary {vocabulary}, hidden {width}: peak "
            f"{peaks[0] / 2**20:.0f} MiB (bound {bound / 2**20:.0f}) against {peaks[1] / 2**20:.0f} MiB with logits"
        )
    assert peaks[0] <= bound
    assert peaks[1] >= 3 * rows * vocabulary * 4

"""What published kernels got wrong, each as a test of both implementations."""

import inspect

import pytest
import torch
from difficulties import implementations, reference, seeded

from megarl.ops import tuning
from megarl.ops.linear import linear_logprob
from megarl.ops.logprob import logprob_and_entropy


def logits_of(rows, columns, seed=0):
    generator = seeded(seed)
    return torch.randn(rows, columns, generator=generator), torch.randint(0, columns, (rows,), generator=generator)


def test_the_phantom_columns_of_a_last_block_hold_no_probability(ops):
    """A block that reaches beyond the vocabulary must not count what lies there as logits of 0."""
    logits, targets = logits_of(4, 37)  # 37 = 2 blocks of 16, and 5 columns
    logits -= 20  # a phantom logit of 0 would take all probability
    for value, expected in zip(logprob_and_entropy(logits, targets), reference(logits, targets), strict=True):
        assert (value - expected).abs().max() <= 2e-5
    hidden, weight = torch.ones(4, 8), torch.full((37, 8), -2.5)
    logprob, entropy = linear_logprob(hidden, weight, targets)
    assert torch.allclose(logprob, -torch.tensor(37.0).log().expand(4), atol=1e-5)
    assert torch.allclose(entropy, torch.tensor(37.0).log().expand(4), atol=1e-5)


@pytest.mark.parametrize("shift", [-150.0, -1e4, 150.0, 1e4])
def test_the_running_maximum_does_not_start_at_zero(ops, shift):
    logits, targets = logits_of(4, 40)
    near, far = (logprob_and_entropy(x, targets) for x in (logits, logits + shift))
    rounding = abs(shift) * 2**-22  # of the shifted logits themselves
    for a, b in zip(near, far, strict=True):
        assert b.isfinite().all() and (a - b).abs().max() <= 1e-5 + rounding


def test_a_log_prob_is_not_positive_where_one_token_is_all_but_certain(ops):
    logits, targets = logits_of(32, 40)
    for height in (5.0, 17.0, 40.0, 88.0, 200.0):
        high = logits.clone()
        high[torch.arange(32), targets] += height
        logprob, _ = logprob_and_entropy(high, targets)
        assert logprob.max() <= 0


def test_the_entropy_is_that_of_the_whole_distribution(ops):
    """Not -p log p of the sampled token."""
    logits, targets = logits_of(6, 40)
    other = (targets + 1) % 40
    (_, entropy), (_, same) = logprob_and_entropy(logits, targets), logprob_and_entropy(logits, other)
    log_p = logits.double().log_softmax(-1)
    assert torch.equal(entropy, same)
    assert (entropy + (log_p.exp() * log_p).sum(-1)).abs().max() <= 1e-5


def test_no_kernel_is_tuned_by_running_it():
    """Autotuning runs a kernel many times over its arguments; one that writes in place would spoil them."""
    from triton.runtime.autotuner import Autotuner, Heuristics

    kernels = implementations()["triton"]
    named = [value for name, value in inspect.getmembers(kernels) if name.endswith("_kernel")]
    assert len(named) == 4 and not any(isinstance(kernel, Autotuner | Heuristics) for kernel in named)


def test_in_place_and_out_of_place_gradients_are_the_same_bits(ops):
    logits, targets = logits_of(6, 40)
    m, log_s, entropy, by_logprob, by_entropy = torch.randn(5, 6, generator=seeded(1))
    arguments = (targets, None, m, log_s, entropy, by_logprob, by_entropy, 0, 37, 0.7)
    apart = ops.logit_grad(logits, *arguments, torch.full_like(logits, torch.nan))
    again = ops.logit_grad(logits, *arguments, torch.full_like(logits, torch.nan))
    within = ops.logit_grad(logits, *arguments, logits)
    assert torch.equal(apart, again) and torch.equal(apart, within) and within is logits
    assert (within[:, 37:] == 0).all()


def test_rows_beyond_32_bits_are_found(ops):
    """50,000 tokens of a vocabulary of 151,936 have more elements than 32 bits count."""
    stride = 2**30 + 8
    memory = torch.empty(3 * stride, dtype=torch.bfloat16)  # only what is touched takes room
    wide = memory.as_strided((3, 20), (stride, 1))
    logits, targets = logits_of(3, 20)
    wide.copy_(logits)
    for found, expected in zip(
        logprob_and_entropy(wide, targets), logprob_and_entropy(logits.bfloat16(), targets), strict=True
    ):
        assert torch.equal(found, expected)
    values = (torch.zeros(3), torch.full((3,), 3.0), torch.zeros(3), torch.ones(3), None, 0, 20, 1.0)
    near = ops.logit_grad(logits.bfloat16(), targets, None, *values, torch.empty(3, 20, dtype=torch.bfloat16))
    assert torch.equal(ops.logit_grad(wide, targets, None, *values, wide), near)


def test_a_masked_target_is_not_looked_up(ops):
    logits, targets = logits_of(4, 40)
    keep = torch.tensor([True, False, True, False])
    targets[~keep] = 2**40
    logits[~keep] = torch.nan
    logprob, entropy = logprob_and_entropy(logits.requires_grad_(), targets, keep=keep)
    (logprob.sum() + entropy.sum()).backward()
    assert (logprob[~keep] == 0).all() and (entropy[~keep] == 0).all() and (logits.grad[~keep] == 0).all()
    assert logprob[keep].isfinite().all() and logits.grad[keep].abs().max() > 0


def test_weights_of_zero_give_gradients_of_zero(ops):
    logits, targets = logits_of(4, 40)
    logits.requires_grad_()
    logprob, entropy = logprob_and_entropy(logits, targets)
    ((logprob + entropy) * 0.0).sum().backward()
    assert (logits.grad == 0).all()


def test_a_device_without_a_row_of_its_own_takes_the_first(monkeypatch):
    tuning._device_name.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, row in (("NVIDIA H100 80GB HBM3", "NVIDIA H100"), ("Some other GPU", next(iter(tuning.KERNELS)))):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        tuning._device_name.cache_clear()
        assert tuning.tuned("logit_grad") == tuning.KERNELS[row]["logit_grad"]
        assert tuning.tile("forward", torch.device("cuda")) == tuning.TILES[row]["forward"]
    tuning._device_name.cache_clear()

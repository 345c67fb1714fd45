"""Logits that are hard to get right, and the same quantities by torch in float64."""

import torch

ROWS, COLUMNS = 24, 52
MINUS_INFINITY = -1e30  # in the reference: the same probability of 0 without NaNs in autograd
CASES = [
    "plain",
    "shifted up",
    "shifted down",
    "each row shifted",
    "nearly certain",
    "impossible tokens",
    "cold",
    "cold, shifted down",
    "hot",
    "padded vocabulary",
    "padded, hot, impossible",
    "some masked",
    "all masked",
]


def implementations():
    """The two modules that compute the ops."""
    from megarl.ops import kernels, reference

    return {"torch": reference, "triton": kernels}


def seeded(seed):
    """Random numbers for tensors on the device that is the default."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def make_logits(case):
    """(logits f32[ROWS, COLUMNS], targets, arguments) of a named difficulty."""
    generator = seeded(7)
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
    elif case == "cold, shifted down":
        arguments["temperature"] = 0.6
        logits -= 300
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
    elif case in ("some masked", "all masked"):
        keep = torch.arange(ROWS) % 3 == 1 if case == "some masked" else torch.zeros(ROWS, dtype=torch.bool)
        arguments["keep"] = keep
        logits[~keep] = torch.nan
        targets[~keep] = -100
    else:
        assert case == "plain"
    return logits, targets, arguments


def reference(logits, targets, vocab_size=COLUMNS, temperature=1.0, keep=None):
    """(log-probs, entropies) by torch in float64, from logits[:, :vocab_size]; 0 where `keep` is False."""
    if keep is not None:
        logits, targets = logits.masked_fill(~keep[:, None], 0.0), targets.masked_fill(~keep, 0)
    x = logits[:, :vocab_size].double().clamp(min=MINUS_INFINITY) / temperature
    log_p = x.log_softmax(-1)
    values = log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    return values if keep is None else tuple(torch.where(keep, value, 0.0) for value in values)


def upstream(rows=ROWS):
    """Gradients arriving at the log-probs and at the entropies."""
    generator = seeded(8)
    return torch.randn(2, rows, generator=generator).unbind()


def gradient(function, leaf, of=("logprob", "entropy")):
    """By the leaf, of a weighted sum of the log-probs, of the entropies, or of both."""
    leaf = leaf.detach().clone().requires_grad_()
    found = function(leaf)
    values = zip(("logprob", "entropy"), found, upstream(len(found[0])), strict=True)
    sum((value * weight).sum() for name, value, weight in values if name in of).backward()
    return leaf.grad

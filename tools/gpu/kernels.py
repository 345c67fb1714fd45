"""The ops on real shapes against float64, the matrix products that they rest on, and the kernel benchmark's bars."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from gpu.report import Report
from megarl.algorithms.loss import token_rule
from megarl.algorithms.recipes import RECIPES
from megarl.ops import reference
from megarl.ops.implementation import implementation
from megarl.ops.linear import _add_product, linear_logits, linear_logprob
from megarl.ops.logprob import logprob_and_entropy

BENCHMARK = Path(__file__).resolve().parents[1] / "bench/kernels.py"
GPU = torch.cuda.is_available()
VOCABULARIES = (32000, 50257, 151936) if GPU else (1000,)
TOKENS, HIDDEN, ROWS = (1024, 1536, 128) if GPU else (64, 64, 32)
KNOWN_MISSES = ("linear_logprob: by_hidden", "linear_logprob: by_weight")
Values = tuple[Tensor, Tensor]  # log-probs, entropies


def run(report: Report) -> None:
    torch.manual_seed(0)
    with torch.device("cuda" if GPU else "cpu"):
        for check in (products, logits_ops, hidden_ops, epilogues):
            with report.attempt(check.__name__):
                check(report)
    with report.attempt("benchmark"):
        benchmark(report)


def products(report: Report) -> None:
    """linear_logprob's: float32 out of bf16, into the corner of a wider array; added onto float32 in place."""
    hidden, weight = torch.randn(200, HIDDEN).bfloat16(), torch.randn(999, HIDDEN).bfloat16()
    exact = hidden.double() @ weight.double().T
    space = torch.full((256, 1024), torch.nan)
    report.at_most("bf16 product into float32", _relative(linear_logits(hidden, weight, space), exact), 1e-5)
    untouched = space[200:].isnan().all() and space[:200, 999:].isnan().all()
    report.holds("what lies beside it is untouched", bool(untouched))
    total = torch.ones(200, 999)
    _add_product(total, hidden, weight.t())
    report.at_most("bf16 product added to float32", _relative(total, exact + 1), 1e-5)
    # TF32 would be 3e-4
    report.at_most("float32 product", _relative(linear_logits(hidden.float(), weight.float(), space), exact), 1e-5)


def logits_ops(report: Report) -> None:
    for vocabulary in VOCABULARIES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            valid, temperature = vocabulary - 7, 0.8
            logits = (torch.randn(TOKENS, vocabulary) * 3).to(dtype)
            ids, upstream = torch.randint(0, valid, (TOKENS,)), torch.randn(2, TOKENS)
            leaf = logits.clone().requires_grad_()
            found = logprob_and_entropy(leaf, ids, vocab_size=valid, temperature=temperature)
            _weighted(found, upstream).backward()
            worst = [0.0, 0.0, 0.0]
            for rows in torch.arange(TOKENS).split(ROWS):
                exact = logits[rows].double().requires_grad_()
                values = _exact(exact[:, :valid] / temperature, ids[rows])
                _weighted(values, upstream[:, rows]).backward()
                pairs = zip((found[0][rows], found[1][rows], leaf.grad[rows]), (*values, exact.grad), strict=True)
                worst = [max(w, _largest(a, b)) for w, (a, b) in zip(worst, pairs, strict=True)]
            what = f"V={vocabulary} {str(dtype).removeprefix('torch.')}"
            limits = (2e-5, 1e-5, 1e-4 if dtype == torch.float32 else 2e-2)
            for name, value, limit in zip(("log-prob", "entropy", "gradient"), worst, limits, strict=True):
                report.at_most(f"{what}: {name}", value, limit)


def hidden_ops(report: Report) -> None:
    vocabulary = VOCABULARIES[-1]
    for dtype in (torch.float32, torch.bfloat16):
        hidden = torch.randn(TOKENS, HIDDEN).to(dtype)
        weight = (torch.randn(vocabulary, HIDDEN) * 3 / HIDDEN**0.5).to(dtype)
        ids, upstream = torch.randint(0, vocabulary, (TOKENS,)), torch.randn(2, TOKENS)
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        w.main_grad = torch.zeros(weight.shape)
        found = linear_logprob(h, w, ids)
        _weighted(found, upstream).backward()
        worst, of_product = [0.0, 0.0], [0.0, 0.0]
        space, by_hidden = torch.empty(ROWS, vocabulary), torch.empty(TOKENS, HIDDEN, dtype=torch.float64)
        exact_weight = weight.double()
        by_weight = torch.zeros_like(exact_weight)
        for rows in torch.arange(TOKENS).split(ROWS):
            logits = (hidden[rows].double() @ exact_weight.T).requires_grad_()
            values = _exact(logits, ids[rows])
            _weighted(values, upstream[:, rows]).backward()
            worst = [max(x, _largest(a[rows], b)) for x, a, b in zip(worst, found, values, strict=True)]
            product = _exact(linear_logits(hidden[rows], weight, space).double(), ids[rows])
            of_product = [max(x, _largest(a, b)) for x, a, b in zip(of_product, product, values, strict=True)]
            by_hidden[rows] = logits.grad @ exact_weight
            by_weight += logits.grad.T @ hidden[rows].double()
        what = f"linear_logprob V={vocabulary} {str(dtype).removeprefix('torch.')}"
        for name, value, own in zip(("log-prob", "entropy"), worst, of_product, strict=True):
            report.number(f"{what}: {name}, error of the product alone", own, "nats")
            report.at_most(f"{what}: {name}", value, 2e-5 + 1.5 * own)
        limit = 1e-5 if dtype == torch.float32 else 1e-2
        report.at_most(f"{what}: gradient by hidden", _relative(h.grad, by_hidden), limit)
        report.at_most(f"{what}: gradient by weight", _relative(w.main_grad, by_weight), limit)
        order, before = torch.randperm(TOKENS), found[0].detach()
        parts = [linear_logprob(hidden[rows], weight, ids[rows])[0] for rows in order.split(TOKENS // 3 + 1)]
        moved = int((torch.cat(parts) != before[order]).sum())
        report.at_most(f"{what}: tokens whose bits depend on their micro-batch", moved, 0)
        again = int((linear_logprob(hidden, weight, ids)[0] != before).sum())
        report.at_most(f"{what}: tokens that differ when run again", again, 0)


def epilogues(report: Report) -> None:
    """Every recipe's rule, by what computes it here and by torch."""
    value = torch.randn(7, 4099)
    given = (-value[0].abs(), value[1] * 0.5, value[2], value[3].abs(), value[4].abs())
    rules = [token_rule(recipe) for recipe in RECIPES.values() if recipe.objective == "policy_gradient"]
    worst = 0.0
    for rule in rules:
        optional = (value[5].abs() if rule.entropy_coef else None, -value[6].abs() if rule.kl_coef else None)
        found = implementation(value).policy_epilogue(rule, *given, *optional)
        for a, b in zip(found, reference.policy_epilogue(rule, *given, *optional), strict=True):
            worst = max(worst, float(((a - b).abs() / (1 + b.abs())).max()))
    report.at_most(f"policy_epilogue, {len(rules)} recipes", worst, 1e-5)


def benchmark(report: Report) -> None:
    """tools/bench/kernels.py, its tables and JSON kept beside this check's, and its bars."""
    small = ("--device", "cpu", "--tokens", "24", "--vocabulary", "600", "--hidden", "32", "--blocks", "1")
    options = small if report.dry_run else ("--blocks", "2", "--repeats", "3")
    folder = report.folder / "kernels"
    command = [sys.executable, str(BENCHMARK), *options, "--out", str(folder)]
    subprocess.run(command, check=True, timeout=max(10.0, report.seconds_left - 5))
    written = json.loads((folder / "kernels.json").read_text())
    for bar in written["bars"]:
        if bar["bar"].startswith(KNOWN_MISSES):
            report.number(bar["bar"], bar["value"], f"of {bar['limit']:g}, missed as docs/kernels.md says")
        elif bar["value"] is not None:
            report.at_most(bar["bar"], bar["value"], bar["limit"])
    for name, reason in written["absent"].items():
        report.skipped(name, reason)


def _exact(logits: Tensor, ids: Tensor) -> Values:
    log_p = logits.log_softmax(-1)
    return log_p.gather(-1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def _weighted(values: Values, upstream: Tensor) -> Tensor:
    return (values[0] * upstream[0]).sum() + (values[1] * upstream[1]).sum()


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _largest(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).abs().max())

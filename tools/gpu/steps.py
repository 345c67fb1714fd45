"""Updates of a random model: seconds, tokens/s, MFU and memory."""

from __future__ import annotations

import gc
import math
import time
from statistics import median
from typing import Any

import torch

from gpu.models import GPU, layers_of, make_batch, make_config, make_learner, only_update, random_model
from gpu.report import Report

PEAK = {"fp32": 67e12, "bf16": 989e12, "fp8": 1979e12}  # of an H100, dense, FLOP/s
SEQUENCES, LENGTH, PROMPT = 32, 1025, 256


def measure(report: Report, size: str, precision: str, seconds: float, multiple: int | None = None) -> None:
    """One optimizer update of 32 sequences of 1025 tokens, a quarter of them prompt, again and again.

    MFU counts the products of weights (the output layer's for the tokens that it computes) and causal attention,
    forward and backward, without what is computed again, over the peak of an H100 in this precision.
    """
    what = f"{size} {precision}"
    sequences, length, prompt = (4, 33, 8) if report.dry_run else (SEQUENCES, LENGTH, PROMPT)
    with report.attempt(what):
        began = time.monotonic()
        learner = make_learner(make_config(random_model(size, report.folder), precision, prompt + 1, length))
        learner.token_multiple = multiple or learner.token_multiple
        batch = make_batch([length] * sequences, prompt, learner.arch.vocab_size)
        report.number(f"{what}: layers", layers_of(learner))
        report.number(f"{what}: ready", time.monotonic() - began, "s")
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        deal, share = learner.deal(batch), only_update(learner, batch)
        first, losses = _seconds(lambda: learner.update(share, 0).loss)
        taken: dict[str, list[float]] = {"score": [], "backward": [], "update": []}
        ends, all_losses = time.monotonic() + seconds, [losses]
        while len(taken["update"]) < 2 or time.monotonic() < ends:
            taken["score"].append(_seconds(lambda: learner.score(deal.whole()))[0])
            taken["backward"].append(_seconds(lambda: learner.backward(share))[0])
            update, loss = _seconds(lambda: learner.update(share, 0).loss)
            taken["update"].append(update)
            all_losses.append(loss)
        report.holds(f"{what}: losses are finite", all(map(math.isfinite, all_losses)))
        update = median(taken["update"])
        report.number(f"{what}: update", sequences * (length - 1) / update, "tokens/s")
        report.number(f"{what}: MFU", 100 * _flops(learner.arch, batch) / update / PEAK[precision], "%")
        report.number(f"{what}: first update", first, "s")
        for name, values in taken.items():
            report.number(f"{what}: seconds of {name}", median(values), "s")
        if GPU:
            report.number(f"{what}: peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    learner = None
    gc.collect()
    torch.cuda.empty_cache()


def _seconds(function: Any) -> tuple[float, Any]:
    torch.cuda.synchronize()
    began = time.monotonic()
    result = function()
    torch.cuda.synchronize()
    return time.monotonic() - began, result


def _flops(arch: Any, batch: Any) -> float:
    """Of one update."""
    predictions, responses = int((batch.lengths - 1).sum()), int(batch.mask.sum())
    heads, groups = arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
    layer = arch.hidden_size * (2 * heads + 2 * groups + 3 * arch.ffn_hidden_size)
    attention = float((batch.lengths - 1).square().sum()) * heads  # of a token with half of its sequence, twice
    forward = arch.num_layers * (2 * predictions * layer + 2 * attention)
    return 3 * (forward + 2 * responses * arch.hidden_size * arch.vocab_size)

"""vLLM beside the learner on one device: their log-probs before and after an update, and where a weight update's time
goes."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu.models import GPU, make_config, make_learner, only_update, random_model, score
from gpu.report import Report
from megarl.batch import build_demonstration_batch
from megarl.learner.agreement import LIMITS
from megarl.models.family import architecture, read_hf_config
from megarl.models.weights import manifest
from megarl.rollout.messages import Request, Sampling
from megarl.rollout.pool import RolloutPool


def run(report: Report) -> None:
    precision = "bf16" if GPU else "fp32"
    size, count, prompt, response = ("0.5B", 256, 64, 256) if GPU else ("toy", 8, 12, 8)
    rollout = {"max_response_tokens": response, "bucket_mib": 256 if GPU else 1, "enforce_eager": True}
    options = {"rollout": rollout, "optim": {"lr": 1e-3 if GPU else 1e-2}}
    config = make_config(random_model(size, report.folder), precision, prompt, response, **options)
    names = manifest(architecture(read_hf_config(config.model.path)))
    began = time.monotonic()
    with RolloutPool(config, report.folder / "engine", names) as pool:
        pool.wait_ready()
        report.number("engine ready", time.monotonic() - began, "s")
        learner = make_learner(config)
        for version, when in enumerate(("before an update", "after an update")):
            started = time.monotonic()
            pool.update_weights(learner.hf_weights(), version)
            report.number(f"weights {when}: in all", time.monotonic() - started, "s")
            for part, seconds in pool.clock.take().items():
                report.number(f"weights {when}: {part}", seconds, "s")
            batch, by_engine, rate = _sample(pool, learner.arch.vocab_size, count, prompt, response)
            by_learner = score(learner, batch)[batch.mask > 0]
            report.number(f"generation {when}", rate, "tokens/s")
            difference = (by_learner - by_engine).abs()
            report.at_most(f"engine against learner, mean, {when}", float(difference.mean()), LIMITS[precision], "nats")
            report.number(f"engine against learner, largest, {when}", float(difference.max()), "nats")
            if version == 0:
                learner.update(only_update(learner, batch), 0)
                moved = float((score(learner, batch)[batch.mask > 0] - by_learner).abs().mean())
                # Else agreement after the update would prove nothing.
                report.holds(
                    "the update moves what they agree on", moved > 5 * float(difference.mean()), f"{moved:.2g} nats"
                )


def _sample(pool: RolloutPool, vocabulary: int, count: int, prompt: int, response: int) -> tuple[Any, Tensor, float]:
    """(batch of prompts and responses, the engine's log-probs of the responses, tokens a second)."""
    generator = np.random.default_rng(0)
    requests = [Request(generator.integers(2, vocabulary, prompt).tolist(), seed=i) for i in range(count)]
    began = time.monotonic()
    answers = pool.run(pool.generate(requests, Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=response)))
    took = time.monotonic() - began
    pairs = [(np.array(r.prompt_ids), a.token_ids) for r, a in zip(requests, answers, strict=True)]
    logprobs = torch.from_numpy(np.concatenate([answer.logprobs for answer in answers]))
    return build_demonstration_batch(pairs), logprobs, len(logprobs) / took

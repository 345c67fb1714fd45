"""One optimizer update with each group's prompt computed once, and with each response computing its own, in turns.

    python tools/bench/update.py [--config smollm2_135m_gsm8k] [--prompts 2] [--samples 8] [--repeats 3] [key=value ...]

Prompts are the config's training problems, responses random tokens of ragged lengths up to rollout.max_response_tokens;
one rank, the recipe's loss, forward and backward, the optimizer's step. Prints seconds, response tokens a second, the
ratio of each pair, and how far the two gradients are apart. --out writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megarl.batch import Batch, build_demonstration_batch
from megarl.config import load_config
from megarl.data.prompts import load_prompts
from megarl.data.tokenizer import load_tokenizer
from megarl.learner.learner import Learner
from megarl.learner.mesh import Mesh
from megarl.models.family import read_hf_config

ONE_RANK = ["learner.world_size=1", "learner.tensor_model_parallel_size=1", "learner.pipeline_model_parallel_size=1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="smollm2_135m_gsm8k")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of updates")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    config = load_config(options.config, [*ONE_RANK, *options.overrides])
    mesh = Mesh(config.learner)
    learner = Learner(config, config.recipe, read_hf_config(config.model.path), mesh)
    batch = samples(config, options.prompts, options.samples, learner.arch.vocab_size)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    gradients, tokens = {}, {}
    for repeat in range(options.repeats + 1):
        for shared in seconds:
            learner.share_prompts = shared
            deal = learner.annotate(learner.deal(batch))
            (share,), tokens[shared] = learner.updates(deal), deal.plan.tokens
            began = time.perf_counter()
            learner.backward(share)
            took = time.perf_counter() - began
            gradients[shared] = torch.cat([tensor.flatten() for tensor in learner.policy.gradients])
            print(f"{repeat}: shared={shared} {took:.2f} s", file=sys.stderr)
            if repeat:  # the first warms up
                seconds[shared].append(took)
    responses = int(batch.mask.sum())
    result: dict[str, Any] = {
        "sequences": len(batch),
        "tokens": {"shared": tokens[True], "unshared": tokens[False]},
        "seconds": {"shared": seconds[True], "unshared": seconds[False]},
        "response_tokens_per_second": {
            name: responses / statistics.median(seconds[shared])
            for name, shared in (("shared", True), ("unshared", False))
        },
        "ratio": [u / s for s, u in zip(seconds[True], seconds[False], strict=True)],
        "gradients_apart": float((gradients[True] - gradients[False]).norm() / gradients[False].norm()),
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    mesh.close()


def samples(config: Any, prompts: int, count: int, vocabulary: int) -> Batch:
    """So many responses to each of the first prompts."""
    rng = np.random.default_rng(0)
    asked = load_prompts(config.data, "train", load_tokenizer(config.model.path)).prompts[:prompts]
    most = config.rollout.max_response_tokens
    pairs = [
        (prompt.token_ids, rng.integers(2, vocabulary, rng.integers(most // 4, most + 1)))
        for prompt in asked
        for _ in range(count)
    ]
    batch = build_demonstration_batch(pairs)
    batch.prompt_index = torch.arange(len(batch)) // count
    return batch


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()

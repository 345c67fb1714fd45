"""A large step dealt to data-parallel ranks, and its metrics: seconds and bytes of each rank, without a model.

    torchrun --standalone --nproc-per-node 8 tools/bench/scatter.py [--prompts 1024] [--samples 16] [--median 3000]

Lengths are log-normal; the log-probs that a model would give are random. Every rank is a process on this machine, which
they share: seconds are those of a rank that has a core to itself only where there are as many. --out writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megarl.batch import Credit, Kept, Update
from megarl.config import parse_config
from megarl.data.plan import Deal, Rules, make_plan
from megarl.learner.agreement import step_agreement
from megarl.learner.mesh import Mesh
from megarl.metrics import update_metrics
from megarl.types import Prompt, Sample, SampleGroup

MICRO_BATCH = 32_768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--median", type=int, default=3000, help="response tokens")
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    config = parse_config(
        {
            "model": {"path": "none"},
            "data": {"train": "arithmetic"},
            "recipe": "dapo",
            "schedule": {"prompts_per_step": options.prompts, "samples_per_prompt": options.samples},
        }
    )
    mesh = Mesh(config.learner)
    groups = make_groups(options) if mesh.rank == 0 else []
    mesh.barrier()
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}

    def timed(name: str, function: Any) -> Any:
        mesh.barrier()
        began = time.process_time(), time.perf_counter()
        result = function()
        seconds[name] = {"cpu": time.process_time() - began[0], "wall": time.perf_counter() - began[1]}
        return result

    def plan_step() -> Any:
        if mesh.rank:
            return None, None
        count = sum(len(group.samples) for group in groups)
        kept = Kept(groups, Credit(torch.ones(count, dtype=torch.bool), torch.ones(count), torch.ones(count)))
        return kept, make_plan(kept, Rules(mesh.dp_size, MICRO_BATCH, share_prompts="auto"))

    def scatter() -> Deal:
        parts = (kept.select(plan.numbers(rank)) for rank in range(mesh.dp_size)) if plan else None
        return Deal(mesh.broadcast(plan), mesh.dp_rank, mesh.scatter(parts).batch())

    kept, plan = timed("plan", plan_step)
    deal = timed("scatter", scatter)
    batch = deal.batch
    logprobs = batch.rollout_logprobs + 1e-4 * torch.randn(len(batch.tokens)) * batch.mask
    batch.old_logprobs = logprobs.clone()
    update = Update(logprobs, -logprobs, 0.0, 0.0, 0.0)
    shares = timed("weights", lambda: deal.updates(lambda tokens, _: 1 / tokens.double()))
    timed("metrics", lambda: update_metrics(config.recipe, [(shares[0], update)], mesh))
    timed("agreement", lambda: step_agreement(config, mesh, 0, deal, deal, [(shares[0], update)]))
    bytes_of_batch = sum(v.numel() * v.element_size() for v in vars(batch).values() if torch.is_tensor(v))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mine = {"seconds": seconds, "batch_mib": bytes_of_batch / 2**20, "peak_growth_mib": (peak - before) / 1024}
    everyone = mesh.gather(mine | {"tokens": len(batch.tokens)})
    if mesh.rank == 0:
        result = {"tokens": sum(one["tokens"] for one in everyone), "micro_batches": len(shares[0].micro_batches)}
        result["ranks"] = everyone
        print(json.dumps(result, indent=2))
        if options.out:
            options.out.write_text(json.dumps(result, indent=2) + "\n")
    mesh.close()


def make_groups(options: argparse.Namespace) -> list[SampleGroup]:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(options.median), 0.8, (options.prompts, options.samples))).astype(int)
    lengths = lengths.clip(16, MICRO_BATCH - options.prompt_tokens)
    return [
        SampleGroup(
            Prompt(str(i), "", rng.integers(0, 99, options.prompt_tokens, np.int32), "", "test"),
            [
                Sample(
                    j,
                    rng.integers(0, 99, length, np.int32),
                    -rng.random(length, np.float32),
                    "",
                    "stop",
                    np.zeros(length, np.int32),
                )
                for j, length in enumerate(row)
            ],
        )
        for i, row in enumerate(lengths)
    ]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

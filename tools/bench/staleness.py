"""What generating ahead of learning saves: the same training with schedule.max_staleness 0, 1 and 2, in turns.

    python tools/bench/staleness.py [--config quickstart] [--staleness 0 1 2] [--repeats 3] [--block 10] [key=value ...]

All are loaded; while one runs a block of steps the others are stopped. Prints medians over all steps: the step, what
the learner waits for, and how long generation and grading took beside it. --out writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from blocks import Megarl, Row, median, phase_seconds

OVERRIDES = ["recipe.old_policy=rollout", "data.eval=null", "run.export=false", "rollout.stall_seconds=1000000"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="interleaved blocks of each")
    parser.add_argument("--block", type=int, default=10, help="steps per block")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    runs: dict[int, Megarl] = {}
    blocks: dict[int, list[list[Row]]] = {k: [] for k in options.staleness}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for k in options.staleness:
                ahead = [f"schedule.max_staleness={k}"]
                runs[k] = Megarl(Path(folder) / f"staleness_{k}", options.config, OVERRIDES + ahead + options.overrides)
            for repeat in range(options.repeats):
                for k, run in runs.items():
                    blocks[k].append(run.block(options.block))
                print(f"repeat {repeat + 1}/{options.repeats} done", file=sys.stderr)
        finally:
            for run in runs.values():
                run.close()
    result = {f"staleness {k}": summary(of_k, blocks[options.staleness[0]]) for k, of_k in blocks.items()}
    for name, values in result.items():
        print(name, json.dumps(values, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def summary(blocks: list[list[Row]], first: list[list[Row]]) -> dict[str, Any]:
    rows = [row for block in blocks for row in block]
    step = median(rows, "time/step")
    medians, of_first = ([median(block, "time/step") for block in of] for of in (blocks, first))
    return {
        "step_seconds": step,
        "times_the_first": [one / other for one, other in zip(medians, of_first, strict=True)],  # block by block
        "phase_seconds": phase_seconds(rows),
        "learner_idle_share": median(rows, "time/rollout") / step,
        "engines_idle_share": 1 - median(rows, "time/engines") / step,
        "tokens_per_step": statistics.mean(row["tokens/generated"] for row in rows),
        "staleness": statistics.mean(row["staleness/mean"] for row in rows),
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

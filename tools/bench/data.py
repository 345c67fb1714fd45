"""Seconds and peak memory of what the start of a run does with many rows, up to the prompts of its first step.

    python tools/bench/data.py FOLDER --model MODEL [--rows 860000] [--kind sft] [key=value ...]

FOLDER gets rows of the size of NuminaMath-CoT's, unless it has them: problems of about 250 characters with a short
answer (jsonl, parquet), or with a solution of about 900 (sft). As in a run, one process checks and hands another, which
stands for rank 0, what it has read. `reading` is a process that does no more than read the rows. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megarl.config import Config, load_config

FILES = {"jsonl": "rows.jsonl", "parquet": "rows.parquet", "sft": "sft.jsonl"}
WORDS = r"""
the of a let and is to in that find for are number if with real such positive integers sum $x$ $n$ $f(x)$ = + prove
$\frac{1}{2}$ $a^2+b^2$ triangle circle $\angle ABC$ determine value points line each which can $\sqrt{3}$ 12 2024 0.5 %
\begin{align*} &= \\ \boxed{} therefore we have follows equation function respectively, area. At? (1) segment, minimum
"""


def text(rng: random.Random, known: list[str], characters: float) -> str:
    """Of log-normal length with that mean; one in ten isn't ASCII."""
    left, words = rng.lognormvariate(-0.245, 0.7) * characters, ["求最小值" if rng.random() < 0.1 else "Let"]
    while left > 0:
        words.append(rng.choice(known) if rng.random() < 0.8 else str(rng.randrange(10_000)))
        left -= len(words[-1]) + 1
    return " ".join(words)


def make_rows(count: int, folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    rng, known = random.Random(0), WORDS.split()
    schema = pyarrow.schema({"problem": pyarrow.string(), "answer": pyarrow.string()})
    with (
        (folder / FILES["jsonl"]).open("w") as answers,
        (folder / FILES["sft"]).open("w") as solutions,
        pyarrow.parquet.ParquetWriter(folder / FILES["parquet"], schema) as table,
    ):
        for start in range(0, count, 10_000):
            group = []
            for i in range(start, min(start + 10_000, count)):
                group.append({"problem": text(rng, known, 250), "answer": str(rng.randrange(10 ** (i % 5 + 1)))})
                solution = {"problem": group[-1]["problem"], "answer": text(rng, known, 900)}
                answers.write(json.dumps(group[-1], ensure_ascii=False) + "\n")
                solutions.write(json.dumps(solution, ensure_ascii=False) + "\n")
            table.write_table(pyarrow.Table.from_pylist(group, schema))


class Laps:
    """Of this process: [wall seconds, CPU seconds] of each, so that a busy machine shows."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}
        self._since = time.perf_counter(), time.process_time()

    def end(self, name: str) -> None:
        now = time.perf_counter(), time.process_time()
        self.told[name] = [round(after - before, 1) for before, after in zip(self._since, now, strict=True)]
        self._since = now


def reading(config: Config, command: str, found: Path) -> dict[str, Any]:
    from megarl.data.sources import Rows

    laps = Laps()
    for _ in Rows("data.train", config.data.train):
        pass
    laps.end("read")
    return laps.told


def checks(config: Config, command: str, found: Path) -> dict[str, Any]:
    from megarl.data.tokenizer import load_tokenizer
    from megarl.preflight import check_data, check_prompts, check_reward

    load_tokenizer(config.model.path)  # what it imports, and takes, has nothing to do with the rows
    laps = Laps()
    problems = check_data(config, command)
    laps.end("read and keep")
    check_reward(config, command, problems)
    check_prompts(config, command, problems)
    laps.end("check")
    found.write_bytes(pickle.dumps(problems))
    return laps.told | {"rank_0": run("rank_0", *sys.argv[3:])}  # while this process holds what it has read


def rank_0(config: Config, command: str, found: Path) -> dict[str, Any]:
    from megarl.data.prompts import load_prompts
    from megarl.data.tokenizer import load_tokenizer
    from megarl.resume import run_folder
    from megarl.sft import Demonstrations

    tokenizer = load_tokenizer(config.model.path)
    laps = Laps()
    problems = pickle.loads(found.read_bytes())
    with run_folder(config, command, resume=False, problems=problems):
        laps.end("record")
    if command == "sft":
        demonstrations = Demonstrations(config, tokenizer, problems["train"])
        laps.end("choose what fits")
        demonstrations.at_step(0)
    else:
        prompts = load_prompts(config.data, "train", tokenizer, problems["train"])
        laps.end("choose what fits")
        prompts.at_step(0, config.schedule.prompts_per_step, config.run.seed)
    laps.end("first step")
    return laps.told


PARTS = {part.__name__: part for part in (reading, checks, rank_0)}


def run(part: str, *arguments: str) -> dict[str, Any]:
    """A part in a process of its own; the peak is of all that it has resident, what it imports included."""
    done = subprocess.run([sys.executable, __file__, "--part", part, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    sys.stderr.write(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--part"]:
        part, command, found, *overrides = sys.argv[2:]
        told = PARTS[part](load_config("quickstart", overrides), command, Path(found))
        peak = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())  # getrusage's may be the parent's
        print(json.dumps(told | {"peak_mib": int(peak[1]) >> 10 if peak else None}))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=860_000)
    parser.add_argument("--kind", action="append", choices=FILES, help="default: all")
    options, overrides = parser.parse_known_args()
    if not (options.folder / FILES["parquet"]).exists():
        make_rows(options.rows, options.folder)
    for kind in options.kind or FILES:
        keys = [f"data.train={options.folder / FILES[kind]}", "data.eval=null", "data.prompt_key=problem"]
        keys += [f"model.path={options.model}", "data.max_prompt_tokens=1024", "rollout.max_response_tokens=1024"]
        keys += [f"run.dir={options.folder}/run", "schedule.prompts_per_step=1024", *overrides]
        given = ("sft" if kind == "sft" else "train", str(options.folder / "found"), *keys)
        print(json.dumps({kind: {part: run(part, *given) for part in ("reading", "checks")}}), flush=True)


if __name__ == "__main__":
    main()

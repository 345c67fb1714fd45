"""Throughput of the math reward next to math-verify called directly, interleaved on this machine.

    python tools/bench/grading.py sample --model MODEL --problems math500.jsonl --out rollouts.jsonl
    python tools/bench/grading.py run --problems math500.jsonl --rollouts rollouts.jsonl --out docs/results/grading

`sample` has a real model answer the problems. `run` makes a batch as group sampling gives it, 8 responses a problem: 4
of the model, and, as a small model is rarely right, the data set's own solution twice (right) and that of the next
problem twice (wrong). Every repeat grades it in turn by math-verify in one process (parse and verify with their
defaults, as in its README), by math-verify in two processes, and by megarl with two workers: with an empty cache, once
more with the cache full, and, without any repetition, each distinct response once. All processes are fresh in every
repeat, and warmed up with solutions to the problems that the batch leaves out. The problems' texts stay out of the
result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from megarl.rewards.pool import RewardPool, Verdict
from megarl.versions import package_versions

WORKERS = 2
Item = tuple[str, str]  # response, reference


def sample(options: argparse.Namespace) -> None:
    """Sample `--samples` responses to the first `--limit` problems with the paper's prompt."""
    from megarl.config import parse_config
    from megarl.data.prompts import encode_prompts, stable_hash
    from megarl.data.tokenizer import load_tokenizer
    from megarl.models.family import architecture, read_hf_config
    from megarl.models.hugging_face import HuggingFaceFiles
    from megarl.models.weights import manifest
    from megarl.rollout.messages import Request, Sampling
    from megarl.rollout.pool import RolloutPool
    from megarl.rollout.reading import Reader

    problems = read(options.problems)[: options.limit]
    config = parse_config(
        {
            "setting": "paper",
            "model": {"path": str(options.model)},
            "data": {"train": "arithmetic"},
            "rollout": {"engines": 2, "max_response_tokens": options.max_tokens},
        }
    )
    tokenizer = load_tokenizer(options.model)
    prompts = encode_prompts(config.data, [problem["problem"] for problem in problems], tokenizer)
    requests = [Request(list(p), stable_hash(i, j)) for i, p in enumerate(prompts) for j in range(options.samples)]
    arch = architecture(read_hf_config(str(options.model)))
    with tempfile.TemporaryDirectory() as logs, RolloutPool(config, Path(logs), manifest(arch)) as pool:
        pool.update_weights(HuggingFaceFiles(str(options.model)).tensors(arch), version=0)
        sampling, done = Sampling(1.0, 1.0, 0, options.max_tokens), itertools.count(1)
        responses = pool.run(pool.generate(requests, sampling, options.samples, lambda *_: print(next(done), end="\r")))
    texts = Reader(config, tokenizer).read(response.token_ids for response in responses)
    rows = [
        {"problem": i // options.samples, "response": text, "finish_reason": response.finish_reason}
        for i, (text, response) in enumerate(zip(texts, responses, strict=True))
    ]
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_batch(problems: list[dict[str, Any]], rollouts: list[dict[str, Any]]) -> dict[str, list[Item]]:
    """The batch by where its responses come from, and a warm-up of solutions to all other problems."""
    parts: dict[str, list[Item]] = {"model": [], "own solution": [], "next solution": [], "warm-up": []}
    used = {row["problem"] for row in rollouts}
    for i, problem in enumerate(problems):
        reference, following = problem["answer"], problems[(i + 1) % len(problems)]
        parts["model"] += [(row["response"], reference) for row in rollouts if row["problem"] == i]
        own, wrong = (problem["solution"], reference), (following["solution"], reference)
        if i in used:
            parts["own solution"] += [own] * 2
            parts["next solution"] += [wrong] * 2
        else:
            parts["warm-up"] += [own, wrong]
    return parts


def direct(item: Item) -> bool:
    """math-verify as its README calls it."""
    from math_verify import parse, verify

    return verify(parse(rf"\boxed{{{item[1]}}}"), parse(item[0]))


def grade_all(pool: RewardPool, items: list[Item]) -> list[Verdict]:
    return pool.grade([(response, reference, False) for response, reference in items])


def accepts(pool: RewardPool, items: list[Item]) -> list[bool]:
    return [verdict.status == "correct" for verdict in grade_all(pool, items)]


def run(options: argparse.Namespace) -> None:
    parts = make_batch(read(options.problems), read(options.rollouts))
    warm_up = parts.pop("warm-up")
    batch = [item for part in parts.values() for item in part]
    distinct = list(dict.fromkeys(batch))
    seconds: dict[str, list[float]] = {}
    verdicts: dict[str, list[bool]] = {}

    def measure(name: str, grade: Callable[[list[Item]], list[bool]], items: list[Item]) -> None:
        start = time.perf_counter()
        verdicts[name] = grade(items)
        seconds.setdefault(name, []).append(time.perf_counter() - start)

    for repeat in range(options.repeats):
        for count in (1, WORKERS):
            with multiprocessing.get_context("spawn").Pool(count) as processes:
                grade = partial(processes.map, direct, chunksize=8)
                grade(warm_up)
                measure(f"math-verify, {count} process{'es' * (count > 1)}", grade, batch)
        for name, lenient, items in (
            ("megarl", False, batch),
            ("megarl, distinct responses", False, distinct),
            ("megarl lenient", True, batch),
        ):
            with RewardPool(workers=WORKERS, lenient=lenient) as pool:
                accepts(pool, warm_up)
                before = pool.checked
                measure(f"{name}, empty cache", partial(accepts, pool), items)
                if name == "megarl":
                    checked = pool.checked - before
                    measure("megarl, full cache", partial(accepts, pool), batch)
                    statuses = Counter(str(verdict.status) for verdict in grade_all(pool, batch))
        print(f"repeat {repeat + 1}/{options.repeats} done", file=sys.stderr)
    names = ["math-verify, 1 process", "megarl, empty cache", "megarl lenient, empty cache"]
    result = {
        "machine": {
            "cpu": cpu_name(),
            "cores": psutil.cpu_count(),
            "load_average": os.getloadavg(),
            "python": platform.python_version(),
            **package_versions(),
        },
        "responses": {name: len(part) for name, part in parts.items()} | {"all": len(batch), "distinct": len(distinct)},
        "statuses": statuses,
        "given_to_workers": checked,
        "answers_per_second": {
            name: [len(distinct if "distinct" in name else batch) / s for s in durations]
            for name, durations in seconds.items()
        },
        "accepted": {name: accepted(parts, verdicts[name]) for name in names},
        "agreement": {name: agreement(parts, verdicts[names[0]], verdicts[name]) for name in names[1:]},
    }
    for name in names[1:]:
        show_disagreements(name, batch, verdicts[names[0]], verdicts[name], options.show)
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    options.out.with_suffix(".md").write_text(report(result, sys.argv[1:]))
    print(report(result, sys.argv[1:]))


def by_part(parts: dict[str, list[Item]], values: list[bool]) -> dict[str, list[bool]]:
    start, found = 0, {}
    for name, part in parts.items():
        found[name] = values[start : start + len(part)]
        start += len(part)
    return found


def accepted(parts: dict[str, list[Item]], verdicts: list[bool]) -> dict[str, float]:
    return {name: statistics.mean(values) for name, values in by_part(parts, verdicts).items()}


def agreement(parts: dict[str, list[Item]], theirs: list[bool], ours: list[bool]) -> dict[str, float]:
    equal = [a == b for a, b in zip(theirs, ours, strict=True)]
    shares = {name: statistics.mean(values) for name, values in by_part(parts, equal).items()}
    return shares | {"all": statistics.mean(equal)}


def show_disagreements(name: str, batch: list[Item], theirs: list[bool], ours: list[bool], count: int) -> None:
    found = dict.fromkeys((i, b) for i, a, b in zip(batch, theirs, ours, strict=True) if a != b)
    for (response, reference), verdict in list(found)[:count]:
        print(f"{name} says {verdict}, math-verify {not verdict}: {response[-160:]!r}, reference {reference!r}")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def report(result: dict[str, Any], arguments: list[str]) -> str:
    machine, rates = result["machine"], result["answers_per_second"]
    base = statistics.median(rates["math-verify, 1 process"])
    responses, agreement = result["responses"], result["agreement"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "math-verify") if name in machine)
    command = " ".join(Path(word).name if word.endswith(".jsonl") else word for word in arguments)
    lines = [
        "# Grading: answers per second",
        "",
        f"`python tools/bench/grading.py {command}` on {machine['cores']} cores ({machine['cpu']}), {versions}; load "
        f"average at the end {machine['load_average'][0]:.1f}. Numbers: [grading.json](grading.json).",
        "",
        f"{responses['all']} responses ({responses['distinct']} distinct) to problems of MATH500: {responses['model']} "
        f"by SmolLM2-135M-Instruct at temperature 1, {responses['own solution']} solutions of the data set's (right) "
        f"and {responses['next solution']} of another problem's (wrong), each twice, as groups of samples do.",
        "Every repeat has fresh processes, warmed up on other problems.",
        f"megarl gave {result['given_to_workers']} answers to its workers; its verdicts: "
        + ", ".join(f"{count} {status}" for status, count in sorted(result["statuses"].items()))
        + ".",
        "",
        "| | answers/s, median | lowest to highest | times math-verify in 1 process |",
        "|---|---|---|---|",
    ]
    for name, values in rates.items():
        median = statistics.median(values)
        lines.append(f"| {name} | {median:.0f} | {min(values):.0f} to {max(values):.0f} | {median / base:.1f} |")
    lines += ["", "| accepted | model | own solution | next solution |", "|---|---|---|---|"]
    for name, shares in result["accepted"].items():
        lines.append(f"| {name.split(',')[0]} | " + " | ".join(f"{share:.1%}" for share in shares.values()) + " |")
    lines += ["", "| agrees with math-verify | model | own solution | next solution | all |", "|---|---|---|---|---|"]
    for name, shares in agreement.items():
        lines.append(f"| {name.split(',')[0]} | " + " | ".join(f"{share:.1%}" for share in shares.values()) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    sampling = commands.add_parser("sample")
    sampling.add_argument("--model", type=Path, required=True)
    sampling.add_argument("--limit", type=int, default=150, help="problems")
    sampling.add_argument("--samples", type=int, default=4, help="responses to each")
    sampling.add_argument("--max-tokens", type=int, default=320)
    sampling.set_defaults(function=sample)
    running = commands.add_parser("run")
    running.add_argument("--rollouts", type=Path, required=True)
    running.add_argument("--repeats", type=int, default=3)
    running.add_argument("--show", type=int, default=0, help="print so many disagreements")
    running.set_defaults(function=run)
    for command in (sampling, running):
        command.add_argument("--problems", type=Path, required=True, help=".jsonl with problem, solution and answer")
        command.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

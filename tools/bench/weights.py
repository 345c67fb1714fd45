"""Weight updates of real size from a learner's ranks to an engine: seconds by what they are spent on, and memory.

    python tools/bench/weights.py MODEL [--precision bf16] [--tp 2] [--pp 2] [--ranks 2] [--repeats 5] [key=value ...]

MODEL is a Hugging Face folder, or 1.3B for random weights. Only the policy is on the ranks, no optimizer. The first
update, which is verified, is reported apart. Beside them the floor: the model's bytes over the bandwidth of copying a
gibibyte in one thread, measured by rank 0 after every update. Memory is what each process grew by at its peak
(VmHWM), shared pages counted in each that maps them. Prints medians and writes them as JSON with --out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from blocks import ROOT

sys.path.insert(0, str(ROOT / "tools"))
LLAMA_1_3B = dict(
    hidden_size=2048,
    intermediate_size=5504,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=16,
    vocab_size=32000,
    tie_word_embeddings=False,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options, overrides = parser.parse_known_args()
    if "RANK" in os.environ:
        measure(options, overrides)
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.model == "1.3B":
            options.model = str(random_llama(Path(folder) / "model"))
        arguments = [f"--{name}={getattr(options, name)}" for name in ("precision", "tp", "pp", "ranks", "repeats")]
        arguments += [f"--out={options.out}"] if options.out else []
        fork = ROOT / "tests/fork_ranks.py"
        command = [sys.executable, fork, options.ranks, Path(__file__), options.model, *arguments, *overrides]
        subprocess.run([str(part) for part in command], check=True)


def random_llama(folder: Path) -> Path:
    from gpu import models

    models.SIZES["1.3B"] = LLAMA_1_3B
    return models.random_model("1.3B", folder)


def measure(options: argparse.Namespace, overrides: list[str]) -> None:
    """On every rank."""
    from megarl.config import parse_config
    from megarl.data.prompts import load_splits
    from megarl.data.tokenizer import load_tokenizer
    from megarl.learner.mesh import Mesh
    from megarl.learner.model import build_model, transformer_config
    from megarl.learner.weights import WeightStream, load_hf_weights
    from megarl.models.family import architecture, read_hf_config
    from megarl.models.weights import manifest
    from megarl.rollout.source import RolloutSource

    rollout = {"verify_every": 0} | dict(entry.split("=") for entry in overrides)
    config = parse_config(
        {
            "model": {"path": options.model, "precision": options.precision},
            "data": {"train": "arithmetic", "max_prompt_tokens": 16},
            "schedule": {"prompts_per_step": 2},
            "learner": {"tensor_model_parallel_size": options.tp, "pipeline_model_parallel_size": options.pp},
            "rollout": {"max_response_tokens": 16} | {name: json.loads(str(value)) for name, value in rollout.items()},
        }
    )
    hf_config, mesh = read_hf_config(options.model), Mesh(config.learner)
    arch = architecture(hf_config)
    model = build_model(hf_config, transformer_config(hf_config, config.learner, config.model.precision), mesh)
    load_hf_weights(model, arch, mesh, options.model)
    stream, log, updates = WeightStream(model, arch, mesh), Log(), []
    problems = load_splits(config.data, "train")
    with RolloutSource(config, mesh, problems, load_tokenizer(options.model), manifest(arch), log) as source:  # type: ignore[arg-type]
        if source.sampler:
            source.sampler.pool.wait_ready()
        for version in range(options.repeats + 2):
            mesh.barrier()
            processes = [psutil.Process(), *(child for child in psutil.Process().children() if is_engine(child))]
            before = [reset_peak(process) for process in processes]
            log.times, began = {}, time.monotonic()
            source.update_weights(stream.rounds, version)
            seconds = time.monotonic() - began
            grown = [peak(process) - start for process, start in zip(processes, before, strict=True)]
            every = mesh.gather(grown)
            updates.append(
                {
                    "seconds": seconds,
                    **log.times,
                    "bandwidth": bandwidth(),
                    "rank_peak_gib": max(of[0] for of in every) / 2**30,
                    "engine_peak_gib": max(value for of in every for value in of[1:]) / 2**30,
                }
            )
    if mesh.rank == 0:
        size = sum(torch.Size(shape).numel() for shape in manifest(arch).shapes.values())
        report(options, mesh.layout, size * (4 if options.precision == "fp32" else 2), updates)
    mesh.close()


class Log:
    """Adds up what `RolloutSource` tells a run's log."""

    def __init__(self) -> None:
        self.folder, self.times = Path(tempfile.mkdtemp()), dict[str, float]()

    def say(self, text: str) -> None:
        print(text, file=sys.stderr)

    def add_time(self, name: str, seconds: float) -> None:
        self.times[name] = seconds


def is_engine(process: psutil.Process) -> bool:
    return "megarl.rollout.worker" in process.cmdline()


def reset_peak(process: psutil.Process) -> int:
    """What the process holds now, from which its peak counts anew."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    return process.memory_info().rss


def peak(process: psutil.Process) -> int:
    (line,) = [x for x in Path(f"/proc/{process.pid}/status").read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def bandwidth(size: int = 2**30) -> float:
    """Bytes a second that are copied."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    began = time.monotonic()
    target.copy_(source)
    return size / (time.monotonic() - began)


def report(options: argparse.Namespace, layout: str, size: int, updates: list[dict[str, Any]]) -> None:
    first, _, *rest = updates  # the second makes what the others find ready
    found = {name: statistics.median(update.get(name, 0.0) for update in rest) for name in rest[0]}
    floor = size / found["bandwidth"]
    row = {
        "model": Path(options.model).name,
        "precision": options.precision,
        "layout": layout,
        "gib": size / 2**30,
        "floor": floor,
        "over_floor": found["seconds"] / floor,
        "load_average": os.getloadavg()[0],
        "first": first["seconds"],
        "first_verify": first.get("weights_verify", 0.0),
        **found,
    }
    print(json.dumps(row, indent=1))
    if options.out:
        rows = json.loads(options.out.read_text()) if options.out.exists() else []
        options.out.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main()

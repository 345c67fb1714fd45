"""Time GRPO steps of TRL's GRPOTrainer on a CPU: the opponent of megarl's own step benchmark.

    python tools/bench/trl_step.py --setup ENV                     # once: an environment of TRL's own
    ENV/bin/python tools/bench/trl_step.py --model DIR --prompts FILE --steps 10    # one JSON line
    ENV/bin/python tools/bench/trl_step.py --model DIR --prompts FILE --serve       # one for each line `run N` read

A step is: sample --samples completions for each of --prompts-per-step prompts, score them, one optimizer update over
all of them. Its time runs from the end of the step before, so nothing a step needs is left out. Standard output carries
JSON only. `--serve` warms up, then answers each line `run N` with the timings of N more steps and waits without using a
core; `run 0` answers as soon as the warm-up is over; the end of standard input ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

TORCH = "torch==2.13.0+cpu"  # the local version keeps pip from choosing a CUDA build
REQUIREMENTS = ["trl==1.16.0", "transformers==5.19.0", "datasets==5.2.0", "accelerate==1.15.0"]
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def set_up(env: Path) -> None:
    """Create a virtual environment with TRL and the CPU build of torch; an existing complete one is kept."""
    python = env / "bin" / "python"
    if python.exists() and subprocess.run([python, "-c", "import trl, torch"], capture_output=True).returncode == 0:
        print(f"{env} is complete already")
        return
    subprocess.run([sys.executable, "-m", "venv", env], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*pip, "--no-deps", TORCH], stderr=subprocess.DEVNULL).returncode != 0:
        subprocess.run([*pip, "--no-deps", TORCH, "--index-url", PYTORCH_CPU_INDEX], check=True)
    subprocess.run([*pip, TORCH, *REQUIREMENTS], check=True)
    print(f"{env} is ready: {TORCH}, {', '.join(REQUIREMENTS)}")


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, braces balanced."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 1
    for end in range(start + 7, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + 7 : end].strip()
    return None


@dataclass
class Step:
    """What one step did and how long its parts took."""

    seconds: float = 0.0
    samples: int = 0
    correct: int = 0
    tokens: int = 0
    updates: int = 0
    phases: dict[str, float] = field(default_factory=dict)  # seconds by the name TRL's own profiler gives


class Clock:
    """Times steps and deals them out in blocks; the first block is the warm-up, which isn't reported."""

    def __init__(self, blocks: Iterator[int], samples_per_step: int, report: Callable[[list[Step]], None]) -> None:
        self.blocks, self.samples_per_step, self.report = blocks, samples_per_step, report
        self.remaining = next(blocks)
        self.steps: list[Step] = []
        self.warm = False
        self.current = Step()
        self.started = 0.0

    def start(self) -> None:
        self.current = Step()
        self.started = time.perf_counter()

    def end_step(self) -> bool:
        """Close the current step; at the end of a block report it and wait for the next. False: no more blocks."""
        step = self.current
        step.seconds = time.perf_counter() - self.started
        if (step.samples, step.updates) != (self.samples_per_step, 1):
            raise RuntimeError(f"{step.updates} updates over {step.samples} samples, not one over all of a step's")
        self.steps.append(step)
        self.remaining -= 1
        while self.remaining == 0:
            if self.warm:
                self.report(self.steps)
            self.warm, self.steps = True, []
            block = next(self.blocks, None)
            if block is None:
                return False
            self.remaining = block
        self.start()
        return True

    def score(self, completions: list[str], completion_ids: list[Any], answer: list[str], **_: Any) -> list[float]:
        """TRL's reward function: exact match of the boxed answer. Counts what was sampled in passing."""
        rewards = [float(boxed(text) == wanted) for text, wanted in zip(completions, answer, strict=True)]
        self.current.samples += len(rewards)
        self.current.correct += int(sum(rewards))
        self.current.tokens += sum(map(len, completion_ids))
        return rewards

    def add_phase(self, name: str, seconds: float) -> None:
        self.current.phases[name] = self.current.phases.get(name, 0.0) + seconds


def summary(steps: list[Step], threads: int) -> dict[str, Any]:
    """One block of steps as the record that is printed."""

    def mean(values: list[float]) -> float:
        return round(sum(values) / len(values), 4) if values else 0.0

    def phase(step: Step, name: str) -> float:
        return step.phases.get(name, 0.0)

    seconds = sum(step.seconds for step in steps)
    samples = sum(step.samples for step in steps)
    prepared = [phase(step, "_prepare_inputs") for step in steps]  # generation, reward, advantages, padding
    loss = [phase(step, "compute_loss") for step in steps]
    return {
        "program": "trl",
        "steps": len(steps),
        "step_seconds": [round(step.seconds, 4) for step in steps],
        "samples_per_second": round(samples / seconds, 2) if steps else 0.0,
        "samples_per_step": [step.samples for step in steps],
        "generated_tokens": [step.tokens for step in steps],
        "reward_mean": round(sum(step.correct for step in steps) / samples, 4) if samples else 0.0,
        "phase_seconds": {  # mean per step
            "generation": mean([phase(step, "transformers.generate") for step in steps]),
            "reward": mean([phase(step, "_calculate_rewards") for step in steps]),
            "loss_forward": mean(loss),
            "backward_and_optimizer": mean(
                [step.seconds - before - forward for step, before, forward in zip(steps, prepared, loss, strict=True)]
            ),
        },
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "threads": threads,
        "versions": {name: metadata.version(name) for name in ("trl", "transformers", "torch", "accelerate")},
    }


def read_prompts(path: Path, at_least: int) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    if len(rows) < at_least:
        raise SystemExit(f"{path} has {len(rows)} prompts; a step needs {at_least}")
    return [{"prompt": row["prompt"], "answer": str(row["answer"])} for row in rows]


def train(args: argparse.Namespace, clock: Clock, output_dir: str) -> None:
    """Run TRL's trainer under the clock until it has no more blocks."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from trl.extras.profiling import ProfilingContext

    class ClockCallback(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            clock.current.updates += 1

        def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = not clock.end_step()

    # TRL times its phases and sends them to loggers; here the clock is the logger.
    def record(context: ProfilingContext, seconds: float) -> None:
        clock.add_phase(context.name.split(".", 1)[1], seconds)

    ProfilingContext._log_metrics = record
    torch.set_num_threads(args.threads)
    samples_per_step = args.prompts_per_step * args.samples
    config = GRPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,  # TRL's default is on: slower, and memory isn't short here
        seed=args.seed,
        max_steps=1_000_000,  # the clock ends the run
        num_generations=args.samples,
        per_device_train_batch_size=args.micro_batch or samples_per_step,
        gradient_accumulation_steps=samples_per_step // (args.micro_batch or samples_per_step),
        max_completion_length=args.max_new_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        beta=0.0,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        args=config,
        train_dataset=Dataset.from_list(read_prompts(args.prompts, args.prompts_per_step)),
        reward_funcs=clock.score,
        callbacks=[ClockCallback()],
    ).train()


def requested_blocks(commands: TextIO) -> Iterator[int]:
    """Block lengths from lines `run N`."""
    for line in iter(commands.readline, ""):
        match line.split():
            case ["run", count] if count.isdigit():
                yield int(count)
            case _:
                raise SystemExit(f"expected 'run N', not {line.strip()!r}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--setup", type=Path, metavar="ENV", help="create TRL's environment in this folder, and stop")
    parser.add_argument("--model", type=Path, help="Hugging Face folder of a small causal model with its tokenizer")
    parser.add_argument("--prompts", type=Path, help='JSONL with the fields "prompt" and "answer"')
    parser.add_argument("--steps", type=int, default=10, help="steps to time")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps before them, at least 1")
    parser.add_argument("--serve", action="store_true", help="take blocks of steps from standard input: run N")
    parser.add_argument("--prompts-per-step", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8, help="completions per prompt")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--micro-batch", type=int, help="completions per backward pass; default: all of a step's")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.setup is None and (args.model is None or args.prompts is None):
        parser.error("--model and --prompts are needed (or --setup)")
    for path in (args.model, args.prompts) if args.setup is None else ():
        if not path.exists():
            parser.error(f"{path} doesn't exist")
    if args.warmup < 1 or args.steps < 1:
        parser.error("--warmup and --steps must be at least 1")
    if args.micro_batch and (args.prompts_per_step * args.samples) % args.micro_batch:
        parser.error("--micro-batch must divide the completions of a step")
    return args


def main() -> None:
    args = parse_arguments()
    if args.setup:
        set_up(args.setup)
        return
    # Set before torch and the Hugging Face libraries are imported.
    os.environ.update(OMP_NUM_THREADS=str(args.threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the libraries print goes to standard error

    def blocks() -> Iterator[int]:
        yield args.warmup
        if args.serve:
            yield from requested_blocks(sys.stdin)
        else:
            yield args.steps

    def report(steps: list[Step]) -> None:
        print(json.dumps(summary(steps, args.threads)), file=answers)

    with tempfile.TemporaryDirectory() as output_dir:
        train(args, Clock(blocks(), args.prompts_per_step * args.samples, report), output_dir)


if __name__ == "__main__":
    main()

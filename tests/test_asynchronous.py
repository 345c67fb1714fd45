"""Generation ahead of learning through the command line: whatever dies, no sample is lost or learned twice."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import rows_of

from megarl.config import load_config
from megarl.data.prompts import load_prompts
from megarl.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs/quickstart.yaml"
STEPS, PROMPTS, SAMPLES, STALENESS = 6, 16, 4, 2
SETTINGS = [
    f"run.steps={STEPS}",
    "run.checkpoint_every=2",
    "run.export=false",
    f"schedule.prompts_per_step={PROMPTS}",
    f"schedule.samples_per_prompt={SAMPLES}",
    f"schedule.max_staleness={STALENESS}",
    "rollout.weight_update=in_flight",
    "rollout.max_sequences=16",
    "data.eval_limit=8",
    "recipe=grpo",
    "recipe.old_policy=rollout",
    "learner.world_size=1",
    "learner.tensor_model_parallel_size=1",
]


def train(folder: Path, *arguments: str, failpoint: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megarl.cli", "train", str(CONFIG), f"run.dir={folder}", *SETTINGS, *arguments]
    environment = {**os.environ, "MEGARL_FAILPOINT": failpoint}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def asked() -> list[list[str]]:
    """The ids of the prompts of each step, from the configuration alone."""
    config = load_config(CONFIG, SETTINGS)
    prompts = load_prompts(config.data, "train", load_tokenizer(config.model.path))
    return [[p.id for p in prompts.at_step(step, PROMPTS, config.run.seed)] for step in range(STEPS)]


def check_learned(folder: Path, asked: list[list[str]]) -> list[list[int]]:
    """Every sample of every step once, by weights within the bound; the [first, last] version of each."""
    metrics = rows_of(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(STEPS + 1))
    seen = []
    for step, prompts in enumerate(asked):
        samples = rows_of(folder / f"samples/step_{step + 1:06d}.jsonl")
        assert [(s["prompt_id"], s["sample"]) for s in samples] == [(p, i) for p in prompts for i in range(SAMPLES)]
        versions = [s["weight_versions"] for s in samples]
        assert all(max(step - STALENESS, 0) <= first <= last <= step for first, last in versions)
        assert metrics[step + 1]["staleness/max"] == step - min(first for first, _ in versions)
        assert metrics[step + 1]["mismatch/probe"] < 1e-3
        seen += versions
    return seen


def test_neither_a_killed_engine_nor_a_killed_run_costs_a_sample(asked, tmp_path):
    killed = train(tmp_path, "rollout.engines=2", failpoint="engine 1.1 generation 30,rank 0 update 6")
    assert killed.returncode == 1 and "was killed by SIGKILL" in killed.stderr
    assert "rollout engine 1: its process was killed by SIGKILL" in killed.stdout
    assert [row["engines/restarts"] for row in rows_of(tmp_path / "metrics.jsonl")[1:]][-1] == 1
    done = train(tmp_path, "--resume", "rollout.engines=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming from" in done.stdout
    versions = check_learned(tmp_path, asked)
    assert any(first < last for first, last in versions), "no response saw a change of the weights"
    assert len({first for first, _ in versions}) > 2
    assert rows_of(tmp_path / "metrics.jsonl")[5]["staleness/max"] == 0, "what was under way is sampled again"
    evaluated = rows_of(tmp_path / f"samples/eval_{STEPS:06d}.jsonl")
    assert evaluated and all(row["weight_versions"] == [STEPS] * 2 for row in evaluated)

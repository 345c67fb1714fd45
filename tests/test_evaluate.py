"""megarl eval through the command line: a real engine, the built-in model and task."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_eval_writes_its_metrics_and_every_sample(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    settings = {
        "model.path": "megarl/data/base_model",
        "data.eval": "arithmetic",
        "data.eval_limit": 8,
        "eval.samples_per_prompt": 2,
        "rollout.engines": 1,
        "run.dir": tmp_path / "run",
    }
    command = [sys.executable, "-m", "megarl.cli", "eval", "configs/quickstart.yaml"]
    command += [f"{key}={value}" for key, value in settings.items()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr

    metrics = json.loads((tmp_path / "run/eval.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run/samples/eval.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and set(Counter(row["prompt_id"] for row in rows).values()) == {2}
    assert metrics["eval/prompts"] == 8

    right = [row["prompt_id"] for row in rows if row["status"] == "correct"]
    assert 0 <= metrics["eval/avg@2"] <= metrics["eval/pass@2"] <= 1
    assert metrics["eval/avg@2"] == pytest.approx(len(right) / 16)
    assert metrics["eval/pass@2"] == pytest.approx(len(set(right)) / 8)
    assert "avg@2" in done.stdout and "pass@2" in done.stdout

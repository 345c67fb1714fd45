"""Runs of a small model that tests start through the command line, and what such a run has recorded."""

import json
from pathlib import Path
from typing import Any

import yaml


def write_config(folder: Path, model: Path, steps: int, **sections: dict[str, Any]) -> Path:
    """A configuration with two engines."""
    values = {
        "run": {"steps": steps, "export": False},
        "model": {"path": str(model), "precision": "fp32"},
        "data": {"train": "arithmetic", "eval": "arithmetic", "eval_limit": 8, "max_prompt_tokens": 16},
        "schedule": {"prompts_per_step": 6, "samples_per_prompt": 4},
        "optim": {"lr": 1e-3},
        "rollout": {"engines": 2, "max_response_tokens": 24},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values | sections))
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Of a file with a JSON object a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics_of(run: Path) -> list[dict[str, float]]:
    """What a run recorded of each step, but for time, memory and the health of its engines."""
    rows = rows_of(run / "metrics.jsonl")
    return [{name: row[name] for name in row if not name.startswith(("time/", "memory/", "engines/"))} for row in rows]

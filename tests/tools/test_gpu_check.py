"""The check for a GPU runs from end to end on a CPU, so that no typo waits for the card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.processes
PARTS = ["kernels", "learner", "te", "fp8", "engine", "quickstart"]


def check(*arguments):
    """Its exit status, and what it printed."""
    command = [sys.executable, str(ROOT / "tools/gpu_check.py"), *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.full
def test_every_part_runs_on_a_cpu_and_holds_its_bars(tmp_path):
    status, shown = check("--dry-run", "--minutes", 20, "--out", tmp_path)
    document = json.loads((tmp_path / "gpu_check.json").read_text())
    assert status == 0 and list(document["parts"]) == PARTS, shown
    assert {part["status"] for part in document["parts"].values()} == {"passed"}, shown
    assert document["dry_run"] and document["machine"]["commit"] and document["versions"]["torch"]
    results = {f"{part}: {r['name']}": r for part, of in document["parts"].items() for r in of["results"]}
    for name, result in results.items():
        assert result["holds"] is not False, name
        assert result.get("limit") is None or result["value"] <= result["limit"], name
    # What each part is for was measured, and only what truly needs the card was not.
    for name in (
        "kernels: linear_logprob V=1000 bfloat16: gradient by weight",
        "kernels: linear_logprob: log-prob error",
        "learner: bf16 padded: gradient, median of 4 recipes",
        "te: toy bf16: MFU",
        "fp8: bf16 packed: gradient, median of 4 recipes",
        "engine: engine against learner, mean, after an update",
        "engine: weights after an update: load",
        "quickstart: bf16: engine against learner",
    ):
        assert name in results
    skipped = {name for name, result in results.items() if "skipped" in result}
    assert {name for name in skipped if not name.startswith("kernels: ")} == {"te: attention", "fp8: fp8"}
    assert results["learner: bf16 packed: gradient, median of 4 recipes"]["value"] > 0  # bars that something could miss
    assert "this says nothing about a GPU" in (tmp_path / "gpu_check.md").read_text()


def test_kernels_and_updates_hold_their_bars_on_a_cpu(tmp_path):
    status, shown = check("--dry-run", "--only", "kernels,te", "--out", tmp_path)
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert status == 0 and {part["status"] for part in parts.values()} == {"passed"}, shown
    assert any(result["name"] == "toy bf16: MFU" for result in parts["te"]["results"])


def test_a_part_whose_time_is_up_is_stopped_and_the_next_one_runs(tmp_path):
    status, shown = check("--dry-run", "--only", "kernels,te", "--minutes", 0.02, "--out", tmp_path)
    parts = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert status == 1 and list(parts) == ["kernels", "te"], shown
    assert all(part["status"].startswith("stopped after 1 s") for part in parts.values())
    assert all((tmp_path / f"{name}.log").exists() for name in parts)


def test_an_unknown_part_is_refused():
    status, shown = check("--dry-run", "--only", "kernels,engines")
    assert status == 2 and "engines is not a part" in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_check_says_what_runs_here():
    status, shown = check()
    assert status == 2 and "--dry-run" in shown and len(shown.splitlines()) == 1

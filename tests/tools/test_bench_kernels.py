"""The kernel benchmark runs from end to end on a CPU, and says what it can't."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.processes, pytest.mark.full]

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments):
    command = [sys.executable, str(ROOT / "tools/bench/kernels.py"), *map(str, arguments)]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": paths})


def test_a_small_run_writes_table_numbers_and_small_errors(tmp_path):
    shape = ("--tokens", 24, "--vocabulary", 600, "--hidden", 32, "--tp", 2, "--blocks", 2)
    done = bench("--device", "cpu", *shape, "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    written = json.loads((tmp_path / "kernels.json").read_text())
    text = (tmp_path / "kernels.md").read_text()
    assert "says nothing about the speed of a GPU" in text and text.strip() in done.stdout

    rows = {(row["family"], row["name"]): row for row in written["rows"]}
    assert all(0 < row["p10"] <= row["p50"] <= row["p90"] and row["peak_bytes"] >= 0 for row in rows.values())
    for family, name in (("logits", "logprob_and_entropy"), ("hidden", "linear_logprob")):
        error = rows[family, name]["errors"]
        assert error["logprob"] <= 2e-5 and error["entropy"] <= 1e-5 and rows[family, name]["over_floor"] > 0
    assert rows["logits", "logprob_and_entropy"]["errors"]["by_logits/rounding"] <= 1.1
    assert rows["hidden", "linear_logprob"]["errors"]["by_weight/rounding"] <= 4
    assert rows["hidden", "torch"]["errors"]["logprob"] > 1e-3  # bf16 logits: the errors are not 0 by construction
    assert rows.keys() >= {("logits", "torch"), ("epilogue", "policy_epilogue"), ("logits", "logit_grad, in place")}
    assert "needs a GPU" in written["absent"]["hidden: cut cross-entropy"]
    assert all(bar["verdict"] for bar in written["bars"])


def test_without_a_gpu_the_default_is_refused_in_one_line():
    if not torch.cuda.is_available():
        done = bench()
        assert done.returncode == 1 and "--device cpu" in done.stderr and len(done.stderr.splitlines()) == 1

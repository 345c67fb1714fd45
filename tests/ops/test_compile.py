"""The kernels compile for an H100 without spills, and the gate that says so can fail."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.full]

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
specification = importlib.util.spec_from_file_location("compile_kernels", ROOT / "tools/compile_kernels.py")
tool = sys.modules["compile_kernels"] = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tool)


def compile_kernels(*arguments, root=ROOT, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(root / "tools/compile_kernels.py"), *arguments]
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**environment, "PYTHONPATH": paths, **variables}
    )


def test_everything_that_ships_compiles_without_spills():
    done = compile_kernels()
    assert done.returncode == 0, done.stderr[-3000:]
    named = {line.split()[0] for line in done.stdout.splitlines()}
    assert named >= {"logit_stats", "logit_grad", "merge_stats", "policy_epilogue"}
    for words in ("bfloat16 HAS_KEEP", "float32 to bfloat16 HAS_ENTROPY", "token ppo DUAL k3", "sequence ppo", "sapo"):
        assert words in done.stdout


def test_a_kernel_that_spills_is_refused_by_name():
    done = compile_kernels("merge_stats.BLOCK_T=1024", "merge_stats.num_warps=1", "--only", "merge_stats")
    assert done.returncode == 1
    refusal = done.stderr.strip().splitlines()[-1]
    assert refusal.startswith("refused: merge_stats") and "BLOCK_T=1024, num_warps=1" in refusal
    assert "B spilled" in refusal


def test_too_much_shared_memory_is_a_problem():
    resources = tool.Resources(255, 0, 0, 0, tool.SHARED_LIMIT, 9000, 0, 0)
    assert resources.problem is None
    assert "shared memory" in resources._replace(shared=tool.SHARED_LIMIT + 1).problem
    assert "stack" in resources._replace(stack=8).problem


@pytest.mark.parametrize("kernel", ["logit_stats", "merge_stats"])  # offsets of one row, and of a block of them
def test_rows_counted_in_32_bits_are_refused(kernel, tmp_path):
    """50,000 tokens of 151,936 logits have more elements than that; the interpreter can't tell."""
    shutil.copytree(ROOT / "megarl", tmp_path / "megarl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    file = tmp_path / "megarl/ops/kernels.py"
    before, mark, after = file.read_text().partition(f"def {kernel}_kernel(")
    assert mark and ".to(tl.int64)" in after
    file.write_text(before + mark + after.replace(".to(tl.int64)", "", 1))
    done = compile_kernels("--only", kernel, root=tmp_path)
    assert done.returncode == 1, done.stdout[-3000:]
    assert done.stderr.strip().splitlines()[-1].startswith(f"refused: {kernel}") and "in 32 bits" in done.stderr


def test_the_interpreter_is_refused_since_it_compiles_nothing():
    done = compile_kernels(TRITON_INTERPRET="1")
    assert done.returncode == 1 and done.stderr.startswith("TRITON_INTERPRET is set")


def test_an_unknown_option_is_refused():
    done = compile_kernels("logit_stats.BLOCK=4")
    assert done.returncode == 1 and "logit_stats.BLOCK=4" in done.stderr

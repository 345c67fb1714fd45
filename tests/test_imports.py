"""Imports point one way: a part of the package knows those below it, and heavy packages stay where they belong."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megarl

ROOT = Path(megarl.__file__).parent
LAYERS = [  # of parts, the lowest first; parts of one layer don't know each other
    {"types"},
    {"batch", "estimates", "faults", "files", "memory", "phases", "rank", "sums", "versions"},
    {"ops", "processes"},
    {"algorithms", "models"},
    {"config", "rewards"},
    {"data", "gpu_budget", "launcher"},
    {"inputs", "learner", "metrics"},
    {"resume"},
    {"evaluation_folder", "runlog"},
    {"rollout"},
    {"preflight"},
    {"evaluate", "sft", "study", "tools", "train"},
    {"cli"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
KNOWN = {  # to the parts that train.py puts together, of each other
    "algorithms": [],
    "rewards": [],
    "data": ["rewards.extraction"],
    "learner": ["algorithms", "data.packing", "data.plan"],
    "rollout": ["algorithms.credit", "algorithms.recipe", "data.prompts", "data.templates", "rewards"],
}
ONLY_IN = {  # package -> the files, or folders, that may import it
    "megatron": ["learner/"],
    "transformer_engine": ["learner/"],
    "vllm": ["rollout/worker.py", "rollout/transfer.py", "rollout/vllm_transfer.py"],
    "ray": ["rollout/ray.py"],
    "triton": ["ops/kernels.py"],
    "math_verify": ["rewards/"],
    "sympy": ["rewards/"],
}
FILES = sorted(ROOT.rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules that are imported when the code runs, wherever in it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from [f"megarl.{alias.name}" for alias in node.names] if node.module == "megarl" else [node.module]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            yield from imports(node)


def is_in(module: str, places: list[str]) -> bool:
    return any(f"{module}.".startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_from_below(file):
    name = str(file.relative_to(ROOT))
    part = name.split("/")[0].removesuffix(".py")
    for module in imports(ast.parse(file.read_text())):
        package, _, rest = module.partition(".")
        if package == "megarl" and part != "__init__":
            other = rest.split(".")[0]
            assert other == part or LEVEL[other] < LEVEL[part], f"{name} imports {module}, which is not below it"
            if part in KNOWN and other in KNOWN and other != part:
                assert is_in(rest, KNOWN[part]), f"{name} imports {module}: of the loop's parts it knows {KNOWN[part]}"
        allowed = ONLY_IN.get(package, [name])
        assert any(name.startswith(place) for place in allowed), f"{name} imports {package}: that is for {allowed}"


def test_every_part_has_its_layer():
    parts = {file.relative_to(ROOT).parts[0].removesuffix(".py") for file in FILES} - {"__init__"}
    assert parts == LEVEL.keys()


def test_what_a_function_or_a_branch_imports_counts():
    code = "if TYPE_CHECKING:\n    import a\ndef f():\n    from b.c import d\n"
    code += "if x:\n    import e\nfrom megarl import types"
    assert [*imports(ast.parse(code))] == ["b.c", "e", "megarl.types"]


@pytest.mark.processes
def test_a_grader_loads_no_torch_and_so_starts_fast():
    code = "import sys, megarl.rewards.worker; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"

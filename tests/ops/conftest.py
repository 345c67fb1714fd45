"""Both implementations of the ops, with tiles and blocks so small that every case needs several.

Where there is a GPU, tensors are made there and the kernels are compiled; elsewhere they are interpreted.
"""

import pytest
import torch
from difficulties import implementations

from megarl.ops import linear, logprob, tuning


def pytest_collection_modifyitems(items):
    """Kernels take seconds in the interpreter: the quick look is test_kernels.py, and a case or two of each other."""
    for item in items:
        quick = {
            "test_linear.py": "triton" not in item.name,
            "test_logprob.py": "triton" not in item.name or "slices" not in item.name and "plain" in item.name,
            "test_epilogue.py": "k3 entropy 0.01" in item.name,
        }
        if not quick.get(item.path.name, True):
            item.add_marker(pytest.mark.slow)
        if torch.cuda.is_available():
            item.add_marker(pytest.mark.processes)  # Triton's compiler starts some
        elif "triton" in item.name and not _is_of_the_selection(item):
            item.add_marker(pytest.mark.full)


def _is_of_the_selection(item):
    """Of the many interpreted cases of one test: every difficulty once, every number of slices; linear's hardest."""
    given = item.callspec.params
    if item.originalname == "test_slices_of_the_vocabulary_merge_to_the_whole":
        slices = {"plain": 1, "each row shifted": 2, "some masked": 4, "impossible tokens": 8, "hot": 13}
        return given["tp"] == slices[given["case"]]
    if item.path.name == "test_linear.py" and "case" in given:
        return given["case"] in ("shifted", "some masked, hot, padded", "all masked")
    return True


@pytest.fixture(params=["torch", "triton"])
def ops(request, monkeypatch):
    """One of the implementations, which the public ops then use too."""
    chosen = implementations()[request.param]
    for module in (linear, logprob):
        monkeypatch.setattr(module, "implementation", lambda tensor: chosen)
    return chosen


@pytest.fixture(autouse=True)
def device():
    """Where the tensors of a test are made."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu") as chosen:
        yield chosen


@pytest.fixture
def on_cpu(device):
    """For what is about the CPU's tiles or memory, or needs float64, which the kernels don't take."""
    with torch.device("cpu"):
        yield


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    table = {op: dict(options) for op, options in next(iter(tuning.KERNELS.values())).items()}
    table["logit_stats"]["BLOCK_V"] = table["logit_grad"]["BLOCK_V"] = 16
    table["merge_stats"]["BLOCK_T"] = table["policy_epilogue"]["BLOCK_T"] = 16
    monkeypatch.setattr(tuning, "KERNELS", {name: table for name in tuning.KERNELS})
    tiles = {"forward": (16, 20), "backward": (24, 12)}
    monkeypatch.setattr(tuning, "TILES", {name: tiles for name in tuning.TILES})

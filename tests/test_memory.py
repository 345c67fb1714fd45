"""Freed memory goes back, in every process, and what is held is recorded."""

import random

import psutil
import pytest
import torch

from megarl import memory
from megarl.config import LearnerConfig
from megarl.learner.mesh import Mesh
from megarl.memory import GIB, give_back, memory_of_ranks
from megarl.rewards.pool import RewardPool


def resident() -> float:
    return psutil.Process().memory_info().rss / GIB


def fragment() -> list[torch.Tensor]:
    """As a step does: blocks of many sizes, of which every other one is freed again before some small ones stay."""
    random.seed(0)
    blocks = [torch.ones(random.randint(20_000, 200_000)) for _ in range(1500)]
    return blocks[::50]


def test_what_a_step_freed_is_given_back():
    give_back()
    before = resident()
    kept = fragment()
    after_step = resident()
    give_back()
    assert after_step - before > 0.2, "nothing was kept back here, so giving back would prove nothing"
    assert resident() - before < 0.05
    assert all(block.min() == 1 for block in kept)


@pytest.fixture
def mesh():
    mesh = Mesh(LearnerConfig())
    yield mesh
    mesh.close(last=False)


@pytest.mark.processes
def test_each_kind_of_process_is_counted_for_itself(mesh, monkeypatch):
    monkeypatch.setattr(memory, "MEASURE_SECONDS", 1e-3)
    alone = memory_of_ranks(mesh)
    assert alone["memory/rank_max"] == alone["memory/ranks"] > 0.05
    assert alone["memory/engines"] == alone["memory/graders"] == 0
    with RewardPool() as graders:
        graders.check()
        both = memory_of_ranks(mesh)
    assert both["memory/graders"] > 0.01 and both["memory/engines"] == 0
    assert both["memory/rank_peak"] >= resident() - 0.05

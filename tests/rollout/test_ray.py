"""Engines on a real Ray cluster of two nodes, both on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import metrics_of, rows_of, write_config

from megarl.config import parse_config
from megarl.types import UserError

pytest.importorskip("ray", reason="ray is not installed: pip install 'megarl[cluster]'")

STEPS = 2
TRAIN = [sys.executable, "-m", "megarl.cli", "train"]


def config_of(**rollout):
    sections = {"model": {"path": "model"}, "data": {"train": "arithmetic"}, "learner": {}}
    return parse_config(sections | {"rollout": {"placement": "ray", **rollout}})


@pytest.mark.parametrize(
    ("engines", "nodes", "expected"),
    [
        (1, [4, 4], (1, 1)),
        (2, [1, 1], (2, 1)),
        (4, [4, 1, 2], (2, 2)),
        (4, [1, 4, 0], (1, 4)),
        (3, [9, 9, 9, 9], (3, 1)),
    ],
)
@pytest.mark.parametrize("gpus", [0, 2])
def test_engines_are_spread_over_as_many_nodes_as_have_room(monkeypatch, engines, nodes, expected, gpus):
    from megarl.rollout.ray import shares

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    has = [{"CPU": float(n + gpus), "GPU": float(n * gpus), "memory": 1e9} for n in nodes]
    if not gpus:
        has = [{"CPU": node["CPU"]} for node in has]
    count, share = shares(config_of(engines=engines, tensor_parallel_size=max(gpus, 1)), has)
    assert (count, share["CPU"], share.get("GPU", 0)) == (*expected, expected[1] * gpus)


def test_a_cluster_without_room_is_refused():
    from megarl.rollout.ray import shares

    with pytest.raises(UserError, match="rollout.engines=3: each needs a CPU of the Ray cluster, whose nodes have"):
        shares(config_of(engines=3), [{"CPU": 1.0}, {"CPU": 1.0}])


@pytest.fixture(scope="module")
def cluster():
    """The address of two nodes with room for an engine each; the first process of the second engine is killed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGARL_FAILPOINT", "engine 1.1 generation 20")  # what runs in a cluster has its environment
        cluster = start_cluster()
    yield cluster.address
    cluster.shutdown()


def start_cluster(attempts=3):
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    try:
        cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        cluster.add_node(**small)
    except Exception:  # of no kind of its own: ray gives its processes 24 s to be up, which a busy machine may exceed
        if attempts == 1:
            raise
        return start_cluster(attempts - 1)
    return cluster


@pytest.mark.full
@pytest.mark.processes
def test_a_run_that_loses_an_engine_in_a_ray_cluster_learns_what_one_on_this_node_does(cluster, qwen2, tmp_path):
    config = write_config(tmp_path, qwen2, STEPS, learner={"world_size": 1})
    runs, said = {}, {}
    for placement in ("colocated", "ray"):
        run = tmp_path / placement
        command = [*TRAIN, str(config), f"run.dir={run}", f"rollout.placement={placement}"]
        environment = {**os.environ, "RAY_ADDRESS": cluster}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        runs[placement], said[placement] = (metrics_of(run), samples_of(run)), done.stdout
    assert "rollout engine 1: its process was killed by SIGKILL" in said["ray"]
    assert "starting another" not in said["colocated"]
    (metrics, samples), (expected_metrics, expected_samples) = runs["ray"], runs["colocated"]
    assert samples == expected_samples and len(samples) > 100
    assert len(metrics) == STEPS + 1 and metrics == [pytest.approx(row, rel=1e-3, abs=1e-5) for row in expected_metrics]


@pytest.mark.processes
def test_a_cluster_that_is_not_there_is_refused_in_one_line(qwen2, tmp_path):
    arguments = [f"model.path={qwen2}", "data.max_prompt_tokens=16", f"run.dir={tmp_path}", "rollout.placement=ray"]
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    command = [*TRAIN, "quickstart", *arguments, "learner.world_size=1", "learner.tensor_model_parallel_size=1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode and "rollout.placement=ray finds no Ray cluster (" in done.stderr, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def samples_of(run: Path) -> list[tuple[str, int, str]]:
    samples = [sample for file in sorted((run / "samples").glob("*.jsonl")) for sample in rows_of(file)]
    return [(sample["prompt_id"], sample["sample"], sample["response"]) for sample in samples]

"""An engine of this node and one of another, whose host is a thread of this process; everything else is as ever."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from faults import FAULTS

from megarl.config import parse_config
from megarl.models.family import architecture, read_hf_config
from megarl.models.hugging_face import HuggingFaceFiles
from megarl.models.weights import manifest
from megarl.rollout.hosts import Host, Nodes
from megarl.rollout.member import State
from megarl.rollout.messages import Request, Sampling
from megarl.rollout.pool import RolloutPool
from megarl.rollout.transfer import WeightTransferError

pytestmark = pytest.mark.processes

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=40)
REQUESTS = [Request([2 + i, 3, 4, 5], seed=i) for i in range(8)]


@pytest.fixture(scope="module")
def arch(qwen2):
    return architecture(read_hf_config(str(qwen2)))


@pytest.fixture(scope="module")
def weights(qwen2, arch):
    return lambda: HuggingFaceFiles(str(qwen2)).tensors(arch)


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def config(qwen2):
    return parse_config(
        {
            "model": {"path": str(qwen2)},
            "data": {"train": "arithmetic", "max_prompt_tokens": 16},
            "learner": {},
            "rollout": {"engines": 2, "max_response_tokens": 40, "bucket_mib": 1},
        }
    )


@pytest.fixture(scope="module")
def nodes(config, said):
    return Nodes(config, 2, said.append)


@pytest.fixture(scope="module")
def pool(config, nodes, arch, said, tmp_path_factory):
    with RolloutPool(config, tmp_path_factory.mktemp("logs"), manifest(arch), said.append, nodes) as pool:
        yield pool


@pytest.fixture(scope="module", autouse=True)
def host(config, nodes, pool):
    host = Host(config, nodes.invitation, 1, 2)
    yield host
    host.close(wait=False)


def responses(pool, on, weights=None):
    return pool.run(pool.generate(REQUESTS, SAMPLING, on=on), weights)


def worker(index: int) -> psutil.Process:
    """The process of an engine, which is a child of its host."""
    (process,) = [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE
        and child.environ().get("MEGARL_PROCESS", "").startswith(f"engine {index}.")
    ]
    return process


def bytes_of_weights(process: psutil.Process) -> list[int]:
    """The sizes of the shared memory that a process has made for weights."""
    files = Path(f"/proc/{process.pid}/fd").iterdir()
    return [os.stat(file).st_size for file in files if "megarl-weights" in os.readlink(file)]


def same(ours, theirs):
    return all(
        np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.logprobs, b.logprobs)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_an_engine_on_another_node_answers_bit_for_bit_as_one_on_this(pool, weights):
    pool.update_weights(weights(), 0)
    ours, theirs = responses(pool, on=0), responses(pool, on=1)
    assert same(ours, theirs) and sum(len(response.token_ids) for response in ours) > 100
    assert max(bytes_of_weights(worker(1))) > 0 == max(bytes_of_weights(worker(0))), "weights came by the wrong way"


def update_remote(pool, weights, version):
    pool.members[1].state = State.STALE
    pool.update_weights(weights(), version, only_stale=True)


def test_weights_that_arrive_corrupted_on_another_node_are_refused(pool, weights, a_flipped_byte):
    with a_flipped_byte(), pytest.raises(WeightTransferError, match=r"engine 1: .*corrupted"):
        update_remote(pool, weights, 1)
    pool.update_weights(weights(), 2)
    assert (responses(pool, on=1)[0].weight_versions == 2).all()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bucket_that_goes_wrong_on_its_way_to_another_node_is_refused(pool, weights, in_transit, fault):
    change, said = FAULTS[fault]
    before = responses(pool, on=1)
    with in_transit(change), pytest.raises(WeightTransferError, match=f"engine 1: .*{said}"):
        update_remote(pool, weights, 2)
    update_remote(pool, weights, 2)
    assert same(responses(pool, on=1), before)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_fails_on_another_node_is_started_again_there(pool, weights, said, fault):
    pool.update_weights(weights(), 3)
    before, failed, restarts = responses(pool, on=1), worker(1), pool.restarts
    config = pool.config
    pool.config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"stall_seconds": 3.0})})
    failed.send_signal(fault)
    assert same(responses(pool, on=1, weights=weights), before), "what it owed was not done again"
    pool.config = config
    assert "rollout engine 1: its process was killed by SIGKILL" in "".join(said)
    deadline = time.monotonic() + 300
    while pool.restarts == restarts and time.monotonic() < deadline:
        time.sleep(0.1)
    assert worker(1).pid != failed.pid
    pool.update_weights(weights(), 3, only_stale=True)
    assert same(responses(pool, on=1), before)


def test_without_its_node_an_engine_is_given_up_and_the_others_do_its_work(pool, nodes, host, weights, said):
    """Last: nobody brings the node back."""
    pool.update_weights(weights(), 4)
    before, process = responses(pool, on=1), worker(1)
    process.suspend()  # or it would be done before it is missed
    begun = pool.start(pool.generate(REQUESTS, SAMPLING, on=1))
    pool.background.loop.call_soon_threadsafe(nodes.close)
    assert same(begun.result(), before)
    host.close(wait=True)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    deadline = time.monotonic() + 300
    while pool.members[1].state != "dead" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "rollout engine 1: node 1 is gone" in "".join(said) and "given up" in said[-1]
    assert same(responses(pool, on=None), before)

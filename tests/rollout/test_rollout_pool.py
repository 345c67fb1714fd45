"""Where engines run and in which order they start, on GPUs that this machine need not have."""

import asyncio

import pytest
import torch

from megarl.config import parse_config
from megarl.config.sections import ScheduleConfig
from megarl.models.weights import Manifest
from megarl.rollout.engine import engine_environment, engine_options, start_waves
from megarl.rollout.messages import Done, Request, Sampling, StartUpdate, VerifyWeights
from megarl.rollout.pool import RolloutPool
from megarl.types import UserError


@pytest.fixture
def gpus(monkeypatch):
    """gpus(n): this machine has n GPUs from here on."""

    def pretend(count):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


def config_of(**rollout):
    data = {"train": "arithmetic"}
    return parse_config({"model": {"path": "model"}, "data": data, "learner": {}, "rollout": rollout})


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("engines", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_engines_that_share_a_gpu_start_one_after_another(gpus, count, engines, size, nodes):
    gpus(count)
    config = config_of(engines=engines, tensor_parallel_size=min(size, count))
    waves = start_waves(config, nodes)
    assert [i for wave in waves for i in wave] == list(range(engines))
    for wave in waves:
        visible = [(i % nodes, engine_environment(config, i // nodes)["CUDA_VISIBLE_DEVICES"]) for i in wave]
        used = [(node, gpu) for node, gpus in visible for gpu in gpus.split(",")]
        assert len(set(used)) == len(used)
    assert len(waves) == -(-engines // (nodes * max(1, count // min(size, count))))


def test_disaggregated_engines_keep_to_the_gpus_that_the_ranks_leave(gpus, monkeypatch):
    gpus(8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    config = config_of(engines=3, tensor_parallel_size=2, placement="disaggregated")
    visible = [engine_environment(config, index)["CUDA_VISIBLE_DEVICES"] for index in range(3)]
    assert visible == ["4,5", "6,7", "4,5"] and start_waves(config) == [[0, 1], [2]]
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with pytest.raises(UserError, match="set LOCAL_WORLD_SIZE"):
        engine_environment(config, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9,8,7,6,5")
    with pytest.raises(UserError, match="4 ranks leave 1 of this node's 5 GPUs .* start fewer ranks"):
        engine_environment(config, 0)


def test_engines_can_sleep_where_they_take_turns_with_the_learner(gpus):
    for staleness, placement, expected in ((0, "colocated", True), (1, "colocated", False), (0, "ray", False)):
        gpus(1)
        config = config_of(placement=placement)
        config = config.model_copy(update={"schedule": ScheduleConfig(max_staleness=staleness)})
        assert engine_options(config)["enable_sleep_mode"] is expected
    gpus(0)
    assert "enable_sleep_mode" not in engine_options(config_of())


def test_engines_on_a_cpu_start_together(gpus):
    gpus(0)
    assert start_waves(config_of(engines=3)) == [[0, 1, 2]]


def test_cuda_graphs_are_on_where_there_is_a_gpu_unless_the_config_says_no(gpus):
    for count, eager, expected in ((1, False, False), (1, True, True), (0, False, True), (0, True, True)):
        gpus(count)
        assert engine_options(config_of(enforce_eager=eager))["enforce_eager"] is expected


SAMPLING = Sampling(1.0, 1.0, 0, 4)


class Confused:
    """An engine that answers requests as if they were questions, on a node of its own."""

    def __init__(self):
        self.places, self._said = [self], asyncio.Queue()

    async def meet(self):
        pass

    async def start(self, index, life, log_path):
        return self

    def send(self, message):
        self._said.put_nowait(Done())

    async def receive(self):
        return await self._said.get()

    def kill(self):
        pass

    close = kill


class Obedient(Confused):
    """An engine that does what it is told, and remembers it."""

    def __init__(self):
        super().__init__()
        self.told = []

    def send(self, message):
        self.told.append(message)
        super().send(message)


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (3, ["after", "before", "", "after", "before", ""]),
        (1, ["after", *["before after"] * 3]),
        (0, ["after", "before", ""]),
    ],
)
def test_weights_are_verified_at_the_start_and_every_so_many_updates_when_they_come_and_when_they_go(
    tmp_path, every, expected
):
    engine, seen = Obedient(), []
    with RolloutPool(config_of(verify_every=every), tmp_path, Manifest({}, {}), nodes=engine) as pool:
        pool.wait_ready()
        for version in range(len(expected)):
            engine.told.clear()
            pool.update_weights([("weight", torch.zeros(1))], version)
            (start,) = [i for i, message in enumerate(engine.told) if isinstance(message, StartUpdate)]
            checks = [i for i, message in enumerate(engine.told) if isinstance(message, VerifyWeights)]
            assert engine.told[start].witnessed == any(i > start for i in checks)
            seen.append(" ".join("before" if i < start else "after" for i in checks))
    assert seen == expected


def test_what_nobody_foresaw_is_raised_where_it_is_waited_for(tmp_path):
    with RolloutPool(config_of(), tmp_path, Manifest({}, {}), nodes=Confused()) as pool:
        pool.update_weights([], 0)
        future = pool.start(pool.generate([Request([1], seed=0)], SAMPLING))
        with pytest.raises(AssertionError, match="an answer to no question"):
            future.result(timeout=60)
        for later in (lambda: pool.run(pool.generate([Request([1], 0)], SAMPLING)), lambda: pool.update_weights([], 1)):
            with pytest.raises(AssertionError, match="an answer to no question"):
                later()

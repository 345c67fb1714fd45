import contextlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file
from small_runs import metrics_of, write_config

from megarl.data import arithmetic

pytestmark = pytest.mark.processes

LAUNCH = Path(__file__).parents[2] / "launch"
TIMEOUT_S = 120
ENGINES_TIMEOUT_S = 400
STEPS = 2


def start(*arguments: str, log: Path, **environment: object) -> subprocess.Popen[bytes]:
    """launch/torchrun.sh with these variables and none of a surrounding launcher's; its output is in `log`."""
    ours = re.compile("NNODES|NODE_RANK|NPROC_PER_NODE|MASTER_.*|RANK|WORLD_SIZE|SLURM_NODEID")
    inherited = {name: value for name, value in os.environ.items() if not ours.fullmatch(name)}
    inherited["PATH"] = f"{Path(sys.executable).parent}:{inherited['PATH']}"
    variables = {name: str(value) for name, value in environment.items()}
    with log.open("wb") as output:
        command = [LAUNCH / "torchrun.sh", *arguments]
        return subprocess.Popen(command, env=inherited | variables, stdout=output, stderr=subprocess.STDOUT)


def finish(*processes: subprocess.Popen[bytes], timeout: float = TIMEOUT_S) -> list[int]:
    """Their exit statuses; whatever still runs at the time limit is killed, ranks included."""
    deadline = time.monotonic() + timeout
    try:
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:  # torchrun gives each rank a session of its own: a process group isn't all
                for descendant in [*psutil.Process(process.pid).children(recursive=True), process]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        descendant.kill()
                process.wait()


@pytest.fixture(scope="module")
def config(qwen2, tmp_path_factory) -> Path:
    """A few demonstrations of the built-in task, learned at TP=2."""
    folder = tmp_path_factory.mktemp("sft")
    rng = random.Random(0)
    problems = arithmetic.problems(0, 12, "train")
    rows = [{"prompt": p.question, "response": arithmetic.demonstration(p, rng)} for p in problems]
    (folder / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "run": {"steps": STEPS},
        "model": {"path": str(qwen2)},
        "data": {
            "train": str(folder / "demonstrations.jsonl"),
            "prompt_key": "prompt",
            "answer_key": "response",
            "max_prompt_tokens": 16,
        },
        "schedule": {"prompts_per_step": 4},
        "optim": {"lr": 1e-3},
        "learner": {"tensor_model_parallel_size": 2},
        "rollout": {"max_response_tokens": 32},
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(values))
    return folder / "sft.yaml"


@pytest.fixture
def port():
    """A port that the kernel gives to nobody else while it is held here: bound, but free to be listened on."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.iterdir()))
def test_a_launch_script_is_sound_bash(script):
    checks = [["bash", "-n"]] + ([["shellcheck"]] if shutil.which("shellcheck") else [])
    for check in checks:
        done = subprocess.run([*check, LAUNCH / script], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_two_nodes_train_as_one_does(config, qwen2, port, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    logs = [tmp_path / f"{name}.log" for name in ("one", "node0", "node1")]
    alone = finish(start("sft", str(config), f"run.dir={one}", log=logs[0], NPROC_PER_NODE=2))
    assert alone == [0], logs[0].read_text()[-4000:]
    cluster = {"NNODES": 2, "NPROC_PER_NODE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    nodes = [
        start("sft", str(config), f"run.dir={two}", log=log, NODE_RANK=rank, **cluster)
        for rank, log in enumerate(logs[1:])
    ]
    assert finish(*nodes) == [0, 0], "".join(log.read_text()[-4000:] for log in logs[1:])

    expected, actual = (metrics_of(run) for run in (one, two))
    assert len(expected) == STEPS
    assert actual == expected
    before, expected, actual = (load_file(folder / "model.safetensors") for folder in (qwen2, one / "hf", two / "hf"))
    assert actual.keys() == expected.keys() == before.keys()
    for name in before:
        assert actual[name].equal(expected[name]), name
        assert not actual[name].equal(before[name]), f"{name} was not trained"


def test_an_engine_on_each_of_two_nodes_samples_as_two_on_one_node(qwen2, port, tmp_path):
    config = write_config(tmp_path, qwen2, STEPS, learner={"tensor_model_parallel_size": 2})
    one, two = tmp_path / "one", tmp_path / "two"

    def train(run: Path, name: str, **environment: object) -> subprocess.Popen[bytes]:
        arguments = ["train", str(config), f"run.dir={run}"]
        return start(*arguments, log=tmp_path / name, MEGARL_TEST_RUN=tmp_path, **environment)

    def output() -> str:
        return "".join(path.read_text()[-4000:] for path in tmp_path.iterdir() if path.suffix == ".log")

    assert finish(train(one, "one.log", NPROC_PER_NODE=2), timeout=ENGINES_TIMEOUT_S) == [0], output()
    cluster = {"NNODES": 2, "NPROC_PER_NODE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    nodes = [train(two, f"node{rank}.log", NODE_RANK=rank, **cluster) for rank in range(2)]
    ancestors: dict[str, list[int]] = {}
    while len(ancestors) < 2 and all(node.poll() is None for node in nodes):
        time.sleep(0.2)
        ancestors = {engine: pids for engine, pids in processes_of(tmp_path) if engine}
    assert finish(*nodes, timeout=ENGINES_TIMEOUT_S) == [0, 0], output()
    assert [nodes[i].pid in ancestors[f"engine {i}.1"] for i in range(2)] == [True, True], "not on its node"
    assert [*processes_of(tmp_path)] == []

    expected, actual = metrics_of(one), metrics_of(two)
    assert len(expected) == STEPS + 1 and actual == expected
    samples = [sorted((run / "samples").iterdir()) for run in (one, two)]
    for ours, theirs in zip(*samples, strict=True):
        assert ours.read_text() == theirs.read_text()


def processes_of(run: Path) -> Iterator[tuple[str, list[int]]]:
    """Of everything that was started with MEGARL_TEST_RUN=run: which engine it is, if any, and its ancestors."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (environment := process.environ()).get("MEGARL_TEST_RUN") == str(run):
                yield environment.get("MEGARL_PROCESS", ""), [parent.pid for parent in process.parents()]


def test_what_a_second_node_needs_is_refused_in_one_line(config, tmp_path):
    log = tmp_path / "log"
    cases = [
        ({"NNODES": 2, "NODE_RANK": 0}, "NNODES=2 needs MASTER_ADDR"),
        ({"NNODES": 2, "MASTER_ADDR": "127.0.0.1"}, "NNODES=2 needs NODE_RANK"),
        ({"NNODES": 2, "NODE_RANK": 2, "MASTER_ADDR": "127.0.0.1"}, "NODE_RANK=2 is not a number from 0 to 1"),
        ({"NNODES": "two"}, "NNODES=two is not a number"),
    ]
    for environment, why in cases:
        assert finish(start("sft", str(config), log=log, **environment)) == [2]
        assert log.read_text().startswith(f"torchrun.sh: {why}")
        assert len(log.read_text().splitlines()) == 1
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        cluster = {"NNODES": 2, "NODE_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        assert finish(start("sft", str(config), log=log, **cluster)) == [2]
    assert log.read_text().startswith(f"torchrun.sh: MASTER_PORT={port} can't be opened")

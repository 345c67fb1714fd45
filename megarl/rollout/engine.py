"""A rollout engine as the trainer sees it: messages to it and from it, and what it takes to start one."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from megarl.config import Config
from megarl.phases import PROCESS
from megarl.processes import describe_exit, python_command, python_path
from megarl.rank import LAUNCHER_VARIABLES
from megarl.rollout.connection import Stream
from megarl.rollout.messages import Broken, LoadBucket
from megarl.rollout.transfer import BACKEND, WORKER_EXTENSION
from megarl.types import UserError

PREFILL_TOKENS = 8192  # tokens of whole prompts that an engine on a CPU takes in at a time


class EngineDied(RuntimeError):
    """The process of an engine is gone; the message says how."""


class Engine(Protocol):
    """A worker somewhere. Messages are those of `messages`, in order, as long as it lives."""

    def send(self, message: Any) -> None:
        """Never waits; what an engine doesn't take is kept for it."""

    async def receive(self) -> Any:
        """Its next message. Raises EngineDied."""

    def kill(self) -> None:
        """At once: an engine holds nothing worth saving, and an error must not wait for it."""


class Place(Protocol):
    """A node that engines are started on."""

    async def start(self, index: int, life: int, log_path: Path) -> Engine:
        """The `life`th process of engine `index`. Raises EngineDied."""


class StreamEngine(ABC):
    """A worker at the other end of a stream; where its process lives is for who inherits this."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._reason = ""  # what it said at its end

    def send(self, message: Any) -> None:
        self._stream.send(message)

    async def receive(self) -> Any:
        try:
            message = await self._stream.receive()
        except EOFError:
            raise EngineDied(self._reason or await self._how_it_ended()) from None
        if isinstance(message, Broken):
            self._reason = message.reason
            return await self.receive()
        return message

    @abstractmethod
    async def _how_it_ended(self) -> str:
        """Once its connection is gone."""


class LocalEngine(StreamEngine):
    """A child process of this one."""

    def __init__(self, process: subprocess.Popen[bytes], stream: Stream) -> None:
        super().__init__(stream)
        self.process = process

    def send(self, message: Any) -> None:
        if isinstance(message, LoadBucket):  # it reads the weights where they lie
            message = replace(message, content=None)
        super().send(message)

    def kill(self) -> None:
        self._stream.close()
        self.process.kill()
        self.process.wait()

    async def _how_it_ended(self) -> str:
        return f"its process {describe_exit(await asyncio.to_thread(self.process.wait))}"


@dataclass(frozen=True)
class Here:
    """The node of this process: the first of `nodes`."""

    config: Config
    nodes: int = 1

    async def start(self, index: int, life: int, log_path: Path) -> LocalEngine:
        ours, theirs = socket.socketpair()
        process = start_worker(self.config, index, life, log_path, theirs, self.nodes)
        return LocalEngine(process, await Stream.open(ours))


def start_worker(
    config: Config, index: int, life: int, log_path: Path, connected: socket.socket, nodes: int = 1
) -> subprocess.Popen[bytes]:
    """The process of an engine, given an end of the socket. It lives as long as the thread that starts it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
    environment |= python_path() | engine_environment(config, index // nodes) | {PROCESS: f"engine {index}.{life}"}
    log_path.parent.mkdir(parents=True, exist_ok=True)
    connected.setblocking(True)
    with connected, log_path.open("w" if life == 1 else "a") as log:
        return subprocess.Popen(
            python_command("megarl.rollout.worker", str(connected.fileno())),
            pass_fds=[connected.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def engine_environment(config: Config, index: int) -> dict[str, str]:
    """Environment of engine `index` of a node; what vLLM reads at import has to be set before."""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_COLOR": "0",
        "VLLM_HOST_IP": "127.0.0.1",  # an engine keeps to this machine, whose name may mean nothing to it
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if torch.cuda.is_available():
        size, gpus = config.rollout.tensor_parallel_size, engine_gpus(config, ranks_here())
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[(index * size + i) % len(gpus)] for i in range(size))
        # FlashInfer's sampler gives no processed log-probs and takes no seeds: it would be loaded and never used.
        environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    else:
        # One thread an engine, on whichever core is free: more only helps models far larger than a CPU should serve.
        environment |= {
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": str(config.rollout.kv_cache_gib),
        }
    return environment


def start_waves(config: Config, nodes: int = 1) -> list[list[int]]:
    """The engines in the order of their start, those of a wave side by side.

    vLLM measures what is free of a GPU when it starts, so no two that share one are in a wave. On a CPU all are.
    Engine i is one of node i % nodes, whose GPUs are as many as here.
    """
    count = config.rollout.engines
    size = count
    if torch.cuda.is_available():
        size = max(1, len(engine_gpus(config, ranks_here())) // config.rollout.tensor_parallel_size) * nodes
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def ranks_here() -> int | None:
    """Of this node, where the launcher says so."""
    if here := os.environ.get("LOCAL_WORLD_SIZE"):
        return int(here)
    return 1 if os.environ.get("WORLD_SIZE", "1") == "1" else None


def engine_gpus(config: Config, ranks: int | None) -> list[str]:
    """Those of this node that engines may have beside so many ranks. Raises UserError where there are none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if config.rollout.placement != "disaggregated":
        return gpus
    if ranks is None:
        raise UserError(
            "rollout.placement=disaggregated: nobody says how many ranks this node has; set LOCAL_WORLD_SIZE to it, or "
            "use colocated"
        )
    left = gpus[ranks:]
    if len(left) < config.rollout.tensor_parallel_size:
        raise UserError(
            f"rollout.placement=disaggregated: {ranks} ranks leave {len(left)} of this node's {len(gpus)} GPUs to "
            f"engines of rollout.tensor_parallel_size={config.rollout.tensor_parallel_size}; start fewer ranks, or use "
            "colocated"
        )
    return left


def weights_dtype(config: Config) -> torch.dtype:
    """In which an engine computes, and weights travel to it."""
    return torch.float32 if config.model.precision == "fp32" else torch.bfloat16


def engine_options(config: Config) -> dict[str, Any]:
    """Arguments of vllm.LLM. Weights start as dummies: the learner's first update brings the real ones."""
    on_gpu = torch.cuda.is_available()
    options: dict[str, Any] = {
        "model": config.model.path,
        "load_format": "dummy",
        "config_format": "hf",  # whatever else lies in the folder
        "tokenizer_mode": "hf",
        "trust_remote_code": False,
        "dtype": str(weights_dtype(config)).removeprefix("torch."),
        "seed": config.run.seed,
        "max_model_len": config.max_sequence_tokens,
        "max_num_seqs": config.rollout.max_sequences,
        "tensor_parallel_size": config.rollout.tensor_parallel_size,
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": {"backend": BACKEND},
        "worker_extension_cls": WORKER_EXTENSION,
        "enforce_eager": config.rollout.enforce_eager or not on_gpu,
        "disable_log_stats": True,
    }
    if on_gpu:
        options["gpu_memory_utilization"] = config.rollout.gpu_memory_utilization
        options["enable_sleep_mode"] = config.engines_sleep
    else:
        # A prompt cut in two makes vLLM rewind the request's random generator, which CPU generators can't do.
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(config.max_sequence_tokens, PREFILL_TOKENS)
    return options

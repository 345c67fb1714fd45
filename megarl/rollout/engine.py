"""A rollout engine as the trainer sees it: messages to it and from it, and what it takes to start one."""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import struct
import subprocess
from pathlib import Path
from typing import Any, Protocol

import torch

from megarl.config import Config
from megarl.failpoints import PROCESS
from megarl.processes import describe_exit, python_command, python_path
from megarl.rank import LAUNCHER_VARIABLES
from megarl.rollout.messages import Broken
from megarl.rollout.transfer import BACKEND, WORKER_EXTENSION

PREFILL_TOKENS = 8192  # tokens of whole prompts that an engine on a CPU takes in at a time
LONG = 0x7FFFFFFF  # bytes, from which on multiprocessing's connections announce a message by a longer header


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


class LocalEngine:
    """A child process, the `life`th of engine `index`. Made in an event loop, by a thread that outlives it."""

    def __init__(self, config: Config, index: int, life: int, log_path: Path) -> None:
        ours, theirs = socket.socketpair()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
        environment |= python_path() | engine_environment(config, index) | {PROCESS: f"engine {index}.{life}"}
        with theirs, log_path.open("a") as log:
            self.process = subprocess.Popen(
                python_command("megarl.rollout.worker", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._socket = ours
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._reason = ""  # what it said at its end

    async def connect(self) -> LocalEngine:
        self._streams = await asyncio.open_connection(sock=self._socket)
        return self

    def send(self, message: Any) -> None:
        assert self._streams
        content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        header = struct.pack("!i", len(content)) if len(content) <= LONG else struct.pack("!iQ", -1, len(content))
        self._streams[1].writelines((header, content))

    async def receive(self) -> Any:
        assert self._streams
        reader, _ = self._streams
        try:
            (size,) = struct.unpack("!i", await reader.readexactly(4))
            if size == -1:
                (size,) = struct.unpack("!Q", await reader.readexactly(8))
            message = pickle.loads(await reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            status = await asyncio.to_thread(self.process.wait)
            raise EngineDied(self._reason or f"its process {describe_exit(status)}") from None
        if isinstance(message, Broken):
            self._reason = message.reason
            return await self.receive()
        return message

    def kill(self) -> None:
        if self._streams:
            self._streams[1].transport.abort()
        self.process.kill()
        self.process.wait()


def engine_environment(config: Config, index: int) -> dict[str, str]:
    """Environment of engine `index`; what vLLM reads at import has to be set before."""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_COLOR": "0",
        "VLLM_HOST_IP": "127.0.0.1",  # an engine keeps to this machine, whose name may mean nothing to it
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    if torch.cuda.is_available():
        size, gpus = config.rollout.tensor_parallel_size, _gpus()
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


def start_waves(config: Config) -> list[list[int]]:
    """The engines in the order of their start, those of a wave side by side.

    vLLM measures what is free of a GPU when it starts, so no two that share one are in a wave. On a CPU all are.
    """
    count = config.rollout.engines
    size = max(1, len(_gpus()) // config.rollout.tensor_parallel_size) if torch.cuda.is_available() else count
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def engine_options(config: Config) -> dict[str, Any]:
    """Arguments of vllm.LLM. Weights start as dummies: the learner's first update brings the real ones."""
    on_gpu = torch.cuda.is_available()
    options: dict[str, Any] = {
        "model": config.model.path,
        "load_format": "dummy",
        "config_format": "hf",  # whatever else lies in the folder
        "tokenizer_mode": "hf",
        "trust_remote_code": False,
        "dtype": "float32" if config.model.precision == "fp32" else "bfloat16",
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
    else:
        # A prompt cut in two makes vLLM rewind the request's random generator, which CPU generators can't do.
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(config.max_sequence_tokens, PREFILL_TOKENS)
    return options

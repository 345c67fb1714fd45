"""The rollout engines of a run: starts them, spreads requests over them, keeps their weights current."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarl.config import Config
from megarl.processes import python_command, python_path, why_killed
from megarl.rank import LAUNCHER_VARIABLES
from megarl.rollout.messages import Request, Response, Sampling
from megarl.rollout.transfer import BACKEND, WORKER_EXTENSION, Bucket, WeightTransferError

PREFILL_TOKENS = 8192  # tokens of whole prompts that an engine on a CPU takes in at a time


OnResponse = Callable[[int, Response], object]  # takes the place of a request and its response


def _ignore(place: int, response: Response) -> None:
    pass


class RolloutError(RuntimeError):
    """An engine failed; the message says which, why, and where its log is."""


class RolloutPool:
    """vLLM engines as child processes of this one. Weights arrive by `update_weights`; until then nothing is served."""

    def __init__(self, config: Config, log_dir: Path, tensor_names: list[str]) -> None:
        self.config, self.log_dir = config, log_dir
        log_dir.mkdir(parents=True, exist_ok=True)
        self._names = tensor_names
        self._engines = [_EngineProcess(i, config, log_dir) for i in range(config.rollout.engines)]
        self._waves = start_waves(config)
        self._start(self._waves[0])
        self._bucket = Bucket(config.rollout.bucket_mib * 2**20)
        self._ready = False

    def wait_ready(self) -> None:
        """Block until every engine is up."""
        if not self._ready:
            for wave in self._waves:
                if wave is not self._waves[0]:
                    self._start(wave)
                self._receive_all(engines=wave)
            self._call("init_weights", self._names)
            self._ready = True

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights of all engines by these tensors. Raises WeightTransferError where they are refused."""
        self.wait_ready()
        self._call("start_update", None)
        for name, tensor in tensors:
            if not self._bucket.add(name, tensor):
                self._send_bucket(last=False)
                self._bucket.add(name, tensor)
        self._send_bucket(last=True)
        self._call("finish_update", version)

    def generate(
        self, requests: list[Request], sampling: Sampling, group: int = 1, on_response: OnResponse = _ignore
    ) -> list[Response]:
        """One response per request, in order; `on_response` is given the place and the response of each as it arrives.

        Every `group` requests share a prompt and go to one engine, which sees it once. Which that is depends only on
        their place.
        """
        self.wait_ready()
        shares: list[list[tuple[int, Request]]] = [[] for _ in self._engines]
        for place, request in enumerate(requests):
            shares[place // group % len(shares)].append((place, request))
        for engine, share in zip(self._engines, shares, strict=True):
            engine.send("submit", (share, sampling))
        responses: list[Any] = [None] * len(requests)

        def arrive(place: int, response: Response) -> None:
            responses[place] = response
            on_response(place, response)

        self._receive_all(owed=[len(share) for share in shares], on_response=arrive)
        return responses

    def close(self) -> None:
        for engine in self._engines:
            engine.close()
        self._bucket.close()

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, engines: list[int]) -> None:
        for i in engines:
            self._engines[i].send("start", engine_options(self.config))

    def _send_bucket(self, last: bool) -> None:
        self._call("update_bucket", self._bucket.message(last))
        self._bucket.clear()

    def _call(self, command: str, argument: Any) -> None:
        for engine in self._engines:
            engine.send(command, argument)
        self._receive_all()

    def _receive_all(
        self, engines: Iterable[int] | None = None, owed: list[int] | None = None, on_response: OnResponse = _ignore
    ) -> None:
        """Until every engine, or each of these, has replied and sent as many responses as it owes. Waits for all, so
        that an error on one leaves no reply of another."""
        waited_for = range(len(self._engines)) if engines is None else engines
        pending = {self._engines[i].connection: i for i in waited_for}
        left = [1 + responses for responses in owed or [0] * len(self._engines)]
        errors: list[str] = []
        while pending:
            for connection in wait(list(pending)):
                assert isinstance(connection, Connection)
                i = pending[connection]
                try:
                    kind, value = connection.recv()
                except (EOFError, ConnectionResetError):
                    kind, value = "error", self._engines[i].cause_of_death()
                left[i] -= 1
                if kind == "finished":
                    on_response(*value)
                elif kind == "error":
                    errors.append(f"rollout engine {i}: {value} (log: {self._engines[i].log_path})")
                if kind == "error" or not left[i]:
                    del pending[connection]
        if errors:
            self._bucket.clear()
            kind_of_error = WeightTransferError if "WeightTransferError" in errors[0] else RolloutError
            raise kind_of_error(errors[0])


class _EngineProcess:
    """A worker process and the connection to it."""

    def __init__(self, index: int, config: Config, log_dir: Path) -> None:
        self.log_path = log_dir / f"rollout_{index}.log"
        ours, theirs = socket.socketpair()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
        environment |= python_path() | engine_environment(config, index)
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                python_command("megarl.rollout.worker", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        theirs.close()
        self.connection = Connection(ours.detach())

    def send(self, command: str, argument: Any) -> None:
        try:
            self.connection.send((command, argument))
        except (BrokenPipeError, ConnectionResetError):
            raise RolloutError(f"{self.cause_of_death()} (log: {self.log_path})") from None

    def cause_of_death(self) -> str:
        code = self.process.wait()
        return (
            f"the engine's process was killed by signal {-code}{why_killed(code)}"
            if code < 0
            else f"the engine's process exited with {code}"
        )

    def close(self) -> None:
        """At once: an engine holds nothing worth saving, and an error must not wait for it."""
        self.connection.close()
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

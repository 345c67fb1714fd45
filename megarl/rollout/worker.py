"""One vLLM engine in a process of its own: `python -m megarl.rollout.worker FD`, commands over the socket FD.

Requests are ("command", argument) pairs; the reply is ("ok", result) or ("error", text), before it any number of
("progress", finished sequences). The process ends with its parent, whatever it is doing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from megarl.memory import give_back
from megarl.rollout.messages import Request, Response, Sampling
from megarl.rollout.transfer import register

PR_SET_PDEATHSIG = 1


class Engine:
    """vLLM's LLM with the commands of a worker."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        register()
        self.llm = LLM(**options)
        self.version: int | None = None  # of the weights served; None: none, or an update failed

    def init_weights(self, names: list[str]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": {"names": names}})

    def start_update(self, _: None) -> None:
        self.version = None
        self.llm.start_weight_update()

    def update_bucket(self, message: dict[str, Any]) -> None:
        self.llm.update_weights({"update_info": message})

    def finish_update(self, version: int) -> None:
        self.llm.finish_weight_update()
        self.llm.reset_prefix_cache()
        self.version = version

    def generate(self, argument: tuple[list[Request], Sampling], progress: Any) -> list[Response]:
        from vllm import SamplingParams

        requests, sampling = argument
        if self.version is None:
            raise RuntimeError("no complete weights: the engine serves nothing before a weight update succeeds")
        # An empty cache makes a batch's numbers independent of what was generated before it.
        self.llm.reset_prefix_cache()
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=sampling.max_tokens,
                seed=request.seed,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
            )
            for request in requests
        ]
        prompts: Any = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        self.llm.enqueue(prompts, params, use_tqdm=False)
        outputs: Any = self.llm.wait_for_completion(use_tqdm=lambda **_: _Progress(progress))
        return [self._response(output.outputs[0]) for output in outputs]

    def _response(self, completion: Any) -> Response:
        flat = completion.logprobs
        logprobs = np.array([flat.logprobs[start] for start in flat.start_indices], dtype=np.float32)
        return Response(
            token_ids=np.array(completion.token_ids, dtype=np.int32),
            logprobs=logprobs,
            finish_reason=completion.finish_reason,
            weight_version=self.version or 0,
        )


class _Progress:
    """Looks like a tqdm bar to vLLM and reports finished sequences, at most ten times a second."""

    def __init__(self, report: Any) -> None:
        self.report, self.n, self.postfix = report, 0, ""
        self._started = self._last = time.monotonic()

    @property
    def format_dict(self) -> dict[str, float]:
        return {"elapsed": max(time.monotonic() - self._started, 1e-9)}

    def update(self, n: int) -> None:
        self.n += n
        if (now := time.monotonic()) - self._last > 0.1:
            self._last = now
            self.report(self.n)

    def refresh(self) -> None:
        pass

    def close(self) -> None:
        pass


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    connection = Connection(int(sys.argv[1]))
    engine: Engine | None = None

    def progress(done: int) -> None:
        connection.send(("progress", done))

    while True:
        try:
            command, argument = connection.recv()
        except EOFError:
            break
        try:
            if command == "start":
                engine, result = Engine(argument), None
            elif command == "generate":
                assert engine is not None
                result = engine.generate(argument, progress)
            else:
                result = getattr(engine, command)(argument)
        except Exception as error:  # reported to the trainer, which decides
            connection.send(("error", f"{type(error).__name__}: {error}"))
        else:
            connection.send(("ok", result))
            result = None
            give_back()
    os._exit(0)  # vLLM's own teardown can hang on a vanished parent


if __name__ == "__main__":
    main()

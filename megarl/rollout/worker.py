"""One vLLM engine in a process of its own: `python -m megarl.rollout.worker FD`, commands over the socket FD.

Commands are ("command", argument) pairs; the reply is ("ok", None) or ("error", text). Between two steps of generation
the engine listens for more of them. A response is told as soon as it is finished, as ("finished", (number, response)),
an error of generation as ("error", text). The process ends with its parent, whatever it is doing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
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
        self.unfinished: set[int] = set()  # numbers of requests

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

    def submit(self, argument: tuple[list[tuple[int, Request]], Sampling]) -> None:
        """Take in requests, each with the number that its response will carry."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        requests, sampling = argument
        if self.version is None:
            raise RuntimeError("no complete weights: the engine serves nothing before a weight update succeeds")
        if not self.unfinished:
            # An empty cache makes a batch's numbers independent of what was generated before it.
            self.llm.reset_prefix_cache()
        for number, request in requests:
            params = SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=sampling.max_tokens,
                seed=request.seed,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self.llm.llm_engine.add_request(str(number), tokens_input(request.prompt_ids), params)
            self.unfinished.add(number)

    def step(self) -> list[tuple[int, Response]]:
        """The numbers and responses that one step of generation finishes."""
        outputs: list[Any] = [output for output in self.llm.llm_engine.step() if output.finished]
        finished = [(int(output.request_id), self._response(output.outputs[0])) for output in outputs]
        self.unfinished.difference_update(number for number, _ in finished)
        return finished

    def abort(self) -> None:
        """Give up what is unfinished."""
        self.llm.llm_engine.abort_request([str(number) for number in self.unfinished])
        self.unfinished.clear()

    def _response(self, completion: Any) -> Response:
        flat = completion.logprobs
        logprobs = np.array([flat.logprobs[start] for start in flat.start_indices], dtype=np.float32)
        return Response(
            token_ids=np.array(completion.token_ids, dtype=np.int32),
            logprobs=logprobs,
            finish_reason=completion.finish_reason,
            weight_version=self.version or 0,
        )


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    connection = Connection(int(sys.argv[1]))
    engine: Engine | None = None
    with suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            if engine and engine.unfinished and not connection.poll():
                _generate(engine, connection)
                continue
            command, argument = connection.recv()
            try:
                if command == "start":
                    engine = Engine(argument)
                else:
                    getattr(engine, command)(argument)
            except Exception as error:  # reported to the trainer, which decides
                if engine:
                    engine.abort()
                connection.send(_told(error))
            else:
                connection.send(("ok", None))
            give_back()
    os._exit(0)  # vLLM's own teardown can hang on a vanished parent


def _generate(engine: Engine, connection: Connection) -> None:
    """One step."""
    try:
        for finished in engine.step():
            connection.send(("finished", finished))
    except Exception as error:
        engine.abort()
        connection.send(_told(error))
    if not engine.unfinished:
        give_back()


def _told(error: Exception) -> tuple[str, str]:
    return "error", f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main()

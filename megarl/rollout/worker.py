"""One vLLM engine in a process of its own: `python -m megarl.rollout.worker FD`, messages over the socket FD.

It listens between two steps of generation, so requests, aborts and new weights arrive while others are being answered.
The process ends with its parent, whatever it is doing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from heapq import heappop, heappush
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from megarl.memory import give_back
from megarl.models.weights import Manifest
from megarl.phases import phase
from megarl.rollout.messages import (
    Abort,
    AnnounceWeights,
    Broken,
    Done,
    Finished,
    FinishUpdate,
    LoadBucket,
    Progress,
    Refused,
    Request,
    Response,
    Sampling,
    Sleep,
    Start,
    StartUpdate,
    Submit,
    VerifyWeights,
    Wake,
)
from megarl.rollout.transfer import DamagedWeights, SharedMemory, land, register

PR_SET_PDEATHSIG = 1
PROGRESS_SECONDS = 1.0
Waiting = tuple[int, int, Request, Sampling]  # due, number: a queue of them is in the order of their turn


class Engine:
    """vLLM's LLM, the requests that wait for it, and which weights sampled which token."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        register()
        self.llm = LLM(**options)
        self.slots = options["max_num_seqs"]
        self.version: int | None = None  # of the weights served; None: none, or an update is under way or failed
        self.update: StartUpdate | None = None  # that was asked for and has not finished
        self.busy = 0.0
        self._asleep: set[str] = set()  # vLLM's names of what it has given back
        self._waiting: list[Waiting] = []
        # Of each response that is being generated: (first token, version) wherever the version changes.
        self._running: dict[int, list[tuple[int, int]]] = {}

    @property
    def can_step(self) -> bool:
        return self.version is not None and bool(self._running or self._waiting and not self.update)

    @property
    def can_update(self) -> bool:
        """Whether nothing keeps the update that was asked for from starting."""
        return self.update is not None and self.version is not None and not any(map(self._holds, self._running))

    def announce_weights(self, manifest: Manifest) -> None:
        self.llm.init_weight_transfer_engine({"init_info": asdict(manifest)})

    def start_update(self) -> None:
        assert self.update
        self.version = None
        self.llm.collective_rpc("expect_update", args=(self.update.update, self.update.witnessed))
        self.llm.start_weight_update()

    def load_bucket(self, bucket: dict[str, Any], update: int, index: int) -> None:
        self.llm.update_weights({"update_info": bucket | {"update": update, "index": index}})

    def finish_update(self, update: int, buckets: int, version: int) -> None:
        self.llm.update_weights({"update_info": {"update": update, "buckets": buckets}})
        self.llm.finish_weight_update()
        # What is running is computed anew, or its next tokens would come from keys and values of the old weights.
        self.llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
        for number, changes in self._running.items():
            if (tokens := self._tokens(number)) > changes[-1][0]:
                changes.append((tokens, version))
            else:
                changes[-1] = (tokens, version)
        self.version, self.update = version, None

    def verify_weights(self) -> None:
        """Raises DamagedWeights."""
        workers: list[list[str]] = self.llm.collective_rpc("damaged_weights")
        damaged = [f"{name} (worker {i})" for i, names in enumerate(workers) for name in names]
        if damaged:
            self.version = None
            raise DamagedWeights(f"{len(damaged)} tensors are not as they were sent: {', '.join(damaged[:8])}")

    def sleep(self) -> None:
        if self._running or self._waiting:
            raise RuntimeError("it can't sleep: responses are being generated")
        if not self._asleep:
            self.llm.sleep(level=1)
            self._asleep = {"weights", "kv_cache"}

    def wake(self, for_weights: bool) -> None:
        if wanted := self._asleep & ({"weights"} if for_weights else self._asleep):
            self.llm.wake_up(tags=sorted(wanted))
            self._asleep -= wanted

    def submit(self, requests: list[tuple[int, Request]], sampling: Sampling) -> None:
        if not self._running and not self._waiting and self.version is not None:
            # An empty cache makes a batch's numbers independent of what was generated before it.
            self.llm.reset_prefix_cache()
        for number, request in requests:
            heappush(self._waiting, (request.due, number, request, sampling))

    def abort(self, numbers: set[int]) -> None:
        running = numbers & self._running.keys()
        self.llm.llm_engine.abort_request([str(number) for number in running])
        for number in running:
            del self._running[number]
        self._waiting = sorted(waiting for waiting in self._waiting if waiting[1] not in numbers)

    def begin(self) -> list[Refused]:
        """Hand waiting requests to vLLM, as far as it has room; those that it refuses."""
        refused = []
        while self._waiting and not self.update and len(self._running) < self.slots:
            _, number, request, sampling = heappop(self._waiting)
            try:
                self._add(number, request, sampling)
            except Exception as error:  # it is of this request alone, and names what is wrong with it
                refused.append(Refused(number, told(error)))
        return refused

    def step(self) -> list[tuple[int, Response]]:
        """The numbers and responses that one step of generation finishes."""
        with phase("generation") as generation:
            outputs: list[Any] = [output for output in self.llm.llm_engine.step() if output.finished]
            finished = [(int(output.request_id), self._response(output)) for output in outputs]
        self.busy += generation.seconds
        return finished

    def tokens(self) -> int:
        """Of all responses that are being generated."""
        return sum(map(self._tokens, self._running))

    def _add(self, number: int, request: Request, sampling: Sampling) -> None:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

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
            skip_clone=True,  # it is this request's alone; vLLM's deep copy takes longer than a token of a small model
        )
        self.llm.llm_engine.add_request(str(number), tokens_input(request.prompt_ids), params)
        assert self.version is not None
        self._running[number] = [(0, self.version)]

    def _holds(self, number: int) -> bool:
        """Whether this response keeps an update waiting."""
        assert self.update
        patience = self.update.patience
        return patience is None or self._tokens(number) - self._running[number][-1][0] < patience

    def _tokens(self, number: int) -> int:
        """How long a response is that is being generated."""
        processor: Any = self.llm.llm_engine.output_processor
        (internal,) = processor.external_req_ids[str(number)]
        return processor.request_states[internal].detokenizer.num_output_tokens()

    def _response(self, output: Any) -> Response:
        completion = output.outputs[0]
        flat, count = completion.logprobs, len(completion.token_ids)
        logprobs = np.array([flat.logprobs[start] for start in flat.start_indices], dtype=np.float32)
        versions = np.empty(count, np.int32)
        for first, version in self._running.pop(int(output.request_id)):
            versions[first:] = version
        return Response(
            token_ids=np.array(completion.token_ids, dtype=np.int32),
            logprobs=logprobs,
            finish_reason=completion.finish_reason,
            weight_versions=versions,
        )


class Worker:
    """Listens to the trainer and keeps its engine going."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._engine: Engine | None = None
        self._memory = SharedMemory()  # for weights that come from another node
        self._said = time.monotonic()

    def work(self) -> None:
        """Until the trainer is gone. Raises what generation raises."""
        while True:
            engine = self._engine
            if engine and engine.can_update:
                self._carry_out(engine.start_update)
            elif engine and engine.can_step and not self._connection.poll():
                self._step(engine)
            else:
                self._handle(self._connection.recv())

    def _step(self, engine: Engine) -> None:
        for refused in engine.begin():
            self._send(refused)
        if not engine.can_step:
            return
        if finished := engine.step():
            self._send(Finished(finished, engine.busy))
        elif time.monotonic() - self._said > PROGRESS_SECONDS:
            self._send(Progress(engine.tokens(), engine.busy))
        if not engine.can_step:
            give_back()

    def _handle(self, message: Any) -> None:
        if isinstance(message, Start):
            return self._carry_out(lambda: self._start(message.options))
        engine = self._engine
        assert engine, "Start comes first"
        match message:
            case Submit(requests, sampling):
                engine.submit(requests, sampling)
            case Abort(numbers):
                engine.abort(set(numbers))
            case AnnounceWeights(manifest):
                self._carry_out(lambda: engine.announce_weights(manifest))
            case StartUpdate():
                engine.update = message
                if engine.version is None:  # nothing is being generated
                    self._carry_out(engine.start_update)
            case LoadBucket(update, index, bucket, content):
                if content is not None:
                    bucket = land(bucket, content, self._memory)
                self._carry_out(lambda: engine.load_bucket(bucket, update, index), trims=False)
            case FinishUpdate(update, buckets, version):
                self._carry_out(lambda: engine.finish_update(update, buckets, version))
            case VerifyWeights():
                self._carry_out(engine.verify_weights)
            case Sleep():
                self._carry_out(engine.sleep)
            case Wake(for_weights):
                self._carry_out(lambda: engine.wake(for_weights))

    def _start(self, options: dict[str, Any]) -> None:
        self._engine = Engine(options)

    def _carry_out(self, command: Callable[[], None], trims: bool = True) -> None:
        """And give back what memory it took, unless the next command takes the same again."""
        began, reason = time.monotonic(), None
        try:
            command()
        except Exception as error:  # reported to the trainer, which decides
            reason = told(error)
        self._send(Done(reason, time.monotonic() - began))
        if trims:
            give_back()

    def _send(self, message: Any) -> None:
        self._connection.send(message)
        self._said = time.monotonic()


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    connection = Connection(int(sys.argv[1]))
    status = 0  # vLLM's own teardown can hang on a vanished parent, so none is waited for
    try:
        Worker(connection).work()
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        pass
    except Exception as error:
        status = 1
        traceback.print_exc()
        with suppress(OSError):
            connection.send(Broken(told(error)))
    os._exit(status)


if __name__ == "__main__":
    main()

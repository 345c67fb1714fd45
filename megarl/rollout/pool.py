"""The rollout engines of a run, for a caller who computes while they generate, and the weights that they serve."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from megarl.config import Config
from megarl.models.weights import Manifest
from megarl.phases import phase
from megarl.rollout.background import Background
from megarl.rollout.clock import Clock
from megarl.rollout.engine import weights_dtype
from megarl.rollout.fleet import Fleet, Receivers, RolloutError
from megarl.rollout.hosts import Nodes
from megarl.rollout.member import State
from megarl.rollout.messages import FinishUpdate, LoadBucket, StartUpdate, VerifyWeights, Wake
from megarl.rollout.transfer import Bucket, Message, Tensors, bucketfuls, content


class RolloutPool(Fleet):
    """The fleet, on a thread of its own. Weights arrive by `update_weights`; until then nothing is served."""

    def __init__(
        self,
        config: Config,
        log_dir: Path,
        manifest: Manifest,
        say: Callable[[str], object] = print,
        nodes: Nodes | None = None,
    ) -> None:
        super().__init__(config, log_dir, manifest, say, nodes)
        self.background = Background("rollout")
        self.clock = Clock()  # of weight updates
        self._buckets = [Bucket(weights_dtype(config)) for _ in range(2)]
        self._loading: Future[None] | None = None  # of a round's buckets
        self._updates = itertools.count()
        self._started = self.background.start(self._start_all())

    def wait_ready(self) -> None:
        """Block until every engine is up. Raises RolloutError where one doesn't start."""
        with phase("start"):
            self._started.result()

    def update_weights(self, tensors: Tensors, version: int, only_stale: bool = False) -> None:
        """Replace the weights of all engines, or of those that have none. Raises WeightTransferError where they are
        refused. Responses that are being generated go on with the new weights, as far as the config lets them."""
        self.load(self._rounds(tensors), version, only_stale)

    def load(self, rounds: Iterable[list[Message]], version: int, only_stale: bool = False) -> None:
        """`update_weights`, by what packers say of their buckets: each round's is loaded while the next is packed, in
        other buckets. Who packs waits for `settle` before the one after."""
        self.wait_ready()
        self._stale_again = Future()
        receivers, number, index = self._receivers(*[State.STALE] * only_stale), next(self._updates), 0
        every = self.config.rollout.verify_every
        witnessed = any(member.lives != member.verified for member in receivers) or bool(every and number % every == 0)
        try:
            self._tell(receivers, Wake(for_weights=True), "wake")
            if witnesses := {member: engine for member, engine in receivers.items() if member.witnesses}:
                self._tell(witnesses, VerifyWeights(), "verify")
            for member in receivers:
                member.witnesses = False
            self._tell(receivers, StartUpdate(number, self._patience, witnessed), "pause")
            for messages in rounds:
                self._finish_loading()
                loads = [LoadBucket(number, index + i, message, content(message)) for i, message in enumerate(messages)]
                index += len(loads)
                self._loading = self.background.start(self._load_all(receivers, loads))
            self._finish_loading()
            self._tell(receivers, FinishUpdate(number, index, version), "finish")
            if witnessed:
                self._tell(receivers, VerifyWeights(), "verify")
        except BaseException:
            self.version = None
            self.settle()
            self._loading = None
            raise
        self.version = version
        self.background.run(self._serve(receivers, witnessed))

    def settle(self) -> None:
        """Wait until engines have read, or refused, what they were given last."""
        if self._loading:
            wait([self._loading])

    def sleep(self) -> None:
        """Give back the memory of the GPUs until `wake`; nothing may be generated meanwhile."""
        self.background.run(self._sleep())

    def wake(self) -> None:
        """Take the GPUs again. New weights wake what they need by themselves."""
        self.background.run(self._wake())

    def start(self, coroutine: Any) -> Future[Any]:
        """Begin something that generates, in the background."""
        return self.background.start(coroutine)

    def is_done(self, future: Future[Any]) -> bool:
        """Wait for it; False where an engine that was started again needs weights meanwhile."""
        wait([future, self._stale_again], return_when="FIRST_COMPLETED")
        return future.done()

    def run(self, coroutine: Any, weights: Callable[[], Tensors] | None = None) -> Any:
        """Its result. `weights` are for an engine in the place of one that dies; without, that is an error."""
        future = self.start(coroutine)
        while not self.is_done(future):
            if weights is None or self.version is None:
                raise RolloutError("; ".join(member.last_words for member in self.members if member.last_words))
            self.update_weights(weights(), self.version, only_stale=True)
        return future.result()

    def busy_seconds(self) -> list[float]:
        """How long each engine has been generating so far."""
        return [member.busy for member in self.members]

    def close(self) -> None:
        self.background.close(last=self._kill_all)
        for bucket in self._buckets:
            bucket.close()

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _patience(self) -> int | None:
        """Tokens that a response may still grow by before an update interrupts it; None: it is finished first."""
        return 0 if self.config.rollout.weight_update == "in_flight" else self.config.schedule.partial_rollouts

    def _rounds(self, tensors: Tensors) -> Iterator[list[Message]]:
        """Of this process alone."""
        parts = bucketfuls(self.clock.each("gather", tensors), self.config.rollout.bucket_mib * 2**20)
        for part, bucket in zip(parts, itertools.cycle(self._buckets)):
            with self.clock.during("pack"):
                message = bucket.pack(part)
            self.settle()
            yield [message] if message else []

    async def _load_all(self, receivers: Receivers, loads: list[LoadBucket]) -> None:
        for load in loads:
            began = time.monotonic()
            worked = await self._tell_all(receivers, load)
            self.clock.seconds["load"] += worked
            self.clock.seconds["wire"] += time.monotonic() - began - worked

    def _finish_loading(self) -> None:
        """Raises what it raised."""
        loading, self._loading = self._loading, None
        if loading:
            loading.result()

    def _tell(self, receivers: Receivers, command: Any, part: str) -> None:
        """Give a command to engines and wait until each has carried it out. One that dies is left out from then on; it
        will want weights when it is back. Raises RolloutError or WeightTransferError where one can't."""
        with self.clock.during(part):
            self.background.run(self._tell_all(receivers, command))

"""The rollout engines of a run, for a caller who computes while they generate, and the weights that they serve."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from torch import Tensor

from megarl.config import Config
from megarl.phases import phase
from megarl.rollout.background import Background
from megarl.rollout.fleet import Fleet, Receivers, RolloutError
from megarl.rollout.hosts import Nodes
from megarl.rollout.member import State
from megarl.rollout.messages import FinishUpdate, LoadBucket, StartUpdate, Wake
from megarl.rollout.transfer import Bucket


class RolloutPool(Fleet):
    """The fleet, on a thread of its own. Weights arrive by `update_weights`; until then nothing is served."""

    def __init__(
        self,
        config: Config,
        log_dir: Path,
        tensor_names: list[str],
        say: Callable[[str], object] = print,
        nodes: Nodes | None = None,
    ) -> None:
        super().__init__(config, log_dir, tensor_names, say, nodes)
        self.background = Background("rollout")
        self._bucket = Bucket(config.rollout.bucket_mib * 2**20)
        self._started = self.background.start(self._start_all())

    def wait_ready(self) -> None:
        """Block until every engine is up. Raises RolloutError where one doesn't start."""
        with phase("start"):
            self._started.result()

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int, only_stale: bool = False) -> None:
        """Replace the weights of all engines, or of those that have none. Raises WeightTransferError where they are
        refused. Responses that are being generated go on with the new weights, as far as the config lets them."""
        self.wait_ready()
        self._stale_again = Future()
        receivers = self._receivers(*[State.STALE] * only_stale)
        try:
            self._tell(receivers, Wake(for_weights=True))
            self._tell(receivers, StartUpdate(self._patience))
            for name, tensor in tensors:
                if not self._bucket.add(name, tensor):
                    self._send_bucket(receivers, last=False)
                    self._bucket.add(name, tensor)
            self._send_bucket(receivers, last=True)
            self._tell(receivers, FinishUpdate(version))
        except BaseException:
            self.version = None
            self._bucket.clear()
            raise
        self.version = version
        self.background.run(self._serve(receivers))

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

    def run(self, coroutine: Any, weights: Callable[[], Iterable[tuple[str, Tensor]]] | None = None) -> Any:
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
        self._bucket.close()

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _patience(self) -> int | None:
        """Tokens that a response may still grow by before an update interrupts it; None: it is finished first."""
        return 0 if self.config.rollout.weight_update == "in_flight" else self.config.schedule.partial_rollouts

    def _send_bucket(self, receivers: Receivers, last: bool) -> None:
        self._tell(receivers, LoadBucket(self._bucket.message(last), self._bucket.content.numpy()))
        self._bucket.clear()

    def _tell(self, receivers: Receivers, command: Any) -> None:
        """Give a command to engines and wait until each has carried it out. One that dies is left out from then on; it
        will want weights when it is back. Raises RolloutError or WeightTransferError where one can't."""
        self.background.run(self._tell_all(receivers, command))

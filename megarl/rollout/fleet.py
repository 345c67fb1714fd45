"""All engines of a run on one event loop: spreads requests over them, hears them out, replaces one that dies."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from megarl.config import Config
from megarl.models.weights import Manifest
from megarl.rollout.engine import Engine, EngineDied, Here, Place, engine_options, start_waves
from megarl.rollout.hosts import Nodes
from megarl.rollout.member import Member, State, Work
from megarl.rollout.messages import (
    Abort,
    AnnounceWeights,
    Done,
    Finished,
    Progress,
    Refused,
    Request,
    Response,
    Sampling,
    Sleep,
    Start,
    Submit,
    Wake,
)
from megarl.rollout.transfer import DamagedWeights, WeightTransferError

OnResponse = Callable[[int, Response], object]  # takes the place of a request and its response
Receivers = dict[Member, Engine]  # of an update: which process of which member
START_SECONDS = 1800  # for an engine to load its model, on a disk that nobody has read yet
RESTARTS = 3  # of an engine that does nothing in between
BACK_OFF_SECONDS = 1.0  # before the first of them, and double before each one more


class RolloutError(RuntimeError):
    """An engine failed; the message says which, why, and where its log is."""


KINDS: list[type[RuntimeError]] = [WeightTransferError, DamagedWeights]  # of errors that an engine names


class Fleet:
    """vLLM engines, each a process of its own, as coroutines of one loop.

    What an engine was doing when it died is done again by the others, or by the one that is started in its place once
    that has weights, with the same random numbers. `say` is told of it.
    """

    def __init__(
        self,
        config: Config,
        log_dir: Path,
        manifest: Manifest,
        say: Callable[[str], object] = print,
        nodes: Nodes | None = None,
    ) -> None:
        self.config, self.say = config, say
        if config.rollout.placement == "ray":
            from megarl.rollout.ray import RayNodes

            nodes = RayNodes(config, say)
        self._nodes = nodes
        self._places: list[Place] = nodes.places if nodes else [Here(config)]
        self.members = [Member(i, log_dir / f"rollout_{i}.log") for i in range(config.rollout.engines)]
        self.version: int | None = None  # of the weights served; None: none, or the last ones were refused
        self.restarts = 0
        self._manifest = manifest
        self._homeless: list[Work] = []  # that no engine can take now
        self._numbers = itertools.count()
        self._stale_again: Future[None] = Future()  # done when an engine that was started again waits for weights
        self._lives: list[asyncio.Task[None]] = []
        self._broken: BaseException | None = None  # what nobody foresaw
        self._awake = asyncio.Event()  # an engine is started only where it may have the GPU
        self._awake.set()

    # Requests.

    async def generate(
        self,
        requests: list[Request],
        sampling: Sampling,
        group: int = 1,
        on_response: OnResponse = lambda place, response: None,
        on: int | None = None,
    ) -> list[Response]:
        """One response per request, in order; `on_response` is given the place and the response of each as it arrives.

        Every `group` requests share a prompt and go to one engine, which sees it once. Which that is depends only on
        their place and on which engines live; `on` names one.
        """
        if self.version is None:
            raise RolloutError("no complete weights: the engines serve nothing before a weight update succeeds")
        if not self._awake.is_set():
            raise RolloutError("the engines sleep: wake them first")
        loop, works = asyncio.get_running_loop(), []
        for place, request in enumerate(requests):
            work = Work(next(self._numbers), request, sampling, loop.create_future())
            work.response.add_done_callback(_telling(on_response, place))
            works.append(work)
        self._hand_out([works[i : i + group] for i in range(0, len(works), group)], on)
        try:
            return await asyncio.gather(*(work.response for work in works))
        finally:
            self._give_up([work for work in works if not work.response.done() or work.response.cancelled()])

    def _hand_out(self, groups: list[list[Work]], on: int | None = None) -> None:
        """Each group to an engine. Raises RolloutError where all are dead, and what ended a life unforeseen."""
        if self._broken:
            raise self._broken
        serving = [m for m in self.members if m.state is State.HEALTHY]
        serving = serving or [m for m in self.members if m.state is State.SUSPECT]
        if on is not None:
            serving = [m for m in serving if m.index == on]
        shares: dict[int, list[Work]] = {}
        for i, group in enumerate(groups):
            if serving:
                shares.setdefault(serving[i % len(serving)].index, []).extend(group)
            else:
                self._homeless += group
        if self._homeless and self._all_dead:
            raise self._why_all_dead()
        for index, works in shares.items():
            member = self.members[index]
            assert member.engine
            if not member.owes:
                member.heard = time.monotonic()
            member.work |= {work.number: work for work in works}
            for sampling, alike in itertools.groupby(works, key=lambda work: work.sampling):
                member.engine.send(Submit([(work.number, work.request) for work in alike], sampling))

    def _give_up(self, works: list[Work]) -> None:
        numbers = {work.number for work in works}
        self._homeless = [work for work in self._homeless if work.number not in numbers]
        for member in self.members:
            if member.engine and (given := numbers & member.work.keys()):
                for number in given:
                    del member.work[number]
                member.engine.send(Abort(sorted(given)))

    # Weights.

    async def _tell_all(self, receivers: Receivers, command: Any) -> float:
        """How long the one that took longest worked at it."""
        asked = list(receivers.items())
        replies = await asyncio.gather(*(self._ask(*receiver, command) for receiver in asked), return_exceptions=True)
        for (member, _), reply in zip(asked, replies, strict=True):
            if isinstance(reply, EngineDied):
                receivers.pop(member, None)
        for reply in replies:
            if isinstance(reply, BaseException) and not isinstance(reply, EngineDied):
                for member in receivers:
                    member.state, member.witnesses = State.STALE, False
                raise reply
        return max((reply for reply in replies if isinstance(reply, float)), default=0.0)

    async def _ask(self, member: Member, engine: Engine, command: Any) -> float:
        """The seconds that it worked. Raises EngineDied, or RolloutError where the engine couldn't."""
        if self._broken:
            raise self._broken
        if member.engine is not engine:
            raise EngineDied
        member.reply, member.heard = asyncio.get_running_loop().create_future(), time.monotonic()
        engine.send(command)
        done = await member.reply
        if done.error:
            raise next((kind for kind in KINDS if kind.__name__ in done.error), RolloutError)(member.of(done.error))
        return done.seconds

    async def _sleep(self) -> None:
        self._awake.clear()
        await self._tell_all(self._receivers(), Sleep())

    async def _wake(self) -> None:
        await self._tell_all(self._receivers(), Wake())
        self._awake.set()

    def _receivers(self, *states: State) -> Receivers:
        """The engines in these states, or all that live."""
        states = states or (State.STALE, State.HEALTHY, State.SUSPECT)
        return {m: m.engine for m in self.members if m.state in states and m.engine}

    async def _serve(self, receivers: Receivers, witnessed: bool) -> None:
        """These have the current weights, verified or not."""
        for member, engine in receivers.items():
            if member.engine is engine:
                member.witnesses = witnessed
                member.verified = member.lives if witnessed else member.verified
                member.state = State.HEALTHY if member.state is State.STALE else member.state
        homeless, self._homeless = self._homeless, []
        self._hand_out(_groups(homeless))

    # Lives of engines.

    async def _start_all(self) -> None:
        """Raises RolloutError where an engine doesn't start; after that, one that dies is started again."""
        if self._nodes:
            try:
                await self._nodes.meet()
            except EngineDied as error:
                raise RolloutError(str(error)) from None
        for wave in start_waves(self.config, len(self._places)):
            await _all(self._first(self.members[i]) for i in wave)
        self._lives = [asyncio.create_task(self._live(member)) for member in self.members]
        self._lives.append(asyncio.create_task(self._watch()))
        for life in self._lives:
            life.add_done_callback(self._fail)

    async def _first(self, member: Member) -> None:
        try:
            await self._begin(member)
        except EngineDied as died:
            raise RolloutError(member.of(died)) from None

    async def _begin(self, member: Member) -> None:
        """A process with the model loaded. Raises EngineDied."""
        member.lives, member.state = member.lives + 1, State.STARTING
        place = self._places[member.index % len(self._places)]
        try:
            engine = member.engine = await place.start(member.index, member.lives, member.log_path)
            for command in (Start(engine_options(self.config)), AnnounceWeights(self._manifest)):
                engine.send(command)
                reply = await asyncio.wait_for(engine.receive(), START_SECONDS)
                assert isinstance(reply, Done), f"{reply} before {command} is done"
                if reply.error:
                    raise EngineDied(reply.error)
        except (EngineDied, TimeoutError) as died:
            if member.engine:
                member.engine.kill()
            member.engine = None
            raise EngineDied(str(died) or f"not ready within {START_SECONDS} s") from None
        member.state = State.STALE

    async def _live(self, member: Member) -> None:
        """Hear an engine out, and start another where it dies."""
        while True:
            assert member.engine
            try:
                while True:
                    self._hear(member, await member.engine.receive())
            except EngineDied as died:
                cause = str(died)
            self._bury(member, cause)
            while member.engine is None:
                member.deaths += 1
                if member.deaths > RESTARTS:
                    self._end(member, cause)
                    return
                await asyncio.sleep(BACK_OFF_SECONDS * 2 ** (member.deaths - 1))
                await self._awake.wait()
                try:
                    await self._begin(member)
                except EngineDied as died:
                    cause = str(died)
            self.restarts += 1
            if not self._stale_again.done():
                self._stale_again.set_result(None)

    def _hear(self, member: Member, message: Any) -> None:
        member.heard = time.monotonic()
        if member.state is State.SUSPECT:
            member.state = State.HEALTHY
        match message:
            case Done():
                assert member.reply, "an answer to no question"
                member.reply.set_result(message)
                member.reply = None
            case Finished(responses, busy):
                member.busy, member.deaths = member.busy_before + busy, 0
                for number, response in responses:
                    if (work := member.work.pop(number, None)) and not work.response.done():
                        work.response.set_result(response)
            case Refused(number, reason):
                if (work := member.work.pop(number, None)) and not work.response.done():
                    work.response.set_exception(RolloutError(member.of(reason)))
            case Progress(tokens, busy):
                member.tokens, member.busy = tokens, member.busy_before + busy

    def _bury(self, member: Member, cause: str) -> None:
        """What a dead engine owes goes to the others, or waits."""
        assert member.engine
        member.engine.kill()
        member.engine, member.state, member.busy_before = None, State.STARTING, member.busy
        member.witnesses = False
        owed, member.work = list(member.work.values()), {}
        member.last_words = member.of(cause)
        if member.reply:
            member.reply.set_exception(EngineDied(cause))
            member.reply = None
        again = f"; its {len(owed)} unfinished responses are generated again" if owed else ""
        self.say(f"{member.last_words}{again}; starting another")
        self._hand_out(_groups(owed))

    def _end(self, member: Member, cause: str) -> None:
        """No more of this engine; without any, there is nobody left to do the work."""
        member.state = State.DEAD
        member.last_words = member.of(cause)
        self.say(f"rollout engine {member.index} died {member.deaths} times without finishing a response: given up")
        if self._all_dead:
            for work in self._homeless:
                work.response.set_exception(self._why_all_dead())

    @property
    def _all_dead(self) -> bool:
        return all(member.state is State.DEAD for member in self.members)

    def _why_all_dead(self) -> RolloutError:
        return RolloutError(f"every engine is dead: {'; '.join(member.last_words for member in self.members)}")

    def _fail(self, life: asyncio.Task[None]) -> None:
        """What ends a life unforeseen is raised wherever something is awaited: nobody waits for what can't come."""
        if not life.cancelled() and (error := life.exception()):
            self._broken = error
            works = [work for member in self.members for work in member.work.values()]
            owed: list[asyncio.Future[Any]] = [
                *(work.response for work in [*works, *self._homeless]),
                *(m.reply for m in self.members if m.reply),
            ]
            for future in owed:
                if not future.done():
                    future.set_exception(error)

    def _kill_all(self) -> None:
        for member in self.members:
            if member.engine:
                member.engine.kill()
        if self._nodes:
            self._nodes.close()

    async def _watch(self) -> None:
        """Kill engines that owe something and say nothing."""
        while True:
            limit, slept = self.config.rollout.stall_seconds, time.monotonic()
            await asyncio.sleep(tick := min(limit / 10, 1.0))
            paused = time.monotonic() - slept - tick  # this process itself, and most likely the engines with it
            for member in self.members:
                member.heard += paused if paused > tick else 0.0
                silent = time.monotonic() - member.heard
                if member.engine is None or member.state is State.STARTING or not member.owes or silent < limit / 2:
                    continue
                if silent < limit:
                    if member.state is State.HEALTHY:
                        member.state = State.SUSPECT
                        self.say(
                            f"waiting {silent:.0f} s for rollout engine {member.index}: {len(member.work)} responses "
                            f"unfinished, {member.tokens} tokens when it last spoke (log: {member.log_path})"
                        )
                else:
                    self.say(f"rollout engine {member.index} has been silent for {silent:.0f} s and is killed")
                    member.engine.kill()


def _groups(works: list[Work]) -> list[list[Work]]:
    """Neighbours with one prompt together."""
    return [list(alike) for _, alike in itertools.groupby(works, key=lambda work: work.request.prompt_ids)]


def _telling(on_response: OnResponse, place: int) -> Callable[[asyncio.Future[Response]], None]:
    def tell(future: asyncio.Future[Response]) -> None:
        if not future.cancelled() and not future.exception():
            on_response(place, future.result())

    return tell


async def _all(tasks: Iterable[Awaitable[None]]) -> None:
    """Every one to its end; then the first error, if any."""
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result

"""Reads and grades responses on a thread, while others are still generated."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue

from megarl.phases import phase
from megarl.rewards.pool import RewardPool, Verdict
from megarl.rollout.messages import Response
from megarl.rollout.reading import Reader


class Grader:
    """One thread that grades what arrives; the processes that do the work are the reward pool's."""

    def __init__(self, reader: Reader, rewards: RewardPool) -> None:
        self.reader, self.rewards = reader, rewards
        self._thread = ThreadPoolExecutor(1, "grader")

    def begin(self, answers: list[str]) -> Grading:
        """Responses to come, with their reference answers by place."""
        return Grading(self, answers)

    def run(self, task: Callable[[], None]) -> Future[None]:
        return self._thread.submit(task)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


class Grading:
    """Of one batch: `graded` grows, by place. A verdict depends on its response alone, not on what it came with."""

    def __init__(self, grader: Grader, answers: list[str]) -> None:
        self._grader, self._answers = grader, answers
        self._waiting: SimpleQueue[tuple[int, Response]] = SimpleQueue()
        self._tasks: list[Future[None]] = []
        self.graded: dict[int, tuple[str, Verdict]] = {}

    def put(self, place: int, response: Response) -> None:
        self._waiting.put((place, response))
        self._tasks.append(self._grader.run(self._grade_what_waits))

    async def results(self) -> list[tuple[str, Verdict]]:
        """The text and the verdict of every response, in order, once all are graded; an error of the thread is raised
        here."""
        for task in self._tasks:
            await asyncio.wrap_future(task)
        return [self.graded[place] for place in range(len(self._answers))]

    def _grade_what_waits(self) -> None:
        batch = []
        while True:
            try:
                batch.append(self._waiting.get_nowait())
            except Empty:
                break
        if not batch:
            return  # an earlier call took it along
        texts = self._grader.reader.read([response.token_ids for _, response in batch])
        asked = [
            (text, self._answers[place], response.finish_reason == "length")
            for text, (place, response) in zip(texts, batch, strict=True)
        ]
        with phase("grading", len(asked)) as grading:
            verdicts = self._grader.rewards.grade(asked, grading.advance)
        self.graded.update(
            (place, (text, verdict)) for (place, _), text, verdict in zip(batch, texts, verdicts, strict=True)
        )

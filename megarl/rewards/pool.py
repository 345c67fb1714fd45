"""Grades responses; what needs a computer algebra system is checked in processes that can be killed.

Extraction, exact comparison and guards run in the caller. The rest goes, once per distinct answer, to workers with a
CPU-time budget per answer (not wall time: a verdict mustn't depend on how busy the machine is) and a memory cap.
"""

from __future__ import annotations

import select
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megarl.rewards import reward_named
from megarl.rewards.process import Question, WorkerLost, WorkerProcess
from megarl.types import RewardStatus, UserError

POLL_SECONDS = 0.02
STARTS = 3  # in a row that fail: the fault is the installation's
ATTEMPTS = 2  # at a question by workers that die of it or get stuck
CACHED_VERDICTS = 1 << 14
MAX_REFERENCE_CHARACTERS = 4096
CORES_PER_WORKER = 4  # the others are for engines and ranks, and for the thread that asks the workers
MOST_WORKERS = 16
MAX_CACHED_CHARACTERS = 1024  # of an answer or reference whose verdict is kept

Progress = Callable[[int], object]  # takes how many of a batch have their verdict


@dataclass(frozen=True)
class Verdict:
    """What the verifier concluded about one response, the answer that it saw, and which step concluded it."""

    status: RewardStatus
    extracted: str | None
    reason: str


def worker_count(cores: int) -> int:
    """Of a pool on a machine that has other things to do."""
    return min(max(cores // CORES_PER_WORKER, 1), MOST_WORKERS)


def _ignore(question: Question, verdict: Verdict) -> None:
    pass


class RewardPool:
    """Grades responses with one reward. Use as a context manager, or call `close`. Calls from threads take turns.

    cpu_seconds: CPU time for one answer; more is TIMEOUT. wall_seconds: backstop for a worker that makes no progress
    without using CPU (default 30 times the CPU budget). memory_bytes: address space of a worker. recycle_after:
    answers a worker checks before a fresh one replaces it. reward, lenient: as in the config's section `reward`.
    `checked` counts the answers that workers were given.
    """

    def __init__(
        self,
        workers: int = 1,
        cpu_seconds: float = 2.0,
        memory_bytes: int = 2 << 30,
        recycle_after: int = 2000,
        wall_seconds: float | None = None,
        reward: str = "math",
        lenient: bool = False,
    ) -> None:
        if min(workers, recycle_after) < 1 or cpu_seconds <= 0:
            raise UserError("reward: workers, recycle_after and cpu_seconds must be positive")
        self.workers, self.recycle_after = workers, recycle_after
        self.cpu_seconds, self.wall_seconds = cpu_seconds, wall_seconds or 30 * cpu_seconds
        self.checked = 0
        self._reward = reward_named(reward, lenient)
        self._worker_arguments = [reward, "lenient" if lenient else "strict", str(cpu_seconds), str(memory_bytes)]
        self._staff: list[WorkerProcess] = []
        self._cache: OrderedDict[Question, Verdict] = OrderedDict()
        self._lock = threading.RLock()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers, after the batch that another thread may be grading. A later `grade` starts new ones."""
        with self._lock:
            while self._staff:
                self._staff.pop().kill()

    def check(self) -> None:
        """Start a worker and wait until it is ready. Raises UserError where the reward can't be used."""
        with self._lock:
            try:
                self._check([], starting=True)
            except BaseException:
                self.close()
                raise

    def grade(self, items: Sequence[tuple[str, str, bool]], on_progress: Progress | None = None) -> list[Verdict]:
        """One verdict per (response text, reference answer, truncated), in order."""
        with self._lock:
            decided: dict[int, Verdict] = {}
            undecided: dict[Question, list[int]] = {}

            def decide(question: Question, verdict: Verdict) -> None:
                decided.update(dict.fromkeys(undecided[question], verdict))
                self._remember(question, verdict)
                if on_progress:
                    on_progress(len(decided))

            for index, item in enumerate(items):
                outcome = self._decide(*item)
                if isinstance(outcome, Verdict):
                    decided[index] = outcome
                else:
                    undecided.setdefault(outcome, []).append(index)
            if on_progress:
                on_progress(len(decided))
            try:
                self._check(list(undecided), decide)
            except BaseException:
                self.close()  # a worker that is still busy would answer this call's question in the next call
                raise
            return [decided[index] for index in range(len(items))]

    def _decide(self, text: str, reference: str, truncated: bool) -> Verdict | Question:
        """The verdict where the caller's process can reach it, else the question for a worker."""
        if truncated:
            return Verdict(RewardStatus.TRUNCATED, None, "truncated")
        answer = self._reward.extract_answer(text)
        if not answer:
            return Verdict(RewardStatus.NO_ANSWER, None, "no answer")
        question = (answer, reference)
        if question in self._cache:
            self._cache.move_to_end(question)
            return self._cache[question]
        fast = self._reward.fast_verdict(answer, reference)
        if fast is not None:
            return self._remember(question, self._answered(question, fast, "exact comparison"))
        refusal = self._reward.guard(answer)
        if refusal is None and len(reference) > MAX_REFERENCE_CHARACTERS:
            refusal = "the reference is too long to compare with"
        if refusal is None and (reason := self._reward.guard(reference)) is not None:
            refusal = f"of the reference: {reason}"
        if refusal is not None:
            return self._remember(question, self._answered(question, False, f"guard: {refusal}"))
        return question

    def _remember(self, question: Question, verdict: Verdict) -> Verdict:
        if verdict.status.is_verdict and max(map(len, question)) <= MAX_CACHED_CHARACTERS:
            self._cache[question] = verdict
            if len(self._cache) > CACHED_VERDICTS:
                self._cache.popitem(last=False)
        return verdict

    def _check(
        self, questions: list[Question], decide: Callable[[Question, Verdict], None] = _ignore, starting: bool = False
    ) -> None:
        """Have workers find the verdicts. A lost worker costs its question one of two attempts, and no other question.

        With `starting`, wait for a worker even if there is no question.
        """
        self.checked += len(questions)
        waiting, left = deque(questions), len(questions)
        losses: Counter[Question] = Counter()
        failed_starts = 0
        while left or (starting and not any(worker.ready for worker in self._staff)):
            while len(self._staff) < min(self.workers, max(left, 1)):
                self._staff.append(WorkerProcess(self._worker_arguments))
            for worker in self._staff:
                if waiting and worker.idle and worker.ask(waiting[0]):
                    waiting.popleft()
            readable = self._wait()
            for worker in list(self._staff):
                question = worker.question
                try:
                    reply = worker.look(worker.reply_descriptor in readable, self.cpu_seconds, self.wall_seconds)
                except WorkerLost as lost:
                    self._staff.remove(worker)
                    failed_starts = 0 if worker.ready else failed_starts + 1
                    name = self._worker_arguments[0]
                    if ":" in name and failed_starts == (1 if lost.stuck else STARTS):
                        module = name.partition(":")[0]
                        raise UserError(f"reward.name={name}: module {module} can't be imported ({lost})") from None
                    if failed_starts == STARTS:
                        raise RuntimeError(
                            f"{STARTS} reward workers in a row were lost at their start: {lost}"
                        ) from lost
                    if question is None:
                        continue
                    losses[question] += 1
                    if lost.over_budget:
                        left -= 1
                        decide(question, self._timeout(question))
                    elif losses[question] == ATTEMPTS:
                        left -= 1
                        decide(question, Verdict(RewardStatus.ERROR, self._shown(question), str(lost)))
                    else:
                        waiting.append(question)
                    continue
                if reply and question:
                    left -= 1
                    decide(question, self._verdict(question, reply))
                    if reply["worn"] or worker.served >= self.recycle_after:
                        self._staff.remove(worker)
                        worker.kill()

    def _wait(self) -> set[int]:
        """Until a worker says something or takes more of a long question; the descriptors of those that say."""
        poll = select.poll()
        for worker in self._staff:
            poll.register(worker.reply_descriptor, select.POLLIN)
            if worker.has_unsent:
                poll.register(worker.request_descriptor, select.POLLOUT)
        readable = {descriptor for descriptor, _ in poll.poll(1000 * POLL_SECONDS)}
        for worker in self._staff:
            worker.send()
        return readable

    def _verdict(self, question: Question, reply: dict) -> Verdict:
        if reply["cpu"] > self.cpu_seconds:  # done before the poll noticed; the budget decides, not the poll
            return self._timeout(question)
        if reply["verdict"] is None:
            return Verdict(RewardStatus.ERROR, self._shown(question), reply["error"])
        return self._answered(question, reply["verdict"], "checked")

    def _answered(self, question: Question, right: bool, reason: str) -> Verdict:
        return Verdict(RewardStatus.CORRECT if right else RewardStatus.WRONG, self._shown(question), reason)

    def _timeout(self, question: Question) -> Verdict:
        reason = f"more than {self.cpu_seconds:g} s of CPU time"
        if self._reward.outweighs(*question):
            return self._answered(question, False, f"{reason}, and much more than the reference")
        return Verdict(RewardStatus.TIMEOUT, self._shown(question), reason)

    def _shown(self, question: Question) -> str | None:
        return None if self._reward.whole_response else question[0]

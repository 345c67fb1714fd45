"""Grades responses; what needs a computer algebra system is checked in processes that can be killed.

Extraction, exact comparison and guards run in the caller. The rest goes, once per distinct answer, to workers with a
CPU-time budget per answer (not wall time: a verdict mustn't depend on how busy the machine is) and a memory cap.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import psutil

import megarl
from megarl.rewards import REWARDS
from megarl.rewards.worker import READY
from megarl.types import RewardStatus, UserError

POLL_SECONDS = 0.02
STARTUP_SECONDS = 120.0
STARTS = 3  # in a row that fail: the fault is the installation's
ATTEMPTS = 2  # at a question by workers that die of it or get stuck
CACHED_VERDICTS = 1 << 14
MAX_REFERENCE_CHARACTERS = 4096  # a request always fits a pipe's buffer, so sending one can't block

Question = tuple[str, str]  # extracted answer, reference answer


@dataclass(frozen=True)
class Verdict:
    """What the verifier concluded about one response, the answer that it saw, and which step concluded it."""

    status: RewardStatus
    extracted: str | None
    reason: str


class RewardPool:
    """Grades responses with one reward. Use as a context manager, or call `close`. Calls from threads take turns.

    cpu_seconds: CPU time for one answer; more is TIMEOUT. wall_seconds: backstop for a worker that makes no progress
    without using CPU (default 30 times the CPU budget). memory_bytes: address space of a worker. recycle_after:
    answers a worker checks before a fresh one replaces it. `checked` counts the answers that workers were given.
    """

    def __init__(
        self,
        workers: int = 1,
        cpu_seconds: float = 2.0,
        memory_bytes: int = 2 << 30,
        recycle_after: int = 2000,
        wall_seconds: float | None = None,
        reward: str = "math",
    ) -> None:
        if reward not in REWARDS:
            raise UserError(f"reward: no reward is named {reward!r}; there is {', '.join(REWARDS)}")
        if min(workers, recycle_after) < 1 or cpu_seconds <= 0:
            raise UserError("reward: workers, recycle_after and cpu_seconds must be positive")
        self.workers, self.recycle_after = workers, recycle_after
        self.cpu_seconds, self.wall_seconds = cpu_seconds, wall_seconds or 30 * cpu_seconds
        self.checked = 0
        self._reward = REWARDS[reward]
        self._worker_arguments = [reward, str(cpu_seconds), str(memory_bytes)]
        self._staff: list[_Worker] = []
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

    def grade(self, items: Sequence[tuple[str, str, bool]]) -> list[Verdict]:
        """One verdict per (response text, reference answer, truncated), in order."""
        with self._lock:
            decided: dict[int, Verdict] = {}
            undecided: dict[Question, list[int]] = {}
            for index, item in enumerate(items):
                outcome = self._decide(*item)
                if isinstance(outcome, Verdict):
                    decided[index] = outcome
                else:
                    undecided.setdefault(outcome, []).append(index)
            try:
                verdicts = self._check(list(undecided)) if undecided else {}
            except BaseException:
                self.close()  # a worker that is still busy would answer this call's question in the next call
                raise
            for question, verdict in verdicts.items():
                decided.update(dict.fromkeys(undecided[question], verdict))
                if verdict.status.is_verdict:
                    self._cache[question] = verdict
            while len(self._cache) > CACHED_VERDICTS:
                self._cache.popitem(last=False)
            return [decided[index] for index in range(len(items))]

    def _decide(self, text: str, reference: str, truncated: bool) -> Verdict | Question:
        """The verdict where the caller's process can reach it, else the question for a worker."""
        if truncated:
            return Verdict(RewardStatus.TRUNCATED, None, "truncated")
        answer = self._reward.extract_answer(text)
        if not answer:
            return Verdict(RewardStatus.NO_ANSWER, None, "no answer")
        fast = self._reward.fast_verdict(answer, reference)
        if fast is not None:
            return Verdict(RewardStatus.CORRECT if fast else RewardStatus.WRONG, answer, "exact comparison")
        refusal = self._reward.guard(answer)
        if refusal is None and len(reference) > MAX_REFERENCE_CHARACTERS:
            refusal = "the reference is too long to compare with"
        if refusal is not None:
            return Verdict(RewardStatus.WRONG, answer, f"guard: {refusal}")
        question = (answer, reference)
        if question in self._cache:
            self._cache.move_to_end(question)
            return self._cache[question]
        return question

    def _check(self, questions: list[Question]) -> dict[Question, Verdict]:
        """The workers' verdicts. A lost worker costs its question one of two attempts, and no other question."""
        self.checked += len(questions)
        waiting, verdicts = deque(questions), dict[Question, Verdict]()
        losses: Counter[Question] = Counter()
        failed_starts = 0
        while len(verdicts) < len(questions):
            while len(self._staff) < min(self.workers, len(questions) - len(verdicts)):
                self._staff.append(_Worker(self._worker_arguments))
            for worker in self._staff:
                if waiting and worker.idle and worker.ask(waiting[0]):
                    waiting.popleft()
            readable = wait([worker.file_descriptor for worker in self._staff], POLL_SECONDS)
            for worker in list(self._staff):
                question = worker.question
                try:
                    reply = worker.look(worker.file_descriptor in readable, self.cpu_seconds, self.wall_seconds)
                except _WorkerLost as lost:
                    self._staff.remove(worker)
                    failed_starts = 0 if worker.ready else failed_starts + 1
                    if failed_starts == STARTS:
                        raise RuntimeError(
                            f"{STARTS} reward workers in a row were lost at their start: {lost}"
                        ) from lost
                    if question is None:
                        continue
                    losses[question] += 1
                    if lost.over_budget:
                        verdicts[question] = self._timeout(question)
                    elif losses[question] == ATTEMPTS:
                        verdicts[question] = Verdict(RewardStatus.ERROR, question[0], str(lost))
                    else:
                        waiting.append(question)
                    continue
                if reply and question:
                    verdicts[question] = self._verdict(question, reply)
                    if reply["error"] or worker.served >= self.recycle_after:
                        self._staff.remove(worker)
                        worker.kill()
        return verdicts

    def _verdict(self, question: Question, reply: dict) -> Verdict:
        if reply["cpu"] > self.cpu_seconds:  # done before the poll noticed; the budget decides, not the poll
            return self._timeout(question)
        if reply["verdict"] is None:
            return Verdict(RewardStatus.ERROR, question[0], reply["error"])
        return Verdict(RewardStatus.CORRECT if reply["verdict"] else RewardStatus.WRONG, question[0], "checked")

    def _timeout(self, question: Question) -> Verdict:
        return Verdict(RewardStatus.TIMEOUT, question[0], f"more than {self.cpu_seconds:g} s of CPU time")


class _WorkerLost(Exception):
    """A worker that died or had to be killed; it is reaped. Says why, and whether its question's CPU budget is why."""

    def __init__(self, reason: str, over_budget: bool = False) -> None:
        super().__init__(reason)
        self.over_budget = over_budget


class _Worker:
    """One process of megarl.rewards.worker, in a process group of its own, with at most one question in hand."""

    def __init__(self, arguments: list[str]) -> None:
        root = str(Path(megarl.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        # A new interpreter, not a fork: the fork of a process with threads (torch, gloo, CUDA) can deadlock.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "megarl.rewards.worker", *arguments, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},  # sympy's search order follows the hash
            process_group=0,
            bufsize=0,
        )
        assert self._process.stdin and self._process.stdout
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self.file_descriptor = self._replies.fileno()
        self._usage = psutil.Process(self._process.pid)
        self._cpu_before = 0.0
        self._since = time.monotonic()  # the start, then the last question
        self.ready = False
        self.question: Question | None = None
        self.served = 0

    @property
    def idle(self) -> bool:
        return self.ready and self.question is None

    def ask(self, question: Question) -> bool:
        """Hand over a question; False if the process is gone, which the next `look` raises."""
        self._cpu_before = self._cpu_seconds()
        try:
            self._requests.write(json.dumps({"answer": question[0], "reference": question[1]}).encode() + b"\n")
        except BrokenPipeError:
            return False
        self.question, self._since = question, time.monotonic()
        self.served += 1
        return True

    def look(self, readable: bool, cpu_limit: float, wall_limit: float) -> dict | None:
        """The reply to the question in hand, None if there is none yet; kills, reaps and raises over a limit (s)."""
        if readable:
            line = self._replies.read(4096)  # what a worker says is shorter than PIPE_BUF, so it arrives whole
            if not line:
                code = self.kill()
                raise _WorkerLost(f"the worker ended with exit code {code}", over_budget=code == -signal.SIGXCPU)
            if line == READY:
                self.ready = True
                return None
            self.question = None
            return json.loads(line)
        if self.question is not None and self._cpu_seconds() - self._cpu_before > cpu_limit:
            self.kill()
            raise _WorkerLost("over the CPU budget", over_budget=True)
        wall = time.monotonic() - self._since
        if not self.idle and wall > (wall_limit if self.ready else STARTUP_SECONDS):
            self.kill()
            raise _WorkerLost(f"the worker was stuck for {wall:.0f} s without using its CPU budget")
        return None

    def _cpu_seconds(self) -> float:
        """CPU time of the process and its ended children since its start."""
        try:
            times = self._usage.cpu_times()
        except psutil.Error:  # it just died: the pipe will say so
            return 0.0
        return times.user + times.system + times.children_user + times.children_system

    def kill(self) -> int:
        """Kill the process group and reap the process; its exit code, negative for a signal."""
        os.killpg(self._process.pid, signal.SIGKILL)  # the group exists until its leader is reaped
        code = self._process.wait()
        self._requests.close()
        self._replies.close()
        return code

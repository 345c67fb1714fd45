"""One worker process of the reward pool, as its parent sees it: asking, watching, killing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import psutil

from megarl.processes import describe_exit, python_command, python_path
from megarl.rewards.worker import READY, STARTUP_SECONDS
from megarl.types import UserError

Question = tuple[str, str]  # extracted answer, reference answer


class WorkerLost(Exception):
    """A worker that died or had to be killed; it is reaped. Says why: its question's CPU budget, or time, or else."""

    def __init__(self, reason: str, over_budget: bool = False, stuck: bool = False) -> None:
        super().__init__(reason)
        self.over_budget, self.stuck = over_budget, stuck


class WorkerProcess:
    """One process of megarl.rewards.worker, in a process group of its own, with at most one question in hand."""

    def __init__(self, arguments: list[str]) -> None:
        # A new interpreter, not a fork: the fork of a process with threads (torch, gloo, CUDA) can deadlock.
        self._process = subprocess.Popen(
            python_command("megarl.rewards.worker", *arguments, str(os.getpid())),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | python_path() | {"PYTHONHASHSEED": "0"},  # sympy's search order follows the hash
            process_group=0,
            bufsize=0,
        )
        assert self._process.stdin and self._process.stdout
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self.reply_descriptor, self.request_descriptor = self._replies.fileno(), self._requests.fileno()
        os.set_blocking(self.request_descriptor, False)  # a stopped worker must not stop its parent
        self._unsent = b""
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
        self._unsent = json.dumps({"answer": question[0], "reference": question[1]}).encode() + b"\n"
        if not self.send():
            return False
        self.question, self._since = question, time.monotonic()
        self.served += 1
        return True

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def send(self) -> bool:
        """Write as much of the question as the pipe takes; False if the process is gone."""
        try:
            while self._unsent:
                self._unsent = self._unsent[os.write(self.request_descriptor, self._unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._unsent = b""
            return False
        return True

    def look(self, readable: bool, cpu_limit: float, wall_limit: float) -> dict | None:
        """The reply to the question in hand, None if there is none yet; kills, reaps and raises over a limit (s).

        Raises UserError for a reward that can't be used; the process is then the caller's to kill.
        """
        if readable:
            line = self._replies.read(4096)  # what a worker says is shorter than PIPE_BUF, so it arrives whole
            if not line:
                code = self.kill()
                raise WorkerLost(f"the worker {describe_exit(code)}", over_budget=code == -signal.SIGXCPU)
            if line == READY:
                self.ready = True
                return None
            reply = json.loads(line)
            if "refused" in reply:
                raise UserError(reply["refused"])
            self.question = None
            return reply
        if self.question is not None and self._cpu_seconds() - self._cpu_before > cpu_limit:
            self.kill()
            raise WorkerLost("over the CPU budget", over_budget=True)
        wall = time.monotonic() - self._since
        if not self.idle and wall > (wall_limit if self.ready else STARTUP_SECONDS):
            self.kill()
            doing = "stuck for {:.0f} s without using its CPU budget" if self.ready else "not ready after {:.0f} s"
            raise WorkerLost(f"the worker was {doing.format(wall)}", stuck=True)
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

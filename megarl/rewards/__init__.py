"""Verifiable rewards: a reward is four functions of text, and a row here. The pool supplies the processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megarl.rewards import math


@dataclass(frozen=True)
class Reward:
    """How one kind of answer is found and checked. Only `slow_verdict` may be slow; it runs in a killable process."""

    extract_answer: Callable[[str], str | None]  # response -> answer
    fast_verdict: Callable[[str, str], bool | None]  # answer, reference -> verdict; None: undecided
    guard: Callable[[str], str | None]  # answer -> why the slow check must not see it
    slow_verdict: Callable[[str, str], bool]  # answer, reference -> verdict


REWARDS = {
    "math": Reward(math.extract_answer, math.fast_verdict, math.guard, math.math_verify_verdict),
}

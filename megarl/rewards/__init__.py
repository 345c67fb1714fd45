"""Verifiable rewards: a reward is a few functions of text, and a row here. The pool supplies the processes.

The names of the rows are also in config/sections.py, which imports no grader.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from megarl.rewards import countdown, extraction, guards, layout, math, user
from megarl.types import UserError


@dataclass(frozen=True)
class Reward:
    """How one kind of answer is found and checked. Only `slow_verdict` may be slow; it runs in a killable process."""

    extract_answer: Callable[[str], str | None]  # response -> answer
    fast_verdict: Callable[[str, str], bool | None]  # answer, reference -> verdict; None: undecided
    guard: Callable[[str], str | None]  # answer -> why the slow check must not see it
    slow_verdict: Callable[[str, str], bool]  # answer, reference -> verdict
    prepare: Callable[[], object] = lambda: None  # what a worker does before its first answer; may raise Unusable
    outweighs: Callable[[str, str], bool] = lambda *_: False  # answer, reference -> whether too slow is wrong
    whole_response: bool = False  # the answer is all of the response: not worth keeping
    accepts: tuple[tuple[str, str], ...] = ()  # response and reference, of which a run must be able to read one


REWARDS = {
    "math": Reward(
        extraction.boxed_answer,
        math.fast_verdict,
        guards.guard,
        math.math_verify_verdict,
        math.prepare,
        guards.outweighs,
        accepts=((r"\boxed{1}", "1"),),
    ),
    "countdown": Reward(
        countdown.extract_answer,
        countdown.fast_verdict,
        countdown.guard,
        countdown.verdict,
        accepts=((r"\boxed{1}", "1 = 1"), ("<answer>1</answer>", "1 = 1")),
    ),
    "format": Reward(
        str,
        layout.has_layout,
        lambda _: None,
        layout.has_layout,
        whole_response=True,
        accepts=((layout.EXAMPLE, ""),),
    ),
}


def reward_named(name: str, lenient: bool = False) -> Reward:
    """A row of REWARDS, or the user's `module:function`, which is imported by `prepare` only. Raises UserError."""
    if ":" in name:
        check = partial(user.verdict, name)
        return Reward(str, lambda *_: None, user.guard, check, prepare=partial(user.load, name), whole_response=True)
    if name not in REWARDS:
        raise UserError(
            f"reward.name={name!r}: there is {', '.join(REWARDS)}, or a function of yours as module:function"
        )
    reward = REWARDS[name]
    return replace(reward, extract_answer=extraction.lenient_answer) if lenient else reward

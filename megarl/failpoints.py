"""Deaths at an exact place, for tests of what a run survives.

MEGARL_FAILPOINT="rank 1 update 4": rank 1 is killed as it begins the phase update for the fourth time.
"engine 0.1 generation 9": so is rollout engine 0, in the first of its processes, before its ninth step of generation.
Several are separated by commas.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "MEGARL_FAILPOINT"
PROCESS = "MEGARL_PROCESS"  # what this process is, where it is no rank
_reached: Counter[str] = Counter()


def reach(phase: str) -> None:
    """Say that a phase begins; the end of this process where VARIABLE names it."""
    _reached[phase] += 1
    process = os.environ.get(PROCESS) or f"rank {os.environ.get('RANK', 0)}"
    if f"{process} {phase} {_reached[phase]}" in os.environ.get(VARIABLE, "").split(","):
        os.kill(os.getpid(), signal.SIGKILL)

"""Deaths at an exact place, for tests of what a run survives.

MEGARL_FAILPOINT="rank 1 update 4": rank 1 is killed as it begins the phase update for the fourth time.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "MEGARL_FAILPOINT"
_reached: Counter[str] = Counter()


def reach(phase: str) -> None:
    """Say that a phase begins; the end of this process where it is the one that VARIABLE names."""
    _reached[phase] += 1
    if os.environ.get(VARIABLE) == f"rank {os.environ.get('RANK', 0)} {phase} {_reached[phase]}":
        os.kill(os.getpid(), signal.SIGKILL)

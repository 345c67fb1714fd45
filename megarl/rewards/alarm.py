"""Says when a run's rewards can't be trusted: the verifier fails often, or no response has what it looks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from megarl.rewards.layout import EXAMPLE
from megarl.rewards.pool import Verdict
from megarl.types import RewardStatus

ALARM_SHARE = 0.01  # of verdicts that are timeout or error
EXAMPLE_CHARACTERS = 80
RECENT = 16  # steps that may be under way side by side
FORMLESS = (RewardStatus.NO_ANSWER, RewardStatus.TRUNCATED)


def is_alarming(statuses: Counter[RewardStatus]) -> bool:
    """Whether over 1% of these verdicts are missing."""
    failed = sum(count for status, count in statuses.items() if not status.is_verdict)
    return failed > ALARM_SHARE * statuses.total()


def nothing_to_reward(name: str, verdicts: Sequence[Verdict], texts: Sequence[str]) -> str | None:
    """One line, if none of these responses, a run's first, has the form that the reward `name` asks for."""
    if name == "format":
        met, wanted = any(verdict.status is RewardStatus.CORRECT for verdict in verdicts), EXAMPLE.replace("1", "...")
    elif ":" in name:
        return None  # the form is the user's own
    else:
        met, wanted = (
            not all(verdict.status in FORMLESS for verdict in verdicts),
            f"an answer that reward.name={name} finds",
        )
    if met or not verdicts:
        return None
    cut = sum(verdict.status is RewardStatus.TRUNCATED for verdict in verdicts)
    return (
        f"reward alarm: none of the first {len(verdicts)} responses has {wanted} ({cut} truncated), so nothing can be "
        f"learned from them; ask for it in data.prompt_template, start from a model that knows it, or raise "
        f"rollout.max_response_tokens; e.g. {texts[0][-EXAMPLE_CHARACTERS:]!r}"
    )


class Alarm:
    """Counts the verdicts of a step, which may be graded in several draws, and raises at most one alarm for it."""

    def __init__(self) -> None:
        self._steps: dict[Hashable, Counter[RewardStatus]] = {}  # of the last few: their draws may alternate
        self._raised: set[Hashable] = set()

    def message(self, step: Hashable, verdicts: Sequence[Verdict]) -> str | None:
        """One line with counts and an example, if these verdicts bring the step's failures over 1%."""
        if step not in self._steps and len(self._steps) == RECENT:
            oldest = next(iter(self._steps))
            del self._steps[oldest]
            self._raised.discard(oldest)
        statuses = self._steps.setdefault(step, Counter())
        statuses.update(verdict.status for verdict in verdicts)
        failed = [verdict for verdict in verdicts if not verdict.status.is_verdict]
        if step in self._raised or not failed or not is_alarming(statuses):
            return None
        self._raised.add(step)
        counts = ", ".join(f"{n} {s}" for s, n in sorted(statuses.items()) if not s.is_verdict)
        example = failed[0]
        of = f" on {example.extracted[:EXAMPLE_CHARACTERS]!r}" if example.extracted else ""
        return (
            f"reward alarm: {counts} of {statuses.total()} verdicts, which leave the loss; "
            f"e.g. {example.status}{of}: {example.reason}"
        )

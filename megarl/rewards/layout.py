"""The format reward: whether a response has the layout <think>...</think> <answer>...</answer>, whatever it answers."""

from __future__ import annotations

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
EXAMPLE = "<think>1</think> <answer>1</answer>"


def has_layout(response: str, reference: str = "") -> bool:
    """Each tag once, in this order, text in both parts, only white space before, between and behind (2501.12948)."""
    if any(response.count(tag) != 1 for tag in TAGS):
        return False
    before, _, rest = response.partition("<think>")
    thought, _, rest = rest.partition("</think>")
    between, _, rest = rest.partition("<answer>")
    answer, closed, behind = rest.partition("</answer>")
    return bool(closed and thought.strip() and answer.strip()) and not (before + between + behind).strip()

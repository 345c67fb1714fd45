"""Imported by each of vLLM's worker processes, as its worker's extension: makes the weight transfer known there."""

from typing import Any

from megarl.rollout.transfer import register

register()


class Extension:
    """What else the worker is asked by name."""

    weight_transfer_engine: Any

    def expect_update(self, update: int, witnessed: bool) -> None:
        self.weight_transfer_engine.expect(update, witnessed)

    def damaged_weights(self) -> list[str]:
        """The names of the tensors that are not as they were sent."""
        return self.weight_transfer_engine.witness.damaged()

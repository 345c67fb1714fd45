"""Imported by each of vLLM's worker processes, as its worker's extension: makes the weight transfer known there."""

from megarl.rollout.transfer import register

register()


class Extension:
    """Adds nothing to the worker."""

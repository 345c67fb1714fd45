"""What a part of the GPU check found, written line by line, so that a part that is stopped leaves what it had."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Report:
    """`folder` is the run's, for files that parts need; a part should end within `seconds`."""

    def __init__(self, file: Path, folder: Path, dry_run: bool, seconds: float) -> None:
        self.file, self.folder, self.dry_run = file, folder, dry_run
        self._ends = time.monotonic() + seconds

    @property
    def seconds_left(self) -> float:
        return self._ends - time.monotonic()

    def number(self, name: str, value: float | str, unit: str = "") -> None:
        self._write(name=name, value=value, unit=unit, limit=None, holds=None)

    def at_most(self, name: str, value: float, limit: float, unit: str = "") -> None:
        self._write(name=name, value=value, unit=unit, limit=limit, holds=bool(value <= limit))

    def holds(self, name: str, holds: bool, value: float | str = "") -> None:
        self._write(name=name, value=value or ("yes" if holds else "no"), unit="", limit=None, holds=bool(holds))

    def skipped(self, name: str, reason: str) -> None:
        self._write(name=name, skipped=reason, holds=None)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """A failure inside is a result like others: what follows runs all the same."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.holds(name, False, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}")

    def _write(self, **result: object) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(result) + "\n")

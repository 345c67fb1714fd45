"""What the keys of a config only name, as fingerprints: the model's files, the problems, a reward of the user's own."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megarl.config import Config
from megarl.data.prompts import Problem
from megarl.files import fingerprint
from megarl.types import Prompt

MODEL_FILES = (".safetensors", ".json", ".model", ".jinja", ".txt", ".tiktoken")  # weights, configuration, tokenizer
Told = list[str]  # what a problem is: its source, id, text and answer


def inputs(config: Config, model: Path, problems: Mapping[str, Iterable[Problem | Prompt]]) -> dict[str, str]:
    """`problems`: by the key that names them. Of a set they are what is compared, not the files that hold them."""
    files = {f"model.path/{file.name}": file for file in sorted(model.iterdir()) if file.suffix in MODEL_FILES}
    files |= {f"reward.name/{_shown(file)}": file for file in _code(config.reward.name)}
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        found = dict(zip(files, pool.map(fingerprint, files.values()), strict=True))
    for key, members in problems.items():
        sets: dict[str, list[Told]] = {}
        for problem in members:
            sets.setdefault(problem.source, []).append(told(problem))
        for name, rows in sets.items():
            digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
            found[f"{key}/{name.rpartition('/')[2]}"] = f"{len(rows)} problems, sha256 {digest}"
    return found


def told(problem: Problem | Prompt) -> Told:
    return [problem.source, problem.id, problem.text, problem.answer]


def _code(reward: str) -> list[Path]:
    """The file of the module that a reward `module:function` is in; what that imports is not looked at."""
    module, colon, _ = reward.partition(":")
    if not colon:
        return []
    places = [Path(place, *module.split(".")) for place in (os.getcwd(), *sys.path)]
    files = (file for place in places for file in (place / "__init__.py", place.with_suffix(".py")))
    return [file for file in files if file.is_file()][:1]


def _shown(file: Path) -> Path:
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file

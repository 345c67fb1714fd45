"""What the keys of a config only name, as fingerprints: the model's files, the problems, a reward of the user's own."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megarl.config import Config
from megarl.data.problems import Problem, digests
from megarl.files import fingerprint
from megarl.types import Prompt

MODEL_FILES = (".safetensors", ".json", ".model", ".jinja", ".txt", ".tiktoken")  # weights, configuration, tokenizer


def inputs(config: Config, model: Path, problems: Mapping[str, Iterable[Problem | Prompt]]) -> dict[str, str]:
    """`problems`: by the key that names them. Of a set they are what is compared, not the files that hold them."""
    files = {f"model.path/{file.name}": file for file in sorted(model.iterdir()) if file.suffix in MODEL_FILES}
    files |= {f"reward.name/{_shown(file)}": file for file in _code(config.reward.name)}
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        found = dict(zip(files, pool.map(fingerprint, files.values()), strict=True))
    for key, members in problems.items():
        for name, digest in digests(members).items():
            found[f"{key}/{name.rpartition('/')[2]}"] = digest
    return found


def _code(reward: str) -> list[Path]:
    """The file of the module that a reward `module:function` is in, and what it imports from the working folder."""
    module, colon, _ = reward.partition(":")
    if not colon:
        return []
    here, name = Path.cwd(), module.split(".")
    found: set[Path] = set()
    _add_imported(found, here, name)
    if here.joinpath(*name).with_suffix(".py") in found or here.joinpath(*name, "__init__.py") in found:
        return sorted(found)
    files = (file for place in sys.path for file in _files(Path(place), name))
    return [file for file in files if file.is_file()][:1]


def _add_imported(found: set[Path], root: Path, name: Sequence[str]) -> None:
    """The files below `root` that importing the module runs: its packages', its own, and those of what they import."""
    for end in range(1, len(name) + 1):
        for file in _files(root, name[:end]):
            if file in found or not file.is_file():
                continue
            found.add(file)
            for other in _imports(file, file.parent.relative_to(root).parts):
                _add_imported(found, root, other)


def _imports(file: Path, package: Sequence[str]) -> Iterator[list[str]]:
    """The modules that a file's import statements may mean."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError):  # the import of the reward says so
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) + 1 - node.level]] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ([*base, alias.name] for alias in node.names)


def _files(root: Path, name: Sequence[str]) -> tuple[Path, Path]:
    place = root.joinpath(*name)
    return place / "__init__.py", place.with_name(f"{place.name}.py")


def _shown(file: Path) -> Path:
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file

"""The configs and the model that come with megarl, by name from any folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from megarl.types import UserError

PACKAGE = Path(__file__).parents[1]
CONFIGS = {file.stem: file for file in sorted(PACKAGE.glob("configs/*.yaml"))}
BUILT_IN = "built-in"  # model.path of the quick start
BUILT_IN_MODEL = PACKAGE / "data/base_model"


def find_config(path: str | Path) -> Path:
    """The file, or one of megarl's own by its bare name, e.g. quickstart. Raises UserError."""
    path = Path(path)
    if path.is_file():
        return path
    if str(path) in CONFIGS:
        return CONFIGS[str(path)]
    names = ", ".join(CONFIGS)
    raise UserError(f"config file {path} does not exist; megarl brings {names}, and `megarl init NAME` copies one here")


def copy_config(name: str) -> Path:
    """Copy one of megarl's configs into the working folder. Raises UserError."""
    if name not in CONFIGS:
        raise UserError(f"{name} is not one of megarl's configs: {', '.join(CONFIGS)}")
    copy = Path(CONFIGS[name].name)
    if copy.exists():
        raise UserError(f"{copy} is here already; move it away, or edit and use it")
    shutil.copyfile(CONFIGS[name], copy)
    return copy

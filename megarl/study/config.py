"""What a study is: a config file with a `study` section becomes rows, one training run each.

A row's config is made in this order, later ones winning: the file's training sections, the scale's `set`, the command
line, `overrides` of the row's recipe, and what makes it this row: its recipe, seed and folder.
What results are measured by (`SAME`) is the same in all rows.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from megarl.algorithms import RECIPES
from megarl.algorithms.recipe import nearest
from megarl.config import Config, Section, parse_config
from megarl.config.load import read_yaml, validated
from megarl.config.overrides import apply_override
from megarl.config.sections import PathText
from megarl.resume import CHANGEABLE, HELD, differing, held_by, recorded_config
from megarl.types import UserError

Settings = dict[str, Any]  # "section.key" -> value
# What a study sets itself, and the keys that say it.
OF_THE_ROW = {
    "recipe": "study.recipes",
    "recipe.name": "study.recipes",
    "recipe.base": "study.recipes",
    "run.dir": "study.dir",
    "run.seed": "study.seeds",
}
SAME = ("run.steps", "model.", "data.", "eval.")  # for all rows: recipes are compared from one start, on one test
# What may differ from a row that was begun: what a resumed run may change, but for what rows are compared by.
FREE = tuple(key for key in CHANGEABLE if key not in ("run.steps", "run.evaluate_every"))


class Scale(Section):
    """A named size of the study."""

    dir: PathText | None = Field(None, description="null: as the study")
    recipes: list[str] | None = Field(None, description="null: as the study")
    seeds: list[int] | None = Field(None, description="null: as the study")
    set: Settings = Field({}, description="section.key: value, for every run")

    @field_validator("set")
    @classmethod
    def _sections_become_keys(cls, settings: Settings) -> Settings:
        return flatten(settings)


class StudySection(Section):
    """Which runs."""

    dir: PathText = Field(description="study folder: a folder per recipe and seed, then the report")
    recipes: list[str] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1, description="values of run.seed, the same for every recipe")
    overrides: dict[str, Settings] = Field({}, description="recipe: {section.key: value}, for the runs of one recipe")
    scale: str | None = Field(None, description="the scale used when --scale names none; null: none")
    scales: dict[str, Scale] = {}

    @field_validator("recipes", "seeds")
    @classmethod
    def _each_once(cls, values: list[Any]) -> list[Any]:
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"{value} is given twice")
        return values

    @field_validator("overrides")
    @classmethod
    def _sections_become_keys(cls, overrides: dict[str, Settings]) -> dict[str, Settings]:
        return {recipe: flatten(settings) for recipe, settings in overrides.items()}


class StudyFile(Config):
    """What a study's file holds."""

    study: StudySection


@dataclass(frozen=True)
class Row:
    """One run of a study."""

    recipe: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return f"{self.recipe} seed {self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)


@dataclass(frozen=True)
class Study:
    """The runs of a study, in the order they are made: seed by seed, so that a part of it compares all recipes."""

    folder: Path
    scale: str | None
    rows: list[Row]

    @property
    def recipes(self) -> list[str]:
        return list(dict.fromkeys(row.recipe for row in self.rows))

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(row.seed for row in self.rows))


def load_study(path: str | Path, scale: str | None = None, overrides: list[str] | None = None) -> Study:
    """Read and validate a study and the configs of all its rows.

    Raises UserError, also where the study folder holds runs of another config.
    """
    values = _read(Path(path))
    section = _section(values["study"])
    scale = scale or section.scale
    if scale is not None:
        if scale not in section.scales:
            known = ", ".join(section.scales) or "none"
            raise UserError(f"study.scales has no {scale!r}{nearest(scale, section.scales)}; scales: {known}")
        sized = section.scales[scale]
        values["study"] |= sized.model_dump(include={"dir", "recipes", "seeds"}, exclude_none=True)
        _check_settings(f"study.scales.{scale}.set", sized.set)
        _set(values, sized.set)
    for override in overrides or []:
        if override.startswith("study.scale="):
            raise UserError(f"{override}: choose the scale with --scale")
        apply_override(values, override, StudyFile)
    section = _section(values.pop("study"))
    for key, place in OF_THE_ROW.items():
        if key in flatten(values) or key in values:
            raise UserError(f"{key}: a study sets it for each run; name {place}")
    for recipe, settings in section.overrides.items():
        if recipe not in RECIPES:
            raise UserError(f"study.overrides.{recipe}: no such recipe{nearest(recipe, RECIPES)}")
        _check_settings(f"study.overrides.{recipe}", settings, of_recipe=True)
    if (held := held_by(Path(section.dir))) not in (None, "study"):
        raise UserError(f"study.dir={section.dir} already holds {HELD[held]}; name another folder")
    rows = [_row(values, section, recipe, seed) for seed in section.seeds for recipe in section.recipes]
    _check_comparable(rows)
    for row in rows:
        _check_unchanged(row)
    return Study(Path(section.dir), scale, rows)


def _read(path: Path) -> dict[str, Any]:
    expected = "a study section (dir, recipes, seeds) beside the sections of a training run"
    values = read_yaml(path, expected)
    if not isinstance(values.get("study"), dict):
        raise UserError(f"{path}: expected {expected}")
    return values


def _section(values: Any) -> StudySection:
    return validated(StudySection, values, prefix=("study",))


def _check_settings(where: str, settings: Settings, of_recipe: bool = False) -> None:
    """Refuses what belongs elsewhere in the file."""
    for key in settings:
        section, _, field = key.partition(".")
        if section == "study":
            place = f"name study.{field}" if of_recipe else f"give {field} beside set"
            raise UserError(f"{where}.{key}: it is of the study, not of a run; {place}")
        if section == "recipe" and not of_recipe:
            place = OF_THE_ROW.get(key, f"study.overrides, as <recipe>: {{{key}: value}}")
            raise UserError(f"{where}.{key}: it would be of every recipe; name it in {place}")
        if key in OF_THE_ROW:
            raise UserError(f"{where}.{key}: a study sets it for each run; name {OF_THE_ROW[key]}")


def _row(values: dict[str, Any], section: StudySection, recipe: str, seed: int) -> Row:
    own = deepcopy(values) | {"recipe": {"name": recipe}}
    _set(own, section.overrides.get(recipe, {}))
    _set(own, {"run.dir": str(Path(section.dir) / recipe / f"seed_{seed}"), "run.seed": seed})
    return Row(recipe, seed, parse_config(own))


def _set(values: dict[str, Any], settings: Settings) -> None:
    for key, value in settings.items():
        *parents, last = key.split(".")
        node = values
        for i, parent in enumerate(parents):
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"{'.'.join(parents[: i + 1])}={node!r}: should be a section of keys")
        node[last] = value


def _check_comparable(rows: list[Row]) -> None:
    """Refuses rows that would not be measured, or not by the same measure."""
    first = rows[0]
    expected = _measured_by(first)
    for row in rows:
        config = row.config
        for key, value in _measured_by(row).items():
            if value != expected[key]:
                raise UserError(
                    f"{key}={value!r} for {row.recipe}, but {expected[key]!r} for {first.recipe}: rows are compared "
                    "under equal conditions; take it out of study.overrides, and set it beside study for all"
                )
        if config.data.eval is None:
            raise UserError("data.eval is required in a study, which compares held-out results; e.g. arithmetic")
        if config.run.track_kl and config.eval.temperature != config.rollout.temperature:
            raise UserError(
                f"run.track_kl=true, but eval.temperature={config.eval.temperature:g} is not rollout.temperature="
                f"{config.rollout.temperature:g} ({row.recipe}): KL and entropy would not be measured; make them "
                "equal, or set run.track_kl=false"
            )


def _measured_by(row: Row) -> Settings:
    settings = {key: value for key, value in flatten(row.config.model_dump()).items() if key.startswith(SAME)}
    limit = row.config.eval.max_response_tokens or row.config.rollout.max_response_tokens
    return settings | {"eval.max_response_tokens": limit}


def _check_unchanged(row: Row) -> None:
    """A row that was begun is gone on with, or read, only under the config it was begun with."""
    if not (row.folder / "config.yaml").exists():
        return
    for key, value, before in differing(row.config, recorded_config(row.folder), FREE):
        raise UserError(
            f"{key}={value!r}, but {row.folder} was run with {before!r}; keep it, or name another study.dir"
        )


def flatten(values: dict[str, Any], prefix: str = "") -> Settings:
    """Nested sections as {"section.key": value}."""
    flat: Settings = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat

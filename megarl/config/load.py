"""Configurations as files: YAML 1.2 plus dotted overrides in, one line per mistake out.

config = load_config("configs/quickstart.yaml", ["recipe=grpo", "optim.lr=2e-4"])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from yaml.parser import ParserError
from yaml.scanner import ScannerError

from megarl.algorithms.recipe import Recipe, compose, nearest
from megarl.algorithms.recipes import RECIPES, variant_fields
from megarl.config import yaml12
from megarl.config.overrides import apply_override
from megarl.config.published import SETTINGS, published_values
from megarl.config.sections import DEFAULT_RECIPE, Config
from megarl.config.shipped import find_config
from megarl.types import UserError

Model = TypeVar("Model", bound=BaseModel)
ADVICE = {"bool_type": ", true or false", "string_type": "; put it in quotes"}


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, validate the whole.

    Raises UserError with one line per mistake.
    """
    values = read_yaml(path, "sections such as model, data and recipe")
    for override in overrides or []:
        apply_override(values, override)
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> Config:
    """Validate nested plain values (as YAML gives them) into a Config. Raises UserError."""
    values = dict(values)
    setting = values.get("setting", "none")
    published = setting if isinstance(setting, str) and setting in SETTINGS else None
    recipe = values["recipe"] = _resolve_recipe(values.get("recipe", DEFAULT_RECIPE), published or "paper")
    if published:
        for section, keys in published_values(published, recipe).items():
            if isinstance(own := values.get(section, {}), dict):
                values[section] = {**keys, **own}
    return validated(Config, values)


def dump_config(config: Config) -> str:
    """The complete configuration as YAML; `load_config` reads it back to an equal Config."""
    values = config.model_dump(mode="json")
    values["recipe"]["base"] = "none"
    return yaml12.dump(values)


def read_yaml(path: str | Path, expected: str) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises UserError naming the file and line, or saying what was `expected`."""
    path = find_config(Path(path).expanduser())
    try:
        values = yaml12.load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        quotes = "; a text with {, [, # or ': ' needs quotes" if isinstance(error, ParserError | ScannerError) else ""
        raise UserError(f"{path}{where}: not valid YAML ({problem}{quotes})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected {expected}")
    return values


def _resolve_recipe(value: Any, variant: str) -> dict[str, Any]:
    """A recipe is a name, or fields that differ from a named one.

    {name: grpo, clip_high: 0.28} starts from grpo; {name: mine, base: grpo, ...} does too, under a name of its own;
    base: none starts from the defaults. A published setting's variant changes what one starts from.
    """
    fields = {"name": value} if isinstance(value, str) else value
    if not isinstance(fields, dict):
        raise UserError(f"recipe: expected a name or fields, got {value!r}; names: {', '.join(RECIPES)}")
    fields = dict(fields)
    base = fields.pop("base", fields.get("name"))
    if base == "none":
        return compose(Recipe(), fields, variant_fields(variant, base))
    if base is None:
        raise UserError(f"recipe has neither name nor base; names: {', '.join(RECIPES)}")
    if not isinstance(base, str) or base not in RECIPES:
        raise UserError(
            f"recipe={base!r} is unknown{nearest(str(base), RECIPES)}; recipes: {', '.join(RECIPES)} "
            "(for a recipe of your own: recipe={name: ..., base: none or a recipe, fields})"
        )
    return compose(RECIPES[base], fields, variant_fields(variant, base))


def validated(model: type[Model], values: Any, prefix: tuple[str, ...] = ()) -> Model:
    """Plain values as a section, or a section of sections. Raises UserError, a line per mistake, each naming its key.

    `prefix`: where the section stands in the file.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # A default that waits for a wrong value is no mistake of its own.
        mistakes = [e for e in error.errors() if e["type"] != "default_factory_not_called"]
        raise UserError("\n".join(_describe(model, prefix, e) for e in mistakes)) from None


def _describe(model: type[BaseModel], prefix: tuple[str, ...], error: Any) -> str:
    """One pydantic error as one line: the key, what is wrong, what would be legal."""
    location, kind = [str(part) for part in error["loc"]], error["type"]
    key = ".".join([*prefix, *location])
    if kind == "extra_forbidden":
        section: Any = model
        for part in location[:-1]:
            of_keys = hasattr(section, "model_fields")  # or dict[str, Section]
            section = section.model_fields[part].annotation if of_keys else get_args(section)[1]
        known = list(section.model_fields)
        hint = nearest(location[-1], known) or f"; known keys: {', '.join(known)}"
        return f"{key} is not a known key{hint}"
    if kind == "missing":
        return f"{key} is required"
    if kind == "value_error":  # from a validator: already says what is wrong; section-level ones name their key
        message = str(error["ctx"]["error"])
        return message if isinstance(error["ctx"]["error"], UserError) else f"{key}={error['input']!r}: {message}"
    if kind == "model_type":
        return f"{key}={error['input']!r}: should be a section of keys"
    message = error["msg"].replace("Input should be", "should be").replace("a valid ", "").replace("valid ", "")
    return f"{key}={error['input']!r}: {message}{ADVICE.get(kind, '')}"

"""The recipes as text, for `megarl recipes` and docs/recipes.md: all from `Recipe`, `RECIPES`, `SOURCES`, `VARIANTS`.

python -m megarl.algorithms.listing > docs/recipes.md
"""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from rich.console import Group
from rich.table import Table
from rich.text import Text

from megarl.algorithms.recipe import Recipe, default, nearest
from megarl.algorithms.recipes import RECIPES, SOURCES, VARIANTS, VARIANTS_OF_RECIPES
from megarl.types import UserError

BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
DEFAULTS = {name: default(name) for name in Recipe.model_fields if name != "name"}
VARIANT_TEXTS = {"paper": "what the text of arXiv 2504.11343 says", "minimal_rl": "what its released scripts ran"}


def list_all() -> Table:
    """Every recipe: the fields that differ from the defaults, and where it is from."""
    table = Table(caption="megarl recipes NAME: all fields of one; megarl recipes diff A B: what differs", expand=True)
    table.add_column("recipe", no_wrap=True)
    table.add_column("fields that differ from the defaults, source")
    for name, recipe in RECIPES.items():
        table.add_row(name, Group(Text(_fields(changed(recipe))), Text(SOURCES[name], style="dim")), end_section=True)
    return table


def show(name: str) -> Table:
    """All fields of a recipe, with their meaning."""
    recipe = find(name)
    table = Table(title=f"{name}\n{SOURCES[recipe.name]}", caption="* differs from the default", title_justify="left")
    table.add_column("")
    table.add_column("field", no_wrap=True)
    table.add_column("value")
    table.add_column("meaning")
    for field in DEFAULTS:
        differs = field in changed(recipe)
        style = "bold" if differs else ""
        table.add_row("*" if differs else "", field, _value(getattr(recipe, field)), meaning(field), style=style)
    return table


def compare(left: str, right: str) -> Table | str:
    """What differs between two recipes, each NAME or NAME:VARIANT."""
    recipes = find(left), find(right)
    differing = [field for field in DEFAULTS if getattr(recipes[0], field) != getattr(recipes[1], field)]
    if not differing:
        return f"{left} and {right} are the same"
    table = Table(title=f"{left} and {right}: {len(differing)} of {len(DEFAULTS)} fields differ", title_justify="left")
    for heading in ("field", left, right, "meaning"):
        table.add_column(heading, no_wrap=heading == "field")
    for field in differing:
        table.add_row(field, *(_value(getattr(recipe, field)) for recipe in recipes), meaning(field))
    return table


def find(name: str) -> Recipe:
    """The recipe NAME, or NAME:VARIANT. Raises UserError with the nearest name."""
    base, colon, variant = name.partition(":")
    if base not in RECIPES:
        raise UserError(f"recipe {base!r} is unknown{nearest(base, RECIPES)} (megarl recipes lists all)")
    if colon and variant not in VARIANTS:
        raise UserError(f"variant {variant!r} is unknown{nearest(variant, VARIANTS)}; variants: {', '.join(VARIANTS)}")
    return Recipe.named(base, variant or "paper")


def changed(recipe: Recipe) -> dict[str, Any]:
    """The fields whose value is not the default."""
    return {field: value for field, default in DEFAULTS.items() if (value := getattr(recipe, field)) != default}


def meaning(field: str) -> str:
    return Recipe.model_fields[field].description or ""


def legal_values(field: str) -> str:
    """What a field may be, as text."""
    info = Recipe.model_fields[field]
    kinds = get_args(info.annotation) or (info.annotation,)
    if get_origin(info.annotation) is Literal:
        return " | ".join(_value(kind) for kind in kinds)
    text = " or ".join({int: "integer", float: "number", type(None): "null", str: "text"}[kind] for kind in kinds)
    bounds = [
        f"{sign} {getattr(limit, name):g}"
        for limit in info.metadata
        for name, sign in BOUNDS.items()
        if hasattr(limit, name)
    ]
    return ", ".join([text, *bounds])


def markdown() -> str:
    """docs/recipes.md."""
    recipes = [[f"`{name}`", _code(changed(recipe)), SOURCES[name]] for name, recipe in RECIPES.items()]
    fields = [
        [f"`{field}`", legal_values(field).replace("|", "\\|"), _value(default), meaning(field).replace("|", "\\|")]
        for field, default in DEFAULTS.items()
    ]
    variants = [
        [f"`{name}`", VARIANT_TEXTS[name], "; ".join([_code(fields), *_of_recipes(VARIANTS_OF_RECIPES.get(name, {}))])]
        for name, fields in VARIANTS.items()
    ]
    parts = [
        "# Recipes",
        "Written by `make docs` from `megarl/algorithms/recipe.py`; change it there. `megarl recipes` shows the same "
        "in a terminal, `megarl recipes diff grpo reinforce_rej` what two differ in.",
        "An algorithm is a recipe, a value for each of the fields below. `recipe: grpo` in a config takes one as it "
        "is, `recipe: {name: grpo, clip_high: 0.28}` changes fields of it.",
        "## The recipes\n\nFields that are not named have their defaults.",
        _table(["recipe", "fields", "source"], recipes),
        "## The fields",
        _table(["field", "values", "default", "meaning"], fields),
        "## The variants\n\nThe paper's text and its released scripts differ. `setting: minimal_rl` in a config runs "
        "the scripts' variant of a recipe, in those of these fields that can act in it.",
        _table(["variant", "", "fields it changes"], variants),
    ]
    return "\n\n".join(parts)


def _of_recipes(changes: dict[str, dict[str, Any]]) -> list[str]:
    """What a variant changes in some recipes alone, those of the same changes together."""
    texts = {name: _code(fields) for name, fields in changes.items()}
    return [
        f"and {text} in {', '.join(f'`{name}`' for name in texts if texts[name] == text)}"
        for text in dict.fromkeys(texts.values())
    ]


def _fields(values: dict[str, Any]) -> str:
    return ", ".join(f"{field}={_value(value)}" for field, value in values.items()) or "(none)"


def _code(values: dict[str, Any]) -> str:
    return ", ".join(f"`{field}={_value(value)}`" for field, value in values.items()) or "none"


def _value(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(headings: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows))


if __name__ == "__main__":
    print(markdown())

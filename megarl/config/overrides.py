"""`section.key=text` of the command line: what the key is declared as decides how its text is read.

A key that takes text takes it as it stands. Any other value is YAML; so is a list or mapping, [...] or {...}, where
the key takes one. Nothing, or null, is null where the key may be null.
"""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from megarl.config import yaml12
from megarl.config.sections import DEFAULT_RECIPE, Config
from megarl.types import UserError


def apply_override(values: dict[str, Any], override: str, model: type[BaseModel] = Config) -> None:
    """Put the override's value where it belongs in `values`, the plain sections of `model`. Raises UserError."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override '{override}': expected section.key=value, e.g. optim.lr=2e-4")
    if not yaml12.is_text(override):
        raise UserError(f"override {override!r}: not UTF-8 text")
    *parents, last = key.split(".")
    node = values
    for i, parent in enumerate(parents):
        child = node.setdefault(parent, DEFAULT_RECIPE if (i, parent) == (0, "recipe") else {})
        if i == 0 and parent == "recipe" and isinstance(child, str):
            child = node[parent] = {"name": child}
        if not isinstance(child, dict):
            raise UserError(f"override '{override}': {'.'.join(parents[: i + 1])} is a value, not a section")
        node = child
    try:
        node[last] = _read(text, declared(model, [*parents, last]))
    except yaml.YAMLError:
        raise UserError(f"override '{override}': '{text}' is not a YAML value") from None


def declared(model: Any, key: list[str]) -> Any:
    """The type of a key below `model`: a section, a mapping, or a union with one; text where there is no such key."""
    if not key:
        return model
    options = _options(model)
    section = next((part for part in options if isinstance(part, type) and issubclass(part, BaseModel)), None)
    if section is not None:
        if key[0] == "recipe" and len(key) == 1 or key == ["recipe", "base"]:
            return str | dict[str, Any]  # a name, or fields
        field = section.model_fields.get(key[0])
        return declared(field.annotation, key[1:]) if field else str
    of_values = next((get_args(part)[1] for part in options if get_origin(part) is dict), None)
    if of_values is Any:  # settings of a run
        return declared(Config, key)
    return str if of_values is None else declared(of_values, key[1:])


def _read(text: str, kind: Any) -> Any:
    options = _options(kind)
    if NoneType in options and text in ("", "null"):
        return None
    takes = {get_origin(part) or part for part in options}
    opening = {"[": list, "{": dict}.get(text.lstrip()[:1])
    if str in takes and opening not in takes:
        return text
    return yaml12.load(text)


def _options(kind: Any) -> tuple[Any, ...]:
    """The members of a union, without annotations, with the types of literals in place of these.

    Not text, where a literal may be something else too: YAML reads its texts as they are.
    """
    if get_origin(kind) in (Union, UnionType):
        return tuple(option for part in get_args(kind) for option in _options(part))
    if get_origin(kind) is Annotated:
        return _options(get_args(kind)[0])
    if get_origin(kind) is not Literal:
        return (kind,)
    types = {type(value) for value in get_args(kind)}
    return tuple(types - {str} or types)

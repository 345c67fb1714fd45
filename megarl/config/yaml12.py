"""YAML 1.2 by its core schema: decimal numbers, true and false, null; every other plain scalar is the text it is.

PyYAML follows YAML 1.1, where 010 is 8, 1:30 is 90, no is false and 2024-01-01 a date.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import yaml

CORE = {  # tag -> (plain scalars that have it, their first characters)
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
# Line breaks of YAML 1.1 that are text in 1.2, and noncharacters that stand for them while PyYAML reads.
TEXT_BREAKS = {"\x85": "\U0001fffe", "\u2028": "\U0001ffff", "\u2029": "\U0002fffe"}
_HIDE = str.maketrans(TEXT_BREAKS)
_SHOW = str.maketrans({hidden: shown for shown, hidden in TEXT_BREAKS.items()})


def load(text: str) -> Any:
    """The value that `text` holds. Raises yaml.YAMLError."""
    try:
        return yaml.load(text.translate(_HIDE), Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def dump(value: Any) -> str:
    """`value` as YAML that reads back equal, as 1.2 and as 1.1."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=float("inf"))


class _Loader(yaml.SafeLoader):
    """Knows the tags of the core schema alone, and refuses a key given twice and a node that holds itself."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def number(self, node: yaml.ScalarNode, of: Callable[[str], Any]) -> Any:
        try:
            return of(self.construct_scalar(node))
        except ValueError:  # !!int "many", or more digits than Python takes
            raise _refusal(node, f"{node.value:.40} is not a number") from None

    def mapping(self, node: yaml.MappingNode) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            for i, (key, _) in enumerate(node.value):
                if key.value in keys[:i]:
                    raise _refusal(key, f"{key.value} is given twice")
        return yaml.constructor.BaseConstructor.construct_mapping(self, node, deep=True)  # type: ignore[arg-type]

    def text(self, node: yaml.ScalarNode) -> str:
        text = str(self.construct_scalar(node)).translate(_SHOW)
        if not is_text(text):
            raise _refusal(node, "half a character, an escape of \\ud800 to \\udfff alone")
        return text

    def nothing(self, node: yaml.ScalarNode) -> None:
        """Null, but not for a key whose text a # has made a comment."""
        if node.value == "" and (mark := node.start_mark) and isinstance(mark.buffer, str):
            rest = mark.buffer[mark.pointer :].partition("\n")[0]
            if rest.lstrip().startswith("#"):
                raise _refusal(node, "nothing stands before the comment: write null, or put the text in quotes")

    def unknown(self, node: yaml.Node) -> NoReturn:
        raise _refusal(node, f"{node.tag} is no tag of YAML 1.2's core schema")

    def flag(self, node: yaml.ScalarNode) -> bool:
        if node.value.lower() not in ("true", "false"):
            raise _refusal(node, f"{node.value:.40} is neither true nor false")
        return node.value.lower() == "true"


class _Dumper(yaml.SafeDumper):
    """Quotes strings that either version would read as something else."""


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: no half of a character, no byte that the command line couldn't decode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _integer(text: str) -> int:
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _refusal(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)


for _tag, (_pattern, _first) in CORE.items():
    for _yaml in (_Loader, _Dumper):
        _firsts = [*_first, *([""] if _tag == "null" else [])]  # "": of the empty scalar
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _firsts)
_CONSTRUCTORS: dict[str, Callable[[_Loader, Any], Any]] = {
    "null": _Loader.nothing,
    "bool": _Loader.flag,
    "int": lambda loader, node: loader.number(node, _integer),
    "float": lambda loader, node: loader.number(node, _float),
    "str": _Loader.text,
    "seq": lambda loader, node: loader.construct_sequence(node, deep=True),
    "map": _Loader.mapping,
}
for _tag, _constructor in _CONSTRUCTORS.items():
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _constructor)
_Loader.add_constructor(None, _Loader.unknown)

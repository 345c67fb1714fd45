"""What a row's columns hold: found by name or dotted path; a text, a number or a conversation."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

Row = dict[str, Any]
Turn = dict[str, Any]  # of a conversation: role, content (a text) and what else the row says of it


def value_of(row: Row, column: str) -> Any:
    """By the column's name, else along its dots: reward_model.ground_truth, messages.0.content. Or LookupError."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if isinstance(value, list) and part.removeprefix("-").isdecimal():
            value = value[int(part)]
        elif isinstance(value, dict):
            value = value[part]
        else:
            raise KeyError(column)
    return value


def has(row: Row, column: str) -> bool:
    try:
        value_of(row, column)
    except LookupError:
        return False
    return True


def names_of(row: Row) -> list[str]:
    """The columns, those inside others by their dotted paths."""
    return [
        path
        for name, value in row.items()
        for path in ([f"{name}.{inner}" for inner in names_of(value)] if isinstance(value, dict) and value else [name])
    ]


def scalar_of(value: Any) -> str:
    """A text, or a finite number in digits (3 for 3.0, no exponent); empty for anything else."""
    if isinstance(value, str):
        return value if value.strip() else ""
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        return ""
    exact = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
    digits = format(exact, "f")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) if exact.is_finite() else ""


def turns_of(value: Any) -> tuple[Turn, ...]:
    """A list of messages with a role and a text each, the text in parts or not; empty for anything else."""
    if not isinstance(value, list):
        return ()
    turns = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return ()
        content = message.get("content")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text") or "") for part in content)
        if not isinstance(content, str) or not content.strip():
            return ()
        said = {key: kept for key, kept in message.items() if kept is not None}  # Parquet fills every message's keys
        turns.append(said | {"content": content})
    return tuple(turns)

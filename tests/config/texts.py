"""Plain scalars with what they are by YAML 1.2, and texts that a reader of YAML might take for something else."""

import math
import random

VALUES = {
    "010": 10,
    "-07": -7,
    "+3": 3,
    "0o17": 15,
    "0x1F": 31,
    "2e-4": 2e-4,
    "1E3": 1000.0,
    ".5": 0.5,
    "1.": 1.0,
    "012.50": 12.5,
    "-.inf": -math.inf,
    "true": True,
    "FALSE": False,
    "null": None,
    "~": None,
    "": None,
    '"010"': "010",
    "'true'": "true",
    "!!str 010": "010",
    "!!float 3": 3.0,
}
TEXTS = ["1:30", "1:30:00", "190:20:30.15", "yes", "no", "on", "Off", "y", "tRUE", "1_000", "0b11", "0o8", "08x", "--3"]
TEXTS += [
    "2024-01-01",
    "2001-12-14t21:59:43.10-05:00",
    "1e",
    "e5",
    ".",
    "-",
    "+",
    "=",
    "<<",
    "nULL",
    "inf",
    "nan",
    "1.2.3",
]


def strings():
    """Texts with a meaning in YAML, each alone and several together."""
    rng = random.Random(0)
    odd = [
        *TEXTS,
        *VALUES,
        "#### (.*)",
        "# a",
        "a #b",
        "[",
        "{problem} Answer:",
        "a: b",
        ": ",
        "&a",
        "*a",
        "!a",
        "%a",
        "@a",
    ]
    odd += [
        "`a",
        "|",
        ">",
        "? a",
        "- a",
        ",",
        "'",
        '"',
        "''",
        "\\n",
        "\\",
        "\n",
        "\n\n",
        " ",
        "  a  ",
        "\ta",
        "a\t",
        "\r",
    ]
    odd += [
        "a=b=c",
        "é",
        "\x85",
        "\u2028",
        "\ufeff",
        "\x00",
        "\x1b",
        "\u200b",
        "😀",
        "---",
        "...",
        "a\n b\n",
        "\n a",
        "0" * 200,
    ]
    yield from odd
    yield from ("".join(rng.choices(odd, k=rng.randint(2, 6))) for _ in range(500))
    yield from (" ".join(["word"] * n) for n in range(0, 100, 9))

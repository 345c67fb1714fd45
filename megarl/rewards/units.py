r"""The unit behind a value: `5\text{ cm}^2`, `5 m/s`, `5^\circ\text{C}`, `8:00 a.m.`, `5 apples`."""

from __future__ import annotations

import re
from collections import Counter

# Units by their one spelling. Any other text behind a number is a unit too, and equal to its own plural only.
_SYNONYMS = {
    "mm": "mm millimeter millimetre",
    "cm": "cm centimeter centimetre",
    "m": "m meter metre",
    "km": "km kilometer kilometre",
    "in": "in inch inche",
    "ft": "ft foot feet",
    "yd": "yd yard",
    "mi": "mi mile",
    "mg": "mg milligram",
    "g": "g gram",
    "kg": "kg kilogram",
    "lb": "lb pound",
    "oz": "oz ounce",
    "s": "s sec second",
    "min": "min minute",
    "h": "h hr hour",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "year yr",
    "mi/h": "mph",
    "km/h": "kph kmh",
    "$": r"$ \$ dollar usd",
    "€": "€ euro",
    "£": "£",
    "cent": "cent",
    "°": "° degree deg",
    "°C": "°c celsius",
    "°F": "°f fahrenheit",
    "l": "l L liter litre",
    "ml": "ml milliliter millilitre",
    "N": "N newton",
    "J": "J joule",
    "W": "W watt",
    "V": "V volt",
    "Hz": "hz hertz",
    "Pa": "pa pascal",
    "K": "K kelvin",
    "rad": "rad radian",
    "mol": "mol mole",
    "am": "am",
    "pm": "pm",
    "": "unit",
}
_PREFIXES = ("f", "p", "n", "u", "µ", "μ", "m", "c", "k", "M", "G", "T")
_PREFIXED = tuple("mgslLNJWVAKCTFHΩ") + ("Hz", "Pa", "eV", "mol")
_UNIT_OF = {
    prefix + unit: prefix.replace("μ", "µ").replace("u", "µ") + unit for prefix in _PREFIXES for unit in _PREFIXED
}
_UNIT_OF |= {unit: unit for unit in ("A", "eV", "T", "Ω", "ohm")} | {"ohm": "Ω"}
_UNIT_OF |= {name: unit for unit, names in _SYNONYMS.items() for name in names.split()}
_POWER_WORDS = {"square": 2, "sq": 2, "cubic": 3}
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}  # powers of ten

# Behind a number they make it another number, or a statement.
_NO_UNIT = re.compile(
    r"\b(?:hal(?:f|ves)|(?:third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth|millionth)s?"
    r"|squared|cubed|factorial|sqrt|root|arc[a-z]+|(?:sin|cos|tan|log|exp)h?|plus|minus|over|mod|modulo|below|negative"
    r"|than|is|are|not|no|if|or|and|for|with|where|when|only|base|to|but)\b",
    re.IGNORECASE,
)

# What may be a unit without being set as text.
_WRITTEN_OUT = (
    r"(?:mm|cm|km|met(?:er|re)s?|(?:centi|kilo|milli)met(?:er|re)s?|inch(?:es)?|foot|feet|ft|yards?|miles?|mph|(?:kilo)?grams?"
    r"|kg|pounds?|lbs?|ounces?|seconds?|sec|minutes?|min|hours?|hrs?|days?|weeks?|months?|years?|dollars?|cents?|degrees?"
    r"|lit(?:er|re)s?|units?)"
)
_EXPONENT = r"\^(?:-?[0-9]|\{-?[0-9]\})"
_IN_TEXT = rf"\\text\{{[^{{}}]*\}}(?:{_EXPONENT})?"
_SYMBOL = rf"(?:[A-Za-z]{{1,3}}|\\text\{{[^{{}}]*\}})(?:{_EXPONENT})?"
_TAIL = re.compile(
    rf"(?P<text>(?:/|\^\\circ ?)?{_IN_TEXT}(?:(?:/|\\cdot ?|\*)?{_IN_TEXT})*)$"
    rf"| ?(?P<known>(?:(?:square|cubic|sq\.?) )?{_WRITTEN_OUT}(?:(?:/| per )(?:{_WRITTEN_OUT}|s|h))?(?:{_EXPONENT})?)$"
    r"|(?P<celsius>\^\\circ ?[CF])$"
    r"| (?P<meridiem>[AaPp]\.?[Mm]\.?)$"
    rf"|(?P<greek>(?<=[0-9])(?: ?[kMGm]?\\Omega|\\mu ?(?:[msglLFHCVAWN]|\\Omega|\\text\{{[^{{}}]*\}}))(?![A-Za-z]))$"
    rf"| (?P<symbols>{_SYMBOL}(?:(?:/|\\cdot ?|\*| ){_SYMBOL})*)$"
    r"| (?P<words>(?=.*[A-Za-z]{4})[A-Za-z]{3,}(?:[ /][A-Za-z]{2,})*)$"
)
_DEGREES = re.compile(r"(-?(?:[0-9.,]+|[0-9]*\\frac\{[^{}]*\}\{[^{}]*\}|\([^()]*\)|[A-Za-z]|\\[a-z]+))\^\\circ")
_FEET_OR_INCHES = re.compile(
    r"(-?(?:[0-9.,]+|[0-9]*\\frac\{[^{}]*\}\{[^{}]*\}))(['\"])"
)  # or minutes or seconds of arc
_SCALED = re.compile(rf"(?<=[0-9]) ?(\\text\{{)?({'|'.join(_SCALES)}|dozen)s?(?![A-Za-z])(?: of)?", re.IGNORECASE)
_VALUE_END = re.compile(r"(?:[0-9)\]}%]|\\pi)$")
_UNKNOWN = re.compile(r"(?<![A-Za-z\\])[A-Za-z]")
_WORD = re.compile(r"(?P<word>[A-Za-z°$€£'µμΩ]+) ?(?:\^\{?(?P<power>-?[0-9])\}?)?")
_PLURAL = re.compile(r"(?:i?e?s|ie|e|y)$")


def split_unit(text: str, expected: str = "") -> tuple[str, str]:
    r"""The value and the one spelling of its unit, such as cm^2 or mi/h; the text and "" where it has none.

    Text set as such is a unit behind a number, bare letters only where they are no product: words, known abbreviations,
    quotients such as m/s, and what makes the unit `expected`. Million and the like become factors.
    """
    text = _SCALED.sub(_factor, text).replace(r"\text{}", "")
    if degrees := _DEGREES.fullmatch(text):
        return degrees[1], "°"
    if marked := _FEET_OR_INCHES.fullmatch(text):
        return marked[1], marked[2]
    tail = _TAIL.search(text)
    if not tail or not tail.start():
        return text, ""
    value, unit = text[: tail.start()], unit_named(tail[0])
    is_known = unit is not None and "_" not in unit
    if unit is None or not (is_known or (_VALUE_END.search(value) and not _UNKNOWN.search(value))):
        return text, ""
    if tail["symbols"] and not (
        _VALUE_END.search(value) and (unit == expected or (is_known and ("/" in unit or _is_long(tail[0]))))
    ):
        return text, ""
    return value, unit


def _is_long(symbols: str) -> bool:
    """Whether this is one symbol of several letters, such as nm or eV, which nobody writes for a product."""
    return bool(re.fullmatch(r" ?[A-Za-z]{2,}", symbols))


def _factor(scale: re.Match[str]) -> str:
    word = scale[2].casefold()
    return rf"\cdot {12 if word == 'dozen' else 10 ** _SCALES[word]}{scale[1] or ''}"


def unit_named(text: str) -> str | None:
    """The one spelling of a unit, names that aren't known behind an underscore; None where the text is no unit."""
    text = re.sub(r"\\mu ?(?:\\text\{ ?([^{}]*)\}|(?=[A-Za-zΩ]))", r" µ\1", text.replace(r"\Omega", "Ω"))
    text = re.sub(r"\^\\circ ?", " °", re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)).replace(r"\cdot", " ")
    text = re.sub(r"\b([ap]) m\b", r"\1m", re.sub(r"[*. ]+", " ", text), flags=re.IGNORECASE)
    text = re.sub(r"(?<=[A-Za-z]) squared\b", "^2", re.sub(r"(?<=[A-Za-z]) cubed\b", "^3", text))
    if _NO_UNIT.search(text):
        return None
    factors: Counter[str] = Counter()
    for position, part in enumerate(re.sub(r"\bper\b", "/", text).split("/")):
        words = [(match["word"], int(match["power"] or 1)) for match in _WORD.finditer(part)]
        if _WORD.sub("", part).strip():
            return None
        if words and (power := _POWER_WORDS.get(words[0][0].casefold())):
            words = [(word, power) for word, _ in words[1:]]
        known = [_known(word) for word, _ in words]
        if None in known:
            known = ["_" + "_".join(_PLURAL.sub("", word.casefold()) if len(word) > 3 else word for word, _ in words)]
            words = words[-1:]
        for name, (_, power) in zip(known, words, strict=True):
            for place, unit in enumerate((name or "").split("/")):
                factors[unit] += -power if bool(position) != bool(place) else power
    if factors.keys() & {"°C", "°F"}:
        del factors["°"]
    above = [_power(unit, power) for unit, power in sorted(factors.items()) if unit and power > 0]
    below = [_power(unit, -power) for unit, power in sorted(factors.items()) if unit and power < 0]
    return "/".join("*".join(units) for units in ([above, below] if below else [above]))


def _power(unit: str, power: int) -> str:
    return f"{unit}^{power}" if power > 1 else unit


def _known(word: str) -> str | None:
    for name in (word, word.casefold()) if len(word) > 1 else (word,):
        for singular in (name, name.removesuffix("s")):
            if singular in _UNIT_OF:
                return _UNIT_OF[singular]
    return None

"""Units of measure in answers: which ones are known, and what each is worth in another."""

from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """What is measured, and how many of its base unit this one is."""

    measures: str
    size: Fraction


def _table() -> dict[str, Unit]:
    rows = {
        # measures: (size, names)
        "length": (
            ("1/1000", "mm millimeter millimetre"),
            ("1/100", "cm centimeter centimetre"),
            ("1", "m meter metre"),
            ("1000", "km kilometer kilometre"),
            ("0.0254", "inch inches"),
            ("0.3048", "ft foot feet"),
            ("0.9144", "yd yard"),
            ("1609.344", "mile"),
        ),
        "mass": (
            ("1/1000", "mg milligram"),
            ("1", "g gram"),
            ("1000", "kg kilogram"),
            ("28.349523125", "oz ounce"),
            ("453.59237", "lb pound"),
        ),
        "time": (
            ("1", "s sec second"),
            ("60", "min minute"),
            ("3600", "h hr hour"),
            ("86400", "day"),
            ("604800", "week"),
        ),
        "years": (("1/12", "month"), ("1", "year"), ("10", "decade"), ("100", "century centuries")),
        "money": (("1/100", "cent"), ("1", "dollar usd")),
        "volume": (
            ("1/1000", "ml milliliter millilitre"),
            ("1", "l liter litre"),
            ("3.785411784", "gallon"),
        ),
        "angle": (("1", "degree"),),
        "share": (("1", "percent"),),
        "unit": (("1", "unit"),),  # of a length that has none
    }
    return {
        name: Unit(measures, Fraction(size))
        for measures, units in rows.items()
        for size, names in units
        for word in names.split()
        for name in (word, f"{word}s")
    }


UNITS = _table()
RATES = {"mph": "mile/hour", "kph": "km/hour", "kmh": "km/hour"}
POWERS = {"square": 2, "cubic": 3}


def unit(text: str) -> Unit | None:
    """The unit that a text without space names: "cm", "m^2", "squarefeet", "milesperhour"."""
    text = RATES.get(text.lower(), text.lower())
    found = _power(text)
    if found is None and ("/" in text or "per" in text):
        over, _, under = text.partition("/" if "/" in text else "per")
        top, bottom = _power(over), _power(under)
        if top and bottom:
            return Unit(f"{top.measures}/{bottom.measures}", top.size / bottom.size)
    return found


def _power(text: str) -> Unit | None:
    """A unit, perhaps with a power."""
    word, _, power = text.replace("{", "").replace("}", "").partition("^")
    exponent = {"": 1, "2": 2, "3": 3}.get(power)
    for name, times in POWERS.items():
        if word.startswith(name) and exponent == 1:
            word, exponent = word.removeprefix(name), times
    found = UNITS.get(word)
    if (
        found is None
        or exponent is None
        or (exponent > 1 and found.measures not in ("length", "unit"))
    ):
        return None
    return Unit(f"{found.measures}^{exponent}", found.size**exponent)

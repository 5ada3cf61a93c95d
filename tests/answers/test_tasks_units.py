"""Units: the sizes of the international definitions, and words that are none."""

from fractions import Fraction

import pytest

from gspo_jax.answers.units import UNITS, Unit, unit


@pytest.mark.parametrize(
    "one, count, other",
    [
        ("m", 100, "cm"),
        ("foot", 12, "inch"),
        ("yard", 3, "feet"),
        ("mile", 5280, "ft"),
        ("pound", 16, "ounces"),
        ("week", 168, "hours"),
        ("dollar", 100, "cents"),
        ("liter", 1000, "ml"),
        ("km^2", 10**6, "m^2"),
        ("cubic yard", 27, "ft^3"),
        ("m/s", Fraction(36, 10), "km/h"),
        ("mph", Fraction("1.609344"), "kilometers per hour"),
        ("mile per hour", 1, "mph"),
        ("century", 100, "years"),
        ("year", 12, "months"),
    ],
)
def test_one_of_them_is_so_many_of_the_other(one, count, other):
    a, b = unit(one.replace(" ", "")), unit(other.replace(" ", ""))
    assert a.measures == b.measures and a.size == count * b.size


def test_case_and_plural_do_not_matter():
    assert unit("Hours") == unit("hour") == UNITS["hours"]._replace(measures="time^1")
    assert unit("M^{2}") == Unit("length^2", Fraction(1))


@pytest.mark.parametrize(
    "word",
    [
        "",
        "apples",
        "squarehours",
        "kg^2",
        "m^4",
        "m^x",
        "square",
        "2",
        "per",
        "perhour",
        "kg/",
        "dozen",
    ],
)
def test_other_words_are_no_units(word):
    assert unit(word) is None

"""A number that knows how it is put together: of rounds, of updates and of processes alike."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Count(NamedTuple):
    """How many; counts add."""

    value: Any
    weight: Any = 1


class Average(NamedTuple):
    """A mean, and over how many things it is."""

    value: Any
    weight: Any


class Least(NamedTuple):
    """The smallest of so many things."""

    value: Any
    weight: Any


class Most(NamedTuple):
    """The largest of so many things."""

    value: Any
    weight: Any


Tally = Count | Average | Least | Most
KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Count, Average, Least, Most)}


def combined(parts: Iterable[Tally]) -> Tally:
    """The number of all that the parts are the numbers of; a NaN among them stays.

    What is over nothing does not count; where everything is, the first part stands.

    Raises:
        TypeError: parts of different kinds.
    """
    parts = list(parts)
    kind = type(parts[0])
    if any(type(part) is not kind for part in parts):
        raise TypeError(f"{parts} are not of one kind.")
    known = [(float(x.value), float(x.weight)) for x in parts if x.weight > 0]
    if len(known) <= 1:
        return kind(*(known[0] if known else map(float, parts[0])))
    values, weight = [x for x, _ in known], sum(w for _, w in known)
    if kind is Count:
        return Count(sum(values))
    if kind is Average:
        return Average(sum(x * w for x, w in known) / weight, weight)
    extreme = (min if kind is Least else max)(values)
    return kind(extreme if all(x == x for x in values) else float("nan"), weight)


def merged(records: Iterable[Mapping[str, Tally]]) -> dict[str, Tally]:
    """By name, `combined` over the records that have it; names in the order of their first."""
    records = list(records)
    names = dict.fromkeys(name for record in records for name in record)
    return {name: combined(r[name] for r in records if name in r) for name in names}


def numbers(record: Mapping[str, Tally]) -> dict[str, float]:
    """What is shown of them."""
    return {name: float(part.value) for name, part in record.items()}


def packed(record: Mapping[str, Tally]) -> dict[str, list[Any]]:
    """As JSON has them; `unpacked` gives them back."""
    return {name: [type(x).__name__, *map(float, x)] for name, x in record.items()}


def unpacked(record: Mapping[str, Any]) -> dict[str, Tally]:
    """What `packed` was given. A bare number, of an earlier version, is a mean over one thing."""
    pairs = {name: x if isinstance(x, list) else ["Average", x, 1.0] for name, x in record.items()}
    return {name: KINDS[kind](*rest) for name, (kind, *rest) in pairs.items()}

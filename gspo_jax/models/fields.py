"""Single values of a `config.json`: read leniently, refused in one line that names the key."""

from typing import Any

from gspo_jax.errors import DataError


def check_size(key: str, value: Any, limit: int) -> None:
    """Raise unless `value` is an integer from 1 to `limit`."""
    if value is None:
        raise DataError(f"{key} is missing; wanted an integer.")
    if type(value) is not int:  # bool is an int, and "12" is neither
        raise DataError(f"{key}={short(value)}: wanted an integer.")
    if not 1 <= value <= limit:
        raise DataError(f"{key}={short(value)}: wanted 1 to {limit}.")


def check_number(key: str, value: Any, *, low: float = 0.0, high: float) -> None:
    """Raise unless `value` is a number strictly between `low` and `high`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low < value < high:  # NaN fails the comparison
        raise DataError(f"{key}={short(value)}: wanted a number between {low:g} and {high:g}.")


def one_of(key: str, value: Any, allowed: tuple) -> None:
    """Raise unless `value` is in `allowed`, where 1 is not True."""
    if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
        raise DataError(f"{key}={short(value)}: wanted one of {', '.join(map(repr, allowed))}.")


def as_float(value: Any) -> Any:
    """JSON writes 1000000 for 1000000.0; what is no number is left for the check to refuse."""
    return float(value) if type(value) is int and abs(value) < 2**53 else value


def either(value: Any, default: Any) -> Any:
    """`value`, or `default` where it is None: a null in JSON says as much as a missing key."""
    return default if value is None else value


def short(value: Any) -> str:
    """`repr`, cut: a hostile file must not fill the screen."""
    if isinstance(value, dict | list):
        return "{...}" if isinstance(value, dict) else "[...]"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."

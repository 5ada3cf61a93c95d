"""Numbers as people read them."""


def measured(
    value: float,
    low: float | None = None,
    high: float | None = None,
    *,
    scale: int = 100,
    digits: int = 1,
    sign: str = "",
    unit: str = "",
) -> str:
    """39.3 % [35.1, 43.6]: a share, or a number of another scale, with its interval if it has one.

    Args:
        sign: "+" where an increase is to be told from a decrease.
        unit: after the value alone, such as " %".
    """
    bounds = () if low is None or high is None else (low, high)
    first, *rest = (f"{scale * x:{sign}.{digits}f}" for x in (value, *bounds))
    return first + unit + (f" [{', '.join(rest)}]" if rest else "")


def clock(seconds: float) -> str:
    """72 -> "1:12", 3672 -> "1:01:12"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

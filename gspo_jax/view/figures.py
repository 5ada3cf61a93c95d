"""Figures of runs, panel by panel: one run in detail, several overlaid, many as bands."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from gspo_jax.numbers.statistics import t_interval
from gspo_jax.view.drawing import (
    BLUE,
    COLORS,
    GREEN,
    GREY,
    ORANGE,
    RED,
    Curve,
    Panel,
    overlay,
    percent_axis,
    short,
    svg,
    write,
)
from gspo_jax.view.page import Picture
from gspo_jax.view.run_files import (
    Interval,
    Number,
    Numbers,
    Rows,
    accuracies,
    is_number,
    series,
    updates,
)

T = TypeVar("T")

MOST_POINTS = 2000  # of a curve; longer runs are thinned, a picture has no more columns


def draw(rows: Rows, path: Path, *, title: str = "") -> Path:
    """Draw a run's panels into `path` (its ending says the format), replacing it at once.

    Raises:
        StorageError: the disk is full, or the directory not writable.
    """
    return write(run_panels(rows), path, title=title)


NOTHING = Panel("Reward", "mean of a step", lambda axis: None)
METRICS = {  # title, unit of a curve
    "reward": ("Training reward", "mean of a step"),
    "loss": ("Loss", "mean of a step"),
    "clip_frac": ("Clipped", "share of tokens"),
    "entropy": ("Entropy", "nats per token"),
    "completions/mean_length": ("Response length", "tokens, mean"),
    "kl": ("Divergence from the reference", "KL, nats per token"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "tokens_per_second": ("Throughput", "tokens per second"),
}


def picture(stem: str, what: str, panels: Sequence[Panel], caption: str = "") -> Picture:
    """Panels on a page; who cannot see them is told their titles, after `what` they are."""
    titles = ", ".join(panel.title.lower() for panel in panels)
    return Picture(stem, f"{what}: {titles}", list(map(svg, panels)), caption)


# ----------------------------------------------------------------------------- a run, in detail


def run_panels(rows: Rows, *, points: int = MOST_POINTS) -> list[Panel]:
    """The dynamics of one run: a panel for all that its rows record."""
    thin = thinned(rows, points)
    panels = [
        Panel(title, unit, partial(_on_updates, show=partial(show, rows=thin), rows=rows))
        for title, unit, names, show in RUN_PANELS
        if any(is_number(row.get(name)) for row in thin for name in names)
    ]
    if any("reward" in row for row in thin):
        panels = [panel for panel in panels if panel.title != "Loss"]  # about 0; it says nothing
    if any(map(accuracies, rows)):
        panels.insert(1, held_out(rows))
    return panels or [NOTHING]


def held_out(rows: Rows) -> Panel:
    """Every accuracy of a run's evaluations, with its interval."""
    names = sorted({name for row in rows for name in accuracies(row)})
    curves = {name.removeprefix("eval/"): accuracy_curve(rows, name) for name in names}
    unit = f"accuracy ± 95 %, n = {counted(rows)}"
    return overlay("Held-out accuracy", unit, curves, colors=(ORANGE, GREEN, *COLORS[3:]))


def accuracy_curve(rows: Rows, name: str) -> Curve:
    """The evaluations of one accuracy, against the number of updates."""
    found = [(updates(row), accuracies(row)[name]) for row in rows if name in accuracies(row)]
    if not found:
        return Curve([], [])
    y, low, high = zip(*(interval for _, interval in found), strict=True)
    return Curve([x for x, _ in found], y, low, high, marked=True)


def counted(rows: Rows) -> str:
    """On how many problems the rows were evaluated: "512", or "256/512" where that differs."""
    return "/".join(str(n) for n in sorted({int(row["eval/n"]) for row in rows if accuracies(row)}))


def _on_updates(axis: Axes, *, show: Callable[[Axes], None], rows: Rows) -> None:
    show(axis)
    last = updates(rows[-1])
    axis.set_xlim(-0.02 * last, max(1.02 * last, 1))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _reward(axis: Axes, rows: Rows) -> None:
    x, y = series(rows, "reward")
    _smoothed(axis, x, y, BLUE, label="training reward ± 95 %", band=True)


def _clipping(axis: Axes, rows: Rows) -> None:
    for name, color, label in [
        ("clip_frac_high", ORANGE, "above 1 + ε_high"),
        ("clip_frac_low", BLUE, "below 1 - ε_low"),
    ]:
        _smoothed(axis, *series(rows, name), color, label=label)
    percent_axis(axis)


def _ratio(axis: Axes, rows: Rows) -> None:
    x, low = series(rows, "ratio_q05")
    _, high = series(rows, "ratio_q95")
    if len(low) == len(high):
        axis.fill_between(x, low, high, color=BLUE, alpha=0.18, lw=0, label="5 % to 95 %")
    x, middle = series(rows, "ratio_q50")
    axis.plot(x, middle, color=BLUE, label="median")
    axis.axhline(1, color=GREY, lw=0.8)
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.margins(y=0.25)  # room for the legend


def _length(axis: Axes, rows: Rows) -> None:
    x, low = series(rows, "completions/min_length")
    _, high = series(rows, "completions/max_length")
    if len(low) == len(high):
        axis.fill_between(x, low, high, color=BLUE, alpha=0.12, lw=0, label="shortest to longest")
    x, middle = series(rows, "completions/mean_length")
    axis.plot(x, middle, color=BLUE, label="mean")
    axis.set_ylim(0, 1.4 * max([*high, *middle, 0.1]))  # room for the legend
    x, cut = series(rows, "completions/clipped_ratio")
    if any(cut):
        other = axis.twinx()
        other.plot(x, cut, color=RED, lw=1)
        axis.plot([], [], color=RED, lw=1, label="cut at the limit (right)")
        other.set_ylim(0, max(0.1, 1.4 * max(cut)))
        other.yaxis.set_major_formatter(PercentFormatter(1.0))
        other.grid(visible=False)
        other.spines["right"].set_visible(True)


def _curve(name: str, *, percent: bool = False) -> Callable[..., None]:
    def show(axis: Axes, rows: Rows) -> None:
        x, y = series(rows, name)
        _smoothed(axis, x, y, BLUE)
        if percent:
            percent_axis(axis)
        elif min(y, default=0) >= 0:
            axis.set_ylim(bottom=0)
        if max(y, default=0) >= 1e4:
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))

    return show


RUN_PANELS = [  # title, unit, metrics of which it needs one, what draws it
    ("Reward", "mean of a step", ["reward"], _reward),
    (*METRICS["loss"], ["loss"], _curve("loss")),
    ("Clipped", "share of tokens", ["clip_frac_low", "clip_frac_high"], _clipping),
    ("Importance ratio", "π_θ / π_old", ["ratio_q50"], _ratio),
    (*METRICS["entropy"], ["entropy"], _curve("entropy")),
    ("Response length", "tokens", ["completions/mean_length"], _length),
    (*METRICS["kl"], ["kl"], _curve("kl")),
    (*METRICS["grad_norm"], ["grad_norm"], _curve("grad_norm")),
    (
        "Groups without spread",
        "rewards all equal",
        ["frac_reward_zero_std"],
        _curve("frac_reward_zero_std", percent=True),
    ),
    (*METRICS["tokens_per_second"], ["tokens_per_second"], _curve("tokens_per_second")),
]


# ------------------------------------------------------------------------ several runs, overlaid


def overlaid_panels(runs: Mapping[str, Rows], *, points: int = 500) -> list[Panel]:
    """A panel per metric, with one curve per run: smoothed, against the number of updates."""
    thin = {label: thinned(rows, points) for label, rows in runs.items()}
    rewarded = any("reward" in row for rows in thin.values() for row in rows)
    names = [name for name in METRICS if not (rewarded and name == "loss")]

    def curve(rows: Rows, name: str) -> Curve:
        x, y = series(rows, name)
        return Curve(x, [v.value for v in smooth(y)])

    return panel_each(names, thin, curve) or [NOTHING]


def panel_each(
    names: Iterable[str],
    runs: Mapping[str, T],
    curve: Callable[[T, str], Curve],
    x: str = "optimizer updates",
) -> list[Panel]:
    """A panel per metric that any has recorded: `curve` of each label, on one pair of axes."""
    panels = []
    for name in names:
        curves = {label: curve(rows, name) for label, rows in runs.items()}
        if any(found.x for found in curves.values()):
            percent = name == "clip_frac"
            panels.append(overlay(*METRICS[name], curves, x=x, percent=percent))
    return panels


# ----------------------------------------------------------------------------------- numbers


def thinned(rows: Rows, points: int) -> Rows:
    """Every k-th row, so that at most `points` are left."""
    return rows[:: max(-(-len(rows) // points), 1)]


def mean(values: Sequence[Number]) -> Interval:
    """The mean with Student's 95 % interval."""
    return Interval(*t_interval(values))


def smooth(y: Numbers) -> list[Interval]:
    """The mean over a window of a twentieth of the curve, centred, shorter at the ends.

    Its 95 % interval is Student's, with the steps of the window as independent.
    """
    half = max(len(y) // 40, 2) if len(y) >= 10 else 0
    return [mean(y[max(i - half, 0) : i + half + 1]) for i in range(len(y))]


def _smoothed(
    axis: Axes, x: Numbers, y: Numbers, color: str, *, label: str = "", band: bool = False
) -> None:
    smoothed = smooth(y)
    axis.plot(x, y, color=color, lw=0.9, alpha=0.3)
    if band and all(math.isfinite(v.high) for v in smoothed):
        low, high = [v.low for v in smoothed], [v.high for v in smoothed]
        axis.fill_between(x, low, high, color=color, alpha=0.18, lw=0)
    axis.plot(x, [v.value for v in smoothed], color=color, label=label or None)

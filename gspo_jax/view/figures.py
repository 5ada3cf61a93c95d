"""Figures of runs, panel by panel: one run in detail, several overlaid, many as bands.

A panel is drawn twice: among others in one picture (`write`), and alone as SVG for a page
(`svg`), where panels flow to the width of the screen.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from gspo_jax.errors import StorageError
from gspo_jax.numbers.statistics import t_interval
from gspo_jax.text.inert import inert
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

MOST_POINTS = 2000  # of a curve; longer runs are thinned, a picture has no more columns
BLUE, ORANGE, GREEN, RED, GREY = "#2f6db3", "#d9772b", "#3a8f4f", "#c0392b", "#6b7280"
COLORS = (BLUE, ORANGE, GREEN, "#8e5fb8", RED, "#1f8a94", "#b0568f", "#8a6d3b")
INK, PALE, FRAME = "#374151", "#e5e7eb", "#9aa1ab"
DASHES = ("-", "--", "-.", ":")
LEGEND = 6  # labels that a panel has room for in one column
STYLE: dict[Any, Any] = {
    "axes.edgecolor": FRAME,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.facecolor": "white",
    "font.size": 9.5,
    "grid.color": PALE,
    "grid.linewidth": 0.8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "gspo_jax",  # the same figure is the same file
    "text.color": INK,
    "text.parse_math": False,  # a name with dollar signs is no formula
    "xtick.color": GREY,
    "ytick.color": GREY,
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes: what it is called, what its y axis measures, and what draws on it."""

    title: str
    unit: str
    draw: Callable[[Axes], None]
    x: str = "optimizer updates"
    height: float = 2.9  # inches; all are 4.2 wide


@dataclass(frozen=True)
class Curve:
    """A line with, or without, a band; `marked` where each point was measured by itself."""

    x: Sequence[Number]
    y: Sequence[Number]
    low: Sequence[Number] = ()
    high: Sequence[Number] = ()
    marked: bool = False


# ---------------------------------------------------------------------------------- pictures


def draw(rows: Rows, path: Path, *, title: str = "") -> Path:
    """Draw a run's panels into `path` (its ending says the format), replacing it at once.

    Raises:
        StorageError: the disk is full, or the directory not writable.
    """
    return write(run_panels(rows), path, title=title)


def write(panels: Sequence[Panel], path: Path, *, title: str = "") -> Path:
    """All panels in one picture, three or four beside each other; PNG or SVG by the name.

    Raises:
        StorageError: the disk is full, or the directory not writable.
    """
    columns = 4 if len(panels) in (4, 8) else min(3, len(panels))
    lines = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        size = (4.33 * columns, lines * max(panel.height for panel in panels) + 0.4 * bool(title))
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).flat
        for panel, axis in zip(panels, axes, strict=False):
            _draw(panel, axis)
        for axis in list(axes)[len(panels) :]:
            axis.set_axis_off()
        if title:
            figure.suptitle(_label(title, 100), x=0.01, ha="left", fontsize=13, fontweight="bold")
        _replace(path, figure)
    return path


def svg(panel: Panel) -> str:
    """A panel alone, as the text of an SVG file without a background."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, panel.height), layout="constrained")
        figure.patch.set_visible(False)
        _draw(panel, figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _draw(panel: Panel, axis: Axes) -> None:
    title, unit, x = (_label(text, 60) for text in (panel.title, panel.unit, panel.x))
    axis.set(title=title, ylabel=unit, xlabel=x)
    panel.draw(axis)
    if not (axis.collections or any(np.size(line.get_xdata()) for line in axis.lines)):
        axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", color=GREY)
    elif labels := axis.get_legend_handles_labels()[1]:
        small = {"ncols": 2, "fontsize": 6.5} if len(labels) > LEGEND else {}
        axis.legend(loc="best", **small)


def _replace(path: Path, figure: Figure) -> None:
    part = path.with_name(f".part.{path.name}")
    metadata = {"Date": None} if path.suffix == ".svg" else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(part, metadata=metadata)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise StorageError(f"{path}: cannot be written ({error.strerror}).") from error


NOTHING = Panel("Reward", "mean of a step", lambda axis: None)

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
    _percent(axis)


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
            _percent(axis)
        elif min(y, default=0) >= 0:
            axis.set_ylim(bottom=0)
        if max(y, default=0) >= 1e4:
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))

    return show


RUN_PANELS = [  # title, unit, metrics of which it needs one, what draws it
    ("Reward", "mean of a step", ["reward"], _reward),
    ("Loss", "mean of a step", ["loss"], _curve("loss")),
    ("Clipped", "share of tokens", ["clip_frac_low", "clip_frac_high"], _clipping),
    ("Importance ratio", "π_θ / π_old", ["ratio_q50"], _ratio),
    ("Entropy", "nats per token", ["entropy"], _curve("entropy")),
    ("Response length", "tokens", ["completions/mean_length"], _length),
    ("Divergence from the reference", "KL, nats per token", ["kl"], _curve("kl")),
    ("Gradient norm", "before clipping", ["grad_norm"], _curve("grad_norm")),
    (
        "Groups without spread",
        "rewards all equal",
        ["frac_reward_zero_std"],
        _curve("frac_reward_zero_std", percent=True),
    ),
    ("Throughput", "tokens per second", ["tokens_per_second"], _curve("tokens_per_second")),
]


# ------------------------------------------------------------------------ several runs, overlaid

OVERLAID = {  # metric -> title, unit
    "reward": ("Training reward", "mean of a step"),
    "loss": ("Loss", "mean of a step"),
    "clip_frac": ("Clipped", "share of tokens"),
    "entropy": ("Entropy", "nats per token"),
    "completions/mean_length": ("Response length", "tokens, mean"),
    "kl": ("Divergence from the reference", "KL, nats per token"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "tokens_per_second": ("Throughput", "tokens per second"),
}


def overlaid_panels(runs: Mapping[str, Rows], *, points: int = 500) -> list[Panel]:
    """A panel per metric, with one curve per run: smoothed, against the number of updates."""
    panels = []
    thin = {label: thinned(rows, points) for label, rows in runs.items()}
    for name, (title, unit) in OVERLAID.items():
        if name == "loss" and any("reward" in row for rows in thin.values() for row in rows):
            continue
        found = {label: series(rows, name) for label, rows in thin.items()}
        curves = {k: Curve(x, [v.value for v in smooth(y)]) for k, (x, y) in found.items()}
        if any(curve.x for curve in curves.values()):
            panels.append(overlay(title, unit, curves, percent=name == "clip_frac"))
    return panels or [NOTHING]


def overlay(
    title: str,
    unit: str,
    curves: Mapping[str, Curve],
    *,
    x: str = "optimizer updates",
    colors: Sequence[str] = COLORS,
    percent: bool = False,
) -> Panel:
    """Curves by label, in the order of their colours."""

    def show(axis: Axes) -> None:
        for k, (label, curve) in enumerate(curves.items()):
            color = colors[k % len(colors)]
            dash = DASHES[k // len(colors) % len(DASHES)]
            _one(axis, curve, color, dash, _label(label))
        if percent:
            _percent(axis)
            peaks = [max(curve.y) for curve in curves.values() if curve.y]
            if max(peaks, default=0) > 20 * min(peaks, default=0):
                axis.set_yscale("symlog", linthresh=1e-3)
                axis.yaxis.set_major_formatter(PercentFormatter(1.0))
                axis.set_ylabel(f"{_label(unit, 60)}; log above 0.1 %")
        last = max((max(curve.x, default=0) for curve in curves.values()), default=0)
        axis.set_xlim(-0.02 * last, max(1.03 * last, 1))
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if last >= 1e4:
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))

    return Panel(title, unit, show, x)


def _one(axis: Axes, curve: Curve, color: str, dash: str, label: str) -> None:
    has_band = len(curve.low) == len(curve.high) == len(curve.x) > 0
    if curve.marked:
        reach = None
        if has_band:
            bounds = list(zip(curve.y, curve.low, curve.high, strict=True))
            reach = [
                [max(y - low, 0) for y, low, _ in bounds],
                [max(h - y, 0) for y, _, h in bounds],
            ]
        axis.errorbar(
            curve.x,
            curve.y,
            reach,
            color=color,
            marker="o",
            ms=4.5,
            lw=1.2,
            ls=dash,
            capsize=3,
            label=label,
        )
        return
    if has_band:
        axis.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.13, lw=0)
    axis.plot(curve.x, curve.y, color=color, ls=dash, label=label)


def differences(
    rows: Mapping[str, Interval], points: Mapping[str, Sequence[Number]], *, unit: str
) -> Panel:
    """A line per label: its interval as a bar, the single values as dots, and where nothing is."""

    def show(axis: Axes) -> None:
        axis.axvline(0, color=GREY, lw=1)
        for k, (label, (value, low, high)) in enumerate(rows.items()):
            color = GREEN if low > 0 else RED if high < 0 else BLUE
            if all(map(math.isfinite, (low, high))):
                axis.plot([low, high], [k, k], color=color, lw=2.5, solid_capstyle="round")
            axis.plot([value], [k], color=color, marker="o", ms=7, ls="")
            single = [v for v in points.get(label, ()) if is_number(v)]
            axis.plot(single, [k + 0.22] * len(single), color=GREY, marker="|", ms=6, ls="")
        axis.set_yticks(range(len(rows)), [_label(label) for label in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)  # the first on top
        axis.grid(visible=False, axis="y")

    return Panel("Paired difference", "", show, unit, height=1.3 + 0.34 * len(rows))


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


def _label(text: str, most: int = 28) -> str:
    """`text` as a figure has room for it; matplotlib would hide what begins with "_"."""
    text = inert(text[: 8 * most])
    text = f" {text}" if text.startswith("_") else text
    return text if len(text) <= most else f"{text[: most - 1]}…"


def short(value: Number) -> str:
    """586282 -> "586k", 1.5e6 -> "1.5M"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def _smoothed(
    axis: Axes, x: Numbers, y: Numbers, color: str, *, label: str = "", band: bool = False
) -> None:
    smoothed = smooth(y)
    axis.plot(x, y, color=color, lw=0.9, alpha=0.3)
    if band and all(math.isfinite(v.high) for v in smoothed):
        low, high = [v.low for v in smoothed], [v.high for v in smoothed]
        axis.fill_between(x, low, high, color=color, alpha=0.18, lw=0)
    axis.plot(x, [v.value for v in smoothed], color=color, label=label or None)


def _percent(axis: Axes) -> None:
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_ylim(bottom=0)

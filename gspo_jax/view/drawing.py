"""Panels: what is drawn on one pair of axes, and how it becomes a picture.

A panel is drawn twice: among others in one picture (`write`), and alone as SVG for a page
(`svg`), where panels flow to the width of the screen.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from gspo_jax.files.whole import delivered
from gspo_jax.text.inert import inert
from gspo_jax.view.run_files import Interval, Number, is_number

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
        with delivered(path) as part:
            figure.savefig(part, metadata={"Date": None} if path.suffix == ".svg" else None)
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
            percent_axis(axis)
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


def percent_axis(axis: Axes) -> None:
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_ylim(bottom=0)


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

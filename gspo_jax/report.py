"""The picture of a run: metrics.jsonl -> plots/dynamics.png. Reads files alone; no JAX.

Six panels against the number of optimizer updates: reward with held-out accuracy, clipped share,
importance ratio, entropy, response length, gradient norm.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # a file, whatever the machine's display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from gspo_jax import jsonl
from gspo_jax.errors import DataError, StorageError

Rows = list[dict[str, Any]]
Numbers = list[int | float]

MOST_ROWS = 20_000  # held in memory
MOST_POINTS = 2000  # of a curve; longer runs are thinned, a picture has no more columns
LARGEST = 1e100  # of a number that is drawn; beyond, axes overflow
SAMPLED = re.compile(r"eval/avg@(\d+)")
BLUE, ORANGE, GREEN, RED, GREY = "#2f6db3", "#d9772b", "#3a8f4f", "#c0392b", "#6b7280"
STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#9aa1ab",
    "axes.grid": True,
    "axes.labelcolor": "#374151",
    "axes.labelsize": 9.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "font.size": 9.5,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
}


def read_metrics(run: Path, *, most: int = MOST_ROWS) -> Rows:
    """The steps of a run directory (or of a metrics.jsonl), in order; the latest line of each.

    A line that was torn by a crash, or is still being written, is left out.

    Args:
        most: rows to hold, and as many more with evaluations: of a longer run every 2nd, 4th, ...
            step, but always the first and the last.

    Raises:
        DataError: there is no metrics.jsonl, or nothing in it.
    """
    path = run if run.suffix == ".jsonl" else run / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            rows = _thinned(jsonl.records(file), most)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; give a run directory, like runs/x.") from None
    if not rows:
        raise DataError(f"{path}: holds no step yet.")
    return [rows[step] for step in sorted(rows)]


def dynamics(run: Path, say: Callable[[str], None] | None = None) -> Path:
    """Draw a run directory's metrics into its plots/dynamics.png, and say where that is.

    Args:
        say: told why it cannot be drawn, which then is no error: so a run ends well without.

    Raises:
        DataError: the run has no metrics to draw.
        StorageError: the picture cannot be written.
    """
    run = Path(run)
    home = run.parent if run.suffix == ".jsonl" else run
    path = home / "plots" / "dynamics.png"
    try:
        draw(read_metrics(run, most=2 * MOST_POINTS), path, title=home.resolve().name)
    except (DataError, StorageError) as error:
        if say is None:
            raise
        say(f"warning: {error}")
    return path


def draw(rows: Rows, path: Path, *, title: str = "") -> Path:
    """Draw the six panels into `path` (its ending says the format), replacing it at once.

    Raises:
        StorageError: the disk is full, or the directory not writable.
    """
    rows = [{**row, "updates": _updates(row)} for row in rows]
    thin = rows[:: -(-len(rows) // MOST_POINTS)]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 3, figsize=(13, 6.6), dpi=120)
        try:
            _reward(axes[0, 0], thin, [row for row in rows if "eval/greedy" in row])
            _clipping(axes[0, 1], thin)
            _ratio(axes[0, 2], thin)
            _curve(axes[1, 0], thin, "entropy", "Entropy", "nats per token")
            _length(axes[1, 1], thin)
            _curve(axes[1, 2], thin, "grad_norm", "Gradient norm", "before clipping")
            for axis in axes.flat:
                _finish(axis, rows[-1]["updates"])
            if title:
                head = figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
                head.set_parse_math(False)  # a name with dollar signs is no formula
            _replace(path, figure)
        finally:
            plt.close(figure)
    return path


def _replace(path: Path, figure: Figure) -> None:
    part = path.with_name(f".part.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(part)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StorageError(f"{path}: cannot be written ({error.strerror}).") from error


# ----------------------------------------------------------------------------------- panels


def _reward(axis: Axes, rows: Rows, evaluated: Rows) -> None:
    x, y = _series(rows, "reward")
    axis.plot(x, y, color=BLUE, lw=0.9, alpha=0.35)
    axis.plot(x, _smooth(y), color=BLUE, label="training reward")
    names = {name for row in evaluated for name in row if SAMPLED.fullmatch(name)}
    for name, color, marker in [
        *((name, ORANGE, "o") for name in sorted(names)),
        ("eval/greedy", GREEN, "s"),
    ]:
        x, y = _series(evaluated, name)
        low, high = _series(evaluated, f"{name}_low")[1], _series(evaluated, f"{name}_high")[1]
        reach = None
        if len(low) == len(high) == len(y):
            below = [max(v - a, 0) for v, a in zip(y, low, strict=True)]
            reach = [below, [max(b - v, 0) for v, b in zip(y, high, strict=True)]]
        label = f"held-out {name.removeprefix('eval/')}"
        axis.errorbar(
            x, y, reach, color=color, marker=marker, ms=5.5, lw=1, ls=":", capsize=3, label=label
        )
    axis.set(title="Reward", ylabel="mean; accuracy with 95 % interval")


def _clipping(axis: Axes, rows: Rows) -> None:
    for name, color, label in [
        ("clip_frac_high", ORANGE, "above 1 + ε_high"),
        ("clip_frac_low", BLUE, "below 1 - ε_low"),
    ]:
        x, y = _series(rows, name)
        axis.plot(x, y, color=color, lw=0.9, alpha=0.3)
        axis.plot(x, _smooth(y), color=color, label=label)
    axis.set(title="Clipped", ylabel="share of tokens")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_ylim(bottom=0)


def _ratio(axis: Axes, rows: Rows) -> None:
    x, low = _series(rows, "ratio_q05")
    _, high = _series(rows, "ratio_q95")
    if len(low) == len(high):
        axis.fill_between(x, low, high, color=BLUE, alpha=0.18, lw=0, label="5 % to 95 %")
    x, middle = _series(rows, "ratio_q50")
    axis.plot(x, middle, color=BLUE, label="median")
    axis.axhline(1, color=GREY, lw=0.8)
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.set(title="Importance ratio", ylabel="π_θ / π_old")
    axis.margins(y=0.25)  # room for the legend


def _length(axis: Axes, rows: Rows) -> None:
    x, low = _series(rows, "completions/min_length")
    _, high = _series(rows, "completions/max_length")
    if len(low) == len(high):
        axis.fill_between(x, low, high, color=BLUE, alpha=0.12, lw=0, label="shortest to longest")
    x, mean = _series(rows, "completions/mean_length")
    axis.plot(x, mean, color=BLUE, label="mean")
    axis.set(title="Response length", ylabel="tokens")
    axis.set_ylim(0, 1.4 * max([*high, *mean], default=1))  # room for the legend
    x, cut = _series(rows, "completions/clipped_ratio")
    if any(cut):
        other = axis.twinx()
        other.plot(x, cut, color=RED, lw=1)
        axis.plot([], [], color=RED, lw=1, label="cut at the limit (right)")
        other.set_ylim(0, max(0.1, 1.4 * max(cut)))
        other.yaxis.set_major_formatter(PercentFormatter(1.0))
        other.grid(visible=False)
        other.spines["right"].set_visible(True)


def _curve(axis: Axes, rows: Rows, name: str, title: str, unit: str) -> None:
    x, y = _series(rows, name)
    axis.plot(x, y, color=BLUE, lw=0.9, alpha=0.35)
    axis.plot(x, _smooth(y), color=BLUE)
    axis.set(title=title, ylabel=unit)
    axis.set_ylim(bottom=0)


def _finish(axis: Axes, updates: int) -> None:
    axis.set_xlabel("optimizer updates")
    axis.set_xlim(-0.02 * updates, max(1.02 * updates, 1))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    has_data = axis.collections or any(np.size(line.get_xdata()) for line in axis.lines)
    if not has_data:
        axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", color=GREY)
    elif axis.get_legend_handles_labels()[1]:
        axis.legend(loc="best")


# ----------------------------------------------------------------------------------- numbers


@dataclass
class _Sieve:
    """At most `most` rows by step: those of every `stride`-th step, which doubles when needed."""

    most: int
    stride: int = 1
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        if row["step"] % self.stride == 0:
            self.rows[row["step"]] = row
        while len(self.rows) > self.most:
            self.stride *= 2
            self.rows = {s: row for s, row in self.rows.items() if s % self.stride == 0}


def _thinned(rows: Iterable[dict[str, Any]], most: int) -> dict[int, dict[str, Any]]:
    """Rows by step, thinned in one pass; the first and the last step stay."""
    every, evaluated = _Sieve(most), _Sieve(most)
    first: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    for row in rows:
        if not 0 <= row["step"] < 2**53:  # no step, but a flipped bit
            continue
        every.add(row)
        if any(name.startswith("eval/") for name in row):
            evaluated.add(row)
        first = row if first is None or row["step"] <= first["step"] else first
        last = row if last is None or row["step"] >= last["step"] else last
    ends = {row["step"]: row for row in (first, last) if row is not None}
    return evaluated.rows | every.rows | ends


def _updates(row: Mapping[str, Any]) -> int | float:
    """Where a row stands on the axis: the updates so far; its step where they are not recorded."""
    updates = row.get("updates")
    return updates if updates and _is_number(updates) else row["step"]


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[Numbers, Numbers]:
    """Updates and values of a metric, where it has one."""
    points = [(row["updates"], row[name]) for row in rows if _is_number(row.get(name))]
    return [x for x, _ in points], [y for _, y in points]


def _is_number(value: Any) -> bool:
    # False for NaN as well.
    return type(value) in (int, float) and -LARGEST < value < LARGEST


def _smooth(y: Numbers) -> Numbers:
    """The mean over a window of a twentieth of the curve, centred, shorter at the ends."""
    half = len(y) // 40
    windows = (y[max(i - half, 0) : i + half + 1] for i in range(len(y)))
    return [sum(window) / len(window) for window in windows]

"""The view of runs in a terminal: a table, small curves, advice, the newest completions. No JAX."""

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gspo_jax.numbers.shown import clock, measured
from gspo_jax.text.inert import one_line
from gspo_jax.view.follow import Watch
from gspo_jax.view.snapshot import snapshot

BLOCKS = "▁▂▃▄▅▆▇█"
LINES = {  # the curves that are shown, and what people call them
    "reward": "reward",
    "entropy": "entropy",
    "clip_frac": "clipped",
    "completions/mean_length": "length",
    "grad_norm": "gradient",
}
SAMPLES = 4
SECONDS = 1.0  # between two looks


def show(runs: Sequence[Path], console: Console | None = None) -> None:
    """The runs until Ctrl-C; where the output is no terminal, once.

    Raises:
        DataError: a run does not exist.
    """
    console = console or Console()
    watch = Watch(runs, most=400)
    if not console.is_terminal:
        while any(follower.behind for follower in watch.look(seconds=1.0)):
            pass
        console.print(view(_look(watch), console.width))
        return
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(view(_look(watch), console.width, console.height), refresh=True)
                time.sleep(SECONDS)
    except KeyboardInterrupt:
        console.print(view(_look(watch), console.width))


def view(runs: Sequence[Mapping[str, Any]], width: int = 100, height: int = 0) -> Group:
    """All that is shown of them.

    Args:
        runs: as `snapshot` has them.
        height: lines that there are; 0 for as many as it takes.
    """
    if not runs:
        return Group(Text("No run is here yet.", style="dim"))
    parts: list[RenderableType] = [overview(runs)]
    for title, part in (
        ("curves", curves(runs, width)),
        ("worth a look", advice(runs, width)),
        ("newest completions", completions(runs, width)),
    ):
        if part is not None:
            parts += [Text(""), Text(title, style="bold"), part]
    parts += [Text("\nCtrl-C ends this; the runs do not mind.", style="dim")] if height else []
    return Group(*parts)


def overview(runs: Sequence[Mapping[str, Any]]) -> Table:
    """A row per run: state, step, time left, reward, held-out accuracy, speed."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("run", no_wrap=True, max_width=32)
    table.add_column("state", no_wrap=True)
    for name in ("step", "left", "reward", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("held-out accuracy")
    for run in runs:
        step, of, newest = run["step"], run["of"], run["newest"]
        cells = [
            f"{_number(step)}/{of}" if of is not None else _number(step),
            "–" if run["eta"] is None else clock(run["eta"]),
            _number(newest.get("reward"), ".3f"),
            _number(newest.get("tokens_per_second"), ",.0f"),
            _accuracy(run["accuracies"]),
        ]
        name = Text(one_line(run["name"], 32), style="bold")
        table.add_row(name, Text(run["state"], style=STYLES.get(run["state"], "")), *cells)
    return table


STYLES = {"running": "cyan", "finished": "green", "failed": "red", "quiet": "yellow", "gone": "red"}


def curves(runs: Sequence[Mapping[str, Any]], width: int) -> Table | None:
    """A line of blocks per metric and run, from its least to its largest value."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    room = max(min(width - 60, 60), 10)
    for name, label in LINES.items():
        for run in runs:
            values = [value for value in run["y"].get(name, []) if value is not None]
            if len(values) > 1:
                ends = f"{_number(values[0], '.4g')} → {_number(values[-1], '.4g')}"
                of = Text(one_line(run["name"], 24), style="dim") if len(runs) > 1 else ""
                table.add_row(label, of, Text(sparkline(values, room), style="cyan"), ends)
    return table if table.row_count else None


def sparkline(values: Sequence[int | float], width: int) -> str:
    """The means of `width` equal stretches as blocks; the least is ▁, the largest █."""
    count = min(width, len(values))
    cuts = [k * len(values) // count for k in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def advice(runs: Sequence[Mapping[str, Any]], width: int) -> Group | None:
    """What is worth a look, and the newest line of warnings.log."""
    lines = []
    for run in runs:
        told = [a["text"] for a in run["advice"]]
        told += [f"warnings.log: {line}" for line in run["warnings"][-1:]]
        name = one_line(run["name"], 32)
        lines += [Text(f"{name}: {one_line(text, 4 * width)}", style="yellow") for text in told]
    return Group(*lines) if lines else None


def completions(runs: Sequence[Mapping[str, Any]], width: int) -> Table | None:
    """The newest of the run that goes on, else of the first that has some."""
    able = [run for run in runs if run["samples"]]
    going = [run for run in able if run["state"] == "running"]
    if not able:
        return None
    room = max((width - 42) // 2, 12)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("step", "reward", "adv."):
        table.add_column(name, justify="right", no_wrap=True)
    for name, most in (("gold", 12), ("prompt", room), ("completion", room)):
        table.add_column(name, no_wrap=True, max_width=most)
    for row in [*going, *able][0]["samples"][:SAMPLES]:
        texts = [
            Text(one_line(row[name] or "–", most))
            for name, most in (("answer", 12), ("prompt", room), ("completion", room))
        ]
        scores = [_number(row["reward"], ".3g"), _number(row["advantage"], "+.2f")]
        table.add_row(str(row["step"]), *scores, *texts)
    return table


def _look(watch: Watch) -> list[Mapping[str, Any]]:
    return snapshot(watch.look(), time.time())["runs"]


def _number(value: int | float | None, form: str = "") -> str:
    return "–" if value is None else format(value, form)


def _accuracy(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return "–"
    first, *_ = found
    value = measured(first["value"], first["low"], first["high"], unit=" %")
    return f"{value} {first['name']}, n = {first['n']:,.0f}, step {first['step']}"

"""What a run's files say, as one page and its figures. Reads files alone; no JAX.

    gspo-jax report RUN        RUN/plots/report.html, dynamics.png, dynamics.svg
    gspo-jax report RUN RUN    report/ beside them: the curves overlaid, a table, what differs

run_files.py reads, figures.py draws, page.py writes; here is what is said.
"""

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from gspo_jax.errors import DataError, StorageError
from gspo_jax.numbers.shown import clock
from gspo_jax.numbers.statistics import independent_difference
from gspo_jax.view import drawing, figures, page
from gspo_jax.view.figures import MOST_POINTS, draw
from gspo_jax.view.page import Block, Code, Details, Heading, Items, Table, Text
from gspo_jax.view.run_files import (
    PHASES,
    Interval,
    Rows,
    Run,
    accuracies,
    differing,
    is_number,
    labels_of,
    read_metrics,
    read_run,
)

PAGE_POINTS = 500  # of a curve in the page
SHARES = {  # of an evaluation, besides its accuracies
    "eval/truncated": "cut at the length limit",
    "eval/no_answer": "without an answer",
}
HOW = (
    "The faint line is each step, the strong one the mean over a window of a twentieth of the run; "
    "its band is the 95 % interval of that mean, the steps taken as independent. Points with bars "
    "are held-out accuracies."
)


def report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """The page of one run, or of several side by side, with its figures.

    Args:
        runs: run directories (or their metrics.jsonl).
        out: where to write; by default plots/ of the only run, or report/ beside several.

    Returns:
        The page, report.html.

    Raises:
        DataError: a run has no metrics.
        StorageError: the page cannot be written.
    """
    read = {}
    for path in runs:
        run = read_run(Path(path), most=2 * MOST_POINTS)
        read.setdefault(run.path.resolve(), run)
    found = list(read.values())
    if len(found) == 1:
        return _one(found[0], out or found[0].path / "plots")
    shared = Path(os.path.commonpath([run.path.resolve().parent for run in found]))
    return _several(found, out or shared / "report")


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


# ------------------------------------------------------------------------------------ pages


def _one(run: Run, out: Path) -> Path:
    for ending in ("png", "svg"):
        draw(run.rows, out / f"dynamics.{ending}", title=run.name)
    panels = figures.run_panels(run.rows, points=PAGE_POINTS)
    blocks = [
        Text(state(run)),
        *outcome(run),
        Heading("Dynamics"),
        figures.picture("dynamics", f"Dynamics of {run.name}", panels),
        Text(HOW, "note"),
        Heading("What was run"),
        what(run),
        *_rest(run),
    ]
    return page.write(out / "report.html", page.html(run.name, blocks))


def _several(runs: Sequence[Run], out: Path) -> Path:
    labels = labels_of(runs)
    named = dict(zip(labels, runs, strict=True))
    rows = {label: run.rows for label, run in named.items()}
    panels = figures.overlaid_panels(rows, points=PAGE_POINTS)
    if held_out := _held_out(rows):
        panels.insert(0, held_out)
    for ending in ("png", "svg"):
        drawing.write(panels, out / f"dynamics.{ending}", title=f"{len(runs)} runs")
    title = f"{len(runs)} runs: {', '.join(labels)}"
    blocks = [
        *_overview(named),
        Heading("Dynamics"),
        figures.picture("dynamics", "The runs overlaid", panels),
        Text("Each line is the mean over a window of a twentieth of its run.", "note"),
        Heading("What differs"),
        _differing(named),
        Heading("Each run"),
        *(
            Details(label, [Text(state(run)), *outcome(run), what(run), *_rest(run)])
            for label, run in named.items()
        ),
    ]
    return page.write(out / "report.html", page.html(title[:200], blocks))


def _rest(run: Run) -> list[Block]:
    """What a reader looks up: timings, warnings, samples, the configuration."""
    return [*timings(run), *warned(run), *sampled(run), *configured(run)]


# ------------------------------------------------------------------------------- of one run


def state(run: Run) -> str:
    """finished, step 100 of 100, 1:19 after its last start on 2026-11-23 at 02:08 UTC."""
    done, of = run.status.get("step", run.rows[-1]["step"]), run.status.get("of")
    text = f"{run.status.get('state', 'state unknown')}, step {done}"
    text += f" of {of}" if of is not None else ""
    try:
        begun, last = (
            datetime.fromisoformat(t) for t in (run.env["started"], run.status["updated"])
        )
        text += f", {clock(max((last - begun).total_seconds(), 0))} after its last start"
        text += f" on {begun:%Y-%m-%d at %H:%M} UTC"
    except (KeyError, TypeError, ValueError):
        pass  # one of the files is missing, or not ours
    return f"{text}."


def outcome(run: Run) -> list[Block]:
    """Accuracy of the first and the last evaluation, with n, intervals and the change."""
    measured = evaluations(run.rows)
    if not measured:
        return [Text("No held-out evaluation with an interval is recorded.", "note")]
    first, last = measured[0], measured[-1]
    columns = [first] if first is last else [first, last]
    head = ["held-out", *(f"step {row['step']}, n = {row['eval/n']:,.0f}" for row in columns)]
    names = [name for name in accuracies(last) if name in accuracies(first)]
    rows = [
        [
            f"{name.removeprefix('eval/')} accuracy",
            *(page.percent(accuracies(row)[name]) for row in columns),
            _change(accuracies(first)[name], accuracies(last)[name]),
        ]
        for name in names
    ]
    for name, label in SHARES.items():
        if all(is_number(row.get(name)) for row in columns):
            rows.append([label, *(f"{row[name]:.1%}".replace("%", " %") for row in columns), ""])
    if all(is_number(row.get("eval/mean_length")) for row in columns):
        lengths = [f"{row['eval/mean_length']:.1f}" for row in columns]
        rows.append(["mean length, tokens", *lengths, ""])
    note = "In brackets: 95 % intervals; n is the number of problems."
    if len(columns) == 2:
        head.append("change, points")
        note += (
            " The change is taken as that of independent samples; on the same problems its true "
        )
        note += "interval is narrower."
    return [
        Heading("Result"),
        Table(head, [row[: len(head)] for row in rows]),
        Text(note, "note"),
    ]


def _change(before: Interval, after: Interval) -> str:
    return page.points(Interval(*independent_difference(before, after)))


def evaluations(rows: Rows) -> Rows:
    """The rows with an accuracy that has n and an interval."""
    return [row for row in rows if accuracies(row)]


def what(run: Run) -> Table:
    """Loss, model, task, sizes, devices, versions, commit: as far as the files say."""
    get, env = run.config.get, run.env
    loss = get("algo.loss.name") or get("algo.loss") or ""
    own = [
        f"{key.rpartition('.')[2]} {value}"
        for key, value in run.config.items()
        if key.startswith("algo.loss.") and key != "algo.loss.name"
    ]
    sizes = [f"{get(key)} {label}" for key, label in SIZES.items() if get(key, "1") != "1"]
    devices, versions = env.get("devices"), env.get("versions")
    command = env.get("command")
    rows = [
        ("loss", ", ".join([loss, *own]) if loss else ""),
        ("advantage", get("algo.advantage.name", "")),
        ("model", get("model.path", "")),
        ("task", next((get(k, "") for k in TASK if get(k, "null") != "null"), "")),
        ("each step", ", ".join(sizes)),
        ("steps", get("run.steps", "")),
        ("seed", get("run.seed", "")),
        ("tokens", page.number(run.rows[-1].get("num_tokens"))),
        ("devices", _counted(devices) if isinstance(devices, list) else ""),
        ("versions", _pairs(versions) if isinstance(versions, Mapping) else ""),
        ("python", str(env.get("python", ""))),
        ("platform", str(env.get("platform", ""))),
        ("commit", str(env.get("commit") or "")),
        ("command", " ".join(map(str, command)) if isinstance(command, list) else ""),
    ]
    return Table([], [[name, text] for name, text in rows if text and text != page.NONE], left=2)


SIZES = {
    "rollout.prompts": "prompts",
    "rollout.group_size": "responses to each",
    "algo.minibatches": "minibatches",
    "algo.epochs": "epochs over them",
}
TASK = ("task.name", "task.path")


def _counted(devices: Sequence[Any]) -> str:
    """["cpu:0", "cpu:1"] -> "2: cpu:0, cpu:1"; a few of many."""
    named = ", ".join(map(str, devices[:8]))
    return f"{len(devices)}: {named}{', ...' if len(devices) > 8 else ''}"


def _pairs(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items() if value)


def timings(run: Run) -> list[Block]:
    """The phases of a step: the median of each, and its share of all the time."""
    rows = [row for row in run.rows if is_number(row.get("step_time"))]
    total = sum(row["step_time"] for row in rows)
    if total <= 0:
        return []
    cells = []
    for name, label in {"step_time": "a step", **PHASES}.items():
        values = [row[name] for row in rows if is_number(row.get(name))]
        if values:
            middle = statistics.median(values)
            cells.append([label, f"{middle:.4f}", f"{100 * sum(values) / total:.1f} %"])
    compiled = sum(row["compile_time"] for row in rows if is_number(row.get("compile_time")))
    return [
        Heading("Time"),
        Table(["", "seconds, median", "share"], cells),
        Text(f"Compilation is not counted as step time; it took {compiled:.1f} s.", "note"),
    ]


def warned(run: Run) -> list[Block]:
    """warnings.log, its newest lines."""
    if not run.warnings:
        return []
    return [Heading("Warnings"), Code("\n".join(run.warnings))]


def sampled(run: Run) -> list[Block]:
    """The newest samples: prompt, response, gold answer, reward, advantage."""
    if not run.samples:
        return []
    blocks: list[Block] = [Heading("Newest samples")]
    for row in run.samples:
        gold = f", gold answer {page.words(row['answer'])}" if row.get("answer") is not None else ""
        scored = f"reward {page.number(row.get('reward'))}"
        scored += f", advantage {page.number(row.get('advantage'), 3)}"
        blocks.append(Text(f"Step {row['step']}: {scored}{gold[:300]}", "note"))
        blocks.append(
            Code(f"{page.words(row.get('prompt'))}\n→ {page.words(row.get('completion'))}")
        )
    return blocks


def configured(run: Run) -> list[Block]:
    """config.yaml as it stands, folded away."""
    if not run.config_text:
        return []
    return [Heading("Configuration"), Details("config.yaml", [Code(run.config_text)])]


# ------------------------------------------------------------------------------ of several


def _overview(runs: Mapping[str, Run]) -> list[Block]:
    """A row per run: state, size, and its last accuracies with n and interval."""
    last = {label: (evaluations(run.rows) or [{}])[-1] for label, run in runs.items()}
    first = {label: (evaluations(run.rows) or [{}])[0] for label, run in runs.items()}
    names = list(dict.fromkeys(name for row in last.values() for name in accuracies(row)))
    head = ["run", "state", "steps", "tokens", "n"]
    head += [text for name in names for text in (name.removeprefix("eval/"), "change, points")]
    rows = []
    for label, run in runs.items():
        now, then = accuracies(last[label]), accuracies(first[label])
        done = [str(run.status.get("state", page.NONE)), page.number(run.rows[-1]["step"])]
        cells = [label, *done, page.number(run.rows[-1].get("num_tokens"))]
        cells.append(page.number(last[label].get("eval/n")))
        for name in names:
            is_both = name in now and name in then and first[label] is not last[label]
            cells.append(page.percent(now.get(name)))
            cells.append(_change(then[name], now[name]) if is_both else page.NONE)
        rows.append(cells)
    note = (
        "The last held-out accuracy of each run, over n problems, and its change since the first; "
        "in brackets 95 % intervals (of the change: as if of independent samples)."
    )
    return [Heading("Result"), Table(head, rows, left=2), Text(note, "note")]


def _held_out(runs: Mapping[str, Rows]) -> drawing.Panel | None:
    """The accuracy that most evaluations have, one curve per run."""
    found = {label: evaluations(rows) for label, rows in runs.items()}
    every = [name for rows in found.values() for row in rows for name in accuracies(row)]
    if not every:
        return None
    name = max(sorted(set(every)), key=every.count)
    curves = {label: figures.accuracy_curve(rows, name) for label, rows in runs.items()}
    n = figures.counted([row for rows in found.values() for row in rows])
    unit = f"{name.removeprefix('eval/')} ± 95 %, n = {n}"
    return drawing.overlay("Held-out accuracy", unit, curves)


def _differing(runs: Mapping[str, Run]) -> Block:
    """The settings that are not the same in all runs, and the commits."""
    found = {
        label: {**run.config, "commit": str(run.env.get("commit"))[:12]}
        for label, run in runs.items()
    }
    rows = [
        [name, *(config.get(name, page.NONE)[:200] for config in found.values())]
        for name in differing(list(found.values()))
    ]
    if not rows:
        return Items(["No setting differs."])
    return Table(["setting", *found], rows, left=1 + len(found))

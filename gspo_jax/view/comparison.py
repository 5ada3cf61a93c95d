"""The page of a comparison: which loss is better, by how much, and how sure that is.

compare.py runs and counts; from its dictionary and the run directories this writes index.html,
comparison.md and their figures. Reads files alone; no JAX. The dictionary:

    title, command, against, metric, seeds, problems, environment, seconds, notes
    variants   label -> settings, runs: each seed, dir, tokens, updates, before, after, seconds
    summary    label -> mean, low, high, n, gain, gain_low, gain_high: over seeds
    paired     label -> difference, low, high, p, n: label minus `against`, seed by seed
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gspo_jax.errors import DataError
from gspo_jax.numbers.shown import clock, measured
from gspo_jax.view import drawing, figures, page
from gspo_jax.view.drawing import Curve, Panel
from gspo_jax.view.page import Block, Code, Details, Heading, Items, Table, Text
from gspo_jax.view.run_files import (
    MOST_ROWS,
    Interval,
    Rows,
    accuracies,
    is_number,
    read_metrics,
    series,
)

Found = Mapping[str, Any]
Curves = dict[str, list[Rows]]  # label -> the rows of each of its runs

GRID = 200  # points of a curve over seeds
TOKENS = "tokens, prompts included"
TRAINING = ("reward", "clip_frac", "entropy", "grad_norm", "completions/mean_length")


def comparison_page(found: Found, out_dir: Path) -> Path:
    """Write index.html, comparison.md, curves and differences (SVG and PNG) into `out_dir`.

    Args:
        found: what compare.py found (see the module's docstring); numbers may be null.
        out_dir: where the pages go; the runs' `dir` are relative to it.

    Returns:
        index.html.

    Raises:
        StorageError: `out_dir` cannot be written.
    """
    out_dir = Path(out_dir)
    runs, missing = _read(found, out_dir)
    curves = curve_panels(found, runs)
    dots = [difference_panel(found)] if _paired(found) else []
    for stem, panels in {"curves": curves, "differences": dots}.items():
        for ending in ("svg", "png"):
            if panels:
                drawing.write(panels, out_dir / f"{stem}.{ending}")
    blocks = [*verdict(found), *result(found)]
    if dots:
        blocks.append(figures.picture("differences", "Figure", dots, _difference_caption(found)))
    if curves:
        blocks += [Heading("Curves"), figures.picture("curves", "Figure", curves, CURVES)]
    blocks += [*clipped(runs), *setting(found), *every_run(found), *circumstances(found, missing)]
    title = str(found.get("title") or "A comparison of losses")
    page.write(out_dir / "comparison.md", page.markdown(title, blocks))
    return page.write(out_dir / "index.html", page.html(title, blocks))


CURVES = (
    "Lines are means over seeds. Bars of the held-out accuracy are 95 % intervals over seeds; the "
    "bands of the others reach from the lowest seed to the highest, each smoothed over a twentieth "
    "of its run."
)


def _read(found: Found, out_dir: Path) -> tuple[Curves, list[str]]:
    """The metrics of every run, and what is to be said of those that have none."""
    runs: Curves = {label: [] for label in found["variants"]}
    missing = []
    for label, variant in found["variants"].items():
        for run in variant["runs"]:
            try:
                rows = read_metrics(out_dir / run["dir"], most=MOST_ROWS // 10)
                runs[label].append(rows)
            except DataError as error:
                missing.append(f"{label}, seed {run['seed']}: without curves ({error})")
    return runs, missing


# ----------------------------------------------------------------------------- what is said


def verdict(found: Found) -> list[Block]:
    """The answer in words: which losses beat, trail or match `against`, by their intervals."""
    against, paired = str(found["against"]), _paired(found)
    said = {
        "better": f"Better than {against}",
        "open": f"No difference from {against} shown",
        "worse": f"Worse than {against}",
    }
    groups: dict[str, list[str]] = {kind: [] for kind in said}
    for label, difference in paired.items():
        kind = "better" if difference.low > 0 else "worse" if difference.high < 0 else "open"
        groups[kind].append(f"{label} ({page.points(difference)} points)")
    sentences = [
        f"{said[kind]}: {', '.join(members)}." for kind, members in groups.items() if members
    ]
    if not sentences:
        return [Text("No paired difference could be computed: see the notes.", "answer")]
    how = (
        f"Judged by {_metric(found)} accuracy on {found['problems']} held-out problems, the same "
        f"{len(found['seeds'])} seeds for each loss, and the 95 % interval of the difference of "
        "paired seeds (in brackets): above 0 is better, below 0 worse. Where it contains 0, "
        "nothing is shown either way, which is not a proof of being equal."
    )
    if len(paired) > 1:
        how += f" The {len(paired)} intervals are not corrected for being several."
    return [Text(" ".join(sentences), "answer"), Text(how)]


def result(found: Found) -> list[Block]:
    """A row per loss: seeds, accuracy, gain and paired difference with intervals, p, tokens."""
    against = found["against"]
    head = [
        "loss",
        "seeds",
        f"{_metric(found)} accuracy, n = {found['problems']}",
        "gain, points",
        f"minus {against}, points",
        "p",
        "tokens per run",
    ]
    rows = []
    for label, variant in found["variants"].items():
        summary = found["summary"].get(label, {})
        paired = found["paired"].get(label, {})
        tokens = [run["tokens"] for run in variant["runs"] if is_number(run.get("tokens"))]
        p = paired.get("p") if label != against else None
        rows.append(
            [
                label,
                str(len(variant["runs"])),
                _cell(summary, "mean", "low", "high"),
                _cell(summary, "gain", "gain_low", "gain_high", signed=True),
                "(itself)" if label == against else _cell(paired, *PAIRED, signed=True),
                ("<0.001" if p < 0.001 else f"{p:.3f}") if is_number(p) else page.NONE,
                page.number(round(sum(tokens) / len(tokens))) if tokens else page.NONE,
            ]
        )
    note = (
        "Means over seeds, in brackets their 95 % intervals over seeds. Each accuracy is over "
        f"n = {found['problems']} held-out problems; the gain is that over the same model before "
        "training; p is of the test of paired seeds."
    )
    return [Heading("Result"), Table(head, rows), Text(note, "note")]


PAIRED = ("difference", "low", "high")


def clipped(runs: Curves) -> list[Block]:
    """The clipped share of tokens in the 1st, 2nd, ... update of a step, mean over steps."""
    found = {label: clipped_by_update(rows) for label, rows in runs.items()}
    count = max(map(len, found.values()), default=0)
    if count < 2:
        return []
    rows = [
        [label, *(_share(v) for v in values), *[page.NONE] * (count - len(values))]
        for label, values in found.items()
    ]
    note = (
        "Share of tokens whose gradient the clip removes, by the update within a step: mean over "
        "steps, then over seeds, with 95 % intervals over seeds. In the first update the policy is "
        "still the one that sampled, and nothing can be clipped."
    )
    head = ["loss", *(f"update {k + 1}" for k in range(count))]
    return [Heading("Clipped, update by update"), Table(head, rows), Text(note, "note")]


def clipped_by_update(runs: Sequence[Rows]) -> list[Interval]:
    """For each update of a step its clipped share: mean over steps, and over runs with interval."""
    of_runs = []
    for rows in runs:
        lists = [row["clip_frac_by_update"] for row in rows if _numbers(row, "clip_frac_by_update")]
        width = min(map(len, lists), default=0)
        of_runs.append([sum(values[k] for values in lists) / len(lists) for k in range(width)])
    of_runs = [values for values in of_runs if values]
    return [figures.mean(values) for values in zip(*of_runs, strict=False)]


def setting(found: Found) -> list[Block]:
    """What each loss was run with."""
    variants = found["variants"]
    rows = [[label, ", ".join(map(str, v.get("settings", [])))] for label, v in variants.items()]
    return [Heading("Settings"), Table(["loss", "settings over the shared ones"], rows, left=2)]


def every_run(found: Found) -> list[Block]:
    """Each run with its own accuracies, their n and intervals over problems."""
    head = ["loss", "directory", "seed", "n", "before", "after", "tokens", "updates", "time"]
    rows = []
    for label, variant in found["variants"].items():
        for run in variant["runs"]:
            before, after = (run.get(key) or {} for key in ("before", "after"))
            seconds = run.get("seconds")
            rows.append(
                [
                    label,
                    str(run["dir"]),
                    str(run["seed"]),
                    page.number(after.get("eval/n")),
                    page.percent(accuracies(before).get(found["metric"])),
                    page.percent(accuracies(after).get(found["metric"])),
                    page.number(run.get("tokens")),
                    page.number(run.get("updates")),
                    clock(seconds) if is_number(seconds) else page.NONE,
                ]
            )
    note = "Intervals of single runs are over problems, of one model on one set of problems."
    inside = [Table(head, rows, left=2), Text(note, "note")]
    return [Heading("Every run"), Details(f"{len(rows)} runs", inside)]


def circumstances(found: Found, missing: Sequence[str]) -> list[Block]:
    """Command, run time, environment, notes."""
    blocks: list[Block] = []
    if notes := [*map(str, found.get("notes") or []), *missing]:
        blocks += [Heading("Notes"), Items(notes)]
    blocks += [Heading("How to run it again"), Code(str(found.get("command", "")))]
    rows = [[str(name), str(value)] for name, value in (found.get("environment") or {}).items()]
    if is_number(found.get("seconds")):
        rows.append(["run time", clock(found["seconds"])])
    return [*blocks, Table([], rows, left=2)] if rows else blocks


# ------------------------------------------------------------------------------- what is drawn


def curve_panels(found: Found, runs: Curves) -> list[Panel]:
    """Held-out accuracy and what training recorded, against the tokens, prompts included."""
    panels = []
    metric = str(found["metric"])
    accuracy = {label: accuracy_curve(rows, metric) for label, rows in runs.items()}
    if any(curve.x for curve in accuracy.values()):
        unit = f"{_metric(found)} ± 95 %, n = {found['problems']}"
        panels.append(drawing.overlay("Held-out accuracy", unit, accuracy, x=TOKENS))
    return [*panels, *figures.panel_each(TRAINING, runs, band, TOKENS)]


def accuracy_curve(runs: Sequence[Rows], metric: str) -> Curve:
    """The k-th evaluations of all runs together: their mean, with a 95 % interval over runs."""
    found = [series(rows, metric, x="num_tokens") for rows in runs]
    found = [(x, y) for x, y in found if x]
    count = min((len(x) for x, _ in found), default=0)
    where = [sum(x[k] for x, _ in found) / len(found) for k in range(count)]
    means = [figures.mean([y[k] for _, y in found]) for k in range(count)]
    # An accuracy lies between 0 and 1, whatever Student's t says of a few seeds.
    low, high = [max(m.low, 0.0) for m in means], [min(m.high, 1.0) for m in means]
    bounds = (low, high) if len(found) > 1 else ((), ())
    return Curve(where, [m.value for m in means], *bounds, marked=True)


def band(runs: Sequence[Rows], name: str) -> Curve:
    """The mean over runs of a smoothed metric, between the lowest and the highest of them.

    Runs stand at different numbers of tokens: each is read off at the same ones, which all reach.
    """
    found = [series(figures.thinned(rows, 1000), name, x="num_tokens") for rows in runs]
    found = [(x, [v.value for v in figures.smooth(y)]) for x, y in found if x]
    if not found:
        return Curve([], [])
    begin, end = max(x[0] for x, _ in found), min(x[-1] for x, _ in found)
    where = np.linspace(begin, max(begin, end), GRID)
    values = np.array([np.interp(where, x, y) for x, y in found])
    low, high = (values.min(0), values.max(0)) if len(found) > 1 else (np.empty(0), np.empty(0))
    return Curve(where.tolist(), values.mean(0).tolist(), low.tolist(), high.tolist())


def difference_panel(found: Found) -> Panel:
    """Each loss minus `against`: the interval, and a tick per seed."""
    hundred = {label: Interval(*(100 * v for v in d)) for label, d in _paired(found).items()}
    seeds = {label: [100 * v for v in by_seed(found, label)] for label in hundred}
    unit = f"{_metric(found)} accuracy minus {found['against']}, points"
    return drawing.differences(hundred, seeds, unit=unit)


def _difference_caption(found: Found) -> str:
    return (
        f"Bars are 95 % intervals of the mean difference from {found['against']} over "
        f"{len(found['seeds'])} seeds, n = {found['problems']} problems; ticks are single seeds. "
        "Green lies above 0, red below, blue contains it."
    )


def by_seed(found: Found, label: str) -> list[float]:
    """The final accuracy of `label` minus that of `against`, for every seed that both have."""
    ours, theirs = (
        {run["seed"]: (run.get("after") or {}).get(found["metric"]) for run in variant["runs"]}
        for variant in (found["variants"][label], found["variants"][found["against"]])
    )
    both = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    return [a - b for a, b in both if is_number(a) and is_number(b)]


# ----------------------------------------------------------------------------------- numbers


def _metric(found: Found) -> str:
    return str(found["metric"]).removeprefix("eval/")


def _paired(found: Found) -> dict[str, Interval]:
    """The paired differences that have an interval, the largest first; `against` left out."""
    known = {
        label: Interval(*(paired[key] for key in PAIRED))
        for label, paired in found["paired"].items()
        if label != found["against"] and all(is_number(paired.get(key)) for key in PAIRED)
    }
    return dict(sorted(known.items(), key=lambda item: -item[1].value))


def _cell(numbers: Found, *keys: str, signed: bool = False) -> str:
    """A number with its interval, as a share or in points; one seed has no interval over seeds."""
    value = numbers.get(keys[0])
    known = [number for key in keys if is_number(number := numbers.get(key))]
    if not is_number(value):
        return page.NONE
    if len(known) == len(keys):
        return (page.points if signed else page.percent)(Interval(*known))
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f} %"
    return f"{text} [no interval: {numbers.get('n', 1)} seed]"


def _share(interval: Interval) -> str:
    """Small shares need more digits: 0.130 % [0.101, 0.163], but 14.9 % [12.1, 17.7]."""
    value, low, high = interval
    if low == high == 0:
        return "0 %"
    bounds = (max(low, 0), high) if is_number(low) else ()
    return measured(value, *bounds, digits=1 if value >= 0.01 else 3, unit=" %")


def _numbers(row: Mapping[str, Any], name: str) -> bool:
    values = row.get(name)
    return isinstance(values, list) and bool(values) and all(map(is_number, values))

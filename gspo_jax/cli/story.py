"""What the command line says around a run: the demo's introduction, and what came out."""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gspo_jax.config.load import Config, load_config
from gspo_jax.experiment.trials import Experiment, told
from gspo_jax.numbers import summary
from gspo_jax.numbers.shown import measured
from gspo_jax.numbers.statistics import independent_difference
from gspo_jax.view.advice import advise
from gspo_jax.view.run_files import logged

if TYPE_CHECKING:
    from gspo_jax.replay import Replayed
    from gspo_jax.run.lifecycle import Result

ROWS = {  # metric -> what people call it
    "eval/greedy": "greedy accuracy",
    "eval/truncated": "cut at the limit",
    "eval/no_answer": "without an answer",
    "eval/mean_length": "length in tokens",
}


def before_demo(config: Config) -> None:
    """What is about to happen, and the two things that puzzle newcomers."""
    rollout, algo, loss = config.rollout, config.algo, config.algo.loss
    lines = [
        "A tiny Qwen2 has seen worked solutions of problems like 47+25-18, most of them with a "
        "slip: it knows the form, and is often wrong. It now learns from its own answers alone.",
        "",
        f"1 measure   {config.eval.problems} held-out problems, greedy and "
        f"{config.eval.samples} samples each",
        f"2 train     {config.run.steps} steps: {rollout.group_size} answers to each of "
        f"{rollout.prompts} problems, reward 1 if right and 0 if wrong; "
        f"{algo.minibatches * algo.epochs} updates towards answers better than their group's mean",
        "3 measure   the same problems again; then export and draw",
        "",
        "The loss reads about 0 all the while: within a group the advantages add up to 0, so its "
        "value says nothing; its gradient does. Watch the reward.",
    ]
    if loss["name"] == "gspo" and "clip_low" in loss:
        lines.append(
            f"The clip range {loss['clip_low']:g}/{loss.get('clip_high', 4e-4):g} is wider than "
            "the paper's 0.0003/0.0004: a response's ratio is a mean over its tokens, and a mean "
            "over 20 tokens strays further than one over thousands."
        )
    show("\n".join(lines) + "\n")


def after_run(config: Config, result: "Result") -> None:
    """Accuracy before and after, where everything lies, and what to change next time."""
    _outcome(result)
    rows = logged(result.run_dir) if result.state == "finished" else []
    for advice in advise(rows, first=next((row for row in rows if row["step"] > 0), None)):
        show(f"advice    {advice.text}")


def _outcome(result: "Result") -> None:
    if result.before and result.after:
        show(comparison({"before": result.before, "after": result.after}))
    if result.state == "finished":
        show(
            f"run       {result.run_dir}\n"
            f"model     {result.run_dir / 'export'}  (a Hugging Face directory)\n"
            f"picture   {result.run_dir / 'plots' / 'dynamics.png'}",
            wrap=False,
        )
        from gspo_jax.run.model_card import (
            how_to_use,  # brings JAX, which a run has and a plan has not
        )

        if lines := how_to_use(result.run_dir / "export"):
            show(f"\n{lines}", wrap=False)


def after_demo(config: Config, result: "Result") -> None:
    """Accuracy before and after, and where to go from here."""
    _outcome(result)
    if result.state == "finished":
        show(
            "\nNext: its curves and samples in a browser; the new model on other problems; losses "
            "compared; your own.\n"
            f"  {program()} monitor {result.run_dir}\n"
            f"  {program()} eval {result.run_dir / 'export'} eval.split=val\n"
            f"  {program()} compare demo.yaml --losses gspo,grpo --seeds 2 --jobs 2\n"
            f"  {program()} train model.path=Qwen/Qwen3-0.6B task.path=problems.jsonl --dry-run",
            wrap=False,
        )


def program() -> str:
    """The command as it can be typed here: by name where it is on the PATH, else by its path."""
    here = Path(sys.argv[0])
    if shutil.which("gspo-jax") or here.name != "gspo-jax":
        return "gspo-jax"
    return os.path.relpath(here)


def comparison(columns: Mapping[str, Mapping[str, float]]) -> Table:
    """Evaluations side by side, with 95 % intervals, and their change where there are two."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))  # 80 characters are enough
    counts = {int(metrics["eval/n"]) for metrics in columns.values()}
    table.add_column(Text(f"{'/'.join(map(str, sorted(counts)))} held out"))
    for name in columns:
        table.add_column(Text(name), justify="right")
    if len(columns) == 2:
        table.add_column("change", justify="right")
    sampled = {n: f"{n.removeprefix('eval/')} accuracy" for n in _sampled(columns)}
    for metric, label in {"eval/greedy": ROWS["eval/greedy"], **sampled, **ROWS}.items():
        if any(metric not in metrics for metrics in columns.values()):
            continue
        is_share = metric != "eval/mean_length"
        cells = [_cell(metrics, metric, is_share) for metrics in columns.values()]
        if len(cells) == 2:
            before, after = columns.values()
            cells.append(_change(before, after, metric, is_share))
        table.add_row(label, *cells)
    return table


def benchmarks(results: Mapping[str, Any]) -> Table:
    """Models on benchmarks: `summary.rows` for a terminal, n in the title of each benchmark."""
    (_, _, _, *models), *body = summary.rows(results)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    for name in models:
        table.add_column(Text(name), justify="right")
    for title, metric, n, *cells in body:
        if title:
            table.add_row(Text(f"{title}, n {n}", style="bold"))
        table.add_row(*map(Text, [metric, *cells]))
    return table


def replayed(done: "Replayed") -> Table | str:
    """What a replay found: one line where all is equal, else a row per metric that is not."""
    count = f"step {done.step}: {len(done.same)} metrics equal"
    if not done.differs:
        return f"{count} to the last bit, the digest of the sampled tokens among them."
    title = f"{count}, {len(done.differs)} not"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("metric")
    table.add_column("recorded", justify="right")
    table.add_column("computed", justify="right")
    for name, values in done.differs.items():
        table.add_row(Text(name), *(Text(str(value)) for value in values))
    return table


def planned(experiment: Experiment) -> str:
    """The runs of an experiment, before any of them is one."""
    sizes = [load_config(experiment.base, trial.overrides) for trial in experiment.trials]
    responses = sum(c.run.steps * c.rollout.prompts * c.rollout.group_size for c in sizes)
    names = "\n".join(f"  {trial.name}" for trial in experiment.trials)
    count = f"{len(experiment.trials)} runs, {responses:,} responses in all"
    return f"{names}\n{count}; by {experiment.metric}, against {experiment.against}"


def compared(found: Mapping[str, Any]) -> Table:
    """A comparison: the metric of each variant over seeds, and its distance from one of them."""
    name = found["metric"].removeprefix("eval/")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(Text(f"{name}, n {found['problems']}"))
    table.add_column("mean over seeds", justify="right", no_wrap=True)
    table.add_column("seeds", justify="right")
    table.add_column(Text(f"minus {found['against']}"), justify="right")
    table.add_column("p", justify="right")
    for variant, row in found["summary"].items():
        pair = found["paired"].get(variant)
        apart = ["", ""]
        if pair:
            by = (pair[name] for name in ("difference", "low", "high"))
            apart = [measured(*by, sign="+", unit=" points"), f"{pair['p']:.3f}"]
        table.add_row(Text(variant), _share(row), str(row["n"]), *apart)
    return table


def swept(metric: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The choices of a sweep, the best first."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("variant")
    table.add_column("chosen")
    table.add_column(Text(metric.removeprefix("eval/")), justify="right")
    table.add_column("seeds, problems", justify="right")
    for row in rows:
        chosen = "  ".join(told(row["chosen"]))
        value = Text(row["trouble"]) if row["mean"] is None else _share(row)
        n = f"{row['n']}, {row['problems']}"
        table.add_row(Text(row["variant"]), Text(chosen), value, n)
    return table


def _share(row: Mapping[str, Any]) -> str:
    return measured(row["mean"], row["low"], row["high"], unit="%")


def show(what: Any, *, wrap: bool = True) -> None:
    """Print a text or a table; paths and commands are not wrapped, so that they can be copied."""
    Console().print(Text(what) if isinstance(what, str) else what, soft_wrap=not wrap)


def _sampled(columns: Mapping[str, Mapping[str, float]]) -> list[str]:
    kinds = ("eval/avg@", "eval/pass@", "eval/maj@")
    names = [name for metrics in columns.values() for name in metrics if name.startswith(kinds)]
    return [name for name in dict.fromkeys(names) if not name.endswith(("_low", "_high"))]


def _change(
    before: Mapping[str, float], after: Mapping[str, float], name: str, is_share: bool
) -> str:
    """The difference; its interval takes the two as independent, which is on the safe side."""
    by = after[name] - before[name]
    if not is_share:
        return f"{by:+.1f}"
    ends = [m.get(f"{name}{end}") for m in (before, after) for end in ("_low", "_high")]
    if None in ends:
        return measured(by, sign="+")
    old, new = ((m[name], m[f"{name}_low"], m[f"{name}_high"]) for m in (before, after))
    _, low, high = independent_difference(old, new)
    return measured(by, low, high, sign="+")


def _cell(metrics: Mapping[str, float], name: str, is_share: bool) -> str:
    if not is_share:
        return f"{metrics[name]:.1f}"
    ends = (metrics.get(f"{name}{end}") for end in ("_low", "_high"))
    return measured(metrics[name], *ends, unit="%")

"""Several runs as one experiment: which they are, running them, and what came out.

    base: demo.yaml                     # beside this file, or one that the package carries
    settings: {run.steps: 50}           # of every run, over the base
    seeds: [0, 1, 2]
    grid: {optim.learning_rate: [1e-5, 3e-5]}
    variants:                           # name -> settings, and a grid of its own
      gspo: {algo.loss: {name: gspo}}
      grpo: {algo.loss: {name: grpo}, grid: {algo.loss.clip_high: [0.2, 0.28]}}

A run of each variant with each combination of the grids and each seed, in a directory and a process
of its own: one that fails costs nothing but itself, and the same command goes on where it stopped.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from gspo_jax.config.load import load_config, packaged_config, read_yaml
from gspo_jax.config.recorded import changes
from gspo_jax.errors import INTERRUPTED, PREEMPTED, ConfigError
from gspo_jax.files import jsonl
from gspo_jax.files.stopping import listening
from gspo_jax.numbers.shown import measured
from gspo_jax.text.spelling import meant

FIELDS = ("title", "base", "settings", "seeds", "grid", "variants", "metric", "against", "notes")
POLL = 0.2  # seconds between looks at the processes


class Trial(NamedTuple):
    """One run of an experiment.

    Attributes:
        variant: whose settings it has.
        chosen: what the grids chose for it, dotted name -> value.
        seed: its run.seed.
        name: its folder, inside that of the experiment.
        overrides: over the base, as the command line takes them.
    """

    variant: str
    chosen: dict[str, Any]
    seed: int
    name: str
    overrides: list[str]


class Experiment(NamedTuple):
    """What an experiment file says.

    Attributes:
        base: the config that all trials start from; None is the defaults.
        metric: by which trials are compared, the larger the better.
        against: the variant that the others are compared with.
    """

    title: str
    base: Path | None
    trials: list[Trial]
    metric: str
    against: str
    notes: list[str]


class Outcome(NamedTuple):
    """What a trial left in its directory.

    Attributes:
        trouble: why it did not finish, in one line; empty where it did.
        before, after: the evaluations at step 0 and at the last step.
        tokens: sampled in training, of responses alone.
        seconds: from the start of its process to the last line that it wrote.
        environment: its env.json: versions, commit and machine.
    """

    trial: Trial
    trouble: str
    before: dict[str, float]
    after: dict[str, float]
    tokens: int
    updates: int
    seconds: float
    environment: dict[str, Any]


# ------------------------------------------------------------------------------ what to run


def read_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment that a file describes; `overrides` are settings of every trial.

    Raises:
        ConfigError: a field that does not exist, or a trial whose settings are refused.
    """
    given = read_yaml(path)
    if unknown := [name for name in given if name not in FIELDS]:
        like = meant(unknown[0], FIELDS)
        raise ConfigError(f"{path}: {unknown[0]} is no field.{like} The fields are {list(FIELDS)}.")
    base = given.get("base")
    if base is not None:
        beside = path.parent / str(base)
        base = beside if beside.exists() else packaged_config(str(base))
    variants = given.get("variants") or {"run": {}}
    if not isinstance(variants, dict) or any(not isinstance(v, dict) for v in variants.values()):
        raise ConfigError(f"{path}: variants={variants}: wanted {{name: {{setting: value}}}}.")
    trials = expand(
        base,
        variants,
        seeds=given.get("seeds") or [0],
        grid=given.get("grid") or {},
        overrides=[*as_overrides(given.get("settings") or {}), *overrides],
    )
    config = load_config(base, trials[0].overrides)
    against = str(given.get("against") or next(iter(variants)))
    if against not in variants:
        raise ConfigError(f"{path}: against={against}: the variants are {list(variants)}.")
    metric = given.get("metric") or f"eval/avg@{config.eval.samples}"
    return Experiment(
        str(given.get("title") or path.stem),
        base,
        trials,
        metric,
        against,
        [" ".join(str(note).split()) for note in given.get("notes") or []],
    )


def expand(
    base: Path | None,
    variants: Mapping[str, Mapping[str, Any]],
    *,
    seeds: Sequence[int],
    grid: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> list[Trial]:
    """Every trial, seed by seed, its config checked.

    Args:
        variants: name -> settings; "grid" among them is a grid of the variant's own.
        grid: setting -> the values that it is to take.
        overrides: settings of all trials, as on a command line.

    Raises:
        ConfigError: a config that is refused, with the variant it belongs to.
    """
    trials = []
    for seed in seeds:
        for name, settings in variants.items():
            own = {key: value for key, value in settings.items() if key != "grid"}
            for chosen in combinations({**(grid or {}), **settings.get("grid", {})}):
                folder = "-".join([name, *told(chosen), f"seed{seed}"])
                texts = [*overrides, *as_overrides(own), *as_overrides(chosen), f"run.seed={seed}"]
                trial = Trial(name, chosen, seed, folder, [*texts, f"run.name={folder}"])
                try:
                    load_config(base, trial.overrides)
                except ConfigError as error:
                    raise ConfigError(f"{name}: {error}") from None
                trials.append(trial)
    return trials


def combinations(grid: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every choice of one value per setting, the last setting changing fastest.

    Raises:
        ConfigError: something else than a list of values.
    """
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"grid.{name}={values}: wanted a list of values, [a, b, ...].")
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Settings, nested or dotted, as the command line takes them."""
    return [
        f"{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in _flat(settings)
    ]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def told(chosen: Mapping[str, Any]) -> list[str]:
    """Choices by the last part of their names, fit for a folder: "learning_rate=3e-05"."""
    texts = (f"{name.rpartition('.')[2]}={value}" for name, value in _flat(chosen))
    return ["".join(c if c.isalnum() or c in "=._+-" else "_" for c in text) for text in texts]


def is_experiment(path: Path) -> bool:
    """Whether a YAML file is an experiment, and not the config of one run."""
    return not {"variants", "grid", "base", "seeds"}.isdisjoint(read_yaml(path))


def against(experiment: Experiment, name: str) -> Experiment:
    """The same with its variants compared with this one."""
    names = list(dict.fromkeys(trial.variant for trial in experiment.trials))
    if name not in names:
        raise ConfigError(f"--against {name}: the variants are {names}.{meant(name, names)}")
    return experiment._replace(against=name)


def default_directory(experiment: Experiment, kind: str, config: Path | None) -> Path:
    """Where its runs are kept: runs/compare-demo for a comparison by configs/demo.yaml."""
    runs = Path(load_config(experiment.base, experiment.trials[0].overrides).run.dir)
    stem = config.stem if config else "gspo"
    return runs / (stem if stem.startswith(kind) else f"{kind}-{stem}")


# ----------------------------------------------------------------------------------- running


def run_trials(
    experiment: Experiment, directory: Path, *, jobs: int = 1, say: Callable[[str], None] = print
) -> list[Outcome]:
    """Run what has not finished yet, `jobs` at a time; what every trial left.

    Each is `gspo-jax train` in a process of its own, with its output in logs/, and the processor's
    cores are dealt out among those that run at a time. Asked to stop, this passes the signal on,
    and the trials save.

    Raises:
        SystemExit: it was asked to stop; with the exit code of a run that was.
    """
    (directory / "logs").mkdir(parents=True, exist_ok=True)
    waiting = [t for t in experiment.trials if not is_finished(experiment, directory, t)]
    if done := len(experiment.trials) - len(waiting):
        say(f"{done} of {len(experiment.trials)} runs had finished before.")
    cores = _dealt(jobs)
    running: dict[int, tuple[Trial, subprocess.Popen]] = {}
    began, total, ended, passed_on = time.monotonic(), len(waiting), 0, False
    with listening(say) as stop:
        while running or (waiting and not stop.asked):
            for place in range(jobs):
                if place in running and running[place][1].poll() is not None:
                    trial, _ = running.pop(place)
                    ended += 1
                    ahead = (time.monotonic() - began) / ended * (total - ended)
                    say(f"{ended}/{total}  {_told_of(experiment, directory, trial)}{_eta(ahead)}")
                if place not in running and waiting and not stop.asked:
                    trial = waiting.pop(0)
                    running[place] = trial, _start(experiment, directory, trial, cores[place])
            if stop.asked and not passed_on:  # once: after a second signal they would not save
                passed_on = True
                for _, process in running.values():
                    process.terminate()
            time.sleep(POLL)
    if stop.asked:
        say("Stopped; the same command goes on from here.")
        raise SystemExit(PREEMPTED if stop.asked == "preempted" else INTERRUPTED)
    return [outcome(directory, trial) for trial in experiment.trials]


def _start(
    experiment: Experiment, directory: Path, trial: Trial, cores: set[int]
) -> subprocess.Popen:
    """The process of a trial."""
    config = [str(experiment.base)] if experiment.base else []
    command = [sys.executable, "-m", "gspo_jax", "train", *config, *trial.overrides]
    with (directory / "logs" / f"{trial.name}.log").open("wb") as log:
        return subprocess.Popen(
            [*command, f"run.dir={directory}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a key press reaches it through us, and once
            preexec_fn=lambda: _pin(cores),
        )


def _dealt(jobs: int) -> list[set[int]]:
    """The cores of each of `jobs` processes; all of them for each where there are too few."""
    ours = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    each = len(ours) // jobs
    return [set(ours[i * each : (i + 1) * each] or ours) for i in range(jobs)]


def _pin(cores: set[int]) -> None:
    if cores:
        os.sched_setaffinity(0, cores)


def _told_of(experiment: Experiment, directory: Path, trial: Trial) -> str:
    found, metric = outcome(directory, trial), experiment.metric
    names = (metric, f"{metric}_low", f"{metric}_high", "eval/n")
    value, low, high, n = (found.after.get(name) for name in names)
    told = f"{metric} was not measured"
    if value is not None:
        told = f"{metric} {measured(value, low, high, scale=1, digits=3)}, n {n}"
    return f"{trial.name}: {found.trouble or told}"


def _eta(seconds: float) -> str:
    return f", {max(seconds / 60, 1):.0f} min left" if seconds else ""


# -------------------------------------------------------------------------------- what came out


def is_finished(experiment: Experiment, directory: Path, trial: Trial) -> bool:
    """Whether this very run, with all these settings, is there and complete."""
    run = directory / trial.name
    status = jsonl.read_object(run / "status.json")
    try:
        saved = (run / "config.yaml").read_text()
    except OSError:
        return False
    wanted = load_config(experiment.base, [*trial.overrides, f"run.dir={directory}"])
    return status.get("state") == "finished" and not changes(saved, wanted)


def outcome(directory: Path, trial: Trial) -> Outcome:
    """Read what a trial has left so far."""
    run = directory / trial.name
    status, env = jsonl.read_object(run / "status.json"), jsonl.read_object(run / "env.json")
    rows: dict[int, dict[str, Any]] = {}
    with suppress(OSError), (run / "metrics.jsonl").open("rb") as file:
        rows = {row["step"]: row for row in jsonl.records(file)}
    seconds = 0.0
    if "started" in env and "updated" in status:
        first, last = (datetime.fromisoformat(x) for x in (env["started"], status["updated"]))
        seconds = (last - first).total_seconds()
    config = load_config(run / "config.yaml") if (run / "config.yaml").exists() else None
    rollouts = config.rollout.prompts * config.rollout.group_size if config else 0
    lengths = [row.get("completions/mean_length", 0.0) for row in rows.values()]
    finished = status.get("state") == "finished"
    return Outcome(
        trial,
        "" if finished else _last_line(directory / "logs" / f"{trial.name}.log"),
        _evaluation(rows.get(0, {})),
        _evaluation(rows[max(rows)]) if rows and finished else {},
        round(sum(lengths) * rollouts),
        max((row.get("updates", 0) for row in rows.values()), default=0),
        seconds,
        env,
    )


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """0 where every trial has finished, else 1."""
    return int(any(outcome.trouble for outcome in outcomes))


def _evaluation(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith("eval/")}


def _last_line(path: Path) -> str:
    with suppress(OSError):
        lines = path.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else "no output"
    return "not started"

"""Losses under one harness: the same start, problems, rewards, budget and evaluation.

    gspo-jax compare configs/experiments/losses.yaml   variants, each with settings of its own
    gspo-jax compare configs/demo.yaml --losses gspo,grpo,ppo --seeds 5

Trials with one seed see the same problems in the same order, so variants are compared in pairs.
"""

import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gspo_jax.config.load import load_config
from gspo_jax.config.settings import LOSS_OPTIONS
from gspo_jax.errors import ConfigError, DataError
from gspo_jax.experiment.trials import Experiment, Outcome, expand
from gspo_jax.numbers.statistics import over_seeds, sign_flip, t_interval
from gspo_jax.text.spelling import meant

GAE: dict[str, Any] = {"algo.advantage.name": "gae", "algo.critic.kind": "separate"}
ADVANTAGE = {"dr_grpo": {"algo.advantage.name": "group_centred"}, "ppo": GAE}
"""What a loss is meant to be used with, where that is not the config's own advantage."""


def of_losses(
    base: Path | None, losses: Sequence[str], *, seeds: int, overrides: Sequence[str] = ()
) -> Experiment:
    """One variant per loss, each with its own defaults.

    The config's own loss keeps the settings that it has there. ppo gets a critic, and dr_grpo
    advantages that are only centred.

    Raises:
        ConfigError: a loss that does not exist, or a config that one of them cannot have.
    """
    config = load_config(base, overrides)
    own = config.algo.loss
    if unknown := [name for name in losses if name not in LOSS_OPTIONS]:
        raise ConfigError(
            f"--losses {unknown[0]}: no such loss.{meant(unknown[0], LOSS_OPTIONS)} The losses are "
            f"{list(LOSS_OPTIONS)}."
        )
    variants = {}
    for name in losses:
        unset = {} if name == own["name"] else {f"algo.loss.{k}": None for k in own if k != "name"}
        variants[name] = {"algo.loss.name": name, **unset, **ADVANTAGE.get(name, {})}
    trials = expand(base, variants, seeds=range(seeds), overrides=overrides)
    against = "grpo" if "grpo" in losses else losses[0]
    title = f"{', '.join(losses)} on {config.task.name or config.task.path}"
    return Experiment(title, base, trials, f"eval/avg@{config.eval.samples}", against, [])


def found(
    experiment: Experiment, outcomes: Sequence[Outcome], command: Sequence[str] = ()
) -> dict[str, Any]:
    """What a comparison found, ready for JSON: every run, every variant, every pair.

    `summary` has the mean of the metric over seeds with its 95 % t-interval, and the gain over
    step 0; `paired` the mean difference from `against` over the seeds that both finished, with its
    t-interval and the p of the exact sign-flip test (at least 2 / 2^n). The interval is that of
    other seeds on these held-out problems.

    Raises:
        DataError: a variant no run of which has finished.
    """
    metric = experiment.metric
    done: dict[str, dict[int, Outcome]] = {}
    for outcome in outcomes:
        if metric in outcome.after:
            done.setdefault(outcome.trial.variant, {})[outcome.trial.seed] = outcome
    names = list(dict.fromkeys(outcome.trial.variant for outcome in outcomes))
    if missing := [name for name in names if name not in done]:
        why = next(o.trouble for o in outcomes if o.trial.variant == missing[0])
        raise DataError(f"{missing[0]}: no run of it has {metric}: {why or 'it was not measured'}")
    summary, paired = {}, {}
    other = {seed: run.after[metric] for seed, run in done[experiment.against].items()}
    for name in names:
        values = {seed: run.after[metric] for seed, run in done[name].items()}
        gains = [run.after[metric] - run.before.get(metric, np.nan) for run in done[name].values()]
        summary[name] = over_seeds(list(values.values())) | {
            f"gain{part}": value
            for part, value in zip(("", "_low", "_high"), t_interval(gains), strict=True)
        }
        if name != experiment.against:
            both = [values[seed] - other[seed] for seed in values if seed in other]
            mean, low, high = t_interval(both)
            p = sign_flip(both)
            paired[name] = {"difference": mean, "low": low, "high": high, "p": p, "n": len(both)}
    first = next(iter(done[experiment.against].values()))
    return {
        "title": experiment.title,
        "command": shlex.join(command),
        "against": experiment.against,
        "metric": metric,
        "seeds": list(dict.fromkeys(outcome.trial.seed for outcome in outcomes)),
        "problems": int(first.after.get("eval/n", 0)),
        "environment": machine(outcomes),
        "seconds": sum(outcome.seconds for outcome in outcomes),
        "variants": {name: _variant(name, outcomes) for name in names},
        "summary": summary,
        "paired": paired,
        "notes": [
            *experiment.notes,
            *(f"{o.trial.name} did not finish: {o.trouble}" for o in outcomes if o.trouble),
        ],
    }


def _variant(name: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    own = [outcome for outcome in outcomes if outcome.trial.variant == name]
    per_run = ("run.seed", "run.name")
    settings = [text for text in own[0].trial.overrides if text.partition("=")[0] not in per_run]
    return {
        "settings": settings,
        "runs": [
            {
                "seed": outcome.trial.seed,
                "dir": outcome.trial.name,
                "tokens": outcome.tokens,
                "updates": outcome.updates,
                "before": outcome.before,
                "after": outcome.after,
                "seconds": outcome.seconds,
            }
            for outcome in own
        ],
    }


def machine(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Where the runs were made: versions, commits, machine."""
    about = next((o.environment for o in outcomes if o.environment), {})
    commits = dict.fromkeys(str(o.environment["commit"]) for o in outcomes if o.environment)
    versions = {"python": about.get("python"), **about.get("versions", {})}
    variables = (f"{name}={value}" for name, value in about.get("variables", {}).items())
    return {
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": ", ".join(commits),
        "platform": about.get("platform"),
        "processor": f"{about.get('cpus')} x {_processor()}",
        **({"variables": text} if (text := " ".join(variables)) else {}),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

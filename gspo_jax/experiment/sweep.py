"""Which settings are best: every trial of an experiment file, ranked.

gspo-jax sweep configs/experiments/losses_sweep.yaml
"""

import json
from collections.abc import Sequence
from typing import Any

from gspo_jax.experiment.trials import Experiment, Outcome
from gspo_jax.numbers.statistics import over_seeds


def ranked(experiment: Experiment, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The choices of a sweep, the best first; those that did not finish last.

    Of several seeds the mean counts, with a 95 % interval over seeds; of one its own value, with
    the interval over held-out problems that the run recorded.
    """
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        key = outcome.trial.variant, json.dumps(outcome.trial.chosen)
        groups.setdefault(key, []).append(outcome)
    rows = [_row(experiment.metric, group) for group in groups.values()]
    return sorted(rows, key=lambda row: (row["mean"] is None, -(row["mean"] or 0)))


def _row(metric: str, group: Sequence[Outcome]) -> dict[str, Any]:
    first = group[0].trial
    row: dict[str, Any] = {"variant": first.variant, "chosen": first.chosen}
    done = [outcome.after for outcome in group if metric in outcome.after]
    trouble = [outcome.trouble for outcome in group if outcome.trouble]
    if len(done) > 1:
        row |= over_seeds([after[metric] for after in done])
    elif done:
        row |= {"mean": done[0][metric], "n": 1}
        row |= {part: done[0].get(f"{metric}_{part}") for part in ("low", "high")}
    else:
        row |= {"mean": None, "low": None, "high": None, "n": 0}
    problems = int(done[0].get("eval/n", 0)) if done else 0
    tokens = sum(outcome.tokens for outcome in group)
    return row | {"problems": problems, "tokens": tokens, "trouble": "; ".join(trouble)}


def best(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Variant -> the choices of its best row, as an experiment file takes them."""
    return {row["variant"]: row["chosen"] for row in reversed(rows) if row["mean"] is not None}

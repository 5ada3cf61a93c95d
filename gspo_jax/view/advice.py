"""What the course of a run warns of, each with a remedy: the steps in, sentences out. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gspo_jax.numbers.shown import clock
from gspo_jax.text import console

RECENT = 20  # steps in which a passing warning is still told
NEVER = 50  # updates without one clipped token
DEAD = 0.9  # of the groups, with equal rewards
COLLAPSED = 0.1  # of the entropy at the start
CERTAIN = 0.02  # nats per token
QUIET = 600.0  # seconds without a step, at least


class Advice(NamedTuple):
    kind: str
    text: str


def advise(
    rows: Sequence[Mapping[str, Any]],
    *,
    first: Mapping[str, Any] | None = None,
    state: str = "running",
    age: float | None = None,
) -> list[Advice]:
    """What to look at, the most urgent first.

    Args:
        rows: the newest steps in order: numbers, `clip_frac_by_update`, `rewards/*/errors`.
        first: an early step, for what is compared with the start.
        state: as status.json has it.
        age: seconds since the run last wrote it.
    """
    trained = [row for row in rows if row["step"] > 0]
    found = [
        _quiet(trained, state, age),
        _errors(trained),
        *_of_steps(trained),
        _dead_groups(trained),
        _collapse(trained, first),
        _never_clipped(trained),
    ]
    return [advice for advice in found if advice is not None]


def quiet_limit(rows: Sequence[Mapping[str, Any]]) -> float:
    """Seconds after which a run that wrote nothing is worth a look: five of its longest steps."""
    longest = max((r.get("step_time", 0) + r.get("compile_time", 0) for r in rows), default=0)
    return max(QUIET, 5 * longest)


def _quiet(rows: Sequence[Mapping[str, Any]], state: str, age: float | None) -> Advice | None:
    if state != "running" or age is None or age <= quiet_limit(rows):
        return None
    return Advice(
        "quiet",
        f"no step for {clock(age)}, though status.json says running: the process may be gone, or "
        "hang. Look for it on its machine; the same command goes on from the last checkpoint.",
    )


def _errors(rows: Sequence[Mapping[str, Any]]) -> Advice | None:
    counts: dict[str, float] = {}
    for row in rows[-RECENT:]:
        for name, value in row.items():
            if name.startswith("rewards/") and name.endswith("/errors") and value > 0:
                counts[name.split("/")[1]] = counts.get(name.split("/")[1], 0) + value
    if not counts:
        return None
    told = ", ".join(f"{name} on {count:,.0f} responses" for name, count in counts.items())
    return Advice(
        "errors",
        f"in the last {len(rows[-RECENT:])} steps a reward function failed: {told}. warnings.log "
        "has the first failure; task.reward_errors says what comes of them: zero gives them 0, "
        "unscored leaves them out, and task.reward_errors=stop ends a run at one.",
    )


def _of_steps(rows: Sequence[Mapping[str, Any]]) -> list[Advice]:
    """The advice that single steps give, of the newest that gives it, and how often of late."""
    texts: dict[str, str] = {}
    counts: dict[str, int] = {}
    recent = rows[-RECENT:]
    before = [None, *rows][-len(recent) - 1 : -1]
    for row, previous in zip(recent, before, strict=True):
        for kind, text in console.advice(_fresh(row, previous)).items():
            texts[kind] = text
            counts[kind] = counts.get(kind, 0) + 1
    of = f"of the last {len(recent)} steps" if len(recent) > 1 else "step so far"
    return [Advice(kind, f"{text} ({counts[kind]} {of})") for kind, text in texts.items()]


def _fresh(row: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """The row with its running totals as what this step added."""
    totals = ("skipped_updates", "skipped_spikes")
    added = {n: row[n] - (before or {}).get(n, 0) for n in totals if n in row}
    return {**row, **added}


def _dead_groups(rows: Sequence[Mapping[str, Any]]) -> Advice | None:
    name = "frac_reward_zero_std"
    shares = [r[name] for r in rows[-RECENT:] if name in r and "critic/vf_loss" not in r]
    if len(shares) < 5 or not DEAD < statistics.fmean(shares) < 1:  # 1 is told of single steps
        return None
    return Advice(
        "few",
        f"in {statistics.fmean(shares):.0%} of the groups of the last {len(shares)} steps all "
        "rewards are equal, and only the others teach anything: take easier prompts (harder ones "
        "where the reward is high), a larger rollout.group_size, or rollout.resample.",
    )


def _collapse(rows: Sequence[Mapping[str, Any]], first: Mapping[str, Any] | None) -> Advice | None:
    values = [row["entropy"] for row in rows[-5:] if "entropy" in row]
    if not values:
        return None
    now = statistics.median(values)
    start = (first or {}).get("entropy", 0)
    if now >= CERTAIN and now >= COLLAPSED * start:
        return None
    was = f" from {start:.3g}" if start > now else ""
    return Advice(
        "entropy",
        f"the entropy has fallen{was} to {now:.2g} nats per token: responses hardly differ, and "
        "little is left to learn from. Lower optim.learning_rate, raise algo.loss.clip_high or "
        "rollout.temperature, or set algo.entropy_coef; if the accuracy is good, stop here.",
    )


def _never_clipped(rows: Sequence[Mapping[str, Any]]) -> Advice | None:
    """The first update of a step is on-policy and clips nothing: it does not count."""
    later: list[float | None] = []
    for row in reversed(rows):
        later += row.get("clip_frac_by_update", [])[1:]
        if len(later) >= NEVER:
            break
    if len(later) < NEVER or any(value != 0 for value in later):
        return None
    return Advice(
        "unclipped",
        f"no token was clipped in the last {len(later)} updates that could: clipping does nothing. "
        "Narrow algo.loss.clip_low and clip_high, raise optim.learning_rate, or spare the "
        "minibatches (algo.minibatches=1).",
    )

"""What a monitor shows of runs, as plain JSON: numbers, and text that is already inert."""

import math
import socket
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from gspo_jax.view import page
from gspo_jax.view.advice import advise, quiet_limit
from gspo_jax.view.follow import CURVES, Follower
from gspo_jax.view.run_files import (
    PHASES,
    Rows,
    accuracies,
    differing,
    is_number,
    labels_of,
    updates,
)

POINTS = 4000  # of a curve, of all runs together
MOST_TEXT = 4000  # characters of a prompt or a response
MOST_WARNINGS = 20
MOST_SETTINGS = 8
NAMES = ("eval/greedy",)  # the accuracies to show first


def snapshot(followers: Sequence[Follower], now: float) -> dict[str, Any]:
    """All runs as one object that JSON can hold: see `of_run`.

    Args:
        now: seconds since 1970, to tell a run that is quiet from one that goes on.
    """
    points = max(POINTS // max(len(followers), 1), 250)
    own = own_settings(followers)
    return {
        "host": page.shown(socket.gethostname()),
        "runs": [
            of_run(follower, name, now, points) | {"settings": settings}
            for follower, name, settings in zip(followers, names(followers), own, strict=True)
        ],
    }


def of_run(follower: Follower, name: str, now: float, points: int) -> dict[str, Any]:
    """One run: where it stands, its newest numbers and texts, advice, curves."""
    status, recent = follower.rest.status, list(follower.recent)
    written = changed(status)
    state = state_of(follower)
    age = None if written is None else max(now - written, 0)
    is_quiet = state == "running" and age is not None and age > quiet_limit(recent)
    last = recent[-1] if recent else {}
    step, of = last.get("step", _count(status.get("step"))), _count(status.get("of"))
    return {
        "name": name,
        "path": page.shown(str(follower.path)),
        "state": "quiet" if is_quiet else state,
        "step": step,
        "of": of,
        "behind": round(follower.behind, 3),
        "updated": written,
        "eta": eta(recent, step, of) if state == "running" and not is_quiet else None,
        "elapsed": _rounded(last.get("seconds")),
        "newest": {n: _rounded(v) for n, v in last.items() if n in CURVES},
        "accuracies": _accuracies(follower.last_eval),
        "phases": phases(last),
        "by_update": {
            "clipped": last.get("clip_frac_by_update", []),
            "ratio": [last.get(f"ratio_q{q}_by_update", []) for q in ("05", "50", "95")],
        },
        "advice": [
            {"kind": a.kind, "text": page.shown(a.text)}
            for a in advise(recent, first=follower.begun, state=state, age=age)
        ],
        "warnings": [page.shown(line, most=1000) for line in follower.rest.warnings][
            -MOST_WARNINGS:
        ],
        "samples": [sample(row) for row in reversed(follower.rest.samples)],
        **curves(_thinned(follower.rows, points)),
    }


def names(followers: Sequence[Follower]) -> list[str]:
    """The directories' names, each once; where two are called alike, their paths."""
    found: list[str] = []
    for label in labels_of([follower.rest for follower in followers]):
        name = page.shown(label, most=200)
        found.append(name if name not in found else f"{name} ({len(found) + 1})")
    return found


def state_of(follower: Follower) -> str:
    """That of status.json; without one unknown, or waiting for a first step; gone if all is."""
    if not follower.is_there:
        return "gone"
    state = follower.rest.status.get("state")
    if isinstance(state, str):
        return page.shown(state, most=20)
    return "unknown" if follower.recent else "waiting"


def changed(status: Mapping[str, Any]) -> float | None:
    """When the run last wrote its status, in seconds since 1970."""
    try:
        return datetime.fromisoformat(status["updated"]).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return None


def eta(recent: Rows, step: int | None, of: int | None) -> int | float | None:
    """Seconds to the last step, each like the median of the newest 20."""
    times = [row["step_time"] for row in recent[-20:] if "step_time" in row]
    if not times or step is None or of is None or step >= of:
        return None
    return _rounded(statistics.median_low(times) * (of - step))


def phases(row: Mapping[str, Any]) -> list[list[Any]]:
    """Label and seconds of each phase of a step, in its order."""
    found = ((label, row.get(name)) for name, label in PHASES.items())
    return [[label, _rounded(value)] for label, value in found if value is not None and value >= 0]


def sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """A response with its scores; texts cut, and without what a page would obey."""
    said = {name: row.get(name) for name in ("prompt", "completion", "answer")}
    texts = {
        n: None if value is None else page.words(value, MOST_TEXT) for n, value in said.items()
    }
    scores = {name: _rounded(row.get(name)) for name in ("reward", "advantage")}
    return {"step": row["step"], **texts, **scores}


def curves(rows: Rows) -> dict[str, Any]:
    """`x`, three ways to say where a row is, and `y`: a list per metric, null where it has none.

    Accuracies are under their own name, with `_low`, `_high` and eval/n.
    """
    present = {name for row in rows for name in row}
    shown = [name for name in CURVES if name in present]
    shown += sorted({found for row in rows for name in accuracies(row) for found in _bounds(name)})
    shown += ["eval/n"] if "eval/n" in present else []
    return {
        "x": {
            "updates": [0 if row["step"] == 0 else _rounded(updates(row)) for row in rows],
            "tokens": [0 if row["step"] == 0 else _rounded(row.get("num_tokens")) for row in rows],
            "time": [_rounded(row["seconds"]) for row in rows],
            "step": [row["step"] for row in rows],
        },
        "y": {name: [_rounded(row.get(name)) for row in rows] for name in shown},
    }


def own_settings(followers: Sequence[Follower]) -> list[dict[str, str]]:
    """Of each run the settings in which they are not all alike, those of the algorithm first."""
    configs = [follower.rest.config for follower in followers if follower.rest.config]
    different = [
        name
        for name in sorted(differing(configs), key=_importance)
        # What some do not know at all is of another version, but for the loss's own parameters.
        if name.startswith("algo.") or all(name in config for config in configs)
    ]
    return [
        {
            page.shown(name): page.shown(follower.rest.config[name], most=100)
            for name in different[:MOST_SETTINGS]
            if name in follower.rest.config
        }
        for follower in followers
    ]


SECTIONS = ("algo", "optim", "run", "rollout", "model", "task")


def _importance(name: str) -> int:
    section = name.partition(".")[0]
    return SECTIONS.index(section) if section in SECTIONS else len(SECTIONS)


def _accuracies(row: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    found = accuracies(row or {})
    order = sorted(found, key=lambda name: (name not in NAMES, name))
    n = (row or {}).get("eval/n")
    return [
        {"name": page.shown(name.removeprefix("eval/"), most=40), **found[name]._asdict(), "n": n}
        | {"step": (row or {})["step"]}
        for name in order
    ]


def _bounds(name: str) -> list[str]:
    return [name, f"{name}_low", f"{name}_high"]


def _thinned(rows: Rows, most: int) -> Rows:
    """At most about `most` of them, evenly; the last and all evaluations stay."""
    stride = math.ceil(len(rows) / most)
    kept = [row for k, row in enumerate(rows[:-1]) if k % stride == 0 or "eval/n" in row]
    return kept + rows[-1:]


def _rounded(value: Any) -> int | float | None:
    """To 6 digits: enough for a picture, and a third of the bytes."""
    if not is_number(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**53 else None

"""What a run directory says of its run. Reads files alone; no JAX.

Whatever is torn, foreign or missing is left out: a reader shows what is there. Every number may
be null, and every text may come from a model.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard, TypeVar

import yaml

from gspo_jax.errors import DataError
from gspo_jax.files import jsonl

Rows = list[dict[str, Any]]
Number = int | float
Numbers = list[Number]
T = TypeVar("T")

MOST_ROWS = 20_000  # held in memory
MOST_TEXT = 2**20  # bytes of a small file that are read
TAIL = 2**22  # bytes, from the end of a file of samples
MOST_WARNINGS = 100
MOST_SETTINGS = 2000
PHASES = {
    "time/generate": "sampling",
    "time/reward": "scoring",
    "time/advantage": "advantages",
    "time/old_logp": "old log-probs",
    "time/update": "updates: gradients",
    "time/optimizer": "updates: optimizer",
    "time/host": "everything else",
}
LARGEST = 1e100  # of a number that is drawn; beyond, axes overflow


class Interval(NamedTuple):
    """A number with its 95 % interval."""

    value: Number
    low: Number
    high: Number


@dataclass(frozen=True)
class Run:
    """A run directory as it stands; what could not be read is empty."""

    path: Path
    rows: Rows
    status: dict[str, Any]
    env: dict[str, Any]
    config_text: str
    config: dict[str, str]
    warnings: list[str]
    samples: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.path.resolve().name


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Their names; where two are called alike, their paths."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else str(run.path) for run in runs]


def differing(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """The settings that are not the same in all runs, but for their names and places."""
    names = dict.fromkeys(name for config in configs for name in config)
    names = [name for name in names if name not in ("run.name", "run.dir")]
    return [name for name in names if len({config.get(name) for config in configs}) > 1]


def read_run(path: Path, *, most: int = MOST_ROWS, samples: int = 6) -> Run:
    """All that is shown of a run directory (or of the one that a metrics.jsonl lies in).

    Args:
        most: rows of metrics to hold, as `read_metrics`.
        samples: how many of the newest to keep.

    Raises:
        DataError: there is no metrics.jsonl, or nothing in it.
    """
    path = Path(path)
    rows = read_metrics(path, most=most)
    return replace(read_rest(path.parent if path.suffix == ".jsonl" else path, samples), rows=rows)


def read_rest(home: Path, samples: int = 6) -> Run:
    """The run of a directory but for its metrics: `rows` is empty."""
    text = _text(home / "config.yaml")
    newest = _opened(home / "samples.jsonl", lambda file: _newest(file, samples))
    return Run(
        path=home,
        rows=[],
        status=_object(home / "status.json"),
        env=_object(home / "env.json"),
        config_text=text,
        config=settings(text),
        warnings=_opened(home / "warnings.log", _last_lines) or [],
        samples=newest or [],
    )


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


def logged(run: Path) -> Rows:
    """What `read_metrics` gives; nothing before the first step."""
    try:
        return read_metrics(run)
    except DataError:
        return []


# ----------------------------------------------------------------------------------- numbers


def is_number(value: Any) -> TypeGuard[Number]:
    # False for NaN as well.
    return type(value) in (int, float) and -LARGEST < value < LARGEST


def updates(row: Mapping[str, Any]) -> Number:
    """Where a row stands on the axis: the updates so far; its step where they are not recorded."""
    value = row.get("updates")
    return value if value and is_number(value) else row["step"]


def series(rows: Sequence[Mapping[str, Any]], name: str, x: str = "") -> tuple[Numbers, Numbers]:
    """Where and what a metric is, in the rows that have it: against `updates`, or metric `x`.

    The step before training has done none of anything: there `x` is 0.
    """
    points = []
    for row in rows:
        where = updates(row) if not x else row.get(x, 0 if row["step"] == 0 else None)
        if is_number(where) and is_number(row.get(name)):
            points.append((where, row[name]))
    return [x for x, _ in points], [y for _, y in points]


def accuracies(row: Mapping[str, Any]) -> dict[str, Interval]:
    """The accuracies of an evaluation, by name ("eval/greedy"): those with n and an interval."""
    found = {}
    if is_number(row.get("eval/n")):
        for name in row:
            three = [row.get(f"{name}{end}") for end in ("", "_low", "_high")]
            numbers = [value for value in three if is_number(value)]
            if name.startswith("eval/") and len(numbers) == 3:
                found[name] = Interval(*numbers)
    return found


# ------------------------------------------------------------------------------------ config


class _Plain(yaml.SafeLoader):
    """YAML without aliases: they let a small file stand for a huge or an endless tree."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def settings(text: str) -> dict[str, str]:
    """The settings of a config.yaml by dotted name, as texts; none if it cannot be read."""
    try:
        tree = yaml.load(text, _Plain)  # a SafeLoader: plain data alone
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    found: dict[str, str] = {}
    left: list[tuple[str, Any]] = [("", tree)]
    while left and len(found) < MOST_SETTINGS:
        name, value = left.pop()
        if isinstance(value, dict) and (value or not name):
            prefix = f"{name}." if name else ""
            left += [(f"{prefix}{key}", item) for key, item in reversed(value.items())]
        elif name:
            found[name] = "null" if value is None else str(value)
    return found


# ------------------------------------------------------------------------------------- files


def _opened(path: Path, read: Callable[[BinaryIO], T]) -> T | None:
    """What `read` finds in a file; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return read(file)
    except OSError:
        return None


def _text(path: Path) -> str:
    return (_opened(path, lambda file: file.read(MOST_TEXT)) or b"").decode("utf-8", "replace")


def _object(path: Path) -> dict[str, Any]:
    return jsonl.object_of(_text(path)) or {}


def _to_tail(file: BinaryIO, size: int) -> None:
    """Move to the first whole line of the last `size` bytes."""
    end = file.seek(0, 2)
    file.seek(max(end - size, 0))
    if end > size:
        file.readline(size)


def _newest(file: BinaryIO, count: int) -> list[dict[str, Any]]:
    _to_tail(file, TAIL)
    return list(deque(jsonl.records(file), maxlen=count))


def _last_lines(file: BinaryIO) -> list[str]:
    _to_tail(file, MOST_TEXT)
    lines = file.read(MOST_TEXT).decode("utf-8", "replace").splitlines()
    return [line for line in lines if line.strip()][-MOST_WARNINGS:]


@dataclass
class Sieve:
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
    every, evaluated = Sieve(most), Sieve(most)
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

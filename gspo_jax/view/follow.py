"""Runs followed while they are written: the newest of every file, in bounded memory.

    watch = Watch([Path("runs")])
    for follower in watch.look(): follower.rows, follower.recent, follower.rest

metrics.jsonl is read from where reading stopped, if what was read last is still there; so one rule
covers lines that are appended, replaced, cut off by a resume, rotated or deleted.
"""

import hashlib
import os
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gspo_jax.errors import DataError
from gspo_jax.files import jsonl
from gspo_jax.view.run_files import Rows, Run, Sieve, is_number, read_rest

CURVES = (
    "reward",
    "loss",
    "clip_frac",
    "clip_frac_low",
    "clip_frac_high",
    "ratio_q05",
    "ratio_q50",
    "ratio_q95",
    "entropy",
    "completions/mean_length",
    "completions/clipped_ratio",
    "frac_reward_zero_std",
    "kl",
    "grad_norm",
    "tokens_per_second",
)
OTHERS = ("updates", "num_tokens", "step_time", "compile_time", "critic/vf_loss")
OTHERS += ("skipped_updates", "skipped_spikes")
KEPT = frozenset(CURVES + OTHERS)
BY_UPDATE = ("clip_frac_by_update", "ratio_q05_by_update", "ratio_q50_by_update")
BY_UPDATE += ("ratio_q95_by_update",)
MOST_EVALS = 24  # numbers of an evaluation
MOST_UPDATES = 64  # of one step that are looked at singly
MOST_RECENT = 200  # steps held whole
MOST_LINE = 2**20  # bytes; a step has some thousand
NEWEST_RUNS = 8  # of a directory of runs
NEWEST_SAMPLES = 16
SIGNS = ("metrics.jsonl", "status.json", "config.yaml")  # of a run directory
REST = ("status.json", "env.json", "config.yaml", "samples.jsonl", "warnings.log")


class Mark(NamedTuple):
    """A line that was read, to be recognised."""

    start: int
    size: int
    digest: bytes
    step: int
    seconds: float


class Follower:
    """One run directory, as far as it has been read.

    Args:
        path: the run directory; it may be empty, and may vanish.
        most: steps held for its curves; of a longer run every 2nd, 4th, ...
    """

    def __init__(self, path: Path, *, most: int = 1000):
        self.path, self._most = path, most
        self.rest: Run = read_rest(path, NEWEST_SAMPLES)
        self.is_there, self.behind = path.is_dir(), 0.0
        self._signature = _signature(path)
        self._forget()

    def advance(self, until: float) -> None:
        """Take in what is new; of a long file as much as can be read until `until`, a
        `time.monotonic()`. `behind` says which share of it is still to be read."""
        self.is_there = self.path.is_dir()
        if (signature := _signature(self.path)) != self._signature:
            self._signature, self.rest = signature, read_rest(self.path, NEWEST_SAMPLES)
        try:
            with (self.path / "metrics.jsonl").open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self._find_place(file, size)
                self._read(file, until)
                self.behind = max(size - self._offset, 0) / max(size, 1)
        except OSError:
            self._forget()

    @property
    def rows(self) -> Rows:
        """The steps for curves, in order, numbers alone: the first, the last, and the thinned."""
        found = self._every.rows | self._evaluated.rows
        ends = [self.first, *list(self.recent)[-1:]]
        found |= {row["step"]: row for row in ends if row is not None}
        return [found[step] for step in sorted(found)]

    def _forget(self) -> None:
        self._offset, self._skipping, self._seconds = 0, False, 0.0
        self._marks: deque[Mark] = deque(maxlen=8)
        self._every, self._evaluated = Sieve(self._most), Sieve(self._most)
        self.first: dict[str, Any] | None = None
        self.begun: dict[str, Any] | None = None  # the first step of training
        self.recent: deque[dict[str, Any]] = deque(maxlen=MOST_RECENT)
        self.last_eval: dict[str, Any] | None = None
        self.behind = 0.0

    def _find_place(self, file: BinaryIO, size: int) -> None:
        """Go back to the newest line that is still where it was."""
        lost = False
        while self._marks:
            mark = self._marks[-1]
            file.seek(mark.start)
            if _digest(file.read(mark.size)) == mark.digest:
                break
            self._marks.pop()
            self._drop(mark.step)
            lost = True
        if not self._marks and (lost or size < self._offset):
            self._forget()
        elif lost or size < self._offset:
            mark = self._marks[-1]
            self._offset, self._seconds, self._skipping = (
                mark.start + mark.size,
                mark.seconds,
                False,
            )

    def _drop(self, step: int) -> None:
        for sieve in (self._every, self._evaluated):
            sieve.rows.pop(step, None)
        kept = [row for row in self.recent if row["step"] != step]
        self.recent = deque(kept, maxlen=MOST_RECENT)
        if self.last_eval and self.last_eval["step"] == step:
            found = self._evaluated.rows
            self.last_eval = found[max(found)] if found else None

    def _read(self, file: BinaryIO, until: float) -> None:
        file.seek(self._offset)
        count = 0
        while line := file.readline(MOST_LINE):
            is_whole = line.endswith(b"\n")
            if not is_whole and len(line) < MOST_LINE and not self._skipping:
                return  # still being written
            start, self._offset = self._offset, self._offset + len(line)
            was_skipping, self._skipping = self._skipping, not is_whole
            if is_whole and not was_skipping:
                record = jsonl.record(line)
                if record is not None and 0 <= record["step"] < 2**53:
                    self._take(record)
                    step = record["step"]
                    self._marks.append(Mark(start, len(line), _digest(line), step, self._seconds))
            count += 1
            if count % 256 == 0 and time.monotonic() > until:
                return

    def _take(self, record: dict[str, Any]) -> None:
        row = numbers(record)
        self._seconds += sum(max(row.get(name, 0), 0) for name in ("step_time", "compile_time"))
        row["seconds"] = self._seconds
        self._every.add(row)
        if "eval/n" in row:
            self._evaluated.add(row)
            self.last_eval = row
        if self.first is None or row["step"] <= self.first["step"]:
            self.first = row
        if row["step"] > 0 and (self.begun is None or row["step"] <= self.begun["step"]):
            self.begun = row
        if self.recent and row["step"] <= self.recent[-1]["step"]:  # written again
            kept = [old for old in self.recent if old["step"] < row["step"]]
            self.recent = deque(kept, maxlen=MOST_RECENT)
        self.recent.append(row | singles(record))


class Watch:
    """Several runs, those of directories of runs among them as they come and go.

    Args:
        paths: run directories, their metrics.jsonl, or directories of runs.

    Raises:
        DataError: one of them does not exist.
    """

    def __init__(self, paths: Sequence[Path], *, most: int = 1000):
        for path in paths:
            if not path.exists():
                raise DataError(f"{path}: no such run; give run directories, or runs/ for all.")
        self._paths, self._most = list(paths), most
        self._followers: dict[Path, Follower] = {}

    def look(self, seconds: float = 0.3) -> list[Follower]:
        """All runs, each read on; together for about so long."""
        found = find_runs(self._paths)
        followers = self._followers
        self._followers = {p: followers.get(p) or Follower(p, most=self._most) for p in found}
        until = time.monotonic() + seconds
        for follower in self._followers.values():
            follower.advance(until)
        return list(self._followers.values())


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run directories that are meant; of a directory of runs its newest."""
    found: list[Path] = []
    for path in paths:
        home = path.parent if path.suffix == ".jsonl" else path
        if _is_run(home) or not home.is_dir():  # a run that has gone is shown as gone
            found.append(home)
            continue
        with suppress(OSError):
            children = [child for child in home.iterdir() if _is_run(child)]
            found += sorted(sorted(children, key=_changed, reverse=True)[:NEWEST_RUNS])
    return list({path.resolve(): path for path in found}.values())


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Of a record what curves and advice need, where it is a number."""
    row = {name: record[name] for name in KEPT if is_number(record.get(name))}
    evals = [name for name in record if name.startswith("eval/") and is_number(record[name])]
    return row | {name: record[name] for name in evals[:MOST_EVALS]} | {"step": record["step"]}


def singles(record: dict[str, Any]) -> dict[str, Any]:
    """What is shown of the newest steps alone: update by update, phase by phase, errors."""
    found: dict[str, Any] = {}
    for name in BY_UPDATE:
        values = record.get(name)
        if isinstance(values, list):
            found[name] = [v if is_number(v) else None for v in values[:MOST_UPDATES]]
    for name, value in list(record.items())[:500]:
        is_error = name.startswith("rewards/") and name.endswith("/errors")
        if (is_error or name.startswith("time/")) and is_number(value):
            found[name] = value
    return found


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in SIGNS)


def _changed(path: Path) -> int:
    return max((_stat(path / name)[0] for name in SIGNS), default=0)


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, -1
    return found.st_mtime_ns, found.st_size


def _signature(path: Path) -> list[tuple[int, int]]:
    return [_stat(path / name) for name in REST]


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()

"""Checkpoints: all that a run carries, under `checkpoints/<step>`, whole or not at all.

    checkpoints/12/      after step 12
    checkpoints/12+3/    after step 12 and 3 updates of the next one, with the pending files

    file            holds                                                   made by
    state/          each leaf of a `TrainState`, by name and in its dtype:  update/state.py, and
                      params, opt_state (moments), step, updates, skipped   arrays.py beside this
                      critic, spikes, kl_coef where the run has them
    meta.json       step, num_tokens so far, kind (train or sft)            lifecycle.py (`save`)
                      measured: the step's evaluation, if there was one
                      config, data: settings, fingerprint of the problems   resume.py (`identity`)
    pending.npz     batch: the rows that the step learns from               update/steps.py
                      old: log-probs of each minibatch before the step        (`Progress`)
                      ref_logp, targets: of the reference, for the critic
                      completions, lengths: as sampled                      resume.py (`pack`)
    pending.json    stats of the updates that are done; metrics and         resume.py (`pack`)
                      samples of the rollout
    manifest.json   size and SHA-256 of every file                          files/integrity.py

A checkpoint is written as `.12.writing`, read, flushed to the disk and renamed; deleting renames
it to `.12.removed` first. So what has a number for a name was complete when it got it, and the
manifest tells whether it still is. Randomness and data order are functions of (seed, step).
"""

import json
import re
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from gspo_jax.errors import StorageError
from gspo_jax.files import integrity
from gspo_jax.mesh.distributed import barrier, is_writer
from gspo_jax.run import arrays

NAME = re.compile(r"(\d+)(?:\+(\d+))?")
PATIENCE = 50  # tenths of a second that what is left is removed again, while it still grows
LEFTOVER = re.compile(r"\.\d+(\+\d+)?\.(writing|removed)|.*\.orbax-checkpoint-tmp|\.rehearsal")


class Kept(NamedTuple):
    """Which checkpoints rotation spares, besides the newest: see `run.keep` and `run.keep_every`.

    The one whose `meta["measured"]` is highest is spared too, the earliest of equals.
    """

    newest: int = 2
    every: int = 0


class Pending(NamedTuple):
    """What a checkpoint in the middle of a step holds besides the state."""

    updates: int  # of the step that are done
    arrays: dict[str, np.ndarray]
    record: dict[str, Any]


def save(
    directory: Path,
    step: int,
    state: PyTree,
    meta: dict[str, Any],
    *,
    keep: int = 2,
    keep_every: int = 0,
    pending: Pending | None = None,
) -> Path:
    """Write the state of `step`, wait until it is safe, then drop what `Kept` does not spare.

    A checkpoint of the same name is replaced.

    Raises:
        StorageError: the disk is full or the directory cannot be written; older ones are intact.
    """
    with Saver(directory, Kept(keep, keep_every)) as saver:
        return saver.save(step, state, meta, pending=pending)


class Saver:
    """Saves in the background, one at a time; use it as a context manager.

    `save` returns once the state is copied to the host, so that the next update may donate it.
    What goes wrong later is raised by the next `save`, `wait` or the end of the context.

    Args:
        directory: checkpoints/ of the run.
        kept: what rotation spares.

    Attributes:
        whole: checkpoints that need not be written again, as the one that a run resumed from.
        stale: checkpoints that are to go once the next one is whole: those after the one that a
            run resumed from, damaged or not.
    """

    def __init__(self, directory: Path, kept: Kept):
        self.directory, self.kept = Path(directory).absolute(), kept
        self.whole: set[str] = set()
        self.stale: set[str] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def save(
        self, step: int, state: PyTree, meta: dict[str, Any], *, pending: Pending | None = None
    ) -> Path:
        """Copy the state, and begin to write it. At most one save is under way: wait for it."""
        self.wait()
        name = str(step) if pending is None else f"{step}+{pending.updates}"
        path = self.directory / name
        if name in self.whole:
            return path
        leaves = arrays.on_host(arrays.named(state))
        self.whole.add(name)
        stale, self.stale = self.stale, set()
        if jax.process_count() > 1:  # Orbax's own barriers must not meet those of a step
            self._finish(path, leaves, meta, pending, stale)
        else:
            self._running = self._thread.submit(self._finish, path, leaves, meta, pending, stale)
        return path

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            StorageError: the last save did not succeed.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _finish(self, path: Path, leaves, meta, pending, stale: set[str]) -> None:
        try:
            _write(path, leaves, meta, pending)
            if is_writer():
                rotate(self.directory, self.kept, newest=path.name, stale=stale)
        except (OSError, ValueError, StorageError) as error:  # Orbax has a full disk as ValueError
            self.whole.discard(path.name)
            self.stale |= stale
            if is_writer():
                clean(self.directory)
            reason = str(error).strip().splitlines()[0][:200]
            raise StorageError(
                f"{path}: the checkpoint could not be written ({reason}); free some space, or set "
                "run.dir to another disk. Older checkpoints are intact."
            ) from error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            self.wait()
        except StorageError:
            if kind is None:  # an error that is under way already says more
                raise
        finally:
            self._thread.shutdown()


def rehearse(directory: Path) -> list[str]:
    """Save, read, compare and remove a few numbers where checkpoints are to go, as those are.

    So that what would fail at the end of a run fails before its first step.

    Returns:
        What does not keep a run from going on but should be known, one line each.

    Raises:
        StorageError: nothing can be saved there, or what was saved is not what is read.
    """
    trial, wanted = Path(directory).absolute() / ".rehearsal", np.arange(6, dtype=np.float32)
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = {"state": jax.ShapeDtypeStruct(wanted.shape, wanted.dtype, sharding=sharding)}
    try:
        save(trial, 1, {"state": wanted}, {})
        found = restore(trial, 1, like)[0]["state"]
        if not np.array_equal(found, wanted):
            raise StorageError(
                f"{directory}: what is read there is not what was saved; set run.dir elsewhere."
            )
        if integrity.sync(trial):
            return []
    finally:
        barrier("rehearsed")  # all have read it
        if is_writer():
            shutil.rmtree(trial, ignore_errors=True)
    return [
        f"{directory}: its file system does not flush directories; after a power cut the newest "
        "checkpoint may be missing, and the one before it is taken."
    ]


def names(directory: Path) -> list[str]:
    """Names of the complete checkpoints, oldest first: "12" comes before "12+3"."""
    if not directory.is_dir():
        return []
    found = [p.name for p in directory.iterdir() if NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=place)


def steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints at the end of a step, oldest first."""
    return [int(name) for name in names(directory) if name.isdigit()]


def place(name: str) -> tuple[int, int]:
    """(step, updates of the next one; -1 at the end of a step): sorts names by time."""
    match = NAME.fullmatch(name)
    assert match is not None
    return int(match[1]), -1 if match[2] is None else int(match[2])


def best(directory: Path, *, until: int | None = None) -> tuple[int, float] | None:
    """(step, value) where `meta["measured"]` is highest up to a step, the earliest of equals."""
    found: tuple[int, float] | None = None
    for step in (s for s in steps(directory) if until is None or s <= until):
        try:
            value = read_meta(directory / str(step)).get("measured")
        except StorageError:
            continue
        if value is not None and (found is None or value > found[1]):
            found = step, float(value)
    return found


def restore(
    directory: Path, step: int | str, like: PyTree, *, verified: bool = False
) -> tuple[PyTree, dict[str, Any]]:
    """The state of `step` in the structure, dtypes and shardings of `like`, and its meta record.

    Args:
        step: or the name of a checkpoint in the middle of one.
        like: arrays, or `jax.ShapeDtypeStruct`s with shardings, as the run would start with.
        verified: whether `integrity.verify` has just found the checkpoint whole.

    Raises:
        StorageError: no such checkpoint, it is damaged, or of another model or optimizer.
    """
    path = directory.absolute() / str(step)
    if not path.is_dir():
        raise StorageError(
            f"{path}: no such checkpoint; found {', '.join(names(directory)) or 'none'}."
        )
    if not verified:
        integrity.verify(path)
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in arrays.named(like).items()
    }
    try:
        found = arrays.read(path, abstract)
    except (ValueError, KeyError, FileNotFoundError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise StorageError(
            f"{path}: does not fit this model and optimizer ({reason}); resume with the run's own "
            "config.yaml, or set run.resume=never and another run.name."
        ) from error
    leaves = [found[name] for name in abstract]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), read_meta(path)


def read_meta(path: Path) -> dict[str, Any]:
    """The meta record of a checkpoint.

    Raises:
        StorageError: it is missing or not JSON, which `integrity.verify` would have found.
    """
    try:
        return json.loads((path / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: meta.json cannot be read ({error}).") from None


def read_pending(path: Path) -> Pending | None:
    """What a checkpoint in the middle of a step holds besides the state; None at its end."""
    updates = place(path.name)[1]
    if updates < 0:
        return None
    with np.load(path / "pending.npz", allow_pickle=False) as found:
        arrays = {name: found[name] for name in found.files}
    return Pending(updates, arrays, json.loads((path / "pending.json").read_text()))


def rotate(
    directory: Path, kept: Kept, *, newest: str | None = None, stale: Iterable[str] = ()
) -> None:
    """Remove what `kept` does not spare, and what is stale. `newest` is the one just written."""
    for name in set(stale) - {newest}:
        remove(directory / name)
    found = names(directory)
    whole = [name for name in found if name.isdigit()]
    spared = {newest or found[-1], *whole[-kept.newest :]} if found else set()
    if kept.every:
        spared |= {name for name in whole if int(name) % kept.every == 0}
    if (highest := best(directory)) is not None:
        spared.add(str(highest[0]))
    for name in found:
        if name not in spared:
            remove(directory / name)


def remove(path: Path) -> None:
    """Rename first: a deletion that dies half-way must not leave a number behind."""
    if path.is_dir():
        trash = _set_aside(path)
        integrity.sync(path.parent)
        shutil.rmtree(trash)


def clean(directory: Path) -> list[Path]:
    """Remove what saves and deletions that were killed have left; what it was."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if LEFTOVER.match(path.name)]
    for path in found:
        # Of a save that failed Orbax may still be writing, from threads of its own.
        for _ in range(PATIENCE):
            shutil.rmtree(path, ignore_errors=True)
            if not path.is_dir():
                break
            time.sleep(0.1)
    return found


def _set_aside(path: Path) -> Path:
    trash = path.with_name(f".{path.name}.removed")
    shutil.rmtree(trash, ignore_errors=True)
    return path.rename(trash)


def _write(path: Path, leaves: dict[str, Any], meta, pending: Pending | None) -> None:
    """One checkpoint: written aside, sealed, renamed. Every process of a run takes part."""
    part = path.with_name(f".{path.name}.writing")
    if is_writer():
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{part.name}*"):
            shutil.rmtree(left)
    barrier(f"checkpoint {path.name} begins")
    arrays.write(part, leaves)
    barrier(f"checkpoint {path.name} is written")
    if is_writer():
        arrays.check(part, leaves)
        (part / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        if pending is not None:
            np.savez(part / "pending.npz", **pending.arrays)  # pyright: ignore[reportArgumentType]
            (part / "pending.json").write_text(json.dumps(pending.record), encoding="utf-8")
        integrity.seal(part)
        former = _set_aside(path) if path.exists() else None
        part.rename(path)
        integrity.sync(path.parent)
        integrity.sync(path.parent.parent)  # which may be new as well
        if former is not None:
            shutil.rmtree(former)
    barrier(f"checkpoint {path.name} is in its place")

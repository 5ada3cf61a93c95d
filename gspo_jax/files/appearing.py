"""A directory of which nobody ever sees a part: it appears whole, or not at all."""

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gspo_jax.errors import DataError, StorageError
from gspo_jax.files.integrity import sync


@contextmanager
def appearing(out_dir: str | os.PathLike, *, replace: bool = False) -> Iterator[Path]:
    """A directory to fill, which becomes `out_dir` when the block ends well, and else vanishes.

    Files and directories are flushed to the disk before the rename and after it, so that also
    after a power cut `out_dir` is complete or absent. With `replace`, what was there before is
    set aside until the new one has its place: killed at any moment, one of them is whole.

    Whoever was killed while writing leaves `.{name}.partial-*`, or `.{name}.old-*`, beside
    `out_dir`. The next to write there removes those whose writer no longer holds its lock.

    Raises:
        DataError: `out_dir` exists and is not an empty directory; with `replace`, is a file.
        StorageError: it cannot be written.
    """
    target = Path(os.path.realpath(Path(out_dir).expanduser()))
    try:
        if target.exists() and not target.is_dir():
            raise DataError(f"{out_dir} is a file; choose a new directory, or remove it.")
        if not replace and target.is_dir() and any(target.iterdir()):
            raise DataError(f"{out_dir} exists already; choose a new directory, or remove it.")
        _remove_abandoned(target, "partial")
        partial = _beside(target, "partial")
        partial.mkdir(parents=True)
        try:
            with _locked(partial, must=False):
                yield partial
                for path in [*partial.iterdir(), partial]:
                    sync(path)
                _take_place(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync(target.parent)
        _remove_abandoned(target, "old")
    except OSError as error:
        raise StorageError(f"{out_dir} cannot be written: {error.strerror or error}.") from error


def _take_place(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; a directory in the way is set aside, not removed."""
    if not target.exists() or not any(target.iterdir()):
        partial.rename(target)
        return
    old = _beside(target, "old")
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise


def _beside(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{kind}-{uuid.uuid4().hex[:8]}"


def _remove_abandoned(target: Path, kind: str) -> None:
    """Remove the `kind` directories of `target` that nobody holds a lock on."""
    name = re.compile(rf"\.{re.escape(target.name)}\.{kind}-[0-9a-f]{{8}}")
    siblings = target.parent.iterdir() if target.parent.is_dir() else ()
    for path in [p for p in siblings if name.fullmatch(p.name) and not p.is_symlink()]:
        try:
            with _locked(path, must=True):
                shutil.rmtree(path, ignore_errors=True)
        except OSError:  # its writer is alive, or there are no locks here: leave it
            continue


@contextmanager
def _locked(directory: Path, *, must: bool) -> Iterator[None]:
    """Hold the lock on a directory, which the system gives back however this process ends.

    Raises:
        OSError: another process holds it; or, where it `must` be held, there are no locks here.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if must:
                raise
        yield
    finally:
        os.close(descriptor)

"""Files that are replaced at once, and the lock on a run's directory."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from gspo_jax.errors import StorageError


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A place beside `path` for what takes its name at the end, of the same ending.

    Readers, and a crash, see the old file or the new one.
    """
    part = path.with_name(f".part.{path.name}")
    try:
        yield part
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextmanager
def delivered(path: Path) -> Iterator[Path]:
    """`replaced`, in a directory that is made.

    Raises:
        StorageError: the disk is full, or the directory not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as part:
            yield part
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror}).") from error


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once, and safely on the disk."""
    write_parts(path, [text])


def write_parts(path: Path, parts: Iterable[str]) -> None:
    """The same of a text in parts, which need not fit into memory together."""
    with replaced(path) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def lock(directory: Path) -> TextIO:
    """Make the directory and claim it for this process, until `unlock` or the process's end.

    The kernel holds the claim (flock), so a killed run leaves none behind.

    Raises:
        StorageError: another run holds it, or the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        check_parents(directory)  # knows more than "File exists"
        raise unwritable(directory, error) from None
    _claim(directory, file, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def check_place(directory: Path) -> None:
    """Raise the StorageError that `lock` would, but make and change nothing."""
    check_parents(directory)
    try:
        held = directory / "lock"
        if held.is_file():
            with held.open(encoding="utf-8") as file:
                _claim(directory, file, fcntl.LOCK_SH)
    except StorageError:
        raise
    except OSError as error:
        raise unwritable(directory, error) from None


def check_parents(directory: Path) -> None:
    """Raise StorageError unless what is there of the path is a directory that can be written."""
    places = [directory, *directory.absolute().parents]
    there = next(path for path in places if os.path.lexists(path))
    try:
        if not os.path.isdir(there):
            os.stat(there)  # a stale mount and a link that leads nowhere have their own errors
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"no permission in {there}")
    except FileNotFoundError:
        gone = OSError(errno.ENOENT, f"{there} is a link to nothing")
        raise unwritable(directory, gone) from None
    except OSError as error:
        raise unwritable(directory, error) from None


def _claim(directory: Path, file: TextIO, kind: int) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise StorageError(
            f"{directory} is in use by another run ({holder}); wait for it to end, or choose "
            "another run.name."
        ) from None
    except OSError:
        pass  # a file system without locks: nothing to hold on to


def unwritable(directory: Path, error: OSError) -> StorageError:
    """What to say of a directory that cannot be written."""
    return StorageError(
        f"{directory}: cannot be written ({error.strerror}); set run.dir elsewhere."
    )


def unlock(file: TextIO) -> None:
    """Give a claim back; the file stays, because removing it would race with the next claim."""
    with suppress(OSError):  # a full disk, a stale mount: the claim ends with the process
        if not file.closed:
            file.truncate(0)
            file.close()

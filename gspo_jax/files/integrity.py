"""Directories that are whole or not there: a manifest of sizes and checksums, and what to sync.

    seal      every file hashed and flushed to the disk, the list of them written, all directories
              flushed; a rename may follow
    verify    the files are those of the list, bit for bit

The manifest is the text that `json` makes of its content and carries its own checksum, so that a
flipped bit in it is found like any other. Reads and writes files alone; no JAX.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gspo_jax.errors import StorageError

MANIFEST = "manifest.json"
FORMAT = 1
REFUSED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
THREADS = 4  # hashing runs outside of Python's lock


def seal(directory: Path) -> None:
    """Write the manifest of what is in `directory`, and flush all of it to the disk."""
    names = sorted(_files(directory) - {MANIFEST})
    found = {name: _entry(directory / name) for name in names}
    (directory / MANIFEST).write_text(_render(found), encoding="utf-8")
    for name in [*names, MANIFEST]:
        sync(directory / name)
    inner = [path for path in directory.rglob("*") if path.is_dir()]
    for path in sorted(inner, reverse=True):  # a directory after what is in it
        sync(path)
    sync(directory)


def verify(directory: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        StorageError: the first file that is missing, of another size, or of other content.
    """
    listed = read_manifest(directory)
    there = _files(directory)
    for name, entry in listed.items():
        if name not in there:
            raise _damaged(directory, f"{name} is missing")
        size = (directory / name).stat().st_size
        if size != entry["bytes"]:
            raise _damaged(directory, f"{name} has {size} bytes and had {entry['bytes']}")
    with ThreadPoolExecutor(THREADS) as pool:
        paths = [directory / name for name in listed]
        for (name, entry), found in zip(listed.items(), pool.map(sha256, paths), strict=True):
            if found != entry["sha256"]:
                raise _damaged(directory, f"{name} is not what was written (checksum)")


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """File name -> {"bytes", "sha256"}.

    Raises:
        StorageError: there is none, it is damaged, or a later version wrote it.
    """
    path = directory / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        files = content["files"]
        version = content["format"]
    except FileNotFoundError:
        raise _damaged(directory, f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise _damaged(directory, f"{MANIFEST} cannot be read") from None
    if isinstance(version, int) and version > FORMAT:
        raise StorageError(
            f"{directory}: written in format {version} by a later version of gspo_jax, and this "
            f"one reads format {FORMAT}; update gspo_jax."
        )
    if text != _render(files):
        raise _damaged(directory, f"{MANIFEST} is not what was written (checksum)")
    return files


def sync(path: Path) -> bool:
    """Flush a file, or the names in a directory, to the disk; whether that was done.

    Some network and user-space file systems refuse it for directories alone.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in REFUSED or not path.is_dir():
            raise
        return False
    finally:
        os.close(descriptor)
    return True


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror}).") from None


def tidy_names(paths: Iterable[Path]) -> str:
    """Names of paths for a message, at most a few of them."""
    names = sorted(path.name for path in paths)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _render(files: Any) -> str:
    content = {"format": FORMAT, "files": files}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"sha256": digest}, indent=1, sort_keys=True) + "\n"


def _files(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _damaged(directory: Path, what: str) -> StorageError:
    return StorageError(f"{directory}: {what}; it cannot be trusted.")

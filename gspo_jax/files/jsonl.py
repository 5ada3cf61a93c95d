"""Files of one JSON object, or of one per line, which a crash or a full disk may have torn.

Reading skips what is no object and holds one line at a time; writing leaves whole lines alone.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from gspo_jax.files.whole import write_parts, write_whole

MAX_LINE = 2**26  # bytes; what is longer is no record of ours (a stretch of zeros, say)


def records(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The objects with a whole number "step", in the order of their lines."""
    return (found for line in _lines(file) if (found := record(line)) is not None)


def objects(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """All that is an object, in the order of the lines."""
    return (found for line in _lines(file) if (found := object_of(line)) is not None)


def record(line: bytes) -> dict[str, Any] | None:
    """The object of a line, if it is one with a whole number "step"."""
    found = object_of(line)
    return found if found is not None and type(found.get("step")) is int else None


def object_of(text: bytes | str) -> dict[str, Any] | None:
    """The object that a text is, if it is one."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file; {} where it cannot be read or is none."""
    try:
        return object_of(path.read_bytes()) or {}
    except OSError:
        return {}


def write_plain(path: Path, content: Any) -> None:
    """Replace a file at once by the JSON of what is `plain` of this."""
    write_whole(path, json.dumps(plain(content), indent=1) + "\n")


def append(file: BinaryIO, row: dict[str, Any]) -> None:
    """Append to an unbuffered file the whole line or, where that fails, nothing of it.

    Raises:
        OSError: the disk is full, or the file no longer there to be written.
    """
    end = os.fstat(file.fileno()).st_size
    left = memoryview(json.dumps(row, allow_nan=False).encode() + b"\n")
    try:
        while left:
            left = left[file.write(left) :]
    except OSError:
        with suppress(OSError):  # not a file that can be cut
            os.ftruncate(file.fileno(), end)
        raise


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of at most MAX_LINE bytes; of longer ones nothing."""
    while line := file.readline(MAX_LINE):
        if len(line) < MAX_LINE or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE)


def keep_until(path: Path, step: int | None) -> None:
    """Drop the lines after `step`, torn ones too; None starts anew and keeps the old file aside."""
    if not path.exists() or path.stat().st_size == 0:
        return
    if step is None:
        os.replace(path, path.with_name(f"{path.name}.old"))
        return
    with path.open("rb") as file:
        kept = (record for record in records(file) if record["step"] <= step)
        write_parts(path, (json.dumps(record) + "\n" for record in kept))


def plain(value: Any) -> Any:
    """`value` as JSON has it: arrays as numbers and lists, NaN and infinity as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)

"""Standard output and standard error of a process whose work matters more than being watched.

A terminal that is closed, a full disk behind `> log`, a reader that has left: each takes the stream
away, and none of them the work. What is lost is told once, to whoever listens.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

Say = Callable[[str], None]


class Unfailing:
    """A text stream that is left out from the first write that fails on, instead of raising.

    What the stream's encoding lacks is written as "?". All else is the stream's own.

    Args:
        stream: to write to; None (as `>&-` leaves it) takes everything and shows nothing.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self._lost: Say | None = None
        self._trouble = ""

    def write(self, text: str) -> int:
        """Write, or not; the number of characters either way."""
        self._careful(lambda stream: stream.write(_encodable(text, stream)))
        return len(text)

    def flush(self) -> None:
        """Flush, or not."""
        self._careful(lambda stream: stream.flush())

    def tell_losses(self, lost: Say | None) -> None:
        """From now on `lost` hears when the stream is lost; at once if it is already."""
        self._lost = lost
        if lost is not None and self._trouble:
            lost(self._trouble)

    def __getattr__(self, name: str) -> Any:
        if self._stream is None and name == "isatty":
            return lambda: False
        return getattr(self._stream, name)

    def _careful(self, act: Callable[[Any], Any]) -> None:
        if self._stream is None or self._trouble:
            return
        try:
            act(self._stream)
        except (OSError, ValueError) as error:  # ValueError: the file is closed
            reason = getattr(error, "strerror", None) or str(error)
            name = getattr(self._stream, "name", "").strip("<>") or "the output"
            self._trouble = f"{name} is left out from here on ({reason}); the run goes on."
            _to_nowhere(self._stream)
            if self._lost is not None:
                self._lost(self._trouble)


def open_closed() -> None:
    """Open descriptors 0, 1 and 2 on /dev/null where they are closed.

    Else the next file that is opened gets the number, and what a library writes to number 2 ends
    up in a checkpoint.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one


@contextmanager
def guarded(name: Literal["stdout", "stderr"]) -> Iterator[None]:
    """While this lasts, `sys.stdout` or `sys.stderr` is unfailing, its last flush included."""
    stream = getattr(sys, name)
    setattr(sys, name, Unfailing(stream))
    try:
        yield
    finally:
        getattr(sys, name).flush()
        setattr(sys, name, stream)


def _encodable(text: str, stream: Any) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding, getattr(stream, "errors", None) or "strict")
    except UnicodeEncodeError:
        return text.encode(encoding, "replace").decode(encoding)
    return text


def _to_nowhere(stream: Any) -> None:
    """What is still buffered must not raise again when the interpreter ends."""
    with suppress(OSError, ValueError):
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)

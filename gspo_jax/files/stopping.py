"""Asking a run to stop: signals, and a budget of wall-clock time.

    SIGTERM, SIGUSR1   exit code 75, "preempted": the queue starts the same command again later
    SIGHUP             the same: the terminal was closed; not heard where nohup has it ignored
    SIGINT             exit code 130, "interrupted"

The first of them asks. While a step generates or scores nothing has changed yet, so that step is
given up at the next safe point (`raise_if_asked`). Between two updates the run stops, too: then the
rollout is saved with the state. Slurm's --signal=USR1@120 is a warning that the end is near: the
same as SIGTERM.

A terminal that closes sends SIGHUP by way of its shell and once more by way of the kernel, and
systemd sends it after SIGTERM: it never counts as the second.

A second one ends the process at once, whatever it is doing. Python's own handlers run between two
bytecodes of the main thread, which may be many minutes into one call of the compiler; so the byte
that the interpreter writes when a signal arrives is read by a thread of its own. Only C code that
keeps the interpreter's lock would hide it; what might, reward functions, runs in other processes.
Checkpoints are renamed into place when they are whole: the former one is intact.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

Why = Literal["preempted", "interrupted"]

SIGNALS: dict[int, Why] = {
    signal.SIGTERM: "preempted",
    signal.SIGUSR1: "preempted",
    signal.SIGHUP: "preempted",
    signal.SIGINT: "interrupted",
}
ECHO = 0.1  # seconds; `timeout` and job managers send one signal to the process and to its group
BEGAN = time.monotonic()  # of the process, as near as an import comes


class Abandoned(Exception):
    """A stop was asked for in a phase that has not changed anything: the step is given up."""


class Stop:
    """Whether, and why, a run was asked to stop.

    Args:
        abandon: whether a step may be given up in its middle. Several processes must not: they
            would no longer agree on what comes next.
    """

    def __init__(self, *, abandon: bool = True):
        self.asked: Why | None = None
        self.abandon = abandon

    def ask(self, why: Why) -> None:
        """Stop at the next occasion; the first reason counts."""
        self.asked = self.asked or why


_listening: list[Stop] = []  # signals are the process's: one run at a time hears them


def raise_if_asked() -> None:
    """A safe point of a phase that changes nothing.

    Raises:
        Abandoned: the run in progress was asked to stop.
    """
    if _listening and _listening[-1].asked and _listening[-1].abandon:
        raise Abandoned


@contextmanager
def listening(say: Callable[[str], None], *, abandon: bool = True) -> Iterator[Stop]:
    """Hear the SIGNALS; outside the main thread, where Python hears none, do not.

    Args:
        say: tells the user that the first signal was heard.
    """
    stop = Stop(abandon=abandon)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    earlier_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    heard = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    earlier = {n: signal.signal(n, lambda n, _: stop.ask(SIGNALS[n])) for n in heard}
    watcher = threading.Thread(target=_watch, args=(reading, earlier_fd, stop, say), daemon=True)
    watcher.start()
    _listening.append(stop)
    try:
        yield stop
    finally:
        _listening.remove(stop)
        for number, handler in earlier.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(earlier_fd)
        os.close(writing)  # the watcher reads the end
        watcher.join()
        os.close(reading)


def _watch(reading: int, earlier_fd: int, stop: Stop, say: Callable[[str], None]) -> None:
    """Read the number of every signal that arrives, and leave at the second."""
    first, when = 0, 0.0
    while data := os.read(reading, 1):
        if earlier_fd >= 0:  # whoever listened before us may wait for other signals
            with suppress(OSError):
                os.write(earlier_fd, data)
        number = data[0]
        if number not in SIGNALS:
            continue
        if not first:
            first, when = number, time.monotonic()
            stop.ask(SIGNALS[number])
            text = (
                f"{signal.Signals(number).name}: saving and stopping; a second one stops at once."
            )
            # In a thread of its own: a terminal that is held up must not hold up the watcher.
            threading.Thread(target=say, args=(text,), daemon=True).start()
        elif number != signal.SIGHUP and (number != first or time.monotonic() - when > ECHO):
            _leave(number)


def _leave(number: int) -> None:
    # A progress line hides the cursor: give it back, but do not wait for a terminal to take it.
    if os.isatty(1):
        shown = threading.Thread(target=os.write, args=(1, b"\x1b[?25h\n"), daemon=True)
        shown.start()
        shown.join(0.2)
    os._exit(128 + number)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the end of a few lines that belong together.

    KeyboardInterrupt may be raised between any two bytecodes of the main thread, as between what
    ends one state and what keeps the next. Where a run listens to signals there is none to wait.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    waiting: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if waiting:
        raise KeyboardInterrupt


def out_of_time(minutes: float, need: float) -> bool:
    """Whether `need` more seconds would pass a budget of so many minutes; 0 is none."""
    return minutes > 0 and time.monotonic() - BEGAN + need > 60 * minutes

"""Reward functions in processes of their own, which can be killed.

A function of the user's may hang, hold the interpreter's lock in C, fill the memory or crash. In
a child it costs the responses that it was scoring, never the run:

    parent   pickled requests over a pipe; waits for one answer at a time, each within a limit
    child    `child`: imports the functions of one module, and never JAX of its own accord
    at a loss: the child is killed with all that it started, what it was scoring has failed, and
             another child takes the rest, in order

A child that hears nothing more from its parent ends by itself, whatever its parent died of; it
outlives the thread that asked for it. Threads that ask one child wait for each other.
"""

import json
import os
import pickle
import queue
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from typing import Any, NamedTuple

from gspo_jax.batch import Problem
from gspo_jax.errors import ConfigError, DataError
from gspo_jax.files.stopping import raise_if_asked
from gspo_jax.reward.rewards import Answer, Failure, unused
from gspo_jax.reward.signatures import Batch

SLICE = 0.1  # seconds between two looks at the clock and at a wish to stop
GRACE = 1.0  # seconds for an answer to come through, beyond the limit of the call
START_SECONDS = 600.0  # for importing the module, which may load a model
MAX_LOST = 3  # children that a function of the user's may lose in one rollout
CHECK_SECONDS = 5.0  # for one answer, as math-verify has it; most take some 10 ms
CHECK_MEMORY = 4 * 10**9  # bytes of address space of a checker's child
CHECK_MAX_LOST = 20  # answers of one rollout that may run into a limit; the others then score 0 too
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from gspo_jax.reward.child import main; main(*map(int, sys.argv[2:]))"
)
HEADER = struct.Struct("!Q")  # length of a pickled message


class Lost(Exception):
    """A child that hung or died; the text says which, as what a function did."""


class Loaded(NamedTuple):
    """A function as its child found it: its name, and whether it scores response by response."""

    name: str
    one_by_one: bool


class Child:
    """A process that answers one request after the other; started anew when it is needed.

    Args:
        specs: functions of one module, "module:function" or "file.py:function".
        memory: bytes of address space at most; 0 is no limit.
    """

    def __init__(self, specs: Sequence[str], *, memory: int = 0):
        self.specs, self.memory = list(specs), memory
        self._running: _Running | None = None
        self._asked = threading.Lock()

    def load(self) -> list[Loaded]:
        """Start, and import; returns what the specs name.

        Raises:
            ConfigError, DataError: what `rewards.load_rewards` says of them.
            Lost: the process did not survive it.
        """
        self._running = _Running()
        found = []
        for reply in self._replies(("load", self.specs, self.memory), START_SECONDS):
            kind, *rest = reply
            if kind == "refused":
                raise {"ConfigError": ConfigError}.get(rest[0], DataError)(rest[1])
            found = [Loaded(*each) for each in rest[0]]
        return found

    def ask(self, request: Any, seconds: float) -> Generator[Any, None, None]:
        """The replies to a request, each within so many seconds of the one before.

        Raises:
            Lost: no reply in time, or no process any more; it is gone in either case.
            DataError: the request cannot be sent.
            Abandoned: the run is to stop.
        """
        with self._asked:  # one pipe: answers come in the order of the requests
            if self._running is None:
                try:
                    self.load()
                except (ConfigError, DataError) as error:  # it could be imported once
                    raise Lost(f"could not be started again: {error}") from None
            yield from self._replies(request, seconds, " (task.reward_timeout)")

    def _replies(self, request: Any, seconds: float, setting: str = "") -> Iterator[Any]:
        running, whole = self._running, False
        assert running is not None
        try:
            running.send(request)
            while (reply := running.receive(seconds, setting)) is not None:
                yield reply
            whole = True
        finally:
            if not whole:
                self.kill()

    def kill(self) -> None:
        """End the process and what it has started."""
        if self._running is not None:
            self._running.end()
            self._running = None


class _Running:
    """The process and the two pipes; nothing here waits longer than it is told."""

    def __init__(self):
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        for fd in (self._in, self._out):
            os.set_blocking(fd, False)
        command = [sys.executable, "-P", "-c", BOOT, json.dumps(sys.path)]
        self.process = in_lasting_thread(
            lambda: subprocess.Popen(
                [*command, str(theirs_in), str(theirs_out), str(os.getpid())],
                pass_fds=(theirs_in, theirs_out),
                stdin=subprocess.DEVNULL,
                # Not in the terminal's group: Ctrl-C is for the run to hear. Killed as a group.
                start_new_session=True,
                # The parent holds the accelerators; JAX in a child would take them or fail to.
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
            )
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._unsent, self._unread = b"", bytearray()
        self.end = weakref.finalize(self, _end, self.process, (self._in, self._out))

    def send(self, message: Any) -> None:
        """Put a message on its way; `receive` moves it on while it waits."""
        try:
            data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise DataError(
                f"the data's columns cannot be sent to the process of a reward function ({error})."
            ) from error
        self._unsent = HEADER.pack(len(data)) + data

    def receive(self, seconds: float, setting: str = "") -> Any:
        """The next message; `setting` is what limits the time.

        The time in which this process was itself stopped, or the machine asleep, does not count.
        """
        waited, poll = 0.0, select.poll()
        poll.register(self._in, select.POLLIN)
        if self._unsent:
            poll.register(self._out, select.POLLOUT)
        while (message := self._message()) is None:
            raise_if_asked()
            if waited > seconds + GRACE:
                raise Lost(f"gave no answer within {seconds:g} s{setting}")
            began = time.monotonic()
            for fd, _ in poll.poll(1000 * SLICE):
                if fd == self._in:
                    self._read()
                elif not self._write():
                    poll.unregister(fd)
            waited += min(time.monotonic() - began, 2 * SLICE)
        return message[0]

    def _message(self) -> tuple[Any] | None:
        data = self._unread
        if len(data) < HEADER.size:
            return None
        end = HEADER.size + HEADER.unpack_from(data)[0]
        if len(data) < end:
            return None
        message = pickle.loads(data[HEADER.size : end])
        del data[:end]
        return (message,)

    def _read(self) -> None:
        data = os.read(self._in, 1 << 20)
        if not data:
            raise Lost(self._how_it_ended())
        self._unread += data

    def _write(self) -> bool:
        """Pass on what the pipe takes; whether there is more."""
        try:
            self._unsent = self._unsent[os.write(self._out, self._unsent) :]
        except BrokenPipeError:  # it is dying: the other pipe will tell
            self._unsent = b""
        return bool(self._unsent)

    def _how_it_ended(self) -> str:
        try:
            code = self.process.wait(5 * GRACE)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        if code >= 0:
            return f"ended its process with exit code {code}"
        name = signal.Signals(-code).name
        memory = " (out of memory?)" if name == "SIGKILL" else ""
        return f"lost its process to {name}{memory}"


_orders: "list[queue.SimpleQueue[tuple[Callable[[], Any], Future]]]" = []  # none, or one
_making_it = threading.Lock()
os.register_at_fork(after_in_child=_orders.clear)  # its thread is not in a forked process


def in_lasting_thread(make: Callable[[], Any]) -> Any:
    """What `make` returns, called in a thread that lasts as long as this process.

    To Linux the parent of a child is the thread that started it: the signal that a child has asked
    for at its parent's end (PR_SET_PDEATHSIG, in `child`) comes when that thread ends.
    """
    with _making_it:
        if not _orders:
            _orders.append(queue.SimpleQueue())
            threading.Thread(
                target=_obey, args=_orders, name="starter of children", daemon=True
            ).start()
    made: Future = Future()
    _orders[0].put((make, made))
    return made.result()


def _obey(orders: queue.SimpleQueue) -> None:
    while True:
        make, made = orders.get()
        try:
            made.set_result(make())
        except BaseException as error:  # for the thread that waits
            made.set_exception(error)
        del make, made  # nothing is kept until the next order


def _end(process: subprocess.Popen, pipes: tuple[int, int]) -> None:
    for fd in pipes:
        os.close(fd)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)


class Remote:
    """A reward function in a child, for `rewards.score` to call.

    Args:
        child: the process of its module.
        number: its place among the child's specs.
        seconds: how long one call may take. A function that takes the whole batch is called once
            per rollout, one that takes a single response once for each.
        max_lost: children that it may lose in one rollout; what is left then fails too.
    """

    def __init__(
        self, child: Child, number: int, loaded: Loaded, seconds: float, *, max_lost: int = MAX_LOST
    ):
        self.child, self.number, self.loaded, self.seconds = child, number, loaded, seconds
        self.max_lost = max_lost

    def answers_of_child(self, name: str, batch: Batch) -> Iterator[Answer]:
        """As `rewards.answers`, in the order in which they come; logs into `batch`."""
        left, lost = list(range(len(batch.texts))), 0
        while left:
            request = ("score", self.number, name, batch, left, self.seconds)
            try:
                with closing(self.child.ask(request, self.seconds)) as replies:
                    for kind, *rest in replies:
                        if kind == "refused":
                            raise DataError(rest[1])
                        answer, logged = rest
                        batch.add(logged)
                        left = [b for b in left if b not in answer.rows]
                        yield answer
            except DataError as error:  # what the columns hold does not come through
                yield Answer(left, [0.0] * len(left), Failure(f"was not called: {error}"))
                return
            except Lost as error:
                lost += 1
                count = 1 if self.loaded.one_by_one and lost < self.max_lost else len(left)
                yield Answer(left[:count], [0.0] * count, Failure(str(error)))
                left = left[count:]


def checker(spec: str) -> Callable[[Sequence[Problem], Sequence[str]], tuple[list[float], int]]:
    """A function of this library that scores one response, in a child that starts when needed.

    Returns:
        (problems, texts) -> the score of each, 0 where the child was lost, and how many those are.
    """
    child, name = Child([spec], memory=CHECK_MEMORY), spec.rpartition(":")[2]
    remote = Remote(child, 0, Loaded(name, True), CHECK_SECONDS, max_lost=CHECK_MAX_LOST)

    def ask(problems: Sequence[Problem], texts: Sequence[str]) -> tuple[list[float], int]:
        scores, lost = dict.fromkeys(range(len(texts)), 0.0), 0
        batch = Batch.of(problems, texts, [[]] * len(texts), None)
        for rows, values, failure in remote.answers_of_child(name, batch):
            scores |= zip(rows, values, strict=True)
            lost += len(rows) if failure else 0
        return list(scores.values()), lost

    return ask


def load_remote(specs: Sequence[str], *, seconds: float, memory: float = 0.0) -> dict[str, Remote]:
    """Reward functions by name, those of one module together in one child.

    Only specs: a function given as such may be a closure, or belong to the program that is
    running, and is called where it is; then nothing can stop it.

    Args:
        specs: as `rewards.load_rewards` takes them; names are made in the same way.
        seconds: for one call.
        memory: GB of address space per child; 0 is no limit.

    Raises:
        ConfigError, DataError: as `rewards.load_rewards`.
    """
    children: dict[str, Child] = {}
    for spec in specs:
        where = spec.rpartition(":")[0]
        child = children.setdefault(where, Child([], memory=int(memory * 1e9)))
        child.specs.append(spec)
    loaded = {where: _load(child) for where, child in children.items()}
    functions: dict[str, Remote] = {}
    for spec in specs:
        child = children[spec.rpartition(":")[0]]
        number = sum(f.child is child for f in functions.values())
        one = loaded[spec.rpartition(":")[0]][number]
        functions[unused(one.name, functions)] = Remote(child, number, one, seconds)
    return functions


def _load(child: Child) -> list[Loaded]:
    try:
        return child.load()
    except Lost as error:
        raise DataError(f"reward {child.specs[0]}: importing it {error}.") from None

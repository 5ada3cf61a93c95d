"""The process that scores: started by `remote`, it imports reward functions and calls them.

    ("load", specs, memory)                           -> ("loaded", [(name, one_by_one), ...])
    ("score", number, name, batch, rows, seconds)     -> ("answer", Answer, logged), ...

Each request ends with None; what a user should read comes as ("refused", kind, text). Standard
output and error are the parent's, so that functions may print.
"""

import ctypes
import os
import pickle
import queue
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO

from gspo_jax.errors import ConfigError, DataError
from gspo_jax.reward.remote import HEADER
from gspo_jax.reward.rewards import answers, calls_one_by_one, load_rewards, own_name
from gspo_jax.text.streams import guarded

LAST_SECONDS = 1.0  # between the end of the parent and that of a function that goes on regardless
PR_SET_PDEATHSIG = 1


def main(reading: int, writing: int, parent: int) -> None:
    """Serve until the parent closes its pipe, or is no more."""
    _die_with(parent)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(os.fdopen(reading, "rb"), requests), daemon=True).start()
    functions: list[tuple[str, Any]] = []
    with guarded("stdout"), guarded("stderr"), os.fdopen(writing, "wb") as out:
        while (data := requests.get()) is not None:
            try:
                for reply in _replies(_unpickled(data), functions):
                    _send(out, reply)
            except (ConfigError, DataError) as error:
                _send(out, ("refused", type(error).__name__, str(error)))
            sys.stdout.flush()  # what functions print; this process may be killed at any time
            _send(out, None)


def _unpickled(data: bytes) -> Any:
    try:
        return pickle.loads(data)
    except Exception as error:  # a column holds what cannot be made here: anything
        raise DataError(
            f"the data's columns cannot be read in the process of a reward function ({error})."
        ) from None


def _replies(request: Any, functions: list[tuple[str, Any]]) -> Iterator[Any]:
    kind, *rest = request
    if kind == "load":
        specs, memory = rest
        if memory:
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (memory, hard))
        functions += load_rewards(specs).items()
        found = [(own_name(function), function) for _, function in functions]
        yield "loaded", [(name, calls_one_by_one(name, f)) for name, f in found]
        return
    number, name, batch, rows, seconds = rest
    batch.logged.clear()  # what other functions logged stays where it is: it would come back twice
    for answer in answers(name, functions[number][1], batch, rows, seconds=seconds):
        if answer.failure is not None:  # its exception may not survive the way
            answer = answer._replace(failure=answer.failure._replace(cause=None))
        yield "answer", answer, dict(batch.logged)
        batch.logged.clear()


def _send(out: BinaryIO, message: Any) -> None:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    out.write(HEADER.pack(len(data)) + data)
    out.flush()


def _read(file: BinaryIO, requests: queue.SimpleQueue) -> None:
    """Pass requests on; at the end of the pipe end the process, and what it has started."""
    while len(header := file.read(HEADER.size)) == HEADER.size:
        requests.put(file.read(HEADER.unpack(header)[0]))
    requests.put(None)
    time.sleep(LAST_SECONDS)
    os.killpg(os.getpgrp(), signal.SIGKILL)  # `remote` made it the leader of its group


def _die_with(parent: int) -> None:
    """Linux: the kernel kills this process when its parent ends, even inside of C code."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has already ended
        os._exit(1)

"""The run directory's writer: one JSON object per step, samples, status, environment, lock.

    config.yaml  env.json  status.json  metrics.jsonl  samples.jsonl  warnings.log  lock

Nothing here can fail a run that trains well: a full disk costs lines, a dead tracker a warning.
Only a directory that cannot be used at all, or that another run uses, is refused at the start.
"""

import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console

from gspo_jax.files import jsonl
from gspo_jax.files.jsonl import keep_until, plain
from gspo_jax.files.provenance import environment
from gspo_jax.files.whole import lock, unlock, unwritable, write_whole
from gspo_jax.run.trackers import Trackers
from gspo_jax.text.console import Display
from gspo_jax.text.inert import redact
from gspo_jax.text.streams import Unfailing


class RunLog:
    """Everything that a run writes and shows, but for its checkpoints and export.

    Construction takes the lock; `start` opens the files. Use it as a context manager: leaving it
    by an exception records the state "failed".

    Args:
        directory: the run directory; made if it is not there.
        of: steps of the whole run.
        config: the configuration as YAML text, without secrets; saved as it is.
        report_to: names of trackers besides the files.
        devices: descriptions of the devices, for env.json.
        console: where to show progress; standard output by default.

    Raises:
        ConfigError: a tracker is not installed.
        StorageError: another run uses the directory, or it cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        *,
        of: int,
        config: str = "",
        report_to: Sequence[str] = (),
        devices: Sequence[str] = (),
        console: Console | None = None,
    ):
        self.directory, self.of = Path(directory), of
        self._warned: set[str] = set()
        self.display = Display(console or Console(), of)
        self._config, self._devices = config, list(devices)
        self._step, self._written, self._state = 0, -1, "running"
        self._files: dict[str, BinaryIO] = {}
        self._trackers = Trackers(
            report_to, self.directory, redact(config), say=self.say, warn=self._warn
        )
        self._lock = lock(self.directory)
        self._heard = _Heard(self)

    def start(self, step: int | None = None) -> None:
        """Open the files for a new run, or for one that resumes after `step`.

        A resumed run forgets the lines after `step`: it writes them again. A new run in a used
        directory keeps the earlier lines as `*.jsonl.old`.
        """
        self._step, self._written = step or 0, -1 if step is None else step
        try:
            write_whole(self.directory / "config.yaml", self._config)
            env = json.dumps(environment(self._devices), indent=1)
            write_whole(self.directory / "env.json", env + "\n")
            for name in ("metrics.jsonl", "samples.jsonl"):
                self._reopen(name, step)
        except OSError as error:
            raise unwritable(self.directory, error) from error
        self.status("running")
        self._trackers.start(step)
        self.display.begin(self._step)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; show it, and pass it on. NaN and infinity become null.

        A step that is written again (because its evaluation came later) replaces its line.
        """
        record = plain({"step": step, **metrics})
        again = step == self._written
        if again:
            try:
                self._reopen("metrics.jsonl", step - 1)
            except OSError as error:  # both lines stay; readers take the later one
                self._warn(f"metrics.jsonl has step {step} twice ({error.strerror}).")
        self._step = self._written = step
        self._append("metrics.jsonl", record)
        self._trackers.log(step, record)
        self.status("running")
        if step and not again:
            self._show(self.display.step, step, record)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]], *, show: bool = True) -> None:
        """Responses with their scores: `prompt`, `completion`, `answer`, `reward`, and the like."""
        rows = plain(rows)
        for row in rows:
            self._append("samples.jsonl", {"step": step, **row})
        self._trackers.samples(step, rows)
        if show:
            self._show(self.display.samples, step, rows)

    def doing(self, phase: str) -> None:
        """What the run is busy with, for the live line."""
        self.display.doing(phase)

    def say(self, text: str, style: str = "") -> None:
        """One line for the user."""
        self.display.say(text, style)

    def status(self, state: str) -> None:
        """Write status.json: running, finished, preempted, interrupted or failed."""
        self._state = state
        record = {
            "state": state,
            "step": self._step,
            "of": self.of,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        try:
            write_whole(self.directory / "status.json", json.dumps(record) + "\n")
        except OSError as error:
            self._warn(f"status.json was not written ({error.strerror}).")

    def close(self) -> None:
        """Give the terminal, the files and the lock back."""
        logging.getLogger("gspo_jax").removeHandler(self._heard)
        self._show(self.display.end)
        for name, file in self._files.items():
            try:
                file.close()  # a network's file system may tell only now
            except OSError as error:
                self._warn(f"{name} may be missing lines ({error.strerror}).")
        self._files = {}
        self._trackers.finish()
        self._tell_losses(None)
        unlock(self._lock)

    def _tell_losses(self, lost: Callable[[str], None] | None) -> None:
        for stream in {self.display.console.file, sys.stdout, sys.stderr}:
            if isinstance(stream, Unfailing):
                stream.tell_losses(lost)

    def __enter__(self) -> "RunLog":
        logging.getLogger("gspo_jax").addHandler(self._heard)
        self._tell_losses(self._warn)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None and self._state == "running" and self._files:
            self.status("interrupted" if issubclass(kind, KeyboardInterrupt) else "failed")
        self.close()

    def _reopen(self, name: str, step: int | None) -> None:
        keep_until(self.directory / name, step)
        file = (self.directory / name).open("ab", buffering=0)
        if name in self._files:
            self._files[name].close()
        self._files[name] = file

    def _append(self, name: str, record: dict[str, Any]) -> None:
        try:
            if not _is_open_at(self.directory / name, self._files[name]):
                self._files[name].close()  # rotated or deleted by somebody else
                self._files[name] = (self.directory / name).open("ab", buffering=0)
            jsonl.append(self._files[name], record)
        except OSError as error:
            self._warn(f"{name} is missing lines ({error.strerror}); the run goes on.")

    def _warn(self, text: str) -> None:
        """Show a warning and keep it in warnings.log; each text once."""
        if text not in self._warned:
            self._warned.add(text)
            self.warn(text)

    def warn(self, text: str) -> None:
        """Keep a warning in warnings.log, and show it."""
        text = redact(text)
        try:
            with (self.directory / "warnings.log").open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}\n")
        except OSError:
            pass  # it is shown
        self.display.say(f"warning: {text}", style="yellow")

    def _show(self, shown: Callable[..., None], *what: Any) -> None:
        """Show something; what goes wrong there is a warning."""
        try:
            shown(*what)
        except Exception as error:  # a library's: whatever it may raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._warn(f"the display has gaps ({reason[:200]}); the run goes on.")


class _Heard(logging.Handler):
    """What modules log, as the first traceback of a reward function: shown, and kept in a file."""

    def __init__(self, log: RunLog):
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._log.warn(record.getMessage().rstrip())
        except Exception:  # a message that does not fit its arguments
            self.handleError(record)


def _is_open_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False

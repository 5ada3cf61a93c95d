"""The run directory's writer: one JSON object per step, samples, status, environment, lock.

    config.yaml  env.json  status.json  metrics.jsonl  samples.jsonl  warnings.log  lock

Nothing here can fail a run that trains well: a full disk costs lines, a dead tracker a warning.
Only a directory that cannot be used at all, or that another run uses, is refused at the start.
"""

import errno
import fcntl
import json
import logging
import math
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from rich.console import Console

from gspo_jax import jsonl
from gspo_jax.console import Display, redact
from gspo_jax.errors import StorageError
from gspo_jax.streams import Unfailing
from gspo_jax.trackers import Trackers

PACKAGES = ("gspo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
VARIABLES = (  # that change what a run computes; no others are recorded
    "CUDA_VISIBLE_DEVICES",
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)


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
            raise _unwritable(self.directory, error) from error
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
        _check_parents(directory)  # knows more than "File exists"
        raise _unwritable(directory, error) from None
    _claim(directory, file, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def check_place(directory: Path) -> None:
    """Raise the StorageError that `lock` would, but make and change nothing."""
    _check_parents(directory)
    try:
        held = directory / "lock"
        if held.is_file():
            with held.open(encoding="utf-8") as file:
                _claim(directory, file, fcntl.LOCK_SH)
    except StorageError:
        raise
    except OSError as error:
        raise _unwritable(directory, error) from None


def _check_parents(directory: Path) -> None:
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
        raise _unwritable(directory, gone) from None
    except OSError as error:
        raise _unwritable(directory, error) from None


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


def _unwritable(directory: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{directory}: cannot be written ({error.strerror}); set run.dir elsewhere."
    )


def unlock(file: TextIO) -> None:
    """Give a claim back; the file stays, because removing it would race with the next claim."""
    with suppress(OSError):  # a full disk, a stale mount: the claim ends with the process
        if not file.closed:
            file.truncate(0)
            file.close()


def keep_until(path: Path, step: int | None) -> None:
    """Drop the lines after `step`, torn ones too; None starts anew and keeps the old file aside."""
    if not path.exists() or path.stat().st_size == 0:
        return
    if step is None:
        os.replace(path, path.with_name(f"{path.name}.old"))
        return
    with path.open("rb") as file:
        kept = (record for record in jsonl.records(file) if record["step"] <= step)
        _write_parts(path, (json.dumps(record) + "\n" for record in kept))


def _is_open_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once: readers, and a crash, see the old one or the new one."""
    _write_parts(path, [text])


def _write_parts(path: Path, parts: Iterable[str]) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


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


def environment(devices: Sequence[str] = ()) -> dict[str, Any]:
    """What a run's numbers may depend on besides its configuration: versions, machine, command."""
    return {
        "command": [redact(text) for text in sys.argv],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "devices": list(devices),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that the package is imported from; "+changes" where files differ from it."""
    try:
        if _git("ls-files", Path(__file__).name) != Path(__file__).name:
            return None  # installed into something that happens to be a repository
        return _git("rev-parse", "HEAD") + ("+changes" if _git("status", "--short", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()

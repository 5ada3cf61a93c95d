"""Trackers beside the run's own files: Weights & Biases, and TensorBoard's event files.

They get what metrics.jsonl and samples.jsonl get, each from a thread of its own. Whatever goes
wrong there (a server that is gone, a full disk, a call that does not return) is told in one line,
and costs the run neither a step nor more than FINISH_SECONDS at its end.
"""

import json
import os
import queue
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import yaml

from gspo_jax.errors import ConfigError
from gspo_jax.files import jsonl
from gspo_jax.files.whole import write_whole
from gspo_jax.text.inert import inert, redact

FINISH_SECONDS = 120.0  # that the end of a run waits for all of its trackers
WAITING = 2000  # calls that a tracker may be behind
LONGEST = 10_000  # characters of a text in a table
PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")

Record = Mapping[str, Any]
Say = Callable[[str], None]


class Tracker(Protocol):
    """What a run tells. Any call may raise, and may take its time."""

    def __init__(self, directory: Path, config: str, say: Say): ...

    def start(self, step: int | None) -> int:
        """A new run, or one that goes on after `step`; the last step that is here already.

        Steps of metrics.jsonl beyond it are told next, and none before it.
        """
        ...

    def log(self, step: int, record: Record) -> None:
        """The line of a step; the whole once more where its evaluation came later."""
        ...

    def samples(self, step: int, rows: Sequence[Record]) -> None:
        """Responses with their scores."""
        ...

    def finish(self) -> None:
        """Everything has been told."""
        ...


class Wandb:
    """Weights & Biases, as the variables WANDB_* say: online, offline or disabled.

    The run's id is kept in wandb.json, so that a resumed run continues there. What was sent cannot
    be taken back, so no step is sent twice: a resumed run computes the same. Of a process that was
    killed offline, wandb lost the last steps; the next one tells all of them again.
    """

    def __init__(self, directory: Path, config: str, say: Say):
        self._directory, self._config, self._say = directory, config, say
        self._file = directory / "wandb.json"

    def start(self, step: int | None) -> int:
        import wandb

        known = {} if step is None else jsonl.read_object(self._file)
        self._table: Any = wandb.Table
        self._id = os.environ.get("WANDB_RUN_ID") or known.get("id")
        self._id = self._id or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "gspo_jax"),
            name=os.environ.get("WANDB_NAME", self._directory.name),
            id=self._id,
            resume="allow",
            dir=str(self._directory),
            config=yaml.safe_load(self._config) or {},
            # Arguments, the terminal, the repository and its remotes may hold what must not leave;
            # env.json has what matters of them.
            settings=wandb.Settings(
                init_timeout=30,
                login_timeout=15,
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
            ),
        )
        self._last = self._newest = max(int(known.get("step", -1)), self._run.step - 1)
        self._keep()
        if self._run.offline:
            self._say(f"wandb: offline; wandb sync {self._directory}/wandb/offline-* sends it.")
        elif self._run.url:
            self._say(f"wandb: {self._run.url}")
        return self._last

    def log(self, step: int, record: Record) -> None:
        if step <= self._last:  # it takes no step twice, but what was measured since can be seen
            self._run.summary.update(dict(spread(record)))
            return
        self._run.log(dict(spread(record)), step=step)
        self._newest = step

    def samples(self, step: int, rows: Sequence[Record]) -> None:
        if step <= self._last:
            return
        columns, cells = table(step, rows)
        self._run.log({"completions": self._table(columns=columns, data=cells)}, step=step)

    def finish(self) -> None:
        self._run.finish()
        self._keep()

    def _keep(self) -> None:
        write_whole(self._file, json.dumps({"id": self._id, "step": self._newest}) + "\n")


class TensorBoard:
    """Event files in tensorboard/, which `tensorboard --logdir` of any directory above it shows.

    A resumed run writes a further file, whose first event takes the later steps back.
    """

    def __init__(self, directory: Path, config: str, say: Say):
        self._directory, self._config = directory / "tensorboard", config

    def start(self, step: int | None) -> int:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        events: Any = event_pb2
        summaries: Any = summary_pb2
        self._event, self._summary, self._text = events.Event, summaries.Summary, text_pb
        self._told: set[tuple[int, str]] = set()
        self._directory.mkdir(parents=True, exist_ok=True)
        has = any(self._directory.iterdir())
        name = f"events.out.tfevents.{time.time_ns():019d}.{os.getpid()}"
        self._file = (self._directory / name).open("xb", buffering=0)
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._last = -1 if step is None or not has else step
        start = events.SessionLog(status=events.SessionLog.START)
        self._write(step=self._last + 1, session_log=start)
        indented = "".join(f"    {line}\n" for line in self._config.splitlines())
        self._write(step=self._last + 1, summary=text_pb("config", indented))
        return self._last

    def log(self, step: int, record: Record) -> None:
        values = {
            name: value
            for name, value in spread(record)
            if isinstance(value, int | float)
            and (step, name) not in self._told
            and (step > self._last or name.startswith("eval/"))  # all that can come later
        }
        self._told = {told for told in self._told if told[0] == step}
        self._told |= {(step, name) for name in values}
        points = [self._summary.Value(tag=name, simple_value=x) for name, x in values.items()]
        self._write(step=step, summary=self._summary(value=points))

    def samples(self, step: int, rows: Sequence[Record]) -> None:
        columns, cells = table(step, rows)
        lines = [f"| {' | '.join(map(_cell, line))} |" for line in (columns, *cells)]
        lines.insert(1, "|---" * len(columns) + "|")
        self._write(step=step, summary=self._text("completions", "\n".join(lines)))

    def finish(self) -> None:
        self._file.close()

    def _write(self, **fields: Any) -> None:
        event = self._event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())


TRACKERS: dict[str, type[Tracker]] = {"wandb": Wandb, "tensorboard": TensorBoard}


def check_installed(names: Sequence[str]) -> None:
    """Raise a ConfigError that says how to install what `run.report_to` needs and is not there."""
    for name in names:
        if find_spec(name) is None:
            package = "wandb" if name == "wandb" else f"'gspo_jax[{name}]'"
            raise ConfigError(f"run.report_to=[{name}]: not installed; pip install {package}.")


def spread(record: Record) -> Iterator[tuple[str, Any]]:
    """A line of metrics.jsonl by name: lists as name/0, name/1, ...; what is null left out."""
    for name, value in record.items():
        items = enumerate(value) if isinstance(value, list) else [(None, value)]
        for i, item in items:
            if item is not None and name != "step":
                yield (name if i is None else f"{name}/{i}"), item


def table(step: int, rows: Sequence[Record]) -> tuple[list[str], list[list[Any]]]:
    """Columns and cells of sample responses, in TRL's order: texts, then scores."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = [name for name in ("prompt", "completion", "answer") if name in names]
    columns += [name for name in names if name not in columns]
    cells = [[step, *(_plain(row.get(name)) for name in columns)] for row in rows]
    return ["step", *columns], cells


def _plain(value: Any) -> Any:
    if isinstance(value, list):  # a chat
        turns = [turn if isinstance(turn, dict) else {"content": turn} for turn in value]
        value = "\n".join(f"{t.get('role', '')}: {t.get('content', '')}" for t in turns)
    return redact(value[:LONGEST]) if isinstance(value, str) else value


def _cell(value: Any) -> str:
    """A cell of a Markdown table that is no markup: what a model wrote must not load anything."""
    if isinstance(value, float):
        return f"{value:g}"
    return PUNCTUATION.sub(lambda c: f"&#{ord(c[0])};", inert("" if value is None else str(value)))


class Threaded:
    """A tracker in a thread of its own, which may fail or hang without anybody waiting for it.

    Args:
        name: what it is called in warnings.
        made: makes the tracker, in that thread.
        step: after which the run goes on; None for a new one.
        history: the lines of metrics.jsonl up to there.
        warn: takes one line.
    """

    def __init__(
        self,
        name: str,
        made: Callable[[], Tracker],
        step: int | None,
        history: Iterator[Record],
        warn: Say,
    ):
        self._name, self._warn = name, warn
        self._waiting: queue.Queue[tuple[str, int, Any] | None] = queue.Queue(WAITING)
        self._lost = False
        self._thread = Thread(target=self._work, args=(made, step, history), daemon=True)
        self._thread.start()

    def tell(self, method: str, step: int, what: Any) -> None:
        """Call a method of the tracker some time."""
        self._put((method, step, what))

    def finish(self, seconds: float) -> None:
        """Wait for all that was told, for so long at most."""
        self._put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._leave(f"still busy {FINISH_SECONDS:g} s after the end of the run")

    def _put(self, call: tuple[str, int, Any] | None) -> None:
        if self._lost:
            return
        try:
            self._waiting.put_nowait(call)
        except queue.Full:
            self._leave("it does not answer")

    def _work(
        self, made: Callable[[], Tracker], step: int | None, history: Iterator[Record]
    ) -> None:
        try:
            tracker = made()
            last = tracker.start(step)
            for record in history:
                if record["step"] > last:
                    tracker.log(record["step"], record)
            for method, step, what in iter(self._waiting.get, None):
                if step >= last:
                    getattr(tracker, method)(step, what)
            tracker.finish()
        except BaseException as error:  # a foreign library: it may raise anything, exits too
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._leave(redact(reason)[:200])

    def _leave(self, reason: str) -> None:
        if not self._lost:
            self._lost = True
            self._warn(f"{self._name} is left out from here on ({reason}).")


class Trackers:
    """All trackers of a run.

    Args:
        names: of TRACKERS.
        directory: of the run.
        config: the run's configuration as YAML, without credentials.
        say: takes a line for the user; `warn` one that is a warning.

    Raises:
        ConfigError: a tracker is not installed.
    """

    def __init__(self, names: Sequence[str], directory: Path, config: str, *, say: Say, warn: Say):
        check_installed(names)
        self._made = {n: partial(TRACKERS[n], directory, config, say) for n in dict.fromkeys(names)}
        self._directory, self._warn, self._apart = directory, warn, []

    def start(self, step: int | None) -> None:
        """Begin, after `step` where the run goes on."""
        self._apart = [
            Threaded(name, made, step, self._history(step), self._warn)
            for name, made in self._made.items()
        ]

    def _history(self, step: int | None) -> Iterator[Record]:
        """The lines up to `step`; the file grows while they are read."""
        if step is not None:
            with (self._directory / "metrics.jsonl").open("rb") as file:
                yield from takewhile(lambda row: row["step"] <= step, jsonl.records(file))

    def log(self, step: int, record: Record) -> None:
        """The line of a step."""
        for apart in self._apart:
            apart.tell("log", step, record)

    def samples(self, step: int, rows: Sequence[Record]) -> None:
        """Responses of a step."""
        for apart in self._apart if rows else ():
            apart.tell("samples", step, rows)

    def finish(self) -> None:
        """Wait for uploads, but not for a network that is gone."""
        until = time.monotonic() + FINISH_SECONDS
        for apart in self._apart:
            apart.finish(max(until - time.monotonic(), 0))
        self._apart = []

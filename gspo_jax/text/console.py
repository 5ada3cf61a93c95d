"""What a run shows while it goes: a live bar on a terminal, plain lines anywhere else.

Colour follows the terminal and NO_COLOR. Text that a model wrote is shown inert, and credentials
not at all (`inert`). A console that goes away takes nothing with it.
"""

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from gspo_jax.numbers.shown import clock
from gspo_jax.text.inert import inert, one_line, redact
from gspo_jax.text.streams import Unfailing

PLAIN_LINES = 20  # of a whole run, where there is no terminal
PLAIN_SECONDS = 30.0  # but at least one in this time
SHOWN_SAMPLES = 4
PATIENCE = 2.0  # seconds after which `telling` tells


class Display:
    """The progress of one run on a console.

    Args:
        console: rich's; `Console()` writes to standard output.
        of: steps of the whole run.
    """

    def __init__(self, console: Console, of: int):
        self.console, self.of = console, of
        if not isinstance(console.file, Unfailing):
            console.file = cast(Any, Unfailing(console.file))
        self._step, self._metrics, self._phase = 0, {}, ""
        self._times: deque[float] = deque(maxlen=20)
        self._advised: set[str] = set()
        self._printed = (0, time.monotonic())
        self._spinner = Spinner("dots")
        self._live: Live | None = None

    def begin(self, step: int) -> None:
        """Show a run that has `step` steps behind it."""
        self._step = step
        if self.console.is_terminal and self._live is None:
            live = Live(get_renderable=self._render, console=self.console, refresh_per_second=5)
            live.start()
            self._live = live

    def end(self) -> None:
        """Leave the last state on the screen and give the cursor back."""
        if self._live is not None:
            self._phase = ""
            self._live.stop()
            self._live = None

    def doing(self, phase: str) -> None:
        """What the run is busy with, for the live line; "" for nothing to tell."""
        self._phase = phase

    def say(self, text: str, style: str = "") -> None:
        """One line that stays."""
        self.console.print(Text(inert(redact(text)), style=style), soft_wrap=True)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take in the metrics of a step (times in seconds, `step_time` without compilation)."""
        self._step, self._metrics = step, dict(metrics)
        if (seconds := metrics.get("step_time")) is not None:
            self._times.append(float(seconds))
        if (compiled := metrics.get("compile_time") or 0) > 0.5:
            self.say(f"step {step}: {compiled:.1f} s of compilation, not counted as step time.")
        for kind, text in advice(metrics).items():
            if kind not in self._advised:
                self._advised.add(kind)
                self.say(f"step {step}: {text}", style="yellow")
        if self._live is None and self._is_due(step):
            self._printed = (step, time.monotonic())
            self.say("  ".join([self._head(), *self._tail(), *summary(metrics)]))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of some responses; rows have `prompt`, `completion`, `reward`, `answer`."""
        width = max(self.console.width - 34, 20)
        table = Table(title=f"step {step}", title_justify="left", box=None, pad_edge=False)
        table.add_column("prompt", max_width=width // 2, no_wrap=True, style="dim")
        table.add_column("completion", max_width=width, no_wrap=True)
        table.add_column("gold", max_width=14, no_wrap=True)
        table.add_column("reward", justify="right")
        for row in rows[:SHOWN_SAMPLES]:
            reward = row.get("reward")
            table.add_row(
                Text(one_line(row.get("prompt", ""), width // 2)),
                Text(one_line(row.get("completion", ""), width)),
                Text(one_line(row.get("answer", ""), 14)),
                Text("none" if reward is None or reward != reward else f"{reward:g}"),
            )
        self.console.print(table)

    def _is_due(self, step: int) -> bool:
        last, when = self._printed
        stride = -(-self.of // PLAIN_LINES)
        late = time.monotonic() - when > PLAIN_SECONDS
        return last == 0 or step // stride > last // stride or step >= self.of or late

    def _render(self) -> Group:
        grid = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(self.of, 1), completed=self._step, width=24)
        head = [Text(self._head(), style="bold"), bar, *map(Text, self._tail())]
        if self._phase:
            self._spinner.update(text=Text(self._phase, style="dim"))
            head.append(self._spinner)
        grid.add_row(*head)
        return Group(grid, Text("  ".join(summary(self._metrics)), style="cyan"))

    def _head(self) -> str:
        return f"step {self._step:>{len(str(self.of))}}/{self.of}"

    def _tail(self) -> list[str]:
        out = []
        if self._times:
            # The median: one suspended laptop or one checkpoint must not move the estimate; of
            # two steps the shorter.
            out.append(f"eta {clock(statistics.median_low(self._times) * (self.of - self._step))}")
        if rate := self._metrics.get("tokens_per_second"):
            out.append(f"{rate:,.0f} tok/s")
        return out


def summary(metrics: Mapping[str, Any]) -> list[str]:
    """The few numbers to watch, "name value" each; what is missing is left out."""
    get = metrics.get
    shown = [
        ("reward", get("reward"), "{:.3f}"),
        ("loss", get("loss") if get("reward") is None else None, "{:.4f}"),
        ("clip", get("clip_frac"), "{:.1%}"),
        ("length", get("completions/mean_length"), "{:.1f}"),
        ("truncated", get("completions/clipped_ratio"), "{:.1%}"),
        ("entropy", get("entropy"), "{:.3f}"),
    ]
    out = {name: f"{name} {form.format(value)}" for name, value, form in shown if value is not None}
    if "clip" in out and None not in (low := get("clip_frac_low"), high := get("clip_frac_high")):
        out["clip"] += f" (low {low:.1%}, high {high:.1%})"
    return list(out.values())


def advice(metrics: Mapping[str, Any]) -> dict[str, str]:
    """What a step's metrics warn of, each with a remedy, by kind."""
    out = {}
    if metrics.get("frac_reward_zero_std") == 1 and "critic/vf_loss" not in metrics:
        out["equal"] = (
            "within every group all rewards are equal, so no advantage is left and nothing is "
            "learned; take easier or harder prompts, or a larger rollout.group_size."
        )
    if (metrics.get("completions/clipped_ratio") or 0) > 0.2:
        out["truncated"] = (
            f"{metrics['completions/clipped_ratio']:.0%} of the responses hit the length limit; "
            "raise rollout.max_completion_length, or set algo.mask_truncated=true."
        )
    if (metrics.get("clip_frac") or 0) > 0.5:
        out["clipped"] = (
            f"{metrics['clip_frac']:.0%} of the tokens are clipped; lower optim.learning_rate, or "
            "widen algo.loss.clip_low and clip_high."
        )
    if (metrics.get("skipped_updates") or 0) > 0:
        out["skipped"] = "an update was skipped because its gradient was not finite."
    if (metrics.get("skipped_spikes") or 0) > 0:
        out["spikes"] = "an update was skipped because of its long gradient (run.spike_sigmas)."
    return out


@contextmanager
def progress(label: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, or without a terminal a line for every tenth; takes how many have come.

    Args:
        label: what it is the progress of.
        done: of `total`, before this.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    quiet = not console.is_terminal
    bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=quiet)
    began, before, told = time.monotonic(), done, done * 10 // total

    def advance(count: int) -> None:
        nonlocal done, told
        done += count
        bar.update(shown, completed=done)
        if quiet and done * 10 // total > told:
            told = done * 10 // total
            eta = (time.monotonic() - began) / (done - before) * (total - done)
            text = f"{label}: {done} of {total} responses, eta {clock(eta)}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    with bar:
        shown = bar.add_task(label, total=total, completed=done)
        yield advance


@contextmanager
def overdue(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Call `act`, in a thread of its own, unless the block is left in this time."""
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def telling(what: str) -> Iterator[None]:
    """One line on stderr, if what is done inside takes longer than PATIENCE."""

    def tell() -> None:
        with suppress(OSError, ValueError):  # nobody is there to be told
            Console(stderr=True, force_jupyter=False).print(
                Text(f"{inert(what)} ..."), soft_wrap=True
            )

    with overdue(PATIENCE, tell):
        yield

"""One run: its directory, its checkpoints, and how it ends.

`train` and `sft` share this; what differs between them is the step in the middle.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console

from gspo_jax.config.load import Config, run_dir
from gspo_jax.config.recorded import to_yaml
from gspo_jax.errors import (
    INTERRUPTED,
    PREEMPTED,
    ConfigError,
    DataError,
    NumericalError,
    StorageError,
)
from gspo_jax.evaluation.evaluate import evaluate_policy
from gspo_jax.files.integrity import tidy_names
from gspo_jax.files.stopping import Abandoned, Stop, Why, listening, out_of_time
from gspo_jax.mesh.distributed import agreed, is_writer
from gspo_jax.models.hf.weights import read_model_config
from gspo_jax.policy import Policy, Problems, attention
from gspo_jax.run import checkpoint, resume
from gspo_jax.run.export import export_params, keep_model, logged_eval, logged_step, run_card
from gspo_jax.run.metrics import RunLog
from gspo_jax.run.resume import Begun
from gspo_jax.update.programs import all_finite
from gspo_jax.update.state import TrainState
from gspo_jax.view.report import dynamics

STOPS: list[Why | None] = [None, "preempted", "interrupted"]
EXIT_CODES = {"finished": 0, "preempted": PREEMPTED, "interrupted": INTERRUPTED}
SAVE_RATE = 200e6  # bytes per second at which a checkpoint is taken to be written

_compile_seconds = [0.0]  # of this process; XLA reports every compilation, from cache or not
_compiles = [0]


def _count_compilation(event: str, duration_secs: float, **_: str | int) -> None:
    if event.endswith("backend_compile_duration"):
        _compile_seconds[0] += duration_secs
        _compiles[0] += 1


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


@dataclass(frozen=True)
class Result:
    """How a run ended, and what it measured on held-out problems before and after."""

    run_dir: Path
    steps: int
    state: Literal["finished", "preempted", "interrupted"]
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 finished; with the checkpoint saved, 75 preempted and 130 interrupted."""
        return EXIT_CODES[self.state]


@contextmanager
def open_run(
    config: Config, policy: Policy, problems: Problems, *, kind: str = "train"
) -> Iterator["Run"]:
    """Claim the run directory, listen to signals, and give both back at the end."""
    directory = run_dir(config)
    devices = [str(device) for device in policy.mesh.devices.flat]
    log = RunLog(
        directory if is_writer() else directory / "processes" / str(jax.process_index()),
        of=config.run.steps,
        console=None if is_writer() else Console(quiet=True),
        config=to_yaml(config, absolute=True),
        report_to=config.run.report_to if is_writer() else (),
        devices=devices,
    )
    kept = checkpoint.Kept(config.run.keep, config.run.keep_every)
    saver = checkpoint.Saver(directory / "checkpoints", kept)
    alone = jax.process_count() == 1
    with log, jax.set_mesh(policy.mesh), saver, listening(log.warn, abandon=alone) as stop:
        yield Run(config, policy, problems, log, directory, saver, stop, kind)


@dataclass
class Run:
    """A run in progress."""

    config: Config
    policy: Policy
    problems: Problems
    log: RunLog
    directory: Path
    saver: checkpoint.Saver
    stop: Stop
    kind: str = "train"  # or "sft": the loop that the checkpoints belong to
    before: dict[str, float] = field(default_factory=dict)
    begun: Begun | None = None  # the step in the middle of whose updates the run stopped
    tokens: int = 0  # prompt and response tokens so far
    stopped_by: Why | None = None  # all processes alike
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    measured: tuple[int, float] = (0, -np.inf)  # the last step that was evaluated, and its value
    best: float = -np.inf  # of those values
    saved_at: float = field(default_factory=time.monotonic)  # or when the run began

    def start(self, state: TrainState) -> TrainState:
        """Continue from the newest checkpoint if `run.resume` says so, else measure and begin.

        Raises:
            ConfigError, DataError, StorageError: from `resume.find` and `resume.tell_changes`.
        """
        where = self.directory
        self.log.say(f"Writes {where}; to watch it: gspo-jax monitor {where}")
        if is_writer() and (left := checkpoint.clean(self.checkpoints)):
            self.log.say(f"Removed what an interrupted save left: {tidy_names(left)}.")
        found = resume.find(self.config.run.resume, self.checkpoints, self.log.say)
        for warning in checkpoint.rehearse(self.checkpoints):
            self.log.say(f"warning: {warning}", style="yellow")
        shape = read_model_config(self.policy.directory)
        trouble = attention(self.config, self.policy.dtype, shape, self.policy.mesh).trouble
        for warning in [*self.problems.task.warnings, *([trouble] if trouble else [])]:
            self.log.say(f"warning: {warning}", style="yellow")
        if self.problems.too_long:
            self.log.say(
                f"{self.problems.too_long} problems have prompts of more than "
                f"{self.config.task.max_prompt_length} tokens and are left out."
            )
        keep_model(self.policy, state.params, where)
        if found is None:
            self.log.start()
            self.before = self._measured(0, state)
            return state
        return self._continue(state, found)

    def _continue(self, state: TrainState, found: resume.Found) -> TrainState:
        root, name = found.path.parent, found.path.name
        meta = checkpoint.read_meta(found.path)
        resume.tell_changes(meta, self.config, self.problems, found, self.log.say)
        if found.own and meta["kind"] != self.kind:
            raise ConfigError(
                f"{self.directory} is a run of gspo-jax {meta['kind']}, not of {self.kind}; choose "
                f"another run.name, with run.resume={found.path} to start from its weights."
            )
        state = resume.restored_state(found, meta, state)
        if (pending := checkpoint.read_pending(found.path)) is not None:
            self.begun = resume.unpack(pending)
        self.tokens, step, of = meta["num_tokens"], int(meta["step"]), self.config.run.steps
        self.saver.stale = set(found.stale)
        if found.own:
            self.saver.whole = {name}
            highest = checkpoint.best(root, until=step)
            self.best = self.best if highest is None else highest[1]
        self.log.start(step)
        self.log.say(f"Resumed after {told(step, self.begun)} of {of}.")
        if step >= of:
            self.log.say("Nothing is left to train: raise run.steps, or choose another run.name.")
        elif self._lacks_eval(step):
            self._measured(step, state)
        self.before = logged_eval(self.log.directory, 0)
        return state

    def _lacks_eval(self, step: int) -> bool:
        """Whether the run was stopped after a step before its evaluation."""
        due = self._is_measured(step) and not (self.begun and self.begun.progress.stats)
        row = logged_step(self.log.directory, step)
        begun = step == 0 or bool(row)  # by this run, and not by another that it goes on from
        return bool(agreed(due and begun and not any(n.startswith("eval/") for n in row)))

    def _is_measured(self, step: int) -> bool:
        every = self.config.eval.every
        return step in (0, self.config.run.steps) or bool(every and step % every == 0)

    def stopping(self) -> bool:
        """Whether to stop, because any process was asked to; all of them call this."""
        self.stopped_by = STOPS[agreed(STOPS.index(self.stop.asked))]
        return self.stopped_by is not None

    def steps(self, state: TrainState) -> Iterator[int]:
        """The steps that are left, until a signal asks to stop or `run.save_by` comes near."""
        longest = 0.0  # of the steps so far, with their evaluation and checkpoint
        saving = sum(x.nbytes for x in jax.tree.leaves(state)) / SAVE_RATE
        for step in range(int(state.step) + 1, self.config.run.steps + 1):
            if longest and out_of_time(self.config.run.save_by, longest + saving):
                minutes = f"{self.config.run.save_by:g} minutes"
                self.log.warn(f"run.save_by={minutes} leave no more step.")
                self.stop.ask("preempted")
            if self.stopping():
                return
            self.seconds.clear()
            self._step_began = time.perf_counter(), _compile_seconds[0], _compiles[0]
            with self._traced(step):
                yield step
            longest = max(longest, time.perf_counter() - self._step_began[0])

    def _traced(self, step: int) -> AbstractContextManager[Any]:
        """Write what the devices do in this step to profile/, if `run.profile_steps` names it."""
        if step not in self.config.run.profile_steps:
            return nullcontext()
        return jax.profiler.trace(str(self.directory / "profile"))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one stage of the step, compilation left out, and say what the run is doing."""
        self.log.doing(name)
        began, compiled = time.perf_counter(), _compile_seconds[0]
        yield
        spent = time.perf_counter() - began - (_compile_seconds[0] - compiled)
        self.seconds[f"time/{name}"] += spent

    def record(
        self,
        state: TrainState,
        metrics: Mapping[str, Any],
        *,
        tokens: int,
        samples: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write the step's metrics with its timings, and the responses that are to be shown.

        Raises:
            NumericalError: more updates than `run.skip_budget` were skipped.
        """
        c, step = self.config, int(state.step)
        self.stopping()
        began, compiled, compiles = self._step_began
        compile_time = _compile_seconds[0] - compiled
        step_time = time.perf_counter() - began - compile_time
        self.tokens += tokens
        record = counted(metrics, state, self.tokens) | {
            "step_time": step_time,
            "compile_time": compile_time,
            "compiles": _compiles[0] - compiles,
            "tokens_per_second": tokens / step_time,
            **self.seconds,
            "time/host": step_time - sum(self.seconds.values()),
        }
        if not self.stopped_by and self._is_measured(step):
            try:
                record |= self.evaluate(state)
            except DataError:  # a reward failed under task.reward_errors=stop: the step is whole
                self.log.step(step, record)
                self.save_at_failure(state)
                raise
            self._remember(step, record)
        self.log.step(step, record)
        if samples:
            self.log.samples(step, samples)
        if record["skipped_updates"] > c.run.skip_budget:
            raise NumericalError(
                f"{record['skipped_updates']} updates had a loss or gradient that was not finite, "
                f"more than run.skip_budget={c.run.skip_budget}; lower optim.learning_rate, or "
                "look at the rewards. None of them changed anything, and no checkpoint was lost."
            )

    def save(self, state: TrainState, *, now: bool = False) -> None:
        """A checkpoint in the background: where one falls due, at a new best, a stop, or `now`.

        Raises:
            StorageError: the checkpoint before could not be written.
        """
        step, r = int(state.step), self.config.run
        value = self.measured[1] if self.measured[0] == step else None
        better = value is not None and value > self.best
        due = any(every and step % every == 0 for every in (r.save_every, r.keep_every))
        if r.save_minutes:  # clocks differ between processes
            due |= bool(agreed(time.monotonic() - self.saved_at >= 60 * r.save_minutes))
        if not (now or self.stopped_by or due or better):
            return
        self.log.doing("checkpoint")
        if not all_finite(state.params):
            raise NumericalError(
                f"the parameters are not finite after step {step}, and are not saved. Lower "
                "optim.learning_rate; the same command goes on from the checkpoint before."
            )
        self.best = value if value is not None and better else self.best
        meta = {"step": step, "num_tokens": self.tokens, "kind": self.kind, "measured": value}
        meta |= resume.identity(self.config, self.problems)
        pending = None if self.begun is None else resume.pack(self.begun)
        self.saver.save(step, state, meta, pending=pending)
        self.saved_at = time.monotonic()

    def save_at_failure(self, state: TrainState) -> None:
        """A checkpoint of the steps that are whole, if there are any, where something else failed.

        Of several processes one alone may have failed, and saving takes all of them.
        """
        if int(state.step) == 0 or jax.process_count() > 1:
            return
        with suppress(NumericalError, StorageError):  # the first failure is what is told
            self.save(state, now=True)
            self.saver.wait()

    def finish(self, state: TrainState) -> Result:
        """Save; where the run is complete, measure again, export, and draw its dynamics."""
        step = int(state.step)
        self.save(state, now=True)
        self.saver.wait()
        after = logged_eval(self.log.directory, step)
        if not self.stopping() and agreed(not after):  # it was stopped while that was measured
            after = self._measured(step, state)
        self.stopping()
        if (why := self.stopped_by) is not None:
            self.log.status(why)
            done = told(step, self.begun)
            self.log.say(f"Stopped after {done}; the same command continues from here.")
            return Result(self.directory, step, why, self.before)
        self.log.doing("export")
        card = run_card(self.config, self.policy, self.directory, step)
        out_dir = self.directory / "export"
        export_params(self.policy, state.params, out_dir, card=card, replace=True)
        if is_writer():
            dynamics(self.directory, self.log.say)
        self.log.status("finished")
        return Result(self.directory, step, "finished", self.before, after)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Greedy accuracy and avg@k on held-out problems.

        Nothing if the split is empty, or if the run is to stop: whoever resumes it measures again.
        """
        self.log.doing("evaluate")
        with suppress(Abandoned):
            return evaluate_policy(self.config, self.policy, self.problems, state.params)
        return {}

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def _measured(self, step: int, state: TrainState) -> dict[str, float]:
        """Evaluate, and log it: a line of its own, or a part of the step's."""
        result = self.evaluate(state)
        if result:
            self._remember(step, result)
            self.log.step(step, logged_step(self.log.directory, step) | result)
        return result

    def _remember(self, step: int, record: Mapping[str, Any]) -> None:
        """What decides which checkpoint is the best: avg@k, or greedy accuracy without samples."""
        names = (f"eval/avg@{self.config.eval.samples}", "eval/greedy")
        value = next((record[name] for name in names if name in record), None)
        if value is not None:
            self.measured = step, float(value)


def told(step: int, begun: Begun | None) -> str:
    """ "step 12", or what is done of the next one too."""
    if begun is None:
        return f"step {step}"
    done = len(begun.progress.stats)
    return f"step {step} and {f'{done} updates' if done else 'the rollout'} of the next"


def counted(metrics: Mapping[str, Any], state: TrainState, tokens: int) -> dict[str, Any]:
    """A step's metrics with what adds up over a run."""
    return dict(metrics) | {
        "num_tokens": tokens,
        "updates": int(state.updates),
        "skipped_updates": int(state.skipped),
        **({} if state.spikes is None else {"skipped_spikes": int(state.spikes.skipped)}),
    }

"""One run: its directory, its stop signals, its checkpoints, and how it ends.

`train` and `sft` share this; what differs between them is the step in the middle.
"""

import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import PyTree
from rich.console import Console

from gspo_jax import checkpoint
from gspo_jax.batch import Rollout
from gspo_jax.config import Config, load_config, run_dir, to_yaml
from gspo_jax.critic import make_critic, make_term
from gspo_jax.distributed import agreed, is_writer
from gspo_jax.errors import INTERRUPTED, PREEMPTED, DataError, NumericalError, StorageError
from gspo_jax.evaluate import evaluate_policy
from gspo_jax.metrics import RunLog
from gspo_jax.model_card import model_card, stated
from gspo_jax.models.hf import save_model
from gspo_jax.objective import CriticTerm
from gspo_jax.optim import Optimizer, make_optimizer, make_schedule
from gspo_jax.policy import PLAIN, Passes, Policy, Problems, attention, load_policy
from gspo_jax.report import dynamics, read_metrics
from gspo_jax.sharding import state_shardings
from gspo_jax.tokenizer import token_ids
from gspo_jax.update import CriticState, TrainState, init_state

STOPS: list[Literal["preempted", "interrupted"] | None] = [None, "preempted", "interrupted"]
EXIT_CODES = {"finished": 0, "preempted": PREEMPTED, "interrupted": INTERRUPTED}

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


def make_state(
    config: Config, policy: Policy, updates: int
) -> tuple[Optimizer, Callable[[int], Any], TrainState]:
    """The optimizer, its learning rate by update, and the state before the first step.

    The state takes over the policy's parameters: the first update donates them.
    """
    optimizer, schedule = optimizer_at(config, config.optim.learning_rate, updates)
    shapes = jax.eval_shape(lambda params: init_state(params, optimizer), policy.params)
    shardings = state_shardings(shapes, policy.params, policy.mesh)

    def rest(params):  # as outputs of a program the parameters would be copied
        return init_state(params, optimizer)._replace(params=None)

    start = jax.jit(rest, out_shardings=shardings._replace(params=None))
    return optimizer, schedule, start(policy.params)._replace(params=policy.params)


def add_critic(
    config: Config,
    policy: Policy,
    state: TrainState,
    updates: int,
    how: Passes = PLAIN,
    *,
    shortest_prompt: int = 1,
) -> tuple[TrainState, CriticTerm | None]:
    """The state with the critic that `algo.critic` asks for, and its part in the objective.

    To be called before the first update, which donates the weights that it copies.
    """
    c = config.algo.critic
    if c.kind == "none":
        return state, None
    optimizer, _ = optimizer_at(config, c.learning_rate, updates)
    graphdef, params = make_critic(c.kind, policy.graphdef, policy.params)

    def start(params):
        return CriticState(params, optimizer.init(params))

    shardings = state_shardings(jax.eval_shape(start, params), params, policy.mesh)
    critic = jax.jit(start, out_shardings=shardings)(params)
    term = make_term(
        graphdef,
        optimizer,
        shared=c.kind == "shared",
        clip=c.clip,
        coef=c.coef,
        dtype=policy.dtype,
        remat=how.remat,
        attention=how.attention,
        shortest_prompt=shortest_prompt,
    )
    return state._replace(critic=critic), term


def optimizer_at(
    config: Config, learning_rate: float, updates: int
) -> tuple[Optimizer, optax.Schedule]:
    """The configured optimizer with this peak, and its learning rate by update."""
    c = config.optim
    schedule = make_schedule(learning_rate, kind=c.schedule, warmup=c.warmup, updates=updates)
    optimizer = make_optimizer(
        schedule,
        b1=c.b1,
        b2=c.b2,
        eps=c.eps,
        weight_decay=c.weight_decay,
        max_grad_norm=c.max_grad_norm,
        state=c.state,
    )
    return optimizer, schedule


@contextmanager
def open_run(config: Config, policy: Policy, problems: Problems) -> Iterator["Run"]:
    """Claim the run directory, listen to SIGTERM and Ctrl-C, and give both back at the end."""
    directory = run_dir(config)
    devices = [str(device) for device in policy.mesh.devices.flat]
    log = RunLog(
        directory if is_writer() else directory / "processes" / str(jax.process_index()),
        of=config.run.steps,
        console=None if is_writer() else Console(quiet=True),
        config=to_yaml(config),
        report_to=config.run.report_to,
        devices=devices,
    )
    with log, jax.set_mesh(policy.mesh):
        run = Run(config, policy, problems, log, directory)
        with run.listening():
            yield run


@dataclass
class Run:
    """A run in progress."""

    config: Config
    policy: Policy
    problems: Problems
    log: RunLog
    directory: Path
    before: dict[str, float] = field(default_factory=dict)
    tokens: int = 0  # prompt and response tokens so far
    asked: Literal["preempted", "interrupted"] | None = None  # by a signal to this process
    stopped_by: Literal["preempted", "interrupted"] | None = None  # all processes alike
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def start(self, state: TrainState) -> TrainState:
        """Continue from the newest checkpoint if `run.resume` says so, else measure and begin."""
        found = self._checkpoint_to_resume()
        trouble = attention(self.config, self.policy).trouble
        for warning in [*self.problems.task.warnings, *([trouble] if trouble else [])]:
            self.log.say(f"warning: {warning}", style="yellow")
        if self.problems.too_long:
            self.log.say(
                f"{self.problems.too_long} problems have prompts of more than "
                f"{self.config.task.max_prompt_length} tokens and are left out."
            )
        if found is None:
            self.log.start()
            self.before = self._measured(0, state)
            return state
        root, step = found
        state, meta = checkpoint.restore(root, step, state)
        self.tokens = meta["num_tokens"]
        self.log.start(step)
        self.before = logged_eval(self.log.directory, 0)
        of = self.config.run.steps
        self.log.say(f"Resumed after step {step} of {of}.")
        if step >= of:
            self.log.say("Nothing is left to train: raise run.steps, or choose another run.name.")
        return state

    def steps(self, state: TrainState) -> Iterator[int]:
        """The steps that are left, until a signal asks to stop."""
        for step in range(int(state.step) + 1, self.config.run.steps + 1):
            self.seconds.clear()
            self._step_began = time.perf_counter(), _compile_seconds[0], _compiles[0]
            with self._traced(step):
                yield step
            if self.stopped_by:
                return

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
        rollout: Rollout | None = None,
        adv: np.ndarray | None = None,
    ) -> None:
        """Write the step's metrics with its timings, and now and then some responses.

        Raises:
            NumericalError: more updates than `run.skip_budget` were skipped.
        """
        c, step = self.config, int(state.step)
        self.stopped_by = STOPS[agreed(STOPS.index(self.asked))]
        began, compiled, compiles = self._step_began
        compile_time = _compile_seconds[0] - compiled
        step_time = time.perf_counter() - began - compile_time
        self.tokens += tokens
        record = dict(metrics) | {
            "num_tokens": self.tokens,
            "updates": int(state.updates),
            "skipped_updates": int(state.skipped),
            "step_time": step_time,
            "compile_time": compile_time,
            "compiles": _compiles[0] - compiles,
            "tokens_per_second": tokens / step_time,
            **self.seconds,
            "time/host": step_time - sum(self.seconds.values()),
        }
        last, every = step == c.run.steps, c.eval.every
        if not self.stopped_by and (last or (every and step % every == 0)):
            record |= self.evaluate(state)
        self.log.step(step, record)
        every = c.run.log_completions
        if rollout is not None and adv is not None and every and (step == 1 or step % every == 0):
            self.log.samples(step, sample_rows(rollout, adv))
        if record["skipped_updates"] > c.run.skip_budget:
            raise NumericalError(
                f"{record['skipped_updates']} updates had a loss or gradient that was not finite, "
                f"more than run.skip_budget={c.run.skip_budget}; lower optim.learning_rate, or "
                "look at the rewards. Parameters are those before the first of them."
            )

    def save(self, state: TrainState, *, now: bool = False) -> None:
        """A checkpoint where `run.save_every` falls due, at a stop, or `now`."""
        step, every = int(state.step), self.config.run.save_every
        if now or self.stopped_by or (every and step % every == 0):
            self.log.doing("checkpoint")
            meta = {"step": step, "num_tokens": self.tokens}
            checkpoint.save(self.checkpoints, step, state, meta, keep=self.config.run.keep)

    def finish(self, state: TrainState) -> Result:
        """Save; where the run is complete, measure again, export, and draw its dynamics."""
        step = int(state.step)
        self.save(state, now=True)
        if self.stopped_by:
            self.log.status(self.stopped_by)
            self.log.say(f"Stopped after step {step}; the same command continues from here.")
            return Result(self.directory, step, self.stopped_by, self.before)
        # Measured in its last step, unless it was stopped in the middle of that.
        after = logged_eval(self.log.directory, step)
        if agreed(not after):
            after = self._measured(step, state)
        self.log.doing("export")
        card = run_card(self.config, self.policy, self.directory, step)
        out_dir = self.directory / "export"
        export_params(self.policy, state.params, out_dir, card=card, replace=True)
        if is_writer():
            dynamics(self.directory, self.log.say)
        self.log.status("finished")
        return Result(self.directory, step, "finished", self.before, after)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Greedy accuracy and avg@k on held-out problems; nothing if the split is empty."""
        self.log.doing("evaluate")
        return evaluate_policy(self.config, self.policy, self.problems, state.params)

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C ask for a stop after the step; the same signal again forces it."""

        def ask(number, frame):
            self.asked = "interrupted" if number == signal.SIGINT else "preempted"
            signal.signal(number, lambda *_: os._exit(128 + number))
            self.log.say("Stopping after this step; the same signal again stops at once.")

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        earlier = {n: signal.signal(n, ask) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _checkpoint_to_resume(self) -> tuple[Path, int] | None:
        """(directory, step) of the checkpoint to continue from, as `run.resume` says."""
        resume, found = self.config.run.resume, checkpoint.steps(self.checkpoints)
        if resume == "auto":
            return (self.checkpoints, found[-1]) if found else None
        if resume == "never":
            if found:
                raise StorageError(
                    f"{self.directory} holds checkpoints of steps {found} and run.resume=never; "
                    "choose another run.name, or run.resume=auto to continue them."
                )
            return None
        path = Path(resume)
        if not path.name.isdigit() or not path.is_dir():
            raise StorageError(
                f"run.resume={resume}: not a checkpoint; give auto, never, or a directory such as "
                f"{self.checkpoints / '100'}."
            )
        return path.parent, int(path.name)

    def _measured(self, step: int, state: TrainState) -> dict[str, float]:
        """Evaluate, and log it as a line of its own."""
        result = self.evaluate(state)
        if result:
            self.log.step(step, result)
        return result


def sample_rows(rollout: Rollout, adv: np.ndarray, prompts: int = 4) -> list[dict[str, Any]]:
    """The best and the worst response to each of the first few prompts, for people to read."""
    rows, group = [], len(rollout.texts) // len(rollout.problems)
    if adv.ndim == 2:  # one per token, 0 outside the mask: their mean
        adv = adv.sum(1) / np.maximum(rollout.completions.mask.sum(1), 1)
    for p, problem in enumerate(rollout.problems[:prompts]):
        rewards = np.nan_to_num(rollout.reward[p * group : (p + 1) * group], nan=-np.inf)
        for b in sorted({int(rewards.argmax()), int(rewards.argmin())}):
            row = p * group + b
            rows.append(
                {
                    "prompt": problem.prompt,
                    "completion": rollout.texts[row],
                    "answer": problem.answer,
                    "reward": rollout.reward[row],
                    "advantage": adv[row],
                }
            )
    return rows


def export(run_dir: Path, out_dir: Path) -> Path:
    """The newest checkpoint of a run as a Hugging Face directory.

    Raises:
        StorageError: no run, or no checkpoint in it.
        DataError: `out_dir` is there already.
    """
    run_dir = Path(run_dir)
    found = checkpoint.steps(run_dir / "checkpoints")
    if not found or not (run_dir / "config.yaml").is_file():
        raise StorageError(f"{run_dir}: no checkpoint to export; give the directory of a run.")
    config = load_config(run_dir / "config.yaml")
    policy = load_policy(config)
    with jax.set_mesh(policy.mesh):
        _, _, state = make_state(config, policy, updates=1)
        state, _ = add_critic(config, policy, state, updates=1)
        state, _ = checkpoint.restore(run_dir / "checkpoints", found[-1], state)
    own = Path(out_dir).resolve() == (run_dir / "export").resolve()
    card = run_card(config, policy, run_dir, found[-1])
    return export_params(policy, state.params, Path(out_dir), card=card, replace=own)


def export_params(
    policy: Policy,
    params: PyTree,
    out_dir: Path,
    *,
    card: str | None = None,
    replace: bool = False,
) -> Path:
    """`params` as a Hugging Face directory, with the tokenizer and template of the source.

    Only a run's own export/ is ever replaced, at once; any other directory in the way is refused.
    """
    model = nnx.merge(policy.graphdef, params)
    ids = token_ids(policy.tokenizer)
    save_model(model, out_dir, like=policy.directory, card=card, token_ids=ids, replace=replace)
    return out_dir


def run_card(config: Config, policy: Policy, directory: Path, step: int) -> str:
    """The model card of a run after `step`, with what its metrics.jsonl says."""
    trained = [row for row in logged(directory) if row["step"] > 0]
    return model_card(
        config,
        steps=step,
        # Reinforcement learning logs its rewards; supervised training has none.
        supervised=bool(trained) and not any("reward" in row for row in trained),
        before=logged_eval(directory, 0),
        after=logged_eval(directory, step),
        source=stated(policy.directory),
    )


def logged(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none before the first."""
    try:
        return read_metrics(directory)
    except DataError:
        return []


def logged_eval(directory: Path, step: int) -> dict[str, float]:
    """What was measured at `step`; empty where nothing was."""
    row = next((row for row in logged(directory) if row["step"] == step), {})
    return {name: value for name, value in row.items() if name.startswith("eval/")}

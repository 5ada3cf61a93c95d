"""The loop: seven stages, in this order, under these names.

    1 prompt  2 rollout  3 reward  4 advantage  5 update  6 metrics  7 checkpoint

A step is one rollout and all of its updates. Every random draw and the order of the problems are
functions of (run.seed, step), so a resumed run continues exactly.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, PyTree

from gspo_jax.advantage import Judged, make_advantage
from gspo_jax.algo.advantages import adapted_coef
from gspo_jax.algo.losses import RATIO
from gspo_jax.batch import Problem, Rollout
from gspo_jax.config.load import Config
from gspo_jax.errors import DataError
from gspo_jax.files.stopping import Abandoned
from gspo_jax.mesh.distributed import host, place
from gspo_jax.models.hf.weights import read_model_config
from gspo_jax.plan import costs
from gspo_jax.plan.memory import Sketch, explained, held_by, passes, refuse_hopeless, short_memory
from gspo_jax.policy import (
    Policy,
    Problems,
    load_policy,
    load_problems,
    text_sizes,
    within_positions,
)
from gspo_jax.rollout.dynamic_sampling import fill_with_spread, groups_with_spread
from gspo_jax.rollout.reporting import digest, rollout_metrics, sample_rows
from gspo_jax.rollout.stages import Scorer, sample_completions, score_completions, with_opened
from gspo_jax.rollout.train_rows import text_lengths
from gspo_jax.run.lifecycle import Result, Run, open_run
from gspo_jax.run.resume import Begun
from gspo_jax.start import add_critic, make_state, objective, update_programs
from gspo_jax.update.objective import Metrics, Objective
from gspo_jax.update.optim import Optimizer, schedule_count
from gspo_jax.update.programs import Programs
from gspo_jax.update.state import TrainState
from gspo_jax.update.steps import Progress, continue_updates, old_logps, summarise

KL_HORIZON = 1e4  # responses in which algo.kl.target may move the coefficient by a fifth

Phase = Callable[[str], AbstractContextManager[None]]


def train(config: Config) -> Result:
    """Train `config.model` on `config.task`; the run directory holds everything it leaves.

    Raises:
        ConfigError, DataError, StorageError: found before the first step.
        OutOfMemory: a device has less memory than is needed.
        NumericalError: more than `run.skip_budget` updates were not finite.
    """
    policy = load_policy(config)
    problems = load_problems(config, policy.tokenizer)
    shape = read_model_config(policy.directory)
    problems = within_positions(config, shape, problems)
    loop, state = assemble(config, policy, problems)
    held = held_by(state, dtype=policy.dtype, reference=loop.reference is not None)
    sketch = Sketch(config, shape, policy, problems, state, loop.goal, loop.optimizer, held)
    refuse_hopeless(sketch)
    with open_run(config, policy, problems) as run, jax.set_mesh(policy.mesh), explained(sketch):
        run.log.say(f"Memory: {short_memory(sketch)}.")
        meter = speedometer(sketch, run)
        state = run.start(state)
        for step in run.steps(state):
            resumed = run.begun is not None
            try:
                begun = run.begun or begin(loop, state, step, run.phase)  # 1 prompt ... 4 advantage
            except Abandoned:  # asked to stop, and nothing has changed: no need to finish it
                break
            except DataError:  # a reward failed under task.reward_errors=stop
                run.save_at_failure(state)
                raise
            state, begun = update(loop, state, begun, run.phase, run.stopping)  # 5 update
            if int(state.step) < step:  # stopped between two updates; `finish` saves them
                run.begun = begun
                continue
            run.begun, metrics = None, step_metrics(config, begun)
            metrics |= {} if resumed else meter(*begun.lengths, run.seconds)
            run.record(state, metrics, tokens=begun.tokens, samples=begun.samples)  # 6 metrics
            run.save(state)  # 7 checkpoint
        return run.finish(state)


class Loop(NamedTuple):
    """What the steps of a run are made with."""

    config: Config
    policy: Policy
    problems: Problems
    optimizer: Optimizer
    schedule: Callable[[Any], Any]
    goal: Objective
    programs: Programs
    reference: PyTree | None
    advantage: Callable[[TrainState, Rollout], Judged]


def assemble(
    config: Config, policy: Policy | None = None, problems: Problems | None = None
) -> tuple[Loop, TrainState]:
    """The programs of a run, and the state before its first step; it takes the policy's weights."""
    policy = policy or load_policy(config)
    problems = problems or load_problems(config, policy.tokenizer)
    updates = config.run.steps * config.algo.minibatches * config.algo.epochs
    optimizer, schedule, state = make_state(config, policy, updates)
    held = held_by(state, dtype=policy.dtype, reference=config.algo.kl.coef > 0)
    sizes = text_sizes(config, problems, policy.mesh)
    how = passes(config, policy, read_model_config(policy.directory), held, sizes)
    shortest = problems.shortest
    state, critic = add_critic(config, policy, state, updates, how, shortest_prompt=shortest)
    reference = jax.tree.map(jnp.copy, policy.params) if config.algo.kl.coef else None
    goal = objective(config, policy, problems, how, critic)
    programs = update_programs(config, policy, optimizer, goal, state)
    advantage = make_advantage(config, policy, goal, programs, reference)
    made = Loop(config, policy, problems, optimizer, schedule, goal, programs, reference, advantage)
    return made, state


def begin(loop: Loop, state: TrainState, step: int, phase: Phase = nullcontext) -> Begun:
    """A step up to its updates; `phase` is entered for each stage of it."""
    roll, mask_truncated = loop.config.rollout, loop.config.algo.mask_truncated
    draw = partial(sample, loop, state, step, phase)  # 1 prompt, 2 rollout, 3 reward
    rollout, everything = fill_with_spread(draw, roll.prompts, 1 + roll.resample, mask_truncated)
    with phase("advantage"):
        return judge(loop, state, step, rollout, everything)  # 4 advantage


def judge(loop: Loop, state: TrainState, step: int, rollout: Rollout, everything: Rollout) -> Begun:
    """A rollout with its advantages, ready to be learned from; `everything` is reported on."""
    every, prompts = loop.config.run.log_completions, loop.config.rollout.prompts
    judged = loop.advantage(state, rollout)
    metrics = rollout_metrics(everything) | judged.metrics
    metrics["completions/digest"] = digest(everything.completions)
    metrics["learning_rate"] = float(loop.schedule(schedule_count(state.opt_state)))
    with_spread = groups_with_spread(rollout, loop.config.algo.mask_truncated)
    metrics["groups_without_spread"] = prompts - len(with_spread)
    shown = every and (step == 1 or step % every == 0)
    return Begun(
        Progress(judged.batch, judged.ref_logp, judged.targets),
        rollout.completions._replace(routing=None),
        metrics,
        sample_rows(rollout, np.asarray(judged.batch.adv)) if shown else [],
        text_lengths(everything),
    )


def update(
    loop: Loop,
    state: TrainState,
    begun: Begun,
    phase: Phase = nullcontext,
    stop: Callable[[], bool] = lambda: False,
    hold: Callable[[TrainState], None] = lambda state: None,
) -> tuple[TrainState, Begun]:
    """The updates of a step, or those of them that come before a stop; `state` is donated, and
    `hold` is given its successor after each."""
    algo = loop.config.algo
    state, progress = continue_updates(
        loop.programs,
        state,
        begun.progress,
        minibatches=algo.minibatches,
        epochs=algo.epochs,
        phase=phase,
        stop=stop,
        hold=hold,
    )
    begun = begun._replace(progress=progress)
    if len(progress.stats) == algo.minibatches * algo.epochs:
        state = steer(loop.config, state, begun.metrics)
    return state, begun


def steer(config: Config, state: TrainState, metrics: Metrics) -> TrainState:
    """The state after a step, its KL coefficient moved towards algo.kl.target if there is one."""
    kl, roll, coef = config.algo.kl, config.rollout, state.kl_coef
    if coef is None:
        return state
    adapted = adapted_coef(
        float(host(coef)),
        metrics["kl"],
        target=kl.target,
        horizon=KL_HORIZON,
        count=roll.prompts * roll.group_size,
    )
    return state._replace(kl_coef=place(np.float32(adapted), coef.sharding))


def step_metrics(config: Config, begun: Begun) -> Metrics:
    """What the rollout of a step and all its updates have to say."""
    stats = summarise(begun.progress.stats)
    stats |= mismatch(old_logps(begun.progress), begun.completions.logp, begun.progress.batch.mask)
    return begun.metrics | stats | trl_names(stats, config.algo.loss["name"])


def sample(loop: Loop, state: TrainState, step: int, phase: Phase, number: int) -> Rollout:
    """Round `number` of a step: its own prompts, their responses, and their scores.

    Each step has a stretch of the order of problems to itself, long enough for all its rounds.
    """
    c, roll = loop.config, loop.config.rollout
    first = ((step - 1) * (1 + roll.resample) + number) * roll.prompts
    total = c.run.steps * (1 + roll.resample) * roll.prompts
    chosen = loop.problems.visit(first, roll.prompts, total=total, seed=c.run.seed)
    asked = loop.problems.get("train", chosen)  # 1 prompt
    scorer = loop.problems.scorer
    return respond(loop, state, step, asked, scorer, phase, first_prompt=number * roll.prompts)


def respond(
    loop: Loop,
    state: TrainState,
    step: int,
    asked: list[Problem],
    scorer: Scorer,
    phase: Phase = nullcontext,
    *,
    first_prompt: int = 0,
) -> Rollout:
    """The policy's responses to these problems, and their scores."""
    c, roll = loop.config, loop.config.rollout
    asked = with_opened(loop.policy.tokenizer, asked)
    with phase("generate"):
        prompts = loop.policy.tokenizer.encode_prompts([p.prompt for p in asked])
        completions, texts = sample_completions(  # 2 rollout
            loop.policy.sampler(state.params),
            loop.policy.tokenizer,
            prompts,
            key=jax.random.fold_in(jax.random.key(c.run.seed), step),
            group_size=roll.group_size,
            max_new_tokens=roll.max_completion_length,
            temperature=roll.temperature,
            top_p=roll.top_p,
            top_k=roll.top_k,
            first_prompt=first_prompt,
            record_routing=c.algo.routing_replay == "R3",
        )
    with phase("reward"):
        return score_completions(  # 3 reward
            partial(scorer, step=step),
            asked,
            prompts,
            completions,
            texts,
            overlong_buffer=roll.overlong_buffer,
        )


def speedometer(sketch: Sketch, run: Run) -> Callable[..., Metrics]:
    """`costs.utilisation` of a step, from its texts' lengths and its times; see `costs.metered`."""
    config, policy = sketch.config, sketch.policy
    peak = costs.peak(policy.dtype)
    run.log.say(f"Speed: {costs.shown(peak)}.")
    of = partial(
        costs.utilisation,
        sketch.shape,
        group_size=config.rollout.group_size,
        epochs=config.algo.epochs,
        itemsize=jnp.dtype(policy.dtype).itemsize,
        devices=policy.mesh.size,
    )
    measure = partial(costs.peak, policy.dtype)
    return costs.metered(of, measure, peak, partial(run.log.say, style="yellow"))


def trl_names(metrics: Metrics, loss: str) -> Metrics:
    """The clip fractions once more under TRL's names, so that its dashboards read our runs.

    As there, the region is a share of responses where the ratio is one per response, and of
    tokens where it is one per token; low and high are shares of tokens here in either case.
    """
    # A loss that the user has added to LOSSES has no entry.
    region = "clip_frac_seq" if RATIO.get(loss) == "sequence" else "clip_frac"
    return {
        "clip_ratio/region_mean": metrics[region],
        "clip_ratio/low_mean": metrics["clip_frac_low"],
        "clip_ratio/high_mean": metrics["clip_frac_high"],
    }


def mismatch(
    old_logp: Float[np.ndarray, "B T"],
    rollout_logp: Float[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
) -> dict[str, float]:
    """|log π_old of the training program - that of the sampler|, over tokens that are trained on.

    Zero in exact arithmetic; what is left is the rounding of two programs. It should stay far
    below the clip range times the response length.
    """
    difference = np.abs(old_logp - rollout_logp)[mask]
    name = "sampling/sampling_logp_difference"
    difference = difference if difference.size else np.zeros(1)
    return {f"{name}/mean": float(difference.mean()), f"{name}/max": float(difference.max())}

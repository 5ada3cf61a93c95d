"""The update: one rollout becomes minibatches x epochs optimizer steps, in jitted programs.

    score     log π_old of the minibatches that will be visited after the policy has moved
    add       the microbatches' shares of the gradient, into donated accumulators
    apply     clip, Adam, skip if not finite; the metrics

The first minibatch needs no scoring: there π_θ = π_old, so its old log-probabilities are its own
(stop_gradient), its ratio is exactly 1 and nothing can be clipped. The other minibatches' come
from the training program's own forward on the same shapes, never from the sampler: GSPO's clip
band is as narrow as the noise between two programs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from gspo_jax.batch import TrainBatch
from gspo_jax.microbatch import Microbatches, fold, pick, put, split, take
from gspo_jax.models.remat import compiler_options
from gspo_jax.objective import (
    Forward,
    Given,
    Gradients,
    Metrics,
    Objective,
    Targets,
    forward,
    measure,
    pad_to,
    share_of_loss,
)
from gspo_jax.sharding import batch_ways, regathers


class CriticState(NamedTuple):
    """What is trained beside the policy where the advantage needs a critic."""

    params: PyTree
    opt_state: PyTree


class TrainState(NamedTuple):
    """All that a run carries from step to step; a checkpoint is this and the configuration."""

    params: PyTree
    opt_state: PyTree
    step: Int[Array, ""]  # rollouts done
    updates: Int[Array, ""]  # optimizer updates done
    skipped: Int[Array, ""]  # updates skipped because a number was not finite
    critic: CriticState | None = None  # has no leaves where there is none


class Scored(NamedTuple):
    """What a policy says of a batch: log-probabilities, and the experts that it chose."""

    logp: Float[Array, "B T"]
    experts: Int[Array, "B S M X"] | None = None


class Accumulated(NamedTuple):
    """What the microbatches so far have left."""

    grads: Gradients
    found: Forward  # of every row of the minibatch; zeros where it is still to come


class Programs(NamedTuple):
    """The update stage: three functions, and the jitted programs that they call.

    Attributes:
        score: (params, batch) -> Scored.
        update: (state, batch, old_logp, ref_logp, targets) -> (state, metrics, Scored before the
            update); donates `state`. `old_logp` None means on-policy; `ref_logp` is None without
            a KL term in the loss, `targets` without a critic.
        accumulate: (Gradients of weights, batch, ...) -> the gradients and what was found, with
            the placed batch; the first half of `update`.
        blank, look, start, add, apply: see `make_programs`.
    """

    score: Callable[[PyTree, TrainBatch], Scored]
    update: Callable[..., tuple[TrainState, Metrics, Scored]]
    accumulate: Callable[..., tuple[Accumulated, TrainBatch, Given]]
    blank: Any
    look: Any
    start: Any
    add: Any
    apply: Any


def init_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(params, optimizer.init(params), jnp.int32(0), jnp.int32(0), jnp.int32(0))


def make_programs(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    shardings: TrainState | None = None,
    *,
    place: Callable[[PyTree], PyTree] = lambda x: jax.tree.map(jnp.asarray, x),
) -> Programs:
    """Bind the network, the optimizer and the objective into `score` and `update`.

        score    blank: zeros for every row;    look: the rows of one width, filled in
        update   start: zeros for gradients and rows;    add: those of one width, added;    apply

    Args:
        shardings: of the state, so that every new one lives where the old one did.
        place: puts a batch on the devices.
    """
    # `None` leaves the placement of what is found to the compiler.
    kept: Any = None
    if shardings is not None:
        kept = Accumulated._make((_gradients_of(shardings), None))

    @partial(jax.jit, static_argnames="width", donate_argnums=0)
    def look(so_far: Scored, params: PyTree, batch: TrainBatch, rows, count, *, width) -> Scored:
        def one(so_far: Scored, rows) -> Scored:
            found = forward(graphdef, params, take(batch, rows, width), objective)[1]
            return put(so_far, _scored(found), rows)

        return fold(one, Microbatches(rows, count, width), so_far)

    @jax.jit
    def blank(params: PyTree, batch: TrainBatch) -> Scored:
        return _scored(_zeros_of(graphdef, Gradients(params), batch, objective))

    @partial(jax.jit, out_shardings=kept)
    def start(trained: Gradients, batch: TrainBatch) -> Accumulated:
        zeros = _zeros_of(graphdef, trained, batch, objective)
        return Accumulated(jax.tree.map(jnp.zeros_like, trained), zeros)

    @partial(
        jax.jit,
        static_argnames="width",
        donate_argnums=0,
        out_shardings=kept,
        compiler_options=compiler_options(objective.remat, regathers(shardings)),
    )
    def add(so_far: Accumulated, trained, batch, given: Given, rows, count, *, width):
        gradient = jax.grad(share_of_loss(graphdef, batch, objective), has_aux=True)

        def one(so_far: Accumulated, rows) -> Accumulated:
            grads, found = gradient(trained, take(batch, rows, width), pick(given, rows))
            grads = jax.tree.map(jnp.add, so_far.grads, grads)
            return Accumulated(grads, put(so_far.found, found, rows))

        return fold(one, Microbatches(rows, count, width), so_far)

    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None, None))
    def apply(state: TrainState, total: Accumulated, batch: TrainBatch, given: Given):
        metrics, finite = measure(total.grads, total.found, batch, given, objective)
        state = apply_if_finite(state, total.grads, optimizer, objective, finite)
        return state, metrics, _scored(total.found)

    def score(params: PyTree, batch: TrainBatch) -> Scored:
        parts, placed = microbatches(batch, objective), place(batch)
        scored = blank(params, placed)
        for rows, count, width in parts:
            scored = look(scored, params, placed, rows, np.int32(count), width=width)
        return scored

    def accumulate(
        trained: Gradients, batch: TrainBatch, old_logp=None, ref_logp=None, targets=None
    ) -> tuple[Accumulated, TrainBatch, Given]:
        parts, placed = microbatches(batch, objective), place(batch)
        if old_logp is None:  # NaN stands for the policy itself: one program serves both
            old_logp = np.full(batch.mask.shape, np.nan, np.float32)
        given = place(Given(old_logp, ref_logp, targets))
        total = start(trained, placed)
        for rows, count, width in parts:
            total = add(total, trained, placed, given, rows, np.int32(count), width=width)
        return total, placed, given

    def update(state: TrainState, batch: TrainBatch, old_logp=None, ref_logp=None, targets=None):
        total = accumulate(_gradients_of(state), batch, old_logp, ref_logp, targets)
        return apply(state, *total)

    return Programs(score, update, accumulate, blank, look, start, add, apply)


def microbatches(batch: TrainBatch, objective: Objective) -> list[Microbatches]:
    """How the rows of a minibatch are grouped; needs their lengths on the host."""
    length = np.asarray(batch.prompt_length) + np.asarray(batch.mask).sum(1)
    longest = objective.longest or batch.tokens.shape[1]
    return split(length, longest, tokens=objective.microbatch, ways=batch_ways())


def apply_if_finite(
    state: TrainState,
    grads: Gradients,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    finite: Bool[Array, ""],
) -> TrainState:
    """One optimizer update, or the very same parameters and moments with one more skip counted."""

    def step(optimizer, grads, params, opt_state):
        def apply(params, opt_state):
            with jax.numpy_dtype_promotion("standard"):  # optax relies on implicit promotion
                steps, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, steps), opt_state

        return jax.lax.cond(finite, apply, lambda *same: same, params, opt_state)

    params, opt_state = step(optimizer, grads.policy, state.params, state.opt_state)
    critic = state.critic
    if critic is not None and objective.critic is not None:
        critic = CriticState(*step(objective.critic.optimizer, grads.critic, *critic))
    done = finite.astype(jnp.int32)
    return TrainState(
        params, opt_state, state.step, state.updates + done, state.skipped + 1 - done, critic
    )


def update_on_rollout(
    programs: Programs,
    state: TrainState,
    batch: TrainBatch,
    *,
    minibatches: int,
    epochs: int = 1,
    ref_logp: Float[Array, "B T"] | None = None,
    targets: Targets | None = None,
    phase: Callable[[str], AbstractContextManager[None]] = nullcontext,
) -> tuple[TrainState, list[Metrics], Float[np.ndarray, "B T"]]:
    """All updates of one rollout in order, the metrics of each, and log π_old of all rows.

    Args:
        programs: from `make_programs`; `state` is donated.
        batch: the rollout's rows on the host; contiguous blocks of them are the minibatches.
        minibatches: updates per epoch; must divide the rows.
        epochs: passes over the rollout.
        ref_logp: reference log-probabilities, where the objective has a KL term.
        targets: values and returns on the host, where the objective has a critic.
        phase: entered for "old_logp" and for "update", to time them.
    """
    parts = _blocks(batch, minibatches)
    refs = [None] * minibatches if ref_logp is None else _blocks(ref_logp, minibatches)
    goals = [None] * minibatches if targets is None else _blocks(targets, minibatches)
    # The first update is on-policy by construction, and tells its own π_old; the others' is needed
    # before the policy moves.
    old: list[Scored | None] = [None]
    with phase("old_logp"):
        old += [programs.score(state.params, part) for part in parts[1:]]
        jax.block_until_ready(old)
    metrics = []
    with phase("update"):
        for i, part in enumerate(parts * epochs):
            i %= minibatches
            known = old[i]
            if known is not None and part.routing is None:
                part = part._replace(routing=known.experts)
            known_logp = None if known is None else known.logp
            state, stats, scored = programs.update(state, part, known_logp, refs[i], goals[i])
            metrics.append(stats)
            old[i] = scored if known is None else known
        jax.block_until_ready(metrics)
    logp = [jax.device_get(scored.logp) for scored in old if scored is not None]
    return state._replace(step=state.step + 1), metrics, np.concatenate(logp)


def _zeros_of(graphdef, trained: Gradients, batch: TrainBatch, objective: Objective) -> Forward:
    """Zeros in the shapes of what the forward pass of a whole minibatch finds."""

    def find() -> Forward:
        states, found = forward(graphdef, trained.policy, batch, objective)
        if objective.critic is None or trained.critic is None:
            return found
        value = objective.critic.values(trained.critic, batch, states)
        return found._replace(value=pad_to(value, batch.mask.shape[1]))

    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(find))


def _scored(found: Forward) -> Scored:
    return Scored(found.logp, None if found.routing is None else found.routing.experts)


def _gradients_of(state: TrainState) -> Gradients:
    return Gradients(state.params, None if state.critic is None else state.critic.params)


def _blocks(tree: PyTree, count: int) -> list[PyTree]:
    """`count` contiguous blocks of the leading axis."""
    size = jax.tree.leaves(tree)[0].shape[0] // count
    return [jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], tree) for i in range(count)]


def summarise(per_update: list[Metrics]) -> Metrics:
    """A step's metrics from those of its updates: means, extremes, and lists of what differs."""
    host = jax.device_get(per_update)
    summary: Metrics = {}
    for name in dict.fromkeys(name for m in host for name in m):
        values = [float(m[name]) for m in host if name in m]
        combine = min if name.endswith("_min") else max if name.endswith("_max") else np.mean
        summary[name] = float(combine(values))
        if name in ("clip_frac", "ratio_std", "loss", "router/changed"):
            summary[f"{name}_by_update"] = values
    return summary

"""The update: one rollout becomes minibatches x epochs optimizer steps, in jitted programs.

    score     log π_old of the minibatches that will be visited after the policy has moved
    add       the microbatches' shares of the gradient, into donated accumulators
    apply     clip, Adam, unless the gradient is not finite, a spike or zero; the metrics

The first minibatch needs no scoring: there π_θ = π_old, so its old log-probabilities are its own
(stop_gradient), its ratio is exactly 1 and nothing can be clipped. The other minibatches' come
from the training program's own forward on the same shapes, never from the sampler: GSPO's clip
band is as narrow as the noise between two programs.
"""

from collections.abc import Callable, Mapping, Sequence
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
from gspo_jax.files.stopping import uninterrupted
from gspo_jax.mesh.distributed import host
from gspo_jax.mesh.sharding import batch_ways, regathers
from gspo_jax.models.remat import compiler_options
from gspo_jax.numbers.tally import Tally, merged, numbers
from gspo_jax.update.microbatch import Microbatches, fold, pick, put, split, take
from gspo_jax.update.objective import (
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
from gspo_jax.update.optim import LeafByLeaf, Optimizer, let_pass
from gspo_jax.update.spikes import Spikes, empty_window, is_spike, remember


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
    spikes: Spikes | None = None  # likewise
    kl_coef: Float[Array, ""] | None = None  # likewise; the weight of a penalty that is steered


class Scored(NamedTuple):
    """What a policy says of a batch: log-probabilities, and the experts that it chose."""

    logp: Float[Any, "B T"]
    experts: Int[Any, "B S M X"] | None = None


class Pending(NamedTuple):
    """A rollout and how far its updates have come.

    Attributes:
        batch, ref_logp, targets: as of `update_on_rollout`.
        old: what the policy at the start says of each minibatch, None for the first until its
            update is done; empty before any was asked for.
        stats: the metrics of each update that is done.
    """

    batch: TrainBatch
    ref_logp: Float[Any, "B T"] | None = None
    targets: Targets | None = None
    old: tuple[Scored | None, ...] = ()
    stats: tuple[dict[str, Tally], ...] = ()


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
            a KL term in the loss, `targets` without a critic. `phase`, entered for "update" and
            for "optimizer", times them.
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


def init_state(
    params: PyTree, optimizer: Optimizer, *, spikes: bool = False, kl_coef: float | None = None
) -> TrainState:
    """The state before the first step; with `spikes`, what is needed to skip those, and with
    `kl_coef` the weight from which a steered KL penalty begins."""
    counts = [jnp.int32(0) for _ in range(3)]  # buffers of their own: all are donated
    return TrainState(
        params,
        optimizer.init(params),
        *counts,
        spikes=empty_window() if spikes else None,
        kl_coef=None if kl_coef is None else jnp.float32(kl_coef),
    )


def make_programs(
    graphdef: nnx.GraphDef,
    optimizer: Optimizer,
    objective: Objective,
    shardings: TrainState | None = None,
    *,
    place: Callable[[PyTree], PyTree] = lambda x: jax.tree.map(jnp.asarray, x),
    spike_sigmas: float = 0.0,
) -> Programs:
    """Bind the network, the optimizer and the objective into `score` and `update`.

        score    blank: zeros for every row;    look: the rows of one width, filled in
        update   start: zeros for gradients and rows;    add: those of one width, added;    apply

    Args:
        shardings: of the state, so that every new one lives where the old one did.
        place: puts a batch on the devices.
        spike_sigmas: where the state has `spikes`, what counts as one.
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
        norm, spike = metrics["grad_norm"].value, jnp.bool_(False)
        if state.spikes is not None:
            spike = finite & is_spike(state.spikes, norm, spike_sigmas)
            taken = finite & ~spike & (norm > 0)
            state = state._replace(spikes=remember(state.spikes, norm, state.updates, spike, taken))
        state = apply_guarded(state, total.grads, optimizer, objective, norm, finite, spike)
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

    def update(state, *data, phase=nullcontext, hold=lambda state: None):
        with phase("update"):
            total = accumulate(_gradients_of(state), *data)
            jax.block_until_ready(total)
        with phase("optimizer"):
            with uninterrupted():  # between the end of the former state and its successor's owner
                found = apply(state, *total)
                hold(found[0])
            return jax.block_until_ready(found)

    return Programs(score, update, accumulate, blank, look, start, add, apply)


def microbatches(batch: TrainBatch, objective: Objective) -> list[Microbatches]:
    """How the rows of a minibatch are grouped; needs their lengths on the host.

    Rows of which nothing is trained on are left out: what is found of them stays 0.
    """
    length = np.asarray(batch.prompt_length) + np.asarray(batch.length)
    length = np.where(np.asarray(batch.mask).any(1), length, 0)
    longest = objective.longest or batch.tokens.shape[1]
    return split(length, longest, tokens=objective.microbatch, ways=batch_ways())


def apply_guarded(
    state: TrainState,
    grads: Gradients,
    optimizer: Optimizer,
    objective: Objective,
    norm: Float[Array, ""],
    finite: Bool[Array, ""],
    spike: Bool[Array, ""],
) -> TrainState:
    """One optimizer update, or the very same parameters and moments.

    What is not finite, or a spike, moves nothing. A policy gradient that is exactly zero (every
    advantage is, and no other term has a gradient) does not move the policy: Adam's momentum and
    the weight decay would, though nothing was learned. It counts neither as update nor as skipped.
    The learning rate's schedule goes on in any case, as the run does (`optim.let_pass`).
    """

    def step(optimizer, grads, params, opt_state, good):
        def apply(params, opt_state):
            steps, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, steps), opt_state

        with jax.numpy_dtype_promotion("standard"):  # optax relies on implicit promotion
            if isinstance(optimizer, LeafByLeaf):
                return optimizer.step(grads, opt_state, params, good)

            def none(params, opt_state):
                return params, let_pass(opt_state)

            return jax.lax.cond(good, apply, none, params, opt_state)

    good = finite & ~spike
    moved = good & (norm > 0)
    params, opt_state = step(optimizer, grads.policy, state.params, state.opt_state, moved)
    critic = state.critic
    if critic is not None and objective.critic is not None:
        critic = CriticState(*step(objective.critic.optimizer, grads.critic, *critic, good))
    return state._replace(
        params=params,
        opt_state=opt_state,
        updates=state.updates + moved.astype(jnp.int32),
        skipped=state.skipped + (~finite).astype(jnp.int32),
        critic=critic,
    )


@jax.jit
def all_finite(params: PyTree) -> Bool[Array, ""]:
    """Whether every number in a tree is finite."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]).all()


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
) -> tuple[TrainState, list[dict[str, Tally]], Float[np.ndarray, "B T"]]:
    """All updates of one rollout in order, the metrics of each, and log π_old of all rows.

    Args:
        programs: from `make_programs`; `state` is donated.
        batch: the rollout's rows on the host; contiguous blocks of them are the minibatches.
        minibatches: updates per epoch; must divide the rows.
        epochs: passes over the rollout.
        ref_logp: reference log-probabilities, where the objective has a KL term.
        targets: values and returns on the host, where the objective has a critic.
        phase: entered for "old_logp", "update" (the gradient) and "optimizer", to time them.
    """
    pending = Pending(batch, ref_logp, targets)
    state, done = continue_updates(
        programs, state, pending, minibatches=minibatches, epochs=epochs, phase=phase
    )
    return state, list(done.stats), old_logps(done)


def continue_updates(
    programs: Programs,
    state: TrainState,
    pending: Pending,
    *,
    minibatches: int,
    epochs: int = 1,
    phase: Callable[[str], AbstractContextManager[None]] = nullcontext,
    stop: Callable[[], bool] = lambda: False,
    hold: Callable[[TrainState], None] = lambda state: None,
) -> tuple[TrainState, Pending]:
    """The updates of a rollout that are left, or some of them: `stop` is asked before each.

    Continuing later, from what is returned, gives bit for bit what would have come without a stop.
    `state.step` counts the rollout once all its updates are done.

    Args:
        programs, minibatches, epochs, phase: as of `update_on_rollout`; `state` is donated.
        hold: given the state after each update at once, so that whatever interrupts the next one
            leaves its caller with what is whole.
    """
    parts, total = _blocks(pending.batch, minibatches), minibatches * epochs
    refs, goals = (
        [None] * minibatches if tree is None else _blocks(tree, minibatches)
        for tree in (pending.ref_logp, pending.targets)
    )
    if stop():
        return state, pending
    old, stats = list(pending.old), list(pending.stats)
    if not old:
        # The first update is on-policy by construction, and tells its own π_old; the others' is
        # needed before the policy moves.
        with phase("old_logp"):
            old = [None, *(programs.score(state.params, part) for part in parts[1:])]
            jax.block_until_ready(old)
    for i in range(len(stats), total):
        if stop():
            break
        i %= minibatches
        known, part = old[i], parts[i]
        if known is not None and part.routing is None:
            part = part._replace(routing=known.experts)
        known_logp = None if known is None else known.logp
        state, metrics, scored = programs.update(
            state, part, known_logp, refs[i], goals[i], phase=phase, hold=hold
        )
        stats.append(metrics)
        old[i] = scored if known is None else known
    state = state._replace(step=state.step + int(len(stats) == total))
    return state, pending._replace(old=tuple(old), stats=tuple(stats))


def old_logps(done: Pending) -> Float[np.ndarray, "B T"]:
    """log π_old of all rows of a rollout, once every minibatch has had its update."""
    return np.concatenate([host(x.logp) for x in done.old if x is not None])


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


BY_UPDATE = ("clip_frac", "loss", "router/changed", "ratio_std")
BY_UPDATE += ("ratio_q05", "ratio_q50", "ratio_q95")


def summarise(per_update: Sequence[Mapping[str, Tally]]) -> Metrics:
    """A step's metrics from those of its updates: `tally.merged`, and lists of what differs."""
    per_update = jax.device_get(per_update)
    updates = [numbers(update) for update in per_update]
    by_update = {name: [u[name] for u in updates if name in u] for name in BY_UPDATE}
    listed = {f"{name}_by_update": values for name, values in by_update.items() if values}
    return numbers(merged(per_update)) | listed

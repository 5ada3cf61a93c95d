"""The jitted programs of an update, and how a minibatch goes through them.

    logps     log π_old of a minibatch that will be visited after the policy has moved:
              `start_logps`, zeros for every row; `add_logps`, the rows of one width, filled in
    update    `start_grads`, zeros for the gradient and for what is found; `add_grads`, the
              microbatches' shares of it, of one width, into donated accumulators; `apply`: clip,
              Adam, unless the gradient is not finite, a spike or zero, and the metrics

These five are plain functions of arrays, after arguments that are fixed for a run;
`make_programs` binds those, and says which buffers are donated and where the results live.
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
from jax.stages import Wrapped
from jaxtyping import Array, Bool, Float, Int, PyTree

from gspo_jax.batch import TrainBatch
from gspo_jax.files.stopping import uninterrupted
from gspo_jax.mesh.sharding import batch_ways
from gspo_jax.models.remat import compiler_options
from gspo_jax.numbers.tally import Tally
from gspo_jax.update.microbatch import Microbatches, fold, pick, put, split, take
from gspo_jax.update.objective import (
    Forward,
    Given,
    Gradients,
    Objective,
    Targets,
    forward,
    measure,
    pad_to,
    share_of_loss,
)
from gspo_jax.update.optim import LeafByLeaf, Optimizer, let_pass
from gspo_jax.update.spikes import is_spike, remember
from gspo_jax.update.state import CriticState, TrainState


class LogProbs(NamedTuple):
    """What a policy says of a batch: log-probabilities, and the experts that it chose."""

    logp: Float[Any, "B T"]
    experts: Int[Any, "B S M X"] | None = None


class Accumulated(NamedTuple):
    """What the microbatches so far have left."""

    grads: Gradients
    found: Forward  # of every row of the minibatch; zeros where it is still to come


def start_logps(
    graphdef: nnx.GraphDef, objective: Objective, params: PyTree, batch: TrainBatch
) -> LogProbs:
    """What `add_logps` fills in, with zeros for every row."""
    return _logps_of(_zeros_of(graphdef, objective, Gradients(params), batch))


def add_logps(
    graphdef: nnx.GraphDef,
    objective: Objective,
    so_far: LogProbs,
    params: PyTree,
    batch: TrainBatch,
    rows: Int[Array, "K m"],
    count: Int[Array, ""],
    *,
    width: int,
) -> LogProbs:
    """`so_far` with what the policy says of these rows, microbatch after microbatch.

    Args:
        rows, count, width: of `Microbatches`: the first `count` rows of `rows` are run.
    """

    def fill_in(so_far: LogProbs, rows: Array) -> LogProbs:
        found = forward(graphdef, params, take(batch, rows, width), objective)[1]
        return put(so_far, _logps_of(found), rows)

    return fold(fill_in, Microbatches(rows, count, width), so_far)


def start_grads(
    graphdef: nnx.GraphDef, objective: Objective, trained: Gradients, batch: TrainBatch
) -> Accumulated:
    """What `add_grads` adds to: zeros for every gradient and for every row."""
    zeros = _zeros_of(graphdef, objective, trained, batch)
    return Accumulated(jax.tree.map(jnp.zeros_like, trained), zeros)


def add_grads(
    graphdef: nnx.GraphDef,
    objective: Objective,
    so_far: Accumulated,
    trained: Gradients,
    batch: TrainBatch,
    given: Given,
    rows: Int[Array, "K m"],
    count: Int[Array, ""],
    *,
    width: int,
) -> Accumulated:
    """`so_far` with these rows' share of the gradient added, and what was found of them.

    Args:
        trained: the weights, one leaf per gradient.
        rows, count, width: as of `add_logps`.
    """
    gradient = jax.grad(share_of_loss(graphdef, batch, objective), has_aux=True)

    def add_share(so_far: Accumulated, rows: Array) -> Accumulated:
        share, found = gradient(trained, take(batch, rows, width), pick(given, rows))
        grads = jax.tree.map(jnp.add, so_far.grads, share)
        return Accumulated(grads, put(so_far.found, found, rows))

    return fold(add_share, Microbatches(rows, count, width), so_far)


def apply(
    optimizer: Optimizer,
    objective: Objective,
    spike_sigmas: float,
    state: TrainState,
    total: Accumulated,
    batch: TrainBatch,
    given: Given,
) -> tuple[TrainState, dict[str, Tally], LogProbs]:
    """The state after one update, its metrics, and what the policy said before it."""
    metrics, finite = measure(total.grads, total.found, batch, given, objective)
    norm, spike = metrics["grad_norm"].value, jnp.bool_(False)
    if state.spikes is not None:
        spike = finite & is_spike(state.spikes, norm, spike_sigmas)
        taken = finite & ~spike & (norm > 0)
        state = state._replace(spikes=remember(state.spikes, norm, state.updates, spike, taken))
    state = apply_guarded(state, total.grads, optimizer, objective, norm, finite, spike)
    return state, metrics, _logps_of(total.found)


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
        def move(params, opt_state):
            steps, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, steps), opt_state

        with jax.numpy_dtype_promotion("standard"):  # optax relies on implicit promotion
            if isinstance(optimizer, LeafByLeaf):
                return optimizer.step(grads, opt_state, params, good)

            def stay(params, opt_state):
                return params, let_pass(opt_state)

            return jax.lax.cond(good, move, stay, params, opt_state)

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


class Programs(NamedTuple):
    """The jitted programs of a run's updates.

    Attributes:
        objective: what they minimise; how rows are grouped stands in it.
        place: puts a batch, or what belongs to its rows, on the devices.
        start_logps, add_logps, start_grads, add_grads, apply: the functions of this module, but
            for their fixed arguments; `add_logps` and `add_grads` donate what they fill in,
            `apply` donates the state.
    """

    objective: Objective
    place: Callable[[PyTree], PyTree]
    start_logps: Wrapped
    add_logps: Wrapped
    start_grads: Wrapped
    add_grads: Wrapped
    apply: Wrapped

    def logps(self, params: PyTree, batch: TrainBatch) -> LogProbs:
        """What the policy with these parameters says of a batch that lies on the host."""
        parts, placed = microbatches(batch, self.objective), self.place(batch)
        found = self.start_logps(params, placed)
        for rows, count, width in parts:
            found = self.add_logps(found, params, placed, rows, np.int32(count), width=width)
        return found

    def accumulate(
        self,
        trained: Gradients,
        batch: TrainBatch,
        old_logp: Float[Any, "B T"] | None = None,
        ref_logp: Float[Any, "B T"] | None = None,
        targets: Targets | None = None,
    ) -> tuple[Accumulated, TrainBatch, Given]:
        """The gradient over a minibatch, what was found, and what both were made of, placed.

        Args:
            trained: the weights, one leaf per gradient.
            old_logp: None means on-policy.
            ref_logp: None without a KL term in the loss.
            targets: None without a critic.
        """
        parts, placed = microbatches(batch, self.objective), self.place(batch)
        if old_logp is None:  # NaN stands for the policy itself: one program serves both
            old_logp = np.full(batch.mask.shape, np.nan, np.float32)
        given = self.place(Given(old_logp, ref_logp, targets))
        total = self.start_grads(trained, placed)
        for rows, count, width in parts:
            total = self.add_grads(
                total, trained, placed, given, rows, np.int32(count), width=width
            )
        return total, placed, given

    def update(
        self,
        state: TrainState,
        batch: TrainBatch,
        old_logp: Float[Any, "B T"] | None = None,
        ref_logp: Float[Any, "B T"] | None = None,
        targets: Targets | None = None,
        *,
        phase: Callable[[str], AbstractContextManager[None]] = nullcontext,
        hold: Callable[[TrainState], None] = lambda state: None,
    ) -> tuple[TrainState, dict[str, Tally], LogProbs]:
        """One update: the state after it, its metrics, and what the policy said before it.

        Args:
            state: donated.
            batch, old_logp, ref_logp, targets: as of `accumulate`.
            phase: entered for "update" (the gradient) and for "optimizer", to time them.
            hold: given the new state at once, so that whatever interrupts what follows leaves
                its caller with what is whole.
        """
        with phase("update"):
            trained = _weights_of(state)
            total, placed, given = self.accumulate(trained, batch, old_logp, ref_logp, targets)
            jax.block_until_ready((total, placed, given))
        with phase("optimizer"):
            with uninterrupted():  # between the end of the former state and its successor's owner
                state, metrics, said = self.apply(state, total, placed, given)
                hold(state)
            return jax.block_until_ready((state, metrics, said))


def make_programs(
    graphdef: nnx.GraphDef,
    optimizer: Optimizer,
    objective: Objective,
    shardings: TrainState | None = None,
    *,
    place: Callable[[PyTree], PyTree] = lambda x: jax.tree.map(jnp.asarray, x),
    spike_sigmas: float = 0.0,
) -> Programs:
    """The programs that train this network with this optimizer on this objective.

    Args:
        shardings: of the state, so that every new one lives where the old one did.
        place: puts a batch on the devices.
        spike_sigmas: where the state has `spikes`, what counts as one.
    """
    # `None` leaves the placement of what is found to the compiler.
    accumulated: Any = None
    if shardings is not None:
        accumulated = Accumulated._make((_weights_of(shardings), None))
    by_width: dict[str, Any] = {"static_argnames": "width", "donate_argnums": 0}
    network = (graphdef, objective)
    return Programs(
        objective,
        place,
        start_logps=jax.jit(partial(start_logps, *network)),
        add_logps=jax.jit(partial(add_logps, *network), **by_width),
        start_grads=jax.jit(partial(start_grads, *network), out_shardings=accumulated),
        add_grads=jax.jit(
            partial(add_grads, *network),
            **by_width,
            out_shardings=accumulated,
            compiler_options=compiler_options(objective.remat, shardings),
        ),
        apply=jax.jit(
            partial(apply, optimizer, objective, spike_sigmas),
            donate_argnums=0,
            out_shardings=(shardings, None, None),
        ),
    )


def microbatches(batch: TrainBatch, objective: Objective) -> list[Microbatches]:
    """How the rows of a minibatch are grouped; needs their lengths on the host.

    Rows of which nothing is trained on are left out: what is found of them stays 0.
    """
    length = np.asarray(batch.prompt_length) + np.asarray(batch.length)
    length = np.where(np.asarray(batch.mask).any(1), length, 0)
    longest = objective.longest or batch.tokens.shape[1]
    return split(length, longest, tokens=objective.microbatch_tokens, ways=batch_ways())


@jax.jit
def all_finite(params: PyTree) -> Bool[Array, ""]:
    """Whether every number in a tree is finite."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]).all()


def _zeros_of(
    graphdef: nnx.GraphDef, objective: Objective, trained: Gradients, batch: TrainBatch
) -> Forward:
    """Zeros in the shapes of what the forward pass of a whole minibatch finds."""

    def find() -> Forward:
        states, found = forward(graphdef, trained.policy, batch, objective)
        if objective.critic is None or trained.critic is None:
            return found
        value = objective.critic.values(trained.critic, batch, states)
        return found._replace(value=pad_to(value, batch.mask.shape[1]))

    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(find))


def _logps_of(found: Forward) -> LogProbs:
    return LogProbs(found.logp, None if found.routing is None else found.routing.experts)


def _weights_of(state: TrainState) -> Gradients:
    return Gradients(state.params, None if state.critic is None else state.critic.params)

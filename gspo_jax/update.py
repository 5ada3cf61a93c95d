"""The update: one rollout becomes minibatches x epochs optimizer steps, in jitted programs.

    score     log π_old of the minibatches that will be visited after the policy has moved
    update    gradient of the loss over microbatches, clip, Adam, skip if not finite

The first minibatch needs no scoring: there π_θ = π_old, so its old log-probabilities are its own
(stop_gradient), its ratio is exactly 1 and nothing can be clipped. The other minibatches' come
from the training program's own forward on the same shapes, never from the sampler: GSPO's clip
band is as narrow as the noise between two programs.

Denominators are known before the first microbatch, since they depend on masks alone. So the
gradient of any split is the gradient of the whole minibatch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from gspo_jax.batch import TrainBatch
from gspo_jax.logps import token_logps
from gspo_jax.losses import kl as kl_penalty

Metrics = dict[str, Any]


class TrainState(NamedTuple):
    """All that a run carries from step to step; a checkpoint is this and the configuration."""

    params: PyTree
    opt_state: PyTree
    step: Int[Array, ""]  # rollouts done
    updates: Int[Array, ""]  # optimizer updates done
    skipped: Int[Array, ""]  # updates skipped because a number was not finite


class Objective(NamedTuple):
    """What is minimised, and how its forward pass is run. Hashable: a static jit argument."""

    loss: Callable[..., Any]  # one of losses.LOSSES with its keywords bound
    temperature: float = 1.0
    kl_coef: float = 0.0
    kl_kind: str = "k3"
    dtype: str = "float32"  # of activations; parameters and gradients stay float32
    remat: bool = False
    microbatch: int = 0  # rows per forward/backward; 0 = all


class Programs(NamedTuple):
    """The two jitted functions of the update stage."""

    score: Callable[[PyTree, TrainBatch], Float[Array, "B T"]]
    update: Callable[..., tuple[TrainState, Metrics]]


def init_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(params, optimizer.init(params), jnp.int32(0), jnp.int32(0), jnp.int32(0))


def make_programs(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    shardings: TrainState | None = None,
) -> Programs:
    """Bind the network, the optimizer and the objective into `score` and `update`.

    score(params, batch) -> log-probabilities [B, T] of the response tokens.
    update(state, batch, old_logp, ref_logp) -> (state, metrics, logp [B, T] before the update);
    donates `state`. `old_logp` None means on-policy; `ref_logp` is None without a KL term.
    """

    @jax.jit
    def score(params: PyTree, batch: TrainBatch) -> Float[Array, "B T"]:
        def one(_, micro):
            return None, forward_logps(graphdef, params, micro, objective)[0]

        _, logp = jax.lax.scan(one, None, _split(batch, objective.microbatch))
        return _merge(logp)

    # The new state lives where the old one did, so that its buffers can be donated.
    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None, None))
    def update(state: TrainState, batch: TrainBatch, old_logp=None, ref_logp=None):
        grads, logp, entropy = accumulate(
            graphdef, state.params, batch, old_logp, ref_logp, objective
        )
        (total, weight), metrics = objective.loss(logp, old_logp, batch.adv, batch.mask)
        loss = total / jnp.maximum(weight, 1)
        if ref_logp is not None:
            penalty, _ = kl_penalty(logp, ref_logp, batch.mask, kind=objective.kl_kind)
            metrics["kl"] = penalty.total / jnp.maximum(penalty.weight, 1)
            loss += objective.kl_coef * metrics["kl"]
        tokens = jnp.maximum(jnp.sum(batch.mask, dtype=jnp.float32), 1)
        grad_norm = optax.global_norm(grads)
        metrics |= {
            "loss": loss,
            "grad_norm": grad_norm,
            "entropy": jnp.sum(entropy, where=batch.mask) / tokens,
        }
        finite = jnp.isfinite(loss + grad_norm)
        return apply_if_finite(state, grads, optimizer, finite), metrics, logp

    return Programs(score, update)


def forward_logps(
    graphdef: nnx.GraphDef, params: PyTree, batch: TrainBatch, objective: Objective
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability and entropy at each response token; the only shift of the library.

    The hidden state that predicts response token t of a row with a prompt of p tokens stands at
    position p - 1 + t.
    """
    model = nnx.merge(graphdef, jax.tree.map(lambda p: p.astype(objective.dtype), params))
    hidden = model(batch.tokens, remat=objective.remat)
    S, T = batch.tokens.shape[1], batch.mask.shape[1]
    predicted = batch.prompt_length[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    predicted = jnp.minimum(predicted, S - 1)  # padding of short rows; masked
    before = jnp.take_along_axis(hidden, (predicted - 1)[..., None], axis=1)
    tokens = jnp.take_along_axis(batch.tokens, predicted, axis=1)
    return token_logps(before, model.unembed(), tokens, temperature=objective.temperature)


def accumulate(
    graphdef: nnx.GraphDef,
    params: PyTree,
    batch: TrainBatch,
    old_logp: Float[Array, "B T"] | None,
    ref_logp: Float[Array, "B T"] | None,
    objective: Objective,
) -> tuple[PyTree, Float[Array, "B T"], Float[Array, "B T"]]:
    """Gradient of the minibatch loss, microbatch by microbatch, with logp and entropy [B, T]."""
    zeros = jnp.zeros(batch.mask.shape, jnp.float32)
    weight = objective.loss(zeros, zeros, batch.adv, batch.mask)[0].weight
    tokens = kl_penalty(zeros, zeros, batch.mask, kind=objective.kl_kind)[0].weight

    def share_of_loss(params, micro, old, ref):
        logp, entropy = forward_logps(graphdef, params, micro, objective)
        total = objective.loss(logp, old, micro.adv, micro.mask)[0].total / jnp.maximum(weight, 1)
        if ref is not None:
            penalty = kl_penalty(logp, ref, micro.mask, kind=objective.kl_kind)[0]
            total += objective.kl_coef * penalty.total / jnp.maximum(tokens, 1)
        return total, (logp, entropy)

    gradient = jax.grad(share_of_loss, has_aux=True)

    def add(so_far, micro):
        grads, per_token = gradient(params, *micro)
        return jax.tree.map(jnp.add, so_far, grads), per_token

    inputs = (batch, old_logp, ref_logp)
    if objective.microbatch in (0, batch.mask.shape[0]):
        grads, per_token = gradient(params, *inputs)
        return grads, *per_token
    nothing = jax.tree.map(jnp.zeros_like, params)
    grads, per_token = jax.lax.scan(add, nothing, _split(inputs, objective.microbatch))
    return grads, *_merge(per_token)


def apply_if_finite(
    state: TrainState,
    grads: PyTree,
    optimizer: optax.GradientTransformation,
    finite: Bool[Array, ""],
) -> TrainState:
    """One optimizer update, or the very same parameters and moments with one more skip counted."""

    def apply(params, opt_state):
        with jax.numpy_dtype_promotion("standard"):  # optax relies on implicit promotion
            steps, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, steps), opt_state

    params, opt_state = jax.lax.cond(
        finite, apply, lambda params, opt_state: (params, opt_state), state.params, state.opt_state
    )
    done = finite.astype(jnp.int32)
    return TrainState(params, opt_state, state.step, state.updates + done, state.skipped + 1 - done)


def update_on_rollout(
    programs: Programs,
    state: TrainState,
    batch: TrainBatch,
    *,
    minibatches: int,
    epochs: int = 1,
    ref_logp: Float[Array, "B T"] | None = None,
    place: Callable[[PyTree], PyTree] = lambda x: x,
) -> tuple[TrainState, list[Metrics], Float[np.ndarray, "B T"]]:
    """All updates of one rollout in order, the metrics of each, and log π_old of all rows.

    Args:
        programs: from `make_programs`; `state` is donated.
        batch: the rollout's rows on the host; contiguous blocks of them are the minibatches.
        minibatches: updates per epoch; must divide the rows.
        epochs: passes over the rollout.
        ref_logp: reference log-probabilities, where the objective has a KL term.
        place: puts a minibatch on the devices.
    """
    parts = [place(part) for part in _blocks(batch, minibatches)]
    refs = [None] * minibatches if ref_logp is None else _blocks(ref_logp, minibatches)
    # The first update is on-policy by construction, and tells its own π_old; the others' is needed
    # before the policy moves.
    old = [None] + [programs.score(state.params, part) for part in parts[1:]]
    metrics = []
    for epoch in range(epochs):
        for i, part in enumerate(parts):
            first = epoch == 0 and i == 0
            state, stats, logp = programs.update(state, part, None if first else old[i], refs[i])
            metrics.append(stats)
            if first:
                old[0] = logp
    return state._replace(step=state.step + 1), metrics, np.concatenate(jax.device_get(old))


def _blocks(tree: PyTree, count: int) -> list[PyTree]:
    """`count` contiguous blocks of the leading axis."""
    size = jax.tree.leaves(tree)[0].shape[0] // count
    return [jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], tree) for i in range(count)]


def _split(tree: PyTree, rows: int) -> PyTree:
    """[B, ...] -> [B / rows, rows, ...], taking every (B / rows)-th row.

    Strided, so that each microbatch has rows of every device and none has to move.
    """

    def split(x):
        m = rows or x.shape[0]
        return x.reshape(m, x.shape[0] // m, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def _merge(tree: PyTree) -> PyTree:
    """The inverse of `_split`."""
    return jax.tree.map(
        lambda x: x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree
    )


def summarise(per_update: list[Metrics]) -> Metrics:
    """A step's metrics from those of its updates: means, extremes, and lists of what differs."""
    host = jax.device_get(per_update)
    summary: Metrics = {}
    for name in host[0]:
        values = [float(m[name]) for m in host]
        combine = min if name.endswith("_min") else max if name.endswith("_max") else np.mean
        summary[name] = float(combine(values))
        if name in ("clip_frac", "ratio_std", "loss"):
            summary[f"{name}_by_update"] = values
    return summary

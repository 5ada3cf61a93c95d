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
from gspo_jax.losses import entropy_bonus
from gspo_jax.losses import kl as kl_penalty
from gspo_jax.losses import value as value_loss
from gspo_jax.models.moe import Routing, balance, router_metrics

Metrics = dict[str, Any]


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


class Targets(NamedTuple):
    """What a critic learns from; row and token as in the batch."""

    value: Float[Array, "B T"]  # its own estimate before the updates
    returns: Float[Array, "B T"]


class CriticTerm(NamedTuple):
    """How a critic takes part in an update; `critic` builds it."""

    values: Callable[..., Float[Array, "B T"]]  # (its params, batch, the policy's states)
    optimizer: optax.GradientTransformation
    clip: float
    coef: float  # of its loss, which matters where it reaches the policy's weights
    shared: bool  # whether it reads the policy's states


class Gradients(NamedTuple):
    """One leaf per trained parameter."""

    policy: PyTree
    critic: PyTree | None = None


class Forward(NamedTuple):
    """What the forward passes of an update found at each response token."""

    logp: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    value: Float[Array, "B T"] | None = None
    routing: Routing | None = None  # of every token, where the model has experts


class Scored(NamedTuple):
    """What a policy says of a batch: log-probabilities, and the experts that it chose."""

    logp: Float[Array, "B T"]
    experts: Int[Array, "B S M X"] | None = None


class Objective(NamedTuple):
    """What is minimised, and how its forward pass is run. Hashable: a static jit argument."""

    loss: Callable[..., Any]  # one of losses.LOSSES with its keywords bound
    temperature: float = 1.0
    kl_coef: float = 0.0
    kl_kind: str = "k3"
    entropy_coef: float = 0.0
    dtype: str = "float32"  # of activations; parameters and gradients stay float32
    remat: bool = False
    microbatch: int = 0  # rows per forward/backward; 0 = all
    routing_replay: str = "off"  # "R2" and "R3" run the experts in TrainBatch.routing
    router_aux_coef: float = 0.0
    router_z_coef: float = 0.0
    critic: CriticTerm | None = None


class Programs(NamedTuple):
    """The two jitted functions of the update stage."""

    score: Callable[[PyTree, TrainBatch], Scored]
    update: Callable[..., tuple[TrainState, Metrics, Scored]]


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

    score(params, batch) -> Scored: log-probabilities [B, T] of the response tokens.
    update(state, batch, old_logp, ref_logp, targets) -> (state, metrics, Scored before the
    update); donates `state`. `old_logp` None means on-policy; `ref_logp` is None without a KL
    term in the loss, `targets` without a critic.
    """

    @jax.jit
    def score(params: PyTree, batch: TrainBatch) -> Scored:
        def one(micro):
            return _scored(forward(graphdef, params, micro, objective)[1])

        return by_microbatch(one, batch, objective.microbatch)

    # The new state lives where the old one did, so that its buffers can be donated.
    @partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None, None))
    def update(state: TrainState, batch: TrainBatch, old_logp=None, ref_logp=None, targets=None):
        critic = None if state.critic is None else state.critic.params
        grads, at = accumulate(
            graphdef, state.params, batch, old_logp, ref_logp, objective, critic, targets
        )
        (total, weight), metrics = objective.loss(at.logp, old_logp, batch.adv, batch.mask)
        loss = total / jnp.maximum(weight, 1)
        if ref_logp is not None:
            penalty, _ = kl_penalty(at.logp, ref_logp, batch.mask, kind=objective.kl_kind)
            metrics["kl"] = penalty.total / jnp.maximum(penalty.weight, 1)
            loss += objective.kl_coef * metrics["kl"]
        bonus, found = entropy_bonus(at.entropy, batch.mask)
        loss += objective.entropy_coef * bonus.total / jnp.maximum(bonus.weight, 1)
        grad_norm = optax.global_norm(grads.policy)
        metrics |= {"loss": loss, "grad_norm": grad_norm} | found
        finite = jnp.isfinite(loss + grad_norm)
        if objective.critic is not None:
            found = _critic_metrics(objective.critic, at.value, targets, batch.mask, grads.critic)
            finite &= jnp.isfinite(found["critic/vf_loss"] + found["critic/grad_norm"])
            metrics |= found
        if at.routing is not None:
            found = router_metrics(at.routing, batch.routing, real_tokens(batch))
            metrics["loss"] += objective.router_aux_coef * found["router/aux_loss"]
            metrics["loss"] += objective.router_z_coef * found["router/z_loss"]
            metrics |= found
        return apply_if_finite(state, grads, optimizer, objective, finite), metrics, _scored(at)

    return Programs(score, update)


def forward_logps(
    graphdef: nnx.GraphDef, params: PyTree, batch: TrainBatch, objective: Objective
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability and entropy at each response token."""
    return forward(graphdef, params, batch, objective)[1][:2]


def forward(
    graphdef: nnx.GraphDef, params: PyTree, batch: TrainBatch, objective: Objective
) -> tuple[Float[Array, "B T D"], Forward]:
    """The hidden state before each response token, its log-probability and its entropy."""
    model = nnx.merge(graphdef, cast(params, objective.dtype))
    hidden, routing = model.routed(
        batch.tokens,
        remat=objective.remat,
        replay=None if objective.routing_replay == "off" else batch.routing,
        counted=real_tokens(batch),
    )
    states, tokens = before_response(hidden, batch)
    logp, entropy = token_logps(states, model.unembed(), tokens, temperature=objective.temperature)
    return states, Forward(logp, entropy, routing=routing)


def real_tokens(batch: TrainBatch) -> Bool[Array, "B S"]:
    """True on the prompt and on the response tokens that are trained on."""
    end = batch.prompt_length + jnp.sum(batch.mask, axis=1, dtype=jnp.int32)
    return jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None] < end[:, None]


def before_response(
    hidden: Float[Array, "B S D"], batch: TrainBatch
) -> tuple[Float[Array, "B T D"], Int[Array, "B T"]]:
    """The state that precedes each response token, and the token; the only shift of the library.

    The hidden state that predicts response token t of a row with a prompt of p tokens stands at
    position p - 1 + t.
    """
    S, T = batch.tokens.shape[1], batch.mask.shape[1]
    predicted = batch.prompt_length[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
    predicted = jnp.minimum(predicted, S - 1)  # padding of short rows; masked
    before = jnp.take_along_axis(hidden, (predicted - 1)[..., None], axis=1)
    return before, jnp.take_along_axis(batch.tokens, predicted, axis=1)


def accumulate(
    graphdef: nnx.GraphDef,
    params: PyTree,
    batch: TrainBatch,
    old_logp: Float[Array, "B T"] | None,
    ref_logp: Float[Array, "B T"] | None,
    objective: Objective,
    critic: PyTree | None = None,
    targets: Targets | None = None,
) -> tuple[Gradients, Forward]:
    """Gradients of the minibatch loss, microbatch by microbatch, and what the forwards found.

    With a critic its loss is added: `objective.critic.values` decides which parameters it reaches.
    """
    zeros = jnp.zeros(batch.mask.shape, jnp.float32)
    weight = objective.loss(zeros, zeros, batch.adv, batch.mask)[0].weight
    kl_weight = kl_penalty(zeros, zeros, batch.mask, kind=objective.kl_kind)[0].weight
    tokens = jnp.sum(batch.mask, dtype=jnp.float32)
    real = jnp.sum(real_tokens(batch), dtype=jnp.float32)

    def share_of_loss(trained, micro, old, ref, target):
        states, found = forward(graphdef, trained.policy, micro, objective)
        logp, entropy = found.logp, found.entropy
        total = objective.loss(logp, old, micro.adv, micro.mask)[0].total / jnp.maximum(weight, 1)
        if ref is not None:
            penalty = kl_penalty(logp, ref, micro.mask, kind=objective.kl_kind)[0]
            total += objective.kl_coef * penalty.total / jnp.maximum(kl_weight, 1)
        if objective.entropy_coef:
            bonus = entropy_bonus(entropy, micro.mask)[0]
            total += objective.entropy_coef * bonus.total / jnp.maximum(tokens, 1)
        if found.routing is not None:
            total += _router_loss(found.routing, micro, objective, real)
        if (term := objective.critic) is None:
            return total, found
        value = term.values(trained.critic, micro, states)
        error = value_loss(value, target.value, target.returns, micro.mask, clip=term.clip)[0]
        total += term.coef * error.total / jnp.maximum(tokens, 1)
        return total, found._replace(value=value)

    gradient = jax.grad(share_of_loss, has_aux=True)
    trained = Gradients(params, critic)

    def add(so_far, micro):
        grads, found = gradient(trained, *micro)
        return jax.tree.map(jnp.add, so_far, grads), found

    inputs = (batch, old_logp, ref_logp, targets)
    if objective.microbatch in (0, batch.mask.shape[0]):
        return gradient(trained, *inputs)
    nothing = jax.tree.map(jnp.zeros_like, trained)
    grads, found = jax.lax.scan(add, nothing, _split(inputs, objective.microbatch))
    return grads, _merge(found)


def _router_loss(
    routing: Routing, micro: TrainBatch, objective: Objective, real: Float[Array, ""]
) -> Float[Array, ""]:
    """A microbatch's share of the routers' losses: its own balance, weighted by its tokens."""
    counted = real_tokens(micro)
    aux, z, _ = balance(routing, counted)
    loss = objective.router_aux_coef * aux + objective.router_z_coef * z
    return loss * jnp.sum(counted, dtype=jnp.float32) / jnp.maximum(real, 1)


def _scored(found: Forward) -> Scored:
    return Scored(found.logp, None if found.routing is None else found.routing.experts)


def _critic_metrics(term, value, targets, mask, grads) -> Metrics:
    (total, weight), found = value_loss(value, targets.value, targets.returns, mask, clip=term.clip)
    return {
        "critic/vf_loss": total / jnp.maximum(weight, 1),
        "critic/vf_clipfrac": found["value_clip_frac"],
        "critic/grad_norm": optax.global_norm(grads),
    }


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
    place: Callable[[PyTree], PyTree] = lambda x: x,
) -> tuple[TrainState, list[Metrics], Float[np.ndarray, "B T"]]:
    """All updates of one rollout in order, the metrics of each, and log π_old of all rows.

    Args:
        programs: from `make_programs`; `state` is donated.
        batch: the rollout's rows on the host; contiguous blocks of them are the minibatches.
        minibatches: updates per epoch; must divide the rows.
        epochs: passes over the rollout.
        ref_logp: reference log-probabilities, where the objective has a KL term.
        targets: values and returns on the host, where the objective has a critic.
        place: puts a minibatch on the devices.
    """
    parts = [place(part) for part in _blocks(batch, minibatches)]
    refs = [None] * minibatches if ref_logp is None else _blocks(ref_logp, minibatches)
    goals = [None] * minibatches if targets is None else _blocks(targets, minibatches)
    goals = [place(goal) for goal in goals]
    # The first update is on-policy by construction, and tells its own π_old; the others' is needed
    # before the policy moves.
    old: list[Scored | None] = [None]
    old += [programs.score(state.params, part) for part in parts[1:]]
    metrics = []
    for _ in range(epochs):
        for i, part in enumerate(parts):
            known = old[i]
            if known is not None and part.routing is None:
                part = part._replace(routing=known.experts)
            known_logp = None if known is None else known.logp
            state, stats, scored = programs.update(state, part, known_logp, refs[i], goals[i])
            metrics.append(stats)
            old[i] = scored if known is None else known
    logp = [jax.device_get(scored.logp) for scored in old if scored is not None]
    return state._replace(step=state.step + 1), metrics, np.concatenate(logp)


def cast(params: PyTree, dtype: str) -> PyTree:
    """The parameters in the dtype that the network is to compute in."""
    return jax.tree.map(lambda p: p.astype(dtype), params)


def by_microbatch(function: Callable[[TrainBatch], PyTree], batch: TrainBatch, rows: int) -> PyTree:
    """`function` of all rows, `rows` at a time; 0 is all at once."""
    _, out = jax.lax.scan(lambda _, micro: (None, function(micro)), None, _split(batch, rows))
    return _merge(out)


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
    for name in dict.fromkeys(name for m in host for name in m):
        values = [float(m[name]) for m in host if name in m]
        combine = min if name.endswith("_min") else max if name.endswith("_max") else np.mean
        summary[name] = float(combine(values))
        if name in ("clip_frac", "ratio_std", "loss", "router/changed"):
            summary[f"{name}_by_update"] = values
    return summary

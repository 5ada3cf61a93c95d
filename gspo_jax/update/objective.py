"""What an update minimises: a loss over a minibatch, as a sum of shares of its microbatches.

    hidden states -> log-probabilities -> the loss of `losses` (+ KL, entropy, router, critic)

Pure functions. Denominators are known before the first microbatch, since they depend on masks
alone; so the shares of any split add up to the loss, and their gradients to its gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from gspo_jax.algo.logps import token_logps
from gspo_jax.algo.losses import LOSSES, RATIO, entropy_bonus
from gspo_jax.algo.losses import kl as kl_penalty
from gspo_jax.algo.losses import value as value_loss
from gspo_jax.batch import TrainBatch
from gspo_jax.errors import check_choice
from gspo_jax.mesh.sharding import by_rows, regathering, split_by, widened
from gspo_jax.models.moe import Routing, balance, router_metrics
from gspo_jax.models.qwen import Qwen
from gspo_jax.numbers.tally import Average, Least, Most, Tally
from gspo_jax.update.optim import Optimizer, global_norm

Metrics = dict[str, Any]


class Targets(NamedTuple):
    """What a critic learns from; row and token as in the batch."""

    value: Float[Array, "B T"]  # its own estimate before the updates
    returns: Float[Array, "B T"]


class CriticTerm(NamedTuple):
    """How a critic takes part in an update; `critic` builds it."""

    values: Callable[..., Float[Array, "B T"]]  # (its params, batch, the policy's states)
    optimizer: Optimizer
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


class Given(NamedTuple):
    """What an update compares with, row by row; on the host or on the devices."""

    old_logp: Float[Any, "B T"]  # NaN where it is the policy itself
    ref_logp: Float[Any, "B T"] | None = None
    targets: Targets | None = None


class Objective(NamedTuple):
    """What is minimised, and how its forward pass is run. Hashable: a static jit argument."""

    loss: Callable[..., Any]  # one of losses.LOSSES with its keywords bound
    temperature: float = 1.0
    kl_coef: float = 0.0
    kl: Callable[..., Any] = kl_penalty  # likewise, over what the loss is the mean over
    entropy_coef: float = 0.0
    dtype: str = "float32"  # of activations; parameters and gradients stay float32
    remat: str = "none"  # of models.remat.POLICIES
    attention: str = "xla"
    microbatch_tokens: int = 0  # per forward/backward, padding included; 0 = all rows
    longest: int = 0  # no row of any batch has more tokens; 0 = the width of each batch
    shortest_prompt: int = 1  # no prompt has fewer
    routing_replay: str = "off"  # "R2" and "R3" run the experts in TrainBatch.routing
    router_aux_coef: float = 0.0
    router_z_coef: float = 0.0
    critic: CriticTerm | None = None


def forward(
    graphdef: nnx.GraphDef, params: PyTree, batch: TrainBatch, objective: Objective
) -> tuple[Float[Array, "B T D"], Forward]:
    """The hidden state before each response token, its log-probability and its entropy.

    Of a text that is cut to fewer than T response tokens, those states alone; the others, which
    the mask leaves out, have zeros.

    Raises:
        ConfigError: the objective has another `routing_replay`, `remat` or `attention` than there
            are.
    """
    check_choice("routing_replay", objective.routing_replay, ("off", "R2", "R3"))
    model = nnx.merge(graphdef, cast(params, objective.dtype))
    hidden, routing = model.routed(
        batch.tokens,
        remat=objective.remat,
        attention=objective.attention,
        replay=None if objective.routing_replay == "off" else batch.routing,
        counted=real_tokens(batch),
    )
    T = batch.mask.shape[1]
    count = response_tokens(batch, objective.shortest_prompt)
    states, tokens = before_response(hidden, batch, count)
    logp, entropy = read_logps(model, states, tokens, objective.temperature)
    return states, Forward(pad_to(logp, T), pad_to(entropy, T), routing=routing)


def read_logps(
    model: Qwen, states: Float[Array, "B T D"], tokens: Int[Array, "B T"], temperature: float
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`token_logps` under the model's head; each device has its rows and its share of V."""
    head, axes = model.unembed(), model.unembed_axes()
    options = {"temperature": temperature, "axis": split_by(axes[1], head.shape[1])}

    def read(states: Array, tokens: Array, head: Array) -> tuple[Array, Array]:
        return token_logps(states, head, tokens, **options)

    def split(states: Array, tokens: Array, head: Array) -> tuple[Array, Array]:
        return by_rows(read, (states, tokens), (head,), (axes,))

    return regathering(split)(states, tokens, head)


def real_tokens(batch: TrainBatch) -> Bool[Array, "B S"]:
    """True on prompt and response of the rows that are run, whatever of them is trained on."""
    end = jnp.where(batch.mask.any(axis=1), batch.prompt_length + batch.length, 0)
    return jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None] < end[:, None]


def response_tokens(batch: TrainBatch, shortest_prompt: int) -> int:
    """Response tokens that a text of this width can hold, T at most."""
    return min(batch.mask.shape[1], batch.tokens.shape[1] - shortest_prompt)


def before_response(
    hidden: Float[Array, "B S D"], batch: TrainBatch, count: int
) -> tuple[Float[Array, "B count D"], Int[Array, "B count"]]:
    """The state before each of the first `count` response tokens, and the token.

    This is the only shift of the library.

    The hidden state that predicts response token t of a row with a prompt of p tokens stands at
    position p - 1 + t.
    """
    predicted = batch.prompt_length[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    predicted = jnp.clip(predicted, 1, batch.tokens.shape[1] - 1)  # padding and no rows; masked
    before = jnp.take_along_axis(widened(hidden), (predicted - 1)[..., None], axis=1)
    return before.astype(hidden.dtype), jnp.take_along_axis(batch.tokens, predicted, axis=1)


def share_of_loss(
    graphdef: nnx.GraphDef, batch: TrainBatch, objective: Objective
) -> Callable[[Gradients, TrainBatch, Given], tuple[Float[Array, ""], Forward]]:
    """The function whose values on the microbatches add up to the loss of the minibatch `batch`.

    share(trained, micro, given) -> (loss, what its forward pass found). With a critic its loss
    is added: `objective.critic.values` decides which parameters it reaches.
    """
    zeros = jnp.zeros(batch.mask.shape, jnp.float32)
    weight = objective.loss(zeros, zeros, batch.adv, batch.mask)[0].weight
    kl_weight = objective.kl(zeros, zeros, batch.mask)[0].weight
    tokens = jnp.sum(batch.mask, dtype=jnp.float32)
    real = jnp.sum(real_tokens(batch), dtype=jnp.float32)

    def share(trained: Gradients, micro: TrainBatch, given: Given):
        states, found = forward(graphdef, trained.policy, micro, objective)
        logp, entropy = found.logp, found.entropy
        old = _own_where_unknown(given.old_logp, logp)
        total = objective.loss(logp, old, micro.adv, micro.mask)[0].total / jnp.maximum(weight, 1)
        if given.ref_logp is not None:
            penalty = objective.kl(logp, given.ref_logp, micro.mask)[0]
            total += objective.kl_coef * penalty.total / jnp.maximum(kl_weight, 1)
        if objective.entropy_coef:
            bonus = entropy_bonus(entropy, micro.mask)[0]
            total += objective.entropy_coef * bonus.total / jnp.maximum(tokens, 1)
        if found.routing is not None:
            total += _router_loss(found.routing, micro, objective, real)
        if (term := objective.critic) is None or given.targets is None:
            return total, found
        value = pad_to(term.values(trained.critic, micro, states), micro.mask.shape[1])
        goal = given.targets
        error = value_loss(value, goal.value, goal.returns, micro.mask, clip=term.clip)[0]
        total += term.coef * error.total / jnp.maximum(tokens, 1)
        return total, found._replace(value=value)

    return share


def measure(
    grads: Gradients, at: Forward, batch: TrainBatch, given: Given, objective: Objective
) -> tuple[dict[str, Tally], Bool[Array, ""]]:
    """The metrics of one update, and whether its losses and gradients are finite.

    Means know over how many they are: tokens, or responses where a term is one per response. What
    is one number of the update counts once, or not at all where no row was trained on.
    """
    old = _own_where_unknown(given.old_logp, at.logp)
    (sum_, weight), metrics = objective.loss(at.logp, old, batch.adv, batch.mask)
    loss = sum_ / jnp.maximum(weight, 1)
    if given.ref_logp is not None:
        penalty, found = objective.kl(at.logp, given.ref_logp, batch.mask)
        loss += objective.kl_coef * penalty.total / jnp.maximum(penalty.weight, 1)
        metrics |= found
    bonus, found = entropy_bonus(at.entropy, batch.mask)
    loss += objective.entropy_coef * bonus.total / jnp.maximum(bonus.weight, 1)
    grad_norm = global_norm(grads.policy)
    metrics |= found
    finite = jnp.isfinite(loss + grad_norm)
    if objective.critic is not None:
        found = _critic_metrics(objective.critic, at.value, given.targets, batch.mask, grads.critic)
        finite &= jnp.isfinite(found["critic/vf_loss"] + found["critic/grad_norm"])
        metrics |= found
    if at.routing is not None:
        found = router_metrics(at.routing, batch.routing, real_tokens(batch))
        loss += objective.router_aux_coef * found["router/aux_loss"]
        loss += objective.router_z_coef * found["router/z_loss"]
        metrics |= found
    return tallied(metrics | {"loss": loss, "grad_norm": grad_norm}, batch, objective), finite


BY_SEQUENCE = {LOSSES[name] for name, covers in RATIO.items() if covers == "sequence"}


def tallied(metrics: Metrics, batch: TrainBatch, objective: Objective) -> dict[str, Tally]:
    """The metrics of an update, each with what it takes to combine it with those of others."""
    tokens = jnp.sum(batch.mask, dtype=jnp.float32)
    responses = jnp.sum(jnp.any(batch.mask, axis=1), dtype=jnp.float32)
    routed = jnp.sum(real_tokens(batch), dtype=jnp.float32)
    function = getattr(objective.loss, "func", objective.loss)  # of a partial
    ratios = responses if function in BY_SEQUENCE else tokens
    trained = jnp.minimum(tokens, 1)
    whole = ("loss", "grad_norm", "critic/grad_norm")  # of the update
    weights = dict.fromkeys(whole, trained) | {"clip_frac_seq": responses}
    weights |= {name: ratios for name in metrics if name.startswith("ratio_")}
    weights |= {name: routed for name in metrics if name.startswith("router/")}
    if batch.routing is not None:
        known = real_tokens(batch) & (batch.routing[:, :, 0, 0] >= 0)
        compared = jnp.sum(known, dtype=jnp.float32)
        weights |= dict.fromkeys(("router/changed", "router/changed_tokens"), compared)
    kinds = {"ratio_min": Least, "ratio_max": Most, "router/load_max": Most}
    return {n: kinds.get(n, Average)(x, weights.get(n, tokens)) for n, x in metrics.items()}


def _router_loss(
    routing: Routing, micro: TrainBatch, objective: Objective, real: Float[Array, ""]
) -> Float[Array, ""]:
    """A microbatch's share of the routers' losses: its own balance, weighted by its tokens."""
    counted = real_tokens(micro)
    aux, z, _ = balance(routing, counted)
    loss = objective.router_aux_coef * aux + objective.router_z_coef * z
    return loss * jnp.sum(counted, dtype=jnp.float32) / jnp.maximum(real, 1)


def _critic_metrics(term, value, targets, mask, grads) -> Metrics:
    (total, weight), found = value_loss(value, targets.value, targets.returns, mask, clip=term.clip)
    return {
        "critic/vf_loss": total / jnp.maximum(weight, 1),
        "critic/vf_clipfrac": found["value_clip_frac"],
        "critic/grad_norm": global_norm(grads),
    }


def _own_where_unknown(
    old_logp: Float[Array, "B T"], logp: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    return jnp.where(jnp.isnan(old_logp), jax.lax.stop_gradient(logp), old_logp)


def pad_to(x: Float[Array, "B count"], length: int) -> Float[Array, "B {length}"]:
    """Zeros for the response tokens that the text does not reach."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1])))


def cast(params: PyTree, dtype: str) -> PyTree:
    """The parameters in the dtype that the network is to compute in."""
    return jax.tree.map(lambda p: p.astype(dtype), params)

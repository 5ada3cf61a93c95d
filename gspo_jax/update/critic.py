"""The critic of PPO: a value per token, the advantages made of it, and how it is trained.

    separate   a network of its own: the policy's architecture and first weights, and a value head
    shared     a value head alone, on the policy's hidden states; its loss reaches the policy too

V(t) is the value of the state *before* response token t: the prompt and the tokens up to t - 1.
It is read off the same hidden state that predicts token t. The head starts at zero, so the first
values are 0 and the first advantages those of the plain return. `update` trains the critic in the
program that trains the policy, on the same minibatches, with an optimizer of its own.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PyTree

from gspo_jax.algo.advantages import batch_whitened, gae, token_rewards
from gspo_jax.batch import TrainBatch
from gspo_jax.errors import check_choice
from gspo_jax.models.qwen import Qwen, head_logits
from gspo_jax.update.microbatch import Microbatches, fold, put, take
from gspo_jax.update.objective import (
    CriticTerm,
    Metrics,
    Objective,
    Targets,
    before_response,
    cast,
    forward,
    pad_to,
    response_tokens,
)
from gspo_jax.update.optim import Optimizer
from gspo_jax.update.programs import microbatches
from gspo_jax.update.state import TrainState


class Critic(nnx.Module):
    """A value head [D, 1], with a trunk of its own or none."""

    def __init__(self, width: int, trunk: Qwen | None = None):
        if trunk is not None:
            self.trunk = trunk
        self.value_head = nnx.Param(jnp.zeros((width, 1)), axes=("embed", None))

    def __call__(self, states: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        return head_logits(states, self.value_head[...])[..., 0]


def make_critic(kind: str, graphdef: nnx.GraphDef, params: PyTree) -> tuple[nnx.GraphDef, PyTree]:
    """The pure view of a new critic for the policy `(graphdef, params)`; shares no buffer with it.

    Args:
        kind: "separate" or "shared".

    Raises:
        ConfigError: another `kind`.
    """
    check_choice("kind", kind, ("separate", "shared"))
    policy = nnx.merge(graphdef, params)
    if kind == "shared":
        return nnx.split(Critic(policy.config.hidden_size))
    trunk = nnx.merge(graphdef, jax.tree.map(jnp.copy, params))
    return nnx.split(Critic(policy.config.hidden_size, trunk))


def forward_values(
    graphdef: nnx.GraphDef,
    params: PyTree,
    batch: TrainBatch,
    states: Float[Array, "B count D"] | None,
    *,
    dtype: str = "float32",
    remat: str = "none",
    attention: str = "xla",
    shortest_prompt: int = 1,
) -> Float[Array, "B count"]:
    """V of the state before each response token of the text; `states` are the policy's there."""
    critic = nnx.merge(graphdef, cast(params, dtype))
    if hasattr(critic, "trunk"):
        count = response_tokens(batch, shortest_prompt)
        hidden = critic.trunk(batch.tokens, remat=remat, attention=attention)
        states, _ = before_response(hidden, batch, count)
    return critic(states)


def make_term(
    graphdef: nnx.GraphDef,
    optimizer: Optimizer,
    *,
    shared: bool,
    clip: float,
    coef: float,
    dtype: str = "float32",
    remat: str = "none",
    attention: str = "xla",
    shortest_prompt: int = 1,
) -> CriticTerm:
    """How this critic takes part in an update.

    Args:
        graphdef: from `make_critic`.
        optimizer: of the critic's own parameters.
        clip: ε of `penalties.value`, in units of reward.
        coef: weight of its loss where the trunk is shared; otherwise it meets no other loss.
    """
    values = partial(
        forward_values,
        graphdef,
        dtype=dtype,
        remat=remat,
        attention=attention,
        shortest_prompt=shortest_prompt,
    )
    return CriticTerm(values, optimizer, clip, coef if shared else 1.0, shared)


def make_add_values(graphdef: nnx.GraphDef, objective: Objective, term: CriticTerm):
    """The jitted program of `make_values`: all microbatches of one width."""

    @partial(jax.jit, static_argnames="width", donate_argnums=0)
    def add_values(
        so_far, params: PyTree, critic: PyTree, batch: TrainBatch, rows, count, *, width
    ):
        def one(so_far, rows):
            micro = take(batch, rows, width)
            states = forward(graphdef, params, micro, objective)[0] if term.shared else None
            return put(so_far, pad_to(term.values(critic, micro, states), so_far.shape[1]), rows)

        return fold(one, Microbatches(rows, count, width), so_far)

    return add_values


def make_values(
    graphdef: nnx.GraphDef,
    objective: Objective,
    term: CriticTerm,
    *,
    place: Callable[[PyTree], PyTree] = lambda x: jax.tree.map(jnp.asarray, x),
) -> Callable[[TrainState, TrainBatch], Float[Array, "B T"]]:
    """values(state, batch) -> V [B, T], in the update's microbatches.

    Args:
        graphdef, objective: of the policy, whose states a shared critic reads.
        term: from `make_term`.
        place: puts a batch on the devices.
    """
    add_values = make_add_values(graphdef, objective, term)

    def of_state(state: TrainState, batch: TrainBatch) -> Float[Array, "B T"]:
        assert state.critic is not None
        placed, values = place(batch), jnp.zeros(batch.mask.shape, jnp.float32)
        networks = (state.params, state.critic.params)
        for rows, count, width in microbatches(batch, objective):
            values = add_values(values, *networks, placed, rows, np.int32(count), width=width)
        return values

    return of_state


def estimate(
    reward: Float[Array, " B"],
    value: Float[Array, "B T"],
    kl: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    kl_coef: float,
    gamma: float,
    lam: float,
    whiten: bool,
) -> tuple[Float[Array, "B T"], Targets, Metrics]:
    """PPO's advantages per token, what the critic should have said, and how well it did.

        rₜ = -β klₜ, plus the response's reward on its last token;    Â, R = GAE(r, V)

    Args:
        reward: one score per response; where it is NaN the mask must be false.
        kl: log π_old - log π_ref at each token, or zeros.
        whiten: Â with mean 0 and variance 1 over the tokens of the batch; the returns stay.

    Returns:
        Advantages, `Targets`, and metrics: the mean value per token, and the share of the
        variance of R that V explains (1: all; 0: no better than a constant).
    """
    rewards = token_rewards(reward, kl, mask, coef=kl_coef)
    adv, returns = gae(rewards, value, mask, gamma=gamma, lam=lam)
    metrics = {
        "critic/values/mean": jnp.mean(value, where=mask),
        "critic/vf_explained_var": explained_variance(value, returns, mask),
    }
    adv = batch_whitened(adv, mask) if whiten else adv
    return adv, Targets(jnp.where(mask, value, 0), returns), metrics


def explained_variance(
    value: Float[Array, "B T"], returns: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """1 - Var(R - V) / Var(R) over tokens; 0 where R does not vary."""
    spread, left = _variance(returns, mask), _variance(returns - value, mask)
    return jnp.where(spread > 0, 1 - left / jnp.where(spread > 0, spread, 1), 0)


def _variance(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Over tokens, above the lowest of them: the mean of large numbers has few digits."""
    lowest = jnp.min(x, where=mask, initial=jnp.inf)
    return jnp.var(jnp.where(mask, x - lowest, 0), where=mask)

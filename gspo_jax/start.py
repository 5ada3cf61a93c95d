"""What a run starts from: its objective, its optimizer, its programs, and the first state."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
from flax import nnx

from gspo_jax.algo.losses import LOSSES, MEAN
from gspo_jax.algo.losses import kl as kl_penalty
from gspo_jax.config.load import Config
from gspo_jax.mesh.sharding import shard_batch, state_shardings
from gspo_jax.policy import PLAIN, Passes, Policy, Problems, text_sizes
from gspo_jax.update.critic import make_critic, make_term
from gspo_jax.update.objective import CriticTerm, Objective
from gspo_jax.update.optim import Optimizer, make_optimizer, make_schedule
from gspo_jax.update.programs import Programs, make_programs
from gspo_jax.update.state import CriticState, TrainState, init_state


def make_state(
    config: Config, policy: Policy, updates: int
) -> tuple[Optimizer, Callable[[Any], Any], TrainState]:
    """The optimizer, its learning rate by update, and the state before the first step.

    The state takes over the policy's parameters: the first update donates them.
    """
    optimizer, schedule = optimizer_at(config, config.optim.learning_rate, updates)
    begin = starter(config, optimizer)
    shapes = jax.eval_shape(begin, policy.params)
    shardings = state_shardings(shapes, policy.params, policy.mesh)

    def rest(params):  # as outputs of a program the parameters would be copied
        return begin(params)._replace(params=None)

    start = jax.jit(rest, out_shardings=shardings._replace(params=None))
    return optimizer, schedule, start(policy.params)._replace(params=policy.params)


def starter(config: Config, optimizer: Optimizer) -> Callable[[Any], TrainState]:
    """parameters -> the policy's part of the state before the first step."""
    kl, spikes = config.algo.kl, config.run.spike_sigmas > 0
    coef = kl.coef if kl.target else None
    return partial(init_state, optimizer=optimizer, spikes=spikes, kl_coef=coef)


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
    term = critic_term(config, policy, graphdef, optimizer, how, shortest_prompt)
    return state._replace(critic=critic), term


def critic_term(
    config: Config,
    policy: Policy,
    graphdef: nnx.GraphDef,
    optimizer: Optimizer,
    how: Passes,
    shortest_prompt: int,
) -> CriticTerm:
    """The configured critic's part in the objective; `graphdef` is that of its network."""
    c = config.algo.critic
    return make_term(
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


def objective(
    config: Config, policy: Policy, problems: Problems, how: Passes, critic: CriticTerm | None
) -> Objective:
    """The configured loss with its keywords bound, and how its forward pass is run."""
    options = dict(config.algo.loss)
    return base_objective(config, policy, problems, how)._replace(
        loss=partial(LOSSES[options.pop("name")], **options),
        temperature=config.rollout.temperature,
        kl_coef=config.algo.kl.coef,
        kl=kl_term(config),
        entropy_coef=config.algo.entropy_coef,
        routing_replay=config.algo.routing_replay,
        critic=critic,
    )


def base_objective(config: Config, policy: Policy, problems: Problems, how: Passes) -> Objective:
    """The negative log-likelihood of given tokens: REINFORCE where every advantage is 1."""
    sizes = text_sizes(config, problems, policy.mesh)
    return Objective(
        loss=LOSSES["reinforce"],
        dtype=policy.dtype,
        remat=how.remat,
        attention=how.attention,
        microbatch_tokens=sizes.microbatch_tokens,
        longest=sizes.longest,
        shortest_prompt=sizes.shortest_prompt,
        router_aux_coef=config.algo.router_aux_coef,
        router_z_coef=config.algo.router_z_coef,
    )


def update_programs(
    config: Config, policy: Policy, optimizer: Optimizer, goal: Objective, state: TrainState
) -> Programs:
    """The jitted programs of the run's updates; each new state lives where `state` does."""
    return make_programs(
        policy.graphdef,
        optimizer,
        goal,
        jax.tree.map(lambda x: x.sharding, state),
        place=partial(shard_batch, mesh=policy.mesh),
        spike_sigmas=config.run.spike_sigmas,
    )


def kl_term(config: Config) -> Callable[..., Any]:
    """The configured KL to the reference, the mean over what the policy loss is the mean over."""
    loss = config.algo.loss
    # A loss that the user has added to LOSSES has no entry in MEAN.
    mean = {"over": MEAN.get(loss["name"], "responses"), "max_length": loss.get("max_length")}
    return partial(kl_penalty, kind=config.algo.kl.kind, **mean)

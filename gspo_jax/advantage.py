"""Stage 4: of the rewards of a rollout, and of the KL where it is part of them, advantages.

rows      prompts and responses laid together, without advantages
penalty   the KL to the reference at each token, where it is part of the reward
adv       by_group: one per response, from rewards within their groups
          by_token: one per token, from the critic's values
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from gspo_jax.algo.advantages import ADVANTAGES, BY_FUNCTION
from gspo_jax.algo.losses import token_kl
from gspo_jax.batch import Rollout, TrainBatch
from gspo_jax.config.load import Config
from gspo_jax.config.settings import GAE
from gspo_jax.mesh.distributed import host
from gspo_jax.mesh.sharding import shard_batch
from gspo_jax.policy import Policy
from gspo_jax.rollout.train_rows import to_train_batch
from gspo_jax.update.critic import estimate, make_values
from gspo_jax.update.objective import CriticTerm, Metrics, Objective, Targets
from gspo_jax.update.programs import Programs
from gspo_jax.update.state import TrainState

Penalty = Float[np.ndarray, "B T"]  # of each token, in units of reward
Learned = tuple[TrainBatch, Targets | None, Metrics]  # rows with advantages, a critic's targets
Advantages = Callable[[TrainState, TrainBatch, Rollout, Penalty], Learned]


class Judged(NamedTuple):
    """A rollout with all that its updates learn from."""

    batch: TrainBatch
    ref_logp: Float[Array, "B T"] | None  # where the KL term is in the loss
    targets: Targets | None  # where there is a critic
    metrics: Metrics


def make_advantage(
    config: Config,
    policy: Policy,
    goal: Objective,
    programs: Programs,
    reference: PyTree | None,
) -> Callable[[TrainState, Rollout], Judged]:
    """The stage, chosen once: (state, rollout) -> its rows with their advantages.

    The reference is asked only where there is one, that is where the KL coefficient is not zero;
    what the policy itself says beforehand only where the KL term is part of the reward.
    """
    mask_truncated, in_reward = config.algo.mask_truncated, config.algo.kl.placement == "reward"
    advantages = by_token(config, policy, goal, goal.critic) if goal.critic else by_group(config)

    def advantage(state: TrainState, rollout: Rollout) -> Judged:
        rows = to_train_batch(rollout, mask_truncated=mask_truncated, width=goal.longest)
        # The reference is a network of its own, with its own routing.
        alone = rows._replace(routing=None)
        ref_logp = None if reference is None else programs.logps(reference, alone).logp
        penalty, metrics = np.zeros(rows.mask.shape, np.float32), {}
        if ref_logp is not None and in_reward:
            penalty, metrics = kl_penalty(config, programs, state, rows, ref_logp)
            ref_logp = None
        batch, targets, more = advantages(state, rows, rollout, penalty)
        return Judged(batch, ref_logp, targets, metrics | more)

    return advantage


def kl_penalty(
    config: Config,
    programs: Programs,
    state: TrainState,
    rows: TrainBatch,
    ref_logp: Float[Array, "B T"],
) -> tuple[Penalty, Metrics]:
    """β (log π - log π_ref) of each token, which is taken from its reward; and its metrics."""
    logp = programs.logps(state.params, rows).logp
    coef = np.float32(config.algo.kl.coef if state.kl_coef is None else host(state.kl_coef))
    divergence = host(token_kl(logp, ref_logp, jnp.asarray(rows.mask), "k1"))
    mean = float(divergence.sum() / max(rows.mask.sum(), 1))
    return coef * divergence, {"kl": mean, "kl_coef": float(coef)}


def by_group(config: Config) -> Advantages:
    """The configured advantage of rewards within their groups, one per response."""
    options = dict(config.algo.advantage)
    name, weights = options.pop("name"), list(config.task.reward_weights)
    function = (ADVANTAGES | BY_FUNCTION)[name]
    function = jax.jit(partial(function, group_size=config.rollout.group_size, **options))

    def of_sum(state: TrainState, rows: TrainBatch, rollout: Rollout, penalty: Penalty) -> Learned:
        adv = function(rollout.reward - penalty.sum(1))
        return rows._replace(adv=np.asarray(adv)), None, {}

    def of_each_function(
        state: TrainState, rows: TrainBatch, rollout: Rollout, penalty: Penalty
    ) -> Learned:
        rewards = np.stack(list(rollout.rewards.values()), axis=1)
        # A response that is not scored is in no function's baseline either.
        rewards = np.where(np.isnan(rollout.reward)[:, None], np.nan, rewards)
        ones = [1.0] * (rewards.shape[1] - len(weights))  # also of "overlong", the last
        adv = function(rewards, np.asarray([*weights, *ones], np.float32))
        return rows._replace(adv=np.asarray(adv)), None, {}

    return of_each_function if name in BY_FUNCTION else of_sum


def by_token(config: Config, policy: Policy, goal: Objective, critic: CriticTerm) -> Advantages:
    """Generalised advantage estimation with the critic's values, one advantage per token."""
    options = GAE | {k: v for k, v in config.algo.advantage.items() if k != "name"}
    function = jax.jit(partial(estimate, kl_coef=1.0, **options))  # the penalty has its weight
    place = partial(shard_batch, mesh=policy.mesh)
    values = make_values(policy.graphdef, goal, critic, place=place)

    def of_values(
        state: TrainState, rows: TrainBatch, rollout: Rollout, penalty: Penalty
    ) -> Learned:
        scored = ~np.isnan(rollout.reward)  # what was not scored is not learned from
        rows = rows._replace(mask=rows.mask & scored[:, None])
        found = function(rollout.reward, values(state, rows), penalty, rows.mask)
        adv, targets, metrics = host(found)
        return rows._replace(adv=adv), targets, {k: float(v) for k, v in metrics.items()}

    return of_values

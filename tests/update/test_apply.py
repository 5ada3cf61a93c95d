"""An update whose gradient is given: what it moves, what it counts and what it remembers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gspo_jax.algo.losses import LOSSES
from gspo_jax.batch import TrainBatch
from gspo_jax.update.objective import CriticTerm, Forward, Given, Gradients, Objective
from gspo_jax.update.programs import (
    Accumulated,
    all_finite,
    apply,
    apply_guarded,
)
from gspo_jax.update.state import CriticState, init_state

GSPO = Objective(LOSSES["gspo"])
ONE = TrainBatch(
    jnp.ones((1, 2), jnp.int32),
    jnp.ones(1, jnp.int32),
    jnp.ones(1, jnp.int32),
    jnp.ones((1, 1), bool),
    jnp.ones(1),
)
FOUND = Forward(-jnp.ones((1, 1)), jnp.ones((1, 1)))


def test_only_a_gradient_that_moves_the_policy_is_remembered_as_one():
    """After 32 norms of 1 and 3 (mean 2, deviation 1): inf, 0, 9, 2. Plain descent at rate 1.

    The step, 7, is another number than that of the updates, by which the window is filled.
    """
    state = init_state({"w": jnp.zeros(1)}, optimizer := optax.sgd(1.0), spikes=True)
    norms = jnp.full(128, jnp.nan).at[:32].set(jnp.array([1.0, 3.0] * 16))
    state = state._replace(spikes=state.spikes._replace(norms=norms))
    state = state._replace(updates=jnp.int32(32), step=jnp.int32(7))
    run = jax.jit(partial(apply, optimizer, GSPO, 3.0))
    wanted = {  # gradient -> the weight, and how many are updates, not finite, spikes, remembered
        np.inf: (0, 32, 1, 0, 32),
        0.0: (0, 32, 1, 0, 32),
        9.0: (0, 32, 1, 1, 32),
        2.0: (-2, 33, 1, 1, 33),
    }
    for gradient, want in wanted.items():
        total = Accumulated(Gradients({"w": jnp.full(1, gradient)}), FOUND)
        state, metrics, scored = run(state, total, ONE, Given(FOUND.logp))
        counts = (state.updates, state.skipped, state.spikes.skipped)
        known = np.isfinite(state.spikes.norms)
        assert (float(state.params["w"][0]), *map(int, counts), known.sum()) == want
        assert metrics["grad_norm"].value == gradient and scored.logp == -1
    assert known[32] and state.spikes.norms[32] == 2


@pytest.mark.parametrize(
    ("finite", "spike", "policy", "moves"),
    [
        (True, False, 1.0, (1, 1)),
        (True, False, 0.0, (0, 1)),  # equal rewards say nothing of the policy; returns still are
        (False, False, 1.0, (0, 0)),
        (True, True, 1.0, (0, 0)),
    ],
)
def test_a_critic_learns_where_the_policy_has_nothing_to_learn(finite, spike, policy, moves):
    own = optax.sgd(1.0)
    goal = GSPO._replace(critic=CriticTerm(lambda *_: None, own, 0.2, 1.0, shared=False))
    state = init_state({"w": jnp.zeros(1)}, own)
    critic = {"v": jnp.zeros(1)}
    state = state._replace(critic=CriticState(critic, own.init(critic)))
    grads = Gradients({"w": jnp.full(1, policy)}, {"v": jnp.ones(1)})
    flags = (jnp.float32(policy), jnp.bool_(finite), jnp.bool_(spike))
    after = apply_guarded(state, grads, own, goal, *flags)
    assert (-float(after.params["w"][0]), -float(after.critic.params["v"][0])) == moves
    assert (int(after.updates), int(after.skipped)) == (moves[0], int(not finite))


def test_one_number_that_is_not_finite_is_found_in_any_leaf():
    good = {"a": jnp.ones((2, 3)), "b": jnp.zeros(4)}
    assert all_finite(good)
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
        assert not all_finite(good | {"b": good["b"].at[2].set(bad)})
        assert not all_finite(good | {"a": good["a"].at[1, 2].set(bad)})

"""What an update minimises: each term with its own coefficient, over what it is the mean of."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY
from flax import nnx

from gspo_jax.algo.losses import LOSSES, kl
from gspo_jax.batch import TrainBatch
from gspo_jax.models.config import QwenConfig
from gspo_jax.models.moe import Routing
from gspo_jax.models.qwen import Qwen
from gspo_jax.update import objective
from gspo_jax.update.critic import Critic, forward_values
from gspo_jax.update.microbatch import pick
from gspo_jax.update.objective import (
    CriticTerm,
    Forward,
    Given,
    Gradients,
    Objective,
    Targets,
    before_response,
    forward,
    measure,
    response_tokens,
)
from gspo_jax.update.programs import make_programs

B, S, T, D = 4, 12, 6, 8
# Responses of 6, 1, 4 and 2 tokens after prompts of 2, 8, 5 and 3; row 2 has a hole.
PROMPT, LENGTH = np.array([[2, 8, 5, 3], [6, 1, 4, 2]], np.int32)
MASK = (np.arange(T)[None] < LENGTH[:, None]) & ~(
    (np.arange(B) == 2)[:, None] & (np.arange(T) == 1)
)


def make_batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 32, (B, S)).astype(np.int32)  # padding holds random tokens
    adv = np.array([1.0, -2.0, 0.5, -0.3], np.float32)
    return jax.tree.map(jnp.asarray, TrainBatch(tokens, PROMPT, LENGTH, MASK, adv))


@pytest.fixture(scope="module")
def view():
    """One layer, 32 tokens: a few hundred numbers to differentiate by."""
    small = {"vocab_size": 32, "hidden_size": D, "intermediate_size": 8, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen(QwenConfig.from_hf(TINY | small), rngs=nnx.Rngs(0))
    model.embed[...] = model.embed[...] * 20
    return nnx.split(model)


@pytest.mark.parametrize(("width", "count"), [(12, 6), (8, 6), (7, 5)])
def test_the_state_that_predicts_token_t_stands_before_it_in_texts_of_any_width(width, count):
    """The states hold their own position. A prompt of 2 leaves a text of 7 room for 5 tokens."""
    batch = make_batch()
    batch = batch._replace(tokens=batch.tokens[:, :width])
    assert response_tokens(batch, shortest_prompt=2) == count
    position = jnp.broadcast_to(jnp.arange(width, dtype=jnp.float32)[None, :, None], (B, width, 1))
    states, tokens = before_response(position, batch, count)
    for row, t in np.argwhere(MASK[:, :count]):
        place = PROMPT[row] + t
        if place < width:
            assert float(states[row, t, 0]) == place - 1
            assert tokens[row, t] == batch.tokens[row, place]


def test_what_routers_lose_in_a_microbatch_weighs_by_its_tokens():
    """Texts of 8, 9, 9 and 5 tokens, whose (log Σ exp)² are 1, 2, 3 and 4: a mean of 73 / 31.

    All go to one of two experts, with probability 1: the balance of each microbatch is 2.
    """
    batch, long = make_batch(), (PROMPT + LENGTH).astype(np.float32)
    routing = Routing(
        jnp.zeros((B, S, 1, 1), jnp.int16),
        jnp.asarray(long[:, None, None] * np.array([1, 0], np.float32)),
        jnp.asarray(long * np.array([1, 2, 3, 4], np.float32))[:, None],
    )
    goal = Objective(LOSSES["gspo"], router_aux_coef=0.5, router_z_coef=0.1)
    total = sum(
        objective._router_loss(pick(routing, rows), pick(batch, rows), goal, jnp.float32(31))
        for rows in (jnp.array([1, 2, 0]), jnp.array([3]))
    )
    assert float(total) == pytest.approx(0.5 * 2 + 0.1 * 73 / 31)


def test_whatever_is_not_finite_is_seen_in_the_policy_and_in_the_critic():
    """A loss may be finite where its gradient is not."""
    ones, batch = jnp.ones((B, T)), make_batch()
    term = CriticTerm(lambda *_: ones, optax.identity(), 0.2, 1.0, shared=False)
    goal = Objective(LOSSES["gspo"], critic=term)
    for policy, critic, value in np.array(
        [[1, 1, 1], [np.nan, 1, 1], [1, np.inf, 1], [1, 1, np.nan]], np.float32
    ):
        grads = Gradients({"w": jnp.full(2, policy)}, {"v": jnp.full(2, critic)})
        given = Given(-ones, None, Targets(ones, value * ones))
        finite = measure(grads, Forward(-ones, ones, ones), batch, given, goal)[1]
        assert finite == np.isfinite([policy, critic, value]).all()


def test_in_16_bits_the_networks_run_whole_and_what_they_find_is_in_32(view):
    """Of shapes alone. A critic whose head stayed in float32 could not meet the policy's states."""
    batch, goal = make_batch(), Objective(LOSSES["gspo"], dtype="bfloat16")
    states, found = jax.eval_shape(lambda params: forward(view[0], params, batch, goal), view[1])
    assert states.dtype == jnp.bfloat16
    assert found.logp.dtype == found.entropy.dtype == jnp.float32
    graphdef, head = nnx.split(Critic(D))
    run = partial(forward_values, graphdef, batch=batch, dtype="bfloat16")
    assert jax.eval_shape(run, head, states=states).dtype == jnp.float32


def test_shares_of_microbatches_add_up_to_every_term_by_its_coefficient(view):
    """-Â log π over tokens + 0.3 KL over responses - 0.2 H + 0.7 of the critic's half error.

    With a temperature of 0.5, k2 = d²/2, and V = w Σ h. The microbatches, of the two longest rows
    and the two others, have 4 and 8 tokens: what is divided by its own is off by far.
    """
    graphdef, params = view
    batch, rng = make_batch(), np.random.default_rng(1)
    ref, value, returns = jnp.asarray(rng.normal(size=(3, B, T)), jnp.float32)
    term = CriticTerm(
        lambda w, batch, states: w * states.sum(-1), optax.identity(), 1e9, 0.7, shared=True
    )
    goal = Objective(LOSSES["reinforce"], temperature=0.5, kl_coef=0.3, entropy_coef=0.2)
    goal = goal._replace(kl=partial(kl, kind="k2"), critic=term, microbatch_tokens=2 * S)
    programs = make_programs(graphdef, optax.identity(), goal)

    @jax.jit
    @jax.value_and_grad
    def by_hand(trained):
        model = nnx.merge(graphdef, trained.policy)
        states = model(batch.tokens)
        logps = jax.nn.log_softmax(states @ model.unembed() / 0.5, axis=-1)
        row, t = np.nonzero(MASK)
        at = PROMPT[row] + t
        every = logps[row, at - 1]
        logp = every[np.arange(len(at)), batch.tokens[row, at]]
        policy = -jnp.mean(batch.adv[row] * logp)
        k2 = jnp.zeros((B, T)).at[row, t].set((ref[row, t] - logp) ** 2 / 2).sum(1)
        entropy = -jnp.mean(jnp.sum(jnp.exp(every) * every, axis=-1))
        error = (trained.critic * states[row, at - 1].sum(-1) - returns[row, t]) ** 2 / 2
        k2 = jnp.mean(k2 / MASK.sum(1).astype(np.float32))
        return policy + 0.3 * k2 - 0.2 * entropy + 0.7 * jnp.mean(error)

    trained = Gradients(params, jnp.float32(0.1))
    total, placed, given = programs.accumulate(trained, batch, None, ref, Targets(value, returns))
    want, gradient = by_hand(trained)
    for a, b in zip(jax.tree.leaves(total.grads), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
    metrics, finite = measure(*total, placed, given, goal)
    error = 0.7 * float(metrics["critic/vf_loss"].value)  # told apart from the policy's loss
    assert float(metrics["loss"].value) == pytest.approx(float(want) - error, rel=1e-5)
    assert finite and metrics["ratio_max"].value == 1  # on-policy, since no other is known
    alone = programs.logps(params, batch)
    np.testing.assert_allclose(alone.logp, total.found.logp, atol=1e-6)

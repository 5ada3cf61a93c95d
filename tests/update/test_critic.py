"""PPO's critic: what a value is the value of, what it is trained on, and that it learns."""

import importlib
import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import TINY
from flax import nnx
from update_cases import optimizer_of, programs_of

from gspo_jax.advantage import by_group, by_token
from gspo_jax.algo.losses import LOSSES
from gspo_jax.batch import Completions, Rollout, TrainBatch
from gspo_jax.config.checks import ONE_PER_RESPONSE
from gspo_jax.config.load import load_config, packaged_config
from gspo_jax.errors import ConfigError
from gspo_jax.mesh.sharding import make_mesh
from gspo_jax.models.config import QwenConfig
from gspo_jax.models.hf.weights import load_model
from gspo_jax.models.qwen import Qwen
from gspo_jax.policy import Policy
from gspo_jax.run import arrays
from gspo_jax.run.export import export
from gspo_jax.text.console import advice
from gspo_jax.update.critic import (
    estimate,
    explained_variance,
    forward_values,
    make_critic,
    make_term,
    make_values,
)
from gspo_jax.update.objective import Gradients, Objective, Targets, forward
from gspo_jax.update.optim import let_pass, make_optimizer
from gspo_jax.update.programs import Programs, make_programs
from gspo_jax.update.state import CriticState, init_state
from gspo_jax.update.steps import Progress, continue_updates, summarise

loop = importlib.import_module("gspo_jax.train")

KINDS = ("separate", "shared")
B, S, T = 4, 14, 6
# Responses of 6, 1, 4 and 2 tokens after prompts of 3, 8, 5 and 2.
PROMPT, RESPONSE = np.array([[3, 8, 5, 2], [6, 1, 4, 2]], np.int32)
MASK = np.arange(T)[None] < RESPONSE[:, None]


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 64, (B, S)).astype(np.int32)  # padding holds random tokens
    return TrainBatch(tokens, PROMPT, RESPONSE, MASK, rng.normal(size=(B, T)).astype(np.float32))


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


def make_targets(seed=1, poison=np.nan):
    """Values near the 0 that a fresh head predicts, and returns far from it."""
    rng = np.random.default_rng(seed)
    value, returns = rng.normal(size=(2, B, T)).astype(np.float32)
    return Targets(np.where(MASK, value / 10, poison), np.where(MASK, returns + 2, poison))


def drawn_critic(view, kind, seed=0):
    """A critic whose head, and trunk where it has one, differ from what they start as."""
    graphdef, params = make_critic(kind, *view)
    keys = iter(jax.random.split(jax.random.key(seed), 99))
    return graphdef, jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape, p.dtype), params
    )


@pytest.fixture(scope="module")
def view():
    """One layer of the usual tiny network: these tests compile many programs."""
    return nnx.split(Qwen(QwenConfig.from_hf(TINY | {"num_hidden_layers": 1}), rngs=nnx.Rngs(0)))


RATE, CRITIC_RATE = 1e-3, 1e-2


def setup(view, kind, *, coef=0.5, **options):
    """(graphdef, optimizer, objective, state) for PPO with a critic that is not zero."""
    graphdef, params = view
    optimizer = optimizer_of(RATE, "float32")
    own = optimizer_of(CRITIC_RATE, "float32")
    critic_def, critic = drawn_critic(view, kind)
    term = make_term(critic_def, own, shared=kind == "shared", clip=0.2, coef=coef)
    state = init_state(jax.tree.map(jnp.copy, params), optimizer)
    state = state._replace(critic=CriticState(critic, own.init(critic)))
    return graphdef, optimizer, Objective(LOSSES["ppo"], critic=term, **options), state


@pytest.fixture(scope="module")
def fresh(view):
    """kind -> (its programs, compiled once for all tests; a state that they may donate)."""
    made = {kind: setup(view, kind) for kind in KINDS}
    programs = {kind: programs_of(*parts[:3]) for kind, parts in made.items()}
    return lambda kind: (programs[kind], jax.tree.map(jnp.copy, made[kind][3]))


def largest(tree):
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


def same_bits(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


# --------------------------------------------------------------------------------- values


def test_the_value_of_token_t_is_read_where_token_t_is_predicted(view):
    """Against the trunk's hidden states, indexed by hand."""
    graphdef, params = drawn_critic(view, "separate")
    batch = make_batch()
    got = forward_values(graphdef, params, on_device(batch), None)
    critic = nnx.merge(graphdef, params)
    hidden = np.asarray(critic.trunk(jnp.asarray(batch.tokens)))
    head = np.asarray(critic.value_head[...])[:, 0]
    for row in range(B):
        for t in range(RESPONSE[row]):
            want = hidden[row, PROMPT[row] - 1 + t] @ head
            assert got[row, t] == pytest.approx(want, abs=1e-5)


def test_a_shared_head_reads_the_policys_own_states(view):
    graphdef, params = drawn_critic(view, "shared")
    batch = on_device(make_batch())
    states = forward(*view, batch, Objective(LOSSES["ppo"]))[0]
    got = forward_values(graphdef, params, batch, states)
    hidden = np.asarray(nnx.merge(*view)(batch.tokens))
    head = np.asarray(jax.tree.leaves(params)[0])[:, 0]
    want = [hidden[row, PROMPT[row] - 1 + t] @ head for row, t in np.argwhere(MASK)]
    np.testing.assert_allclose(np.asarray(got)[MASK], want, atol=1e-5)


def test_a_value_knows_the_tokens_before_and_neither_its_own_nor_later_ones(view):
    graphdef, params = drawn_critic(view, "separate")
    batch = make_batch()
    changed = batch.tokens.copy()
    changed[0, PROMPT[0] + 2] = 63 - changed[0, PROMPT[0] + 2]  # response token 2 of row 0
    before = forward_values(graphdef, params, on_device(batch), None)
    after = forward_values(graphdef, params, on_device(batch._replace(tokens=changed)), None)
    np.testing.assert_array_equal(before[0, :3], after[0, :3])
    assert abs(float(before[0, 3] - after[0, 3])) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_critic_says_zero_and_shares_no_buffer_with_the_policy(view, kind):
    graphdef, params = make_critic(kind, *view)
    objective = setup(view, kind)[2]
    term = objective.critic._replace(values=partial(forward_values, graphdef))
    batch = on_device(make_batch())
    _, _, _, state = setup(view, kind)
    state = state._replace(critic=CriticState(params, None))
    values = make_values(view[0], objective, term)
    np.testing.assert_array_equal(values(state, batch), np.zeros((B, T)))
    mine = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(params)}
    assert mine.isdisjoint(x.unsafe_buffer_pointer() for x in jax.tree.leaves(view[1]))
    trunk = len(jax.tree.leaves(view[1])) if kind == "separate" else 0
    assert len(jax.tree.leaves(params)) == trunk + 1


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_the_same_in_microbatches(view, kind):
    graphdef, _, objective, state = setup(view, kind)
    batch = on_device(make_batch())
    whole = make_values(graphdef, objective, objective.critic)(state, batch)
    split = make_values(graphdef, objective._replace(microbatch_tokens=2 * S), objective.critic)(
        state, batch
    )
    assert largest(whole) > 0.1
    np.testing.assert_allclose(whole, split, atol=1e-5)


# ------------------------------------------------------------------------------ advantages


def by_hand(reward, value, kl, coef, gamma, lam):
    """Advantages and returns of one response as a reversed loop."""
    adv, out = 0.0, []
    rewards = [-coef * x for x in kl]
    rewards[-1] += reward
    for t in reversed(range(len(value))):
        after = value[t + 1] if t + 1 < len(value) else 0.0
        adv = rewards[t] + gamma * after - value[t] + gamma * lam * adv
        out.append(adv)
    adv = np.array(out[::-1])
    return adv, adv + value


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0)])
def test_advantages_are_those_of_a_reversed_loop_with_the_kl_in_the_reward(gamma, lam):
    rng = np.random.default_rng(3)
    reward = np.array([1.0, -0.5, 0.25, 2.0], np.float32)
    value, kl = rng.normal(size=(2, B, T)).astype(np.float32)
    poisoned = [np.where(MASK, x, np.nan) for x in (value, kl)]
    adv, targets, metrics = jax.jit(
        partial(estimate, kl_coef=0.3, gamma=gamma, lam=lam, whiten=False)
    )(reward, *poisoned, MASK)
    for row, length in enumerate(RESPONSE):
        want_adv, want_returns = by_hand(
            reward[row], value[row, :length], kl[row, :length], 0.3, gamma, lam
        )
        np.testing.assert_allclose(adv[row, :length], want_adv, atol=1e-5)
        np.testing.assert_allclose(targets.returns[row, :length], want_returns, atol=1e-5)
    assert float(metrics["critic/values/mean"]) == pytest.approx(value[MASK].mean(), rel=1e-5)
    for x in (adv, *targets):
        np.testing.assert_array_equal(np.asarray(x)[~MASK], 0)


def test_the_kl_is_paid_token_by_token_and_the_score_on_the_last_one():
    """With V = 0 and γ = λ = 1 the return is the score minus the KL that is still to be paid."""
    kl = np.where(MASK, np.arange(1.0, T + 1)[None], np.inf).astype(np.float32)
    reward = np.array([2.0, 0.0, -1.0, 5.0], np.float32)
    _, targets, _ = estimate(
        *on_device((reward, np.zeros((B, T), np.float32), kl, MASK)),
        kl_coef=0.1,
        gamma=1.0,
        lam=1.0,
        whiten=False,
    )
    # Row 0, 6 tokens with KL 1..6: 2 - 0.1 (21, 20, 18, 15, 11, 6).
    np.testing.assert_allclose(targets.returns[0], [-0.1, 0.0, 0.2, 0.5, 0.9, 1.4], atol=1e-6)
    np.testing.assert_allclose(targets.returns[3, :2], [5 - 0.3, 5 - 0.2], atol=1e-6)


def test_whitening_is_over_valid_tokens_and_leaves_the_returns_alone():
    rng = np.random.default_rng(5)
    value = np.where(MASK, rng.normal(size=(B, T)), np.nan).astype(np.float32)
    reward = np.array([1.0, 0.0, 3.0, -2.0], np.float32)
    args = on_device((reward, value, np.zeros((B, T), np.float32), MASK))
    options = {"kl_coef": 0.0, "gamma": 0.9, "lam": 0.8}
    plain, targets, _ = estimate(*args, **options, whiten=False)
    white, same, _ = estimate(*args, **options, whiten=True)
    chosen = np.asarray(white)[MASK]
    assert chosen.mean() == pytest.approx(0, abs=1e-6)
    assert chosen.var(ddof=1) == pytest.approx(1, abs=1e-5)
    raw = np.asarray(plain)[MASK]
    np.testing.assert_allclose(chosen, (raw - raw.mean()) / raw.std(ddof=1), atol=1e-5)
    np.testing.assert_array_equal(targets.returns, same.returns)
    np.testing.assert_array_equal(np.asarray(white)[~MASK], 0)


def test_explained_variance_of_a_perfect_a_constant_and_a_contrary_critic():
    returns = np.where(MASK, np.arange(B * T).reshape(B, T), np.nan).astype(np.float32)
    explained = partial(explained_variance, returns=jnp.asarray(returns), mask=jnp.asarray(MASK))
    assert float(explained(jnp.asarray(returns))) == 1
    assert float(explained(jnp.full((B, T), 7.0))) == pytest.approx(0, abs=1e-6)
    # R - V = 2 R has four times the variance.
    assert float(explained(-jnp.asarray(returns))) == pytest.approx(-3, abs=1e-5)
    flat = explained_variance(jnp.asarray(returns), jnp.ones((B, T)), jnp.asarray(MASK))
    assert float(flat) == 0  # nothing varies: nothing to explain
    # Above 10,000,000 float32 counts in ones; half of these returns are one more than it.
    far, half = 1e7 + (returns % 2), jnp.full((B, T), 1e7)
    assert float(explained_variance(half, jnp.asarray(far), jnp.asarray(MASK))) == 0
    assert float(explained_variance(*[jnp.asarray(far)] * 2, jnp.asarray(MASK))) == 1


def rollout_of(reward):
    """Of these scores, and nothing else."""
    none = np.zeros((B, 0))
    sampled = Completions(
        none.astype("i4"), none.astype(bool), none.astype("f4"), np.zeros(B, bool)
    )
    return Rollout([], [], sampled, [], {}, reward)


def small_policy(view):
    return Policy(*view, None, make_mesh(data=1), "float32", Path())


def ppo(*overrides):
    return load_config(
        None, ["algo.loss=ppo", "algo.advantage=gae", "algo.critic.kind=separate", *overrides]
    )


def test_a_response_that_was_not_scored_is_not_learned_from(view):
    _, _, objective, state = setup(view, "separate")
    advantages = by_token(ppo(), small_policy(view), objective, objective.critic)
    rows, rollout = make_batch()._replace(adv=None), rollout_of(np.array([1.0, np.nan, 0.0, 2.0]))
    batch, targets, metrics = advantages(state, rows, rollout, np.zeros((B, T), np.float32))
    np.testing.assert_array_equal(batch.mask, MASK & (np.arange(B) != 1)[:, None])
    assert np.isfinite(batch.adv).all() and not batch.adv[1].any()
    assert np.isfinite(targets.returns).all()
    assert np.isfinite(list(metrics.values())).all()


def test_without_a_critic_the_kl_in_the_reward_is_taken_from_each_responses_score(view):
    config = load_config(
        None,
        ["rollout.group_size=2", "algo.advantage=group_centred", "algo.kl.coef=0.5"],
    )
    rows, rollout = make_batch()._replace(adv=None), rollout_of(np.array([1.0, 0.0, np.nan, 3.0]))
    penalty = np.where(MASK, 0.5 * 0.1, 0).astype(np.float32)
    state = setup(view, "shared")[-1]
    judged, targets, _ = by_group(config)(state, rows, rollout, penalty)
    # 6 and 1 tokens: 1 - 0.5 * 0.6 = 0.7 and 0 - 0.5 * 0.1 = -0.05; the third is not scored.
    np.testing.assert_allclose(judged.adv, [0.375, -0.375, 0, 0], atol=1e-6)
    assert targets is None


# --------------------------------------------------------------------------------- update


def gradients(view, kind, targets, batch=None, **options):
    graphdef, optimizer, objective, state = setup(view, kind, **options)
    programs = programs_of(graphdef, optimizer, objective)
    trained = Gradients(state.params, state.critic.params)
    return programs.accumulate(trained, batch or make_batch(), None, None, targets)[0]


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_microbatches_of_uneven_rows_add_up_for_policy_and_critic(view, kind):
    whole = gradients(view, kind, make_targets())
    split = gradients(view, kind, make_targets(), microbatch_tokens=S)
    assert largest(whole[0].critic) > 0.01
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6 * float(jnp.abs(a).max()) + 1e-9)


@pytest.mark.long
def test_what_padding_holds_reaches_no_gradient(view):
    for kind in KINDS:
        a = gradients(view, kind, make_targets(poison=np.nan))[0]
        b = gradients(view, kind, make_targets(poison=1e30))[0]
        assert same_bits(a, b) and np.isfinite(largest(a))


def test_only_a_shared_critic_reaches_the_policy_and_does_so_by_its_coefficient(view):
    """With advantages of 0 the policy's own loss has no gradient: what is left is the critic's."""
    still = make_batch()._replace(adv=np.zeros((B, T), np.float32))
    alone, same = (
        gradients(view, "separate", make_targets(), still, coef=coef)[0] for coef in (0.5, 1.0)
    )
    assert largest(alone.policy) == 0 and same_bits(alone.critic, same.critic)
    half = gradients(view, "shared", make_targets(), still, coef=0.5)[0]
    whole = gradients(view, "shared", make_targets(), still, coef=1.0)[0]
    assert largest(half.policy) > 1e-3
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(2 * np.asarray(a), b, rtol=1e-4, atol=1e-6)


def test_a_value_that_has_moved_further_than_the_clip_learns_no_more(fresh):
    """V = 0 at V_old = 1: V_c = 0.8. Pessimistic: the larger of the two errors counts."""
    programs, state = fresh("shared")
    state = state._replace(critic=jax.tree.map(jnp.zeros_like, state.critic))
    batch = on_device(make_batch()._replace(adv=np.zeros((B, T), np.float32)))

    def update(returns):
        goal = Targets(np.ones((B, T), np.float32), np.full((B, T), returns, np.float32))
        copy = jax.tree.map(jnp.copy, state)
        return programs.update(copy, batch, None, None, on_device(goal))[1]

    # R = -1: the clipped 0.8 is further (1.8² > 1²), so it counts, and is a constant.
    clipped = update(-1.0)
    assert float(clipped["critic/vf_loss"].value) == pytest.approx(1.8**2 / 2, rel=1e-5)
    assert float(clipped["critic/vf_clipfrac"].value) == 1
    assert float(clipped["critic/grad_norm"].value) == 0
    # R = 2: the value itself is further (2² > 1.2²), and is pulled up.
    free = update(2.0)
    assert float(free["critic/vf_loss"].value) == pytest.approx(2.0, rel=1e-5)
    assert float(free["critic/vf_clipfrac"].value) == 0
    assert float(free["critic/grad_norm"].value) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_policy_and_critic_have_learning_rates_of_their_own(fresh, kind):
    """Adam's first step is lr * sign, whatever the gradient."""
    programs, state = fresh(kind)
    old = jax.tree.map(np.asarray, (state.params, state.critic.params))
    goal = on_device(make_targets())
    state, *_ = programs.update(state, on_device(make_batch()), None, None, goal)
    new = (state.params, state.critic.params)
    for before, after, rate in zip(old, new, (RATE, CRITIC_RATE), strict=True):
        assert largest(jax.tree.map(jnp.subtract, before, after)) == pytest.approx(rate, rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_return_that_is_not_finite_leaves_policy_and_critic_bit_unchanged(fresh, kind):
    programs, state = fresh(kind)
    batch, goal = on_device(make_batch()), make_targets()
    state, *_ = programs.update(state, batch, None, None, on_device(goal))
    kept = jax.tree.map(np.asarray, (state.params, state.opt_state, state.critic))
    goal.returns[2, 1] = np.inf
    state, metrics, _ = programs.update(state, batch, None, None, on_device(goal))
    assert not np.isfinite(metrics["critic/vf_loss"].value)
    assert same_bits(let_pass(kept), (state.params, state.opt_state, state.critic))
    assert (int(state.updates), int(state.skipped)) == (1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_each_minibatch_learns_from_its_own_rows(fresh, kind):
    """One rollout in two minibatches equals the two updates made by hand, bit for bit."""
    parts = [(make_batch(seed), make_targets(seed + 10)) for seed in (0, 1)]
    batch, goal = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    programs, state = fresh(kind)
    progress = Progress(batch, targets=goal)
    state, done = continue_updates(programs, state, progress, minibatches=2)
    first, second = on_device(parts)
    _, by_hand = fresh(kind)
    old = programs.logps(by_hand.params, second[0]).logp
    by_hand, *_ = programs.update(by_hand, first[0], None, None, first[1])
    by_hand, *_ = programs.update(by_hand, second[0], old, None, second[1])
    assert same_bits(state._replace(step=by_hand.step), by_hand)
    assert {"critic/vf_loss", "critic/vf_clipfrac"} <= summarise(done.stats).keys()


@pytest.mark.long
def test_without_a_critic_the_state_its_names_and_its_program_know_of_none(view):
    graphdef, params = view
    optimizer = make_optimizer(optax.constant_schedule(1e-3))
    state = init_state(jax.tree.map(jnp.copy, params), optimizer)
    parts = (state.params, state.opt_state, state.step, state.updates, state.skipped)
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(parts))
    assert not any("critic" in name for name in arrays.named(state))
    batch = on_device(make_batch()._replace(adv=np.ones(B, np.float32)))
    programs = make_programs(graphdef, optimizer, Objective(LOSSES["gspo"]))
    total, _, given = programs.accumulate(Gradients(state.params), batch)
    assert len(jax.tree.leaves(total.grads)) == len(jax.tree.leaves(state.params))
    traced = programs.apply.trace(state, total, batch, given).jaxpr
    assert len(traced.in_avals) == len(jax.tree.leaves((state, total, batch, given)))
    _, metrics, _ = programs.update(state, batch)
    assert not any("critic" in name for name in metrics)


# ------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algo.advantage=gae", "algo.loss=ppo"], "set algo.critic.kind to separate or shared"),
        (["algo.critic.kind=shared"], "group_normalised makes no use of a critic"),
        (
            ["algo.advantage=gae", "algo.critic.kind=shared"],
            "algo.loss.name=gspo: takes one advantage per response",
        ),
        (["algo.critic.kind=twin"], "algo.critic.kind=twin: expected one of ['none', 'separate'"),
        (["algo.kl.placement=prompt"], "algo.kl.placement=prompt: expected one of ['loss', 'rew"),
        (["algo.critic.clip=0"], "algo.critic.clip=0: must be above 0"),
        (["algo.critic.learning_rate=-1"], "algo.critic.learning_rate=-1: must be at least 0"),
    ],
)
def test_a_critic_without_use_or_a_use_without_critic_is_refused_in_one_line(overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algo.advantage.lam=1.5", "algo.advantage.lam=1.5: must be from 0 to 1"),
        ("algo.advantage.whiten=3", "algo.advantage.whiten=3: expected true or false"),
        (
            "algo.advantage.lambda=0.9",
            "lambda: gae has no such option. Did you mean lam?",
        ),
    ],
)
def test_the_options_of_gae_are_checked(override, message):
    with pytest.raises(ConfigError) as error:
        ppo(override)
    assert message in str(error.value)


def test_one_response_per_prompt_is_enough_with_a_critic():
    assert ppo("rollout.group_size=1").rollout.group_size == 1


def test_equal_rewards_in_a_group_are_no_reason_to_warn_where_a_critic_compares():
    assert "equal" in advice({"frac_reward_zero_std": 1.0})
    assert advice({"frac_reward_zero_std": 1.0, "critic/vf_loss": 0.1}) == {}


def test_every_loss_that_takes_one_advantage_per_response_is_named():
    logp, adv, mask = jnp.zeros((2, 3)), jnp.ones((2, 3)), jnp.ones((2, 3), bool)
    refused = set()
    for name, loss in LOSSES.items():
        try:
            loss(logp, logp, adv, mask)
        except ValueError:
            refused.add(name)
    assert refused == set(ONE_PER_RESPONSE)


def test_the_demo_of_ppo_is_the_demos_task_with_a_separate_critic():
    config = load_config(packaged_config("demo_ppo.yaml"))
    demo = load_config(packaged_config("demo.yaml"))
    assert (config.algo.critic.kind, config.algo.loss["name"]) == ("separate", "ppo")
    assert config.task == demo.task


# -------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def config(tiny_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    data = root / "prompts.jsonl"
    rows = [{"prompt": f"Say {word}", "answer": word, "split": "train"} for word in "abcdef"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name, *overrides):
        return load_config(
            None,
            [
                f"model.path={tiny_dir}",
                f"task.path={data}",
                "task.rewards=[reward_functions:short_words]",
                "task.max_prompt_length=32",
                "rollout.prompts=48",
                "rollout.group_size=1",
                "rollout.max_completion_length=12",
                "algo.loss=ppo",
                "algo.advantage=gae",
                "algo.minibatches=2",
                "algo.microbatch=12",
                "algo.kl.coef=0.01",
                "algo.kl.placement=reward",
                "algo.critic.learning_rate=3e-3",
                "optim.learning_rate=3e-3",
                "mesh.data=1",
                f"run.dir={root}",
                f"run.name={name}",
                "run.steps=25",
                "run.save_every=24",
                *overrides,
            ],
        )

    return make


@pytest.fixture(scope="module")
def learned(config):
    """kind -> the directory of a run of 25 steps, made once."""
    return cache(lambda kind: loop.train(config(kind, f"algo.critic.kind={kind}")).run_dir)


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def stored(run_dir, step):
    """Every array of a checkpoint by name, as orbax finds it."""
    path = (run_dir / "checkpoints" / str(step)).resolve()
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return checkpointer.restore(path, args=args).state


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_raises_its_reward_while_the_critics_loss_falls(learned, kind):
    rows = rows_of(learned(kind))

    def ends(name):
        return (np.mean([row[name] for row in part]) for part in (rows[:5], rows[-5:]))

    first, last = ends("reward")
    assert last > first + 0.1
    first, last = ends("critic/vf_loss")
    assert last < 0.5 * first
    # Not only because the rewards end up alike: halfway, values tell good from bad.
    assert rows[0]["critic/vf_explained_var"] == pytest.approx(0, abs=1e-5)  # a head of zeros
    assert max(row["critic/vf_explained_var"] for row in rows) > 0.3
    assert rows[0]["critic/values/mean"] == 0
    assert abs(rows[-1]["critic/values/mean"] - rows[-1]["reward"]) < 0.15
    assert rows[0]["kl"] == 0 and rows[-1]["kl"] > 0.1  # far from the reference, and paid for
    assert all(row["clip_frac_by_update"][0] == 0 for row in rows)
    assert all(0 <= row["critic/vf_clipfrac"] <= 1 for row in rows)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_with_a_critic_is_bitwise_the_run_that_never_stopped(config, learned, kind):
    straight = learned(kind)
    from_there = straight / "checkpoints" / "24"
    again = config(f"{kind}-again", f"algo.critic.kind={kind}", f"run.resume={from_there}")
    again = loop.train(again).run_dir
    wanted, got = stored(straight, 25), stored(again, 25)
    assert wanted.keys() == got.keys()
    assert any(name.startswith("critic.params.value_head") for name in got)
    assert any(name.startswith("critic.opt_state.") for name in got)
    for name in wanted:
        np.testing.assert_array_equal(wanted[name], got[name], err_msg=name)
    for name in ("reward", "loss", "kl", "critic/vf_loss", "critic/values/mean"):
        assert rows_of(straight)[-1][name] == rows_of(again)[-1][name], name


@pytest.mark.long
def test_a_run_with_a_critic_exports_the_policy_alone(learned, tmp_path):
    exported = load_model(export(learned("separate"), tmp_path / "out"))
    weights = stored(learned("separate"), 25)
    for path, param in nnx.to_flat_state(nnx.state(exported)):
        name = ".".join(["params", *map(str, path), "value"])
        wanted = np.asarray(weights[name]).astype(exported.config.dtype).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(param[...]), wanted)


@pytest.mark.long
def test_four_devices_compute_what_one_does(config, learned):
    options = ("algo.critic.kind=separate", "mesh.data=2", "mesh.fsdp=2", "run.steps=2")
    four = rows_of(loop.train(config("four", *options)).run_dir)
    for a, b in zip(rows_of(learned("separate"))[:2], four, strict=True):
        assert a["reward"] == b["reward"]
        for name in ("loss", "critic/vf_loss", "critic/values/mean", "critic/vf_explained_var"):
            assert a[name] == pytest.approx(b[name], abs=2e-5), name


@pytest.mark.long
@pytest.mark.parametrize(
    ("coef", "placement", "calls"), [(0.0, "loss", 0), (0.1, "loss", 1), (0.1, "reward", 2)]
)
def test_a_reference_is_asked_only_where_the_kl_coefficient_is_not_zero(
    config, monkeypatch, coef, placement, calls
):
    """One update per step asks for no log-probs of its own: what is left is for the KL."""
    counted, logps = [], Programs.logps

    def counting(programs, params, batch):
        counted.append(params)
        return logps(programs, params, batch)

    monkeypatch.setattr(Programs, "logps", counting)
    options = [f"algo.kl.coef={coef}", f"algo.kl.placement={placement}", "algo.minibatches=1"]
    options += ["algo.loss=grpo", "algo.advantage=group_centred", "rollout.group_size=2"]
    options += ["rollout.prompts=24", "run.steps=2"]
    run_dir = loop.train(config(f"counts-{coef}-{placement}", *options)).run_dir
    assert len(counted) == 2 * calls
    rows = rows_of(run_dir)
    assert ("kl" in rows[0]) == (coef > 0)
    if coef:
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-9) and abs(rows[1]["kl"]) > 1e-6

"""Mistakes that other libraries shipped, each as a test that names it.

Those that concern sampling, checkpoints or sharding are beside the modules that could make them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gspo_jax.algo.advantages import group_normalised
from gspo_jax.algo.losses import LOSSES, cispo, grpo, gspo, gspo_token, kl, luspo
from gspo_jax.algo.mismatch import mismatch_weight

with jax.enable_x64(True):
    OLD = jnp.array([[-1.0, -0.5, -2.0, -0.7], [-0.2, -1.5, -0.9, -0.4]])
MASK = jnp.ones((2, 4), bool)


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def mean(loss):
    return loss.total / loss.weight


def grad_of(loss_fn, logp, *rest, **options):
    return jax.grad(lambda logp: mean(loss_fn(logp, *rest, **options)[0]))(logp)


@pytest.mark.parametrize("loss_fn", [gspo, gspo_token, grpo, luspo])
def test_trap_bad_responses_clipped_on_the_wrong_side(loss_fn):
    """max instead of min for Â < 0: would push down without end and stop where it may come back."""
    adv = jnp.array([-1.0, -2.0])
    options = {"clip_low": 0.2, "clip_high": 0.2}
    pushed_down = grad_of(loss_fn, OLD - 1.0, OLD, adv, MASK, **options)
    np.testing.assert_array_equal(pushed_down, 0)  # s = 0.37 < 0.8: far enough
    came_up = grad_of(loss_fn, OLD + 1.0, OLD, adv, MASK, **options)
    assert np.all(came_up > 0)  # s = 2.7: descent lowers logp, unclipped


@pytest.mark.parametrize("name", LOSSES)
def test_trap_old_log_probabilities_not_detached(name):
    """Passing the differentiated logp itself as old_logp equals passing a constant copy."""
    logp, adv = OLD, jnp.array([1.0, -2.0])
    itself = jax.grad(lambda x: mean(LOSSES[name](x, x, adv, MASK)[0]))(logp)
    np.testing.assert_array_equal(itself, grad_of(LOSSES[name], logp, logp, adv, MASK))
    np.testing.assert_array_equal(itself, grad_of(LOSSES[name], logp, None, adv, MASK))
    assert np.all(itself != 0)


def test_trap_old_log_probabilities_recomputed_at_every_minibatch():
    """Fixed since the rollout, the ratio drifts over updates until the clip stops it."""
    adv, step = jnp.array([1.0, -1.0]), 0.05
    fixed = recomputed = OLD
    clip_fracs = []
    for _ in range(4):
        clip_fracs.append(
            float(gspo(fixed, OLD, adv, MASK, clip_high=0.01, clip_low=0.01)[1]["clip_frac"])
        )
        fixed -= step * grad_of(gspo, fixed, OLD, adv, MASK, clip_high=0.01, clip_low=0.01)
        recomputed -= step * grad_of(gspo, recomputed, recomputed, adv, MASK)
    assert clip_fracs[0] == 0  # on-policy, exactly
    assert clip_fracs[-1] == 1
    assert np.all(np.abs(fixed - OLD) < np.abs(recomputed - OLD))


def test_trap_ratio_built_from_the_policy_itself_never_clips():
    """exp(logp - sg[logp]) is 1 whatever happened: the clip is inert and nobody notices."""
    for loss_fn in (gspo, gspo_token):
        _, metrics = loss_fn(OLD + 0.5, OLD, jnp.array([1.0, 2.0]), MASK)
        np.testing.assert_allclose(metrics["ratio_mean"], np.exp(0.5))
        assert metrics["clip_frac"] == 1


def test_trap_ratio_of_the_token_instead_of_the_sequence_in_gspo_token():
    logp = OLD + jnp.array([[0.3, -0.1, 0.0, 0.2], [0.1, 0.1, -0.5, 0.1]])
    wide = {"clip_low": 1.0, "clip_high": float("inf")}
    adv = jnp.array([1.0, 1.0])
    grad = grad_of(gspo_token, logp, OLD, adv, MASK, **wide)
    s = np.exp(np.mean(logp - OLD, axis=1, keepdims=True))
    np.testing.assert_allclose(grad, np.broadcast_to(-s / 8, (2, 4)), rtol=1e-12)


def test_trap_gradient_through_the_weight_of_cispo():
    """sg[w] Â log π: the gradient is w Â. Without sg it would be w Â (1 + log π)."""
    logp = OLD + 0.2
    grad = grad_of(cispo, logp, OLD, jnp.array([1.0, 1.0]), MASK)
    np.testing.assert_allclose(grad, np.full((2, 4), -np.exp(0.2) / 8), rtol=1e-12)


def test_trap_k1_as_a_loss_has_no_gradient_in_expectation():
    """Exact over a vocabulary of 5. k2 has that of KL(π ‖ ref), k3 that of KL(ref ‖ π)."""
    rng = np.random.default_rng(0)
    z, z_ref = jnp.array(rng.normal(size=5)), jnp.array(rng.normal(size=5))

    def expected_loss(z, kind, **options):
        """E over samples of the fixed π; only log π inside the loss is differentiated."""
        p = jax.lax.stop_gradient(jax.nn.softmax(z))
        each = [jnp.array([[True]])] * 5
        values = [
            kl(jax.nn.log_softmax(z)[i].reshape(1, 1), jax.nn.log_softmax(z_ref)[i].reshape(1, 1),
               each[i], kind=kind, **options)[0].total
            for i in range(5)
        ]  # fmt: skip
        return jnp.sum(p * jnp.stack(values))

    def exact(z, reverse=False):
        a, b = jax.nn.log_softmax(z), jax.nn.log_softmax(z_ref)
        return jnp.sum(jnp.exp(b) * (b - a)) if reverse else jnp.sum(jnp.exp(a) * (a - b))

    np.testing.assert_allclose(jax.grad(expected_loss)(z, "k1"), 0, atol=1e-9)
    np.testing.assert_allclose(jax.grad(expected_loss)(z, "k2"), jax.grad(exact)(z), atol=1e-9)
    np.testing.assert_allclose(
        jax.grad(expected_loss)(z, "k3"), jax.grad(exact)(z, reverse=True), atol=1e-9
    )
    for kind in ("k1", "k3"):  # as values both are right, k2 is not
        np.testing.assert_allclose(expected_loss(z, kind), exact(z), atol=1e-9)
    assert abs(expected_loss(z, "k2") - exact(z)) > 1e-3

    # k3 times the ratio has the gradient of KL(π ‖ ref) exactly
    def corrected(z):
        p = jax.lax.stop_gradient(jax.nn.log_softmax(z))
        logp, ref = jax.nn.log_softmax(z), jax.nn.log_softmax(z_ref)
        values = [
            kl(*(x[i].reshape(1, 1) for x in (logp, ref)), jnp.array([[True]]),
               old_logp=p[i].reshape(1, 1))[0].total
            for i in range(5)
        ]  # fmt: skip
        return jnp.sum(jnp.exp(p) * jnp.stack(values))

    np.testing.assert_allclose(jax.grad(corrected)(z), jax.grad(exact)(z), atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_trap_nan_when_every_response_is_masked(name):
    """All truncated and masked: 0 / 0. Here total and weight are 0, and so is the gradient."""
    nowhere, adv = jnp.zeros((2, 4), bool), jnp.array([1.0, -1.0])
    loss, metrics = LOSSES[name](OLD, OLD, adv, nowhere)
    assert loss == (0, 0)
    assert all(np.isfinite(x) for x in metrics.values())
    grad = jax.grad(lambda logp: LOSSES[name](logp, OLD, adv, nowhere)[0].total)(OLD)
    np.testing.assert_array_equal(grad, 0)


def test_trap_kl_is_nan_when_every_response_is_masked():
    loss, metrics = kl(OLD, OLD - 1, jnp.zeros((2, 4), bool))
    assert loss == (0, 0)
    assert metrics["kl"] == 0


def test_trap_kl_overflows():
    """A reference log-ratio of 1000 is exp(1000) = inf; here e^20, with a gradient."""
    far, mask = jnp.array([[-1000.0]], jnp.float32), jnp.array([[True]])
    ref = jnp.zeros((1, 1), jnp.float32)
    value, grad = jax.value_and_grad(lambda logp: kl(logp, ref, mask)[0].total)(far)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    assert grad[0, 0] < -1e8


@pytest.mark.parametrize("name", ["gspo", "grpo", "dapo"])
def test_trap_accumulation_over_unequal_token_counts_is_a_mean_of_means(name):
    """A microbatch of 4 tokens and one of 1: totals and weights add; means do not."""
    mask = MASK.at[1, 1:].set(False)
    logp, adv = OLD + jnp.array([[0.1], [0.3]]), jnp.array([1.0, 3.0])
    options = {"clip_low": 0.2, "clip_high": 0.2}
    whole, _ = LOSSES[name](logp, OLD, adv, mask, **options)
    parts = [
        LOSSES[name](*(x[i : i + 1] for x in (logp, OLD, adv, mask)), **options)[0]
        for i in range(2)
    ]
    added = sum(p.total for p in parts) / sum(p.weight for p in parts)
    np.testing.assert_allclose(added, mean(whole), rtol=1e-12)
    if name == "dapo":  # by token: the mean of means would be another number
        assert abs(sum(mean(p) for p in parts) / 2 - mean(whole)) > 0.1


def test_trap_sequence_ratio_from_the_sum_instead_of_the_mean():
    """Four tokens of 0.1: s = e^0.1. The product e^0.4 belongs to importance weights only."""
    _, metrics = gspo(OLD + 0.1, OLD, jnp.array([1.0, 1.0]), MASK)
    np.testing.assert_allclose(metrics["ratio_mean"], np.exp(0.1))
    product = mismatch_weight(OLD + 0.1, OLD, MASK, level="sequence")
    np.testing.assert_allclose(product, np.exp(0.4))


def test_trap_masked_tokens_in_the_length_of_the_mean():
    _, metrics = gspo(OLD + 0.1, OLD, jnp.array([1.0, 1.0]), MASK.at[:, 2:].set(False))
    np.testing.assert_allclose(metrics["ratio_mean"], np.exp(0.1))  # not e^0.05


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "luspo", "grpo", "dapo", "ppo"])
def test_trap_exponent_bounded_by_killing_the_gradient(name):
    """A bad response that became e^30 times as likely must still be pushed down."""
    logp = OLD + 30.0
    grad = grad_of(LOSSES[name], logp, OLD, jnp.array([-1.0, -1.0]), MASK)
    assert np.all(np.isfinite(grad))
    assert np.all(grad > 1e6)
    inside = grad_of(LOSSES[name], OLD + 15.0, OLD, jnp.array([-1.0, -1.0]), MASK)
    assert np.all(inside < grad)


def test_trap_group_split_by_microbatches():
    """Advantages come from whole groups before any split; of the halves they would be others."""
    reward = jnp.array([1.0, 1.0, 0.0, 0.0])
    whole = group_normalised(reward, 4)
    halves = jnp.concatenate([group_normalised(x, 2) for x in (reward[:2], reward[2:])])
    assert np.all(np.abs(whole) > 0.8)
    np.testing.assert_array_equal(halves, 0)


def test_trap_length_weighting_squared_in_luspo():
    """|y| min(s Â) once per response: a term per token summed over tokens would be |y|² / T."""
    mask = MASK.at[0, 3].set(False)
    loss, _ = luspo(OLD, None, jnp.array([1.0, 1.0]), mask)
    np.testing.assert_allclose(loss.total, -(3 + 4))
    assert loss.weight == 2


def test_trap_averaging_the_advantages_and_dividing_by_the_token_count():
    """That would be GSPO weighted by length. Equal advantages, unequal lengths: J = 1."""
    loss, _ = gspo(OLD, None, jnp.array([1.0, 1.0]), MASK.at[0, 1:].set(False))
    np.testing.assert_allclose(mean(loss), -1)


def test_trap_padded_batch_column_leaks_into_the_ratio():
    """Ratios centred or summed over the batch: a response must not see its neighbours."""
    adv = jnp.array([1.0, -1.0])
    alone = grad_of(gspo, (OLD + 1e-4)[:1], OLD[:1], adv[:1], MASK[:1])
    neighbour = (OLD + 1e-4).at[1].add(0.7)
    beside = grad_of(gspo, neighbour, OLD, adv, MASK)
    np.testing.assert_allclose(2 * beside[0], alone[0], rtol=1e-12)


def test_trap_gradient_vanishes_because_normalised_advantages_sum_to_zero():
    """The loss of a full group is 0 on-policy. One step must still raise the good responses."""
    adv = group_normalised(jnp.array([1.0, 0.0]), 2)
    z = jnp.array(np.random.default_rng(0).normal(size=(2, 4, 7)))
    tokens = jnp.array([[0, 3, 2, 5], [1, 1, 6, 4]])

    def logp_of(z):
        return jnp.take_along_axis(jax.nn.log_softmax(z), tokens[..., None], axis=-1)[..., 0]

    loss, grad = jax.value_and_grad(lambda z: mean(gspo(logp_of(z), None, adv, MASK)[0]))(z)
    np.testing.assert_allclose(loss, 0, atol=1e-15)
    step = optax.apply_updates(z, jax.tree.map(lambda g: -0.1 * g, grad))
    change = (logp_of(step) - logp_of(z)).sum(axis=1)
    assert change[0] > 0 > change[1]


@pytest.mark.long
@pytest.mark.parametrize("name", ["gspo", "dapo"])
def test_trap_loss_that_depends_on_the_number_of_devices(name):
    """Rows of unequal lengths over 1, 2, 4 and 8 devices, some of which hold only padding."""
    rng = np.random.default_rng(0)
    mask = np.arange(5)[None] < np.array([5, 1, 3, 0, 0, 2, 4, 1])[:, None]
    old = jnp.array(rng.normal(size=(8, 5)))
    inputs = (old + 0.1 * rng.normal(size=(8, 5)), old, jnp.array(rng.normal(size=8)), mask)

    @jax.jit
    def value_and_grad(*inputs):
        def loss(logp):
            mean_, metrics = LOSSES[name](logp, *inputs[1:])
            return mean(mean_), metrics

        return jax.value_and_grad(loss, has_aux=True)(inputs[0])

    results = []
    for count in (1, 2, 4, 8):
        mesh = jax.sharding.Mesh(jax.devices()[:count], ("data",))
        rows = jax.NamedSharding(mesh, jax.P("data"))
        (value, metrics), grad = value_and_grad(*jax.device_put(inputs, rows))
        results.append([value, grad, *metrics.values()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-15)

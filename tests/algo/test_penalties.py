"""Terms beside the policy loss: KL, entropy, the critic's error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gspo_jax.algo.penalties import entropy_bonus, kl, token_kl, value

# Without shrinking: an example is a seed, and a smaller seed explains nothing.
FIXED = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "phases": [Phase.explicit, Phase.generate],
}
MASK = jnp.array([[True, True, False], [True, False, False]])
with jax.enable_x64(True):
    LOGP = jnp.array([[-1.0, -2.0, jnp.nan], [-0.5, jnp.inf, jnp.nan]])
    REF = jnp.array([[-1.2, -1.0, jnp.nan], [-0.9, -jnp.inf, jnp.nan]])
# log-ratios 0.2, -1.0 and 0.4
K3 = [np.exp(-0.2) + 0.2 - 1, np.exp(1.0) - 1.0 - 1, np.exp(-0.4) + 0.4 - 1]


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("k1", [0.2, -1.0, 0.4]), ("k2", [0.02, 0.5, 0.08]), ("k3", K3)],
)
def test_kl_of_each_token_and_both_means(kind, tokens):
    a, b, c = tokens
    per_token = token_kl(LOGP, REF, MASK, kind)
    np.testing.assert_allclose(per_token, [[a, b, 0], [c, 0, 0]], rtol=1e-12, atol=1e-15)
    for over, total, weight in [("responses", (a + b) / 2 + c, 2), ("tokens", a + b + c, 3)]:
        loss, metrics = kl(LOGP, REF, MASK, kind=kind, over=over)
        np.testing.assert_allclose(loss, (total, weight), rtol=1e-12)
        np.testing.assert_allclose(metrics["kl"], (a + b + c) / 3, rtol=1e-12)


@pytest.mark.parametrize(
    ("kind", "slope"),
    [("k1", lambda x: 1), ("k2", lambda x: x), ("k3", lambda x: 1 - np.exp(-x))],
)
def test_gradient_of_each_kind(kind, slope):
    grad = jax.grad(lambda logp: kl(logp, REF, MASK, kind=kind)[0].total)(LOGP)
    a, b, c = (slope(x) for x in (0.2, -1.0, 0.4))
    np.testing.assert_allclose(grad, [[a / 2, b / 2, 0], [c, 0, 0]], rtol=1e-12)


@settings(max_examples=30, **FIXED)
@given(st.lists(st.floats(-5, 5), min_size=6, max_size=6))
def test_k3_is_never_negative_and_zero_only_where_the_policies_agree(log_ratios):
    shape, mask = (2, 3), jnp.ones((2, 3), bool)
    log_ratio = jnp.array(log_ratios).reshape(shape)
    got = np.asarray(token_kl(log_ratio, jnp.zeros(shape), mask))
    assert np.all(got >= 0)
    apart = np.abs(log_ratio) > 1e-4
    assert np.all(got[apart] > 0)
    np.testing.assert_array_equal(token_kl(log_ratio, log_ratio, mask), 0)


def test_k3_keeps_its_digits_near_the_reference():
    """d²/2 to first order; exp(d) - 1 - d would cancel to nothing in float32."""
    ref, mask = jnp.zeros((1, 1), jnp.float32), jnp.ones((1, 1), bool)
    got = token_kl(ref - jnp.float32(2e-3), ref, mask)
    np.testing.assert_allclose(got, 2e-6, rtol=1e-3)


def test_the_corrected_kl_counts_each_token_by_its_ratio_gradient_included():
    old = LOGP - 0.3
    loss, _ = kl(LOGP, REF, MASK, old_logp=old, over="tokens")
    plain, _ = kl(LOGP, REF, MASK, over="tokens")
    np.testing.assert_allclose(loss.total, np.exp(0.3) * plain.total, rtol=1e-12)
    grad = jax.grad(lambda x: kl(x, REF, MASK, old_logp=old, over="tokens")[0].total)
    # d (w k3) / dlogp = w (k3 + 1 - exp(-log-ratio))
    expected = np.exp(0.3) * (K3[0] + 1 - np.exp(-0.2))
    np.testing.assert_allclose(grad(LOGP)[0, 0], expected, rtol=1e-12)


def test_the_reference_has_no_gradient():
    grad = jax.grad(lambda ref: kl(LOGP, ref, MASK)[0].total)(REF)
    np.testing.assert_array_equal(grad, 0)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="kl kind='k4' is not known; choose k1, k2 or k3"):
        kl(LOGP, REF, MASK, kind="k4")
    with pytest.raises(ValueError, match="kl over='rows' is not known; choose from"):
        kl(LOGP, REF, MASK, over="rows")


def test_the_entropy_bonus_rewards_entropy():
    entropy = jnp.array([[0.5, 1.5, jnp.nan], [1.0, jnp.nan, jnp.nan]])
    (loss, metrics), grad = jax.value_and_grad(
        lambda x: ((m := entropy_bonus(x, MASK))[0].total / m[0].weight, m[1]), has_aux=True
    )(entropy)
    np.testing.assert_allclose(loss, -1.0)
    np.testing.assert_allclose(metrics["entropy"], 1.0)
    np.testing.assert_allclose(grad, np.where(MASK, -1 / 3, 0), rtol=1e-12)


def test_value_loss_by_hand():
    """V_old = 1, ε = 0.2. Three tokens: inside, moved away from R, moved towards R too far."""
    predicted = jnp.array([[1.1, 1.5, jnp.nan], [0.2, jnp.nan, jnp.nan]])
    returns = jnp.array([[2.0, 0.0, jnp.nan], [0.0, jnp.nan, jnp.nan]])
    old = jnp.where(MASK, 1.0, jnp.nan)
    loss, metrics = value(predicted, old, returns, MASK, clip=0.2)
    # inside: (1.1-2)² = .81; away: max((1.5)², (1.2)²) = 2.25; too far: max(.2², .8²) = .64
    np.testing.assert_allclose(loss.total / loss.weight, (0.81 + 2.25 + 0.64) / 2 / 3, rtol=1e-12)
    np.testing.assert_allclose(metrics["value_clip_frac"], 1 / 3)
    grad = jax.grad(lambda v: value(v, old, returns, MASK, clip=0.2)[0].total)
    # half the squared error: V - R, but nothing where the old value already went far enough
    np.testing.assert_allclose(grad(predicted), [[-0.9, 1.5, 0], [0, 0, 0]], rtol=1e-12, atol=1e-12)


@settings(max_examples=20, **FIXED)
@given(st.integers(0, 1000), st.floats(0.01, 1))
def test_the_clipped_value_loss_is_never_below_the_plain_one(seed, clip):
    rng = np.random.default_rng(seed)
    predicted, old, returns = (jnp.array(rng.normal(size=(2, 3))) for _ in range(3))
    plain = value(predicted, old, returns, MASK, clip=None)
    clipped = value(predicted, old, returns, MASK, clip=clip)
    assert clipped[0].total >= plain[0].total
    near = old + clip * 0.99 * jnp.sign(predicted)
    inside = value(near, old, returns, MASK, clip=clip)
    np.testing.assert_allclose(
        inside[0].total, value(near, old, returns, MASK, clip=None)[0].total, rtol=1e-12
    )
    squared = np.where(MASK, (predicted - returns) ** 2, 0)
    np.testing.assert_allclose(plain[0], (squared.sum() / 2, 3), rtol=1e-12)
    assert plain[1]["value_clip_frac"] == 0


def test_the_value_loss_moves_the_prediction_alone():
    v = jnp.where(MASK, 0.5, 0.0)
    for i in (1, 2):
        grad = jax.grad(lambda *xs: value(*xs, MASK)[0].total, argnums=i)(v, v + 1, v - 1)
        np.testing.assert_array_equal(grad, 0)


def test_nothing_to_average_is_zero_and_finite():
    nowhere = jnp.zeros_like(MASK)
    for loss, metrics in (
        kl(LOGP, REF, nowhere),
        kl(LOGP, REF, nowhere, over="tokens"),
        entropy_bonus(LOGP, nowhere),
        value(LOGP, REF, LOGP, nowhere),
    ):
        assert loss == (0, 0)
        assert all(x == 0 for x in metrics.values())

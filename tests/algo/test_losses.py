"""Losses by hand: values, gradients and diagnostics that were worked out on paper or in NumPy.

Recorded values of other implementations are in test_losses_golden, the identities of the family
in test_losses_invariants, the mistakes of others in test_losses_traps.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo_jax.algo.losses import (
    LOSSES,
    RATIO,
    cispo,
    dapo,
    dr_grpo,
    gmpo,
    grpo,
    gspo,
    gspo_token,
    luspo,
    ppo,
    reinforce,
    sapo,
)

PAD = np.nan  # whatever lies outside the mask must have no effect

# One group of four responses with 3, 2, 1 and 3 tokens, rewards [1, 0, 1, 0].
# log s = [0.1, -0.35, 0.1, 0], s = [1.105171, 0.704688, 1.105171, 1].
OLD = [[-1.0, -0.5, -2.0], [-0.2, -1.5, PAD], [-0.7, PAD, PAD], [-1.2, -0.4, -0.9]]
NEW = [[-0.9, -0.6, -1.7], [-0.5, -1.9, PAD], [-0.6, PAD, PAD], [-1.2, -0.4, -0.9]]
A = 0.866025403784438647  # (r - 1/2) / sqrt(1/3) = sqrt(3)/2
MASK = ~np.isnan(OLD)


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def arrays():
    return jnp.array(NEW), jnp.array(OLD), jnp.array([A, -A, A, -A]), jnp.array(MASK)


def value_and_grad(loss_fn, logp, *rest, **options):
    def mean(logp):
        loss, metrics = loss_fn(logp, *rest, **options)
        return loss.total / loss.weight, metrics

    return jax.jit(jax.value_and_grad(mean, has_aux=True))(logp)


def check(loss_fn, options, value, grad):
    """Against numbers worked out elsewhere to 12 digits."""
    (got, metrics), got_grad = value_and_grad(loss_fn, *arrays(), **options)
    np.testing.assert_allclose(got, value, rtol=0, atol=1e-12)
    np.testing.assert_allclose(got_grad, np.array(grad), rtol=0, atol=1e-11)
    return metrics


@pytest.mark.parametrize("loss_fn", [gspo, gspo_token])
@pytest.mark.parametrize(
    ("clip_low", "clip_high", "objective", "rows"),
    [
        # d objective / d logp of one token = s A / (B |y|) where the row is not clipped, else 0.
        (3e-4, 4e-4, 0.000238156986041, [0, 0, 0, -0.072168783649]),
        (0.2, 0.27, 0.088841613585643, [0.079758840881, 0, 0.239276522644, -0.072168783649]),
        (0.4, 0.05, 0.085587539180537, [0, -0.076284723430, 0, -0.072168783649]),
    ],
)
def test_gspo_value_and_gradient_at_three_clip_ranges(
    loss_fn, clip_low, clip_high, objective, rows
):
    grad = -np.array(rows)[:, None] * MASK
    check(loss_fn, {"clip_low": clip_low, "clip_high": clip_high}, -objective, grad)


def test_the_default_clip_range_of_gspo_is_the_papers():
    metrics = check(gspo, {}, -0.000238156986041, [[0] * 3] * 3 + [[0.072168783649] * 3])
    # rows 0 and 2 (A > 0) above, row 1 (A < 0) below: 4 and 2 of 9 tokens, 3 of 4 responses
    np.testing.assert_allclose(metrics["clip_frac_high"], 4 / 9)
    np.testing.assert_allclose(metrics["clip_frac_low"], 2 / 9)
    np.testing.assert_allclose(metrics["clip_frac"], 6 / 9)
    np.testing.assert_allclose(metrics["clip_frac_seq"], 3 / 4)


def test_grpo_value_and_gradient():
    grad = np.zeros((4, 3))
    grad[0] = [-0.079758840881, -0.065301015859, 0]
    grad[2, 0] = -np.exp(0.1) * A / 4
    grad[3] = 0.072168783649
    metrics = check(grpo, {"clip_low": 0.2, "clip_high": 0.27}, -0.086279302916105, grad)
    # token [0, 2] above, tokens [1, 0] and [1, 1] below; rows: (1/3 + 1 + 0 + 0) / 4
    np.testing.assert_allclose(metrics["clip_frac_high"], 1 / 9)
    np.testing.assert_allclose(metrics["clip_frac_low"], 2 / 9)
    np.testing.assert_allclose(metrics["clip_frac_seq"], 1 / 3)


@pytest.mark.parametrize(
    ("loss_fn", "options", "value"),
    [
        (luspo, {"clip_low": 3e-4, "clip_high": 4e-4}, 0.216030036974028),
        (gmpo, {}, -0.109477247482348),
        (sapo, {}, -0.152925549425537),
        (cispo, {}, 0.033813635014832),
        (cispo, {"cap": 1.28}, 0.022385951296372),
        (dapo, {"clip_high": 0.27}, 0.020671135903751),
        (dr_grpo, {"clip_high": 0.27}, 0.015503351927813),
        (dr_grpo, {"clip_high": 0.27, "max_length": 6}, 0.015503351927813 / 2),
    ],
)
def test_values_of_the_family_and_their_defaults(loss_fn, options, value):
    (got, _), _ = value_and_grad(loss_fn, *arrays(), **options)
    np.testing.assert_allclose(got, value, rtol=0, atol=1e-12)


def test_the_default_ranges_are_those_of_the_table():
    """Log-ratios on both sides of every default bound; which of them are clipped."""
    defaults = {
        gspo: (3e-4, 4e-4),
        gspo_token: (3e-4, 4e-4),
        luspo: (2e-3, 2.5e-3),
        grpo: (0.2, 0.2),
        dr_grpo: (0.2, 0.2),
        dapo: (0.2, 0.28),
        ppo: (0.2, 0.2),
    }
    old, mask = jnp.full((4, 1), -1.0), jnp.ones((4, 1), bool)
    adv = jnp.array([1.0, 1.0, -1.0, -1.0])
    for loss_fn, (low, high) in defaults.items():
        ratio = jnp.array(
            [[1 + 0.99 * high], [1 + 1.01 * high], [1 - 0.99 * low], [1 - 1.01 * low]]
        )
        _, metrics = loss_fn(old + jnp.log(ratio), old, adv, mask)
        assert metrics["clip_frac_low"] == metrics["clip_frac_high"] == 0.25, loss_fn.__name__


def test_the_default_bounds_of_gmpo_and_cispo():
    old, mask = jnp.full((4, 1), -1.0), jnp.ones((4, 1), bool)
    adv = jnp.array([1.0, 1.0, -1.0, -1.0])
    log_ratio = jnp.array([[0.39], [0.41], [-0.39], [-0.41]])
    _, metrics = gmpo(old + log_ratio, old, adv, mask)
    assert metrics["clip_frac_low"] == metrics["clip_frac_high"] == 0.25
    _, metrics = cispo(old + jnp.log(jnp.array([[4.9], [5.1], [0.09], [1.0]])), old, adv, mask)
    assert (metrics["clip_frac_low"], metrics["clip_frac_high"]) == (0, 0.25)


def test_gmpo_has_a_bound_for_each_side():
    """Good above 0.3, three, cut to 0.3; bad below -0.2, two, cut to -0.2; the rest pass."""
    log_ratio = jnp.array([[0.5], [0.35], [0.31], [-0.5], [-0.25], [0.5], [-0.5], [-0.15]])
    adv = jnp.array([1.0, 2.0, 3.0, -2.0, -5.0, -4.0, 8.0, -3.0])
    old, mask = jnp.full((8, 1), -1.0), jnp.ones((8, 1), bool)
    loss, metrics = gmpo(old + log_ratio, old, adv, mask, log_clip_low=0.2, log_clip_high=0.3)
    expected = np.exp([0.3, 0.3, 0.3, -0.2, -0.2, 0.5, -0.5, -0.15]) @ np.asarray(adv)
    np.testing.assert_allclose(loss.total, -expected, rtol=1e-12)
    np.testing.assert_allclose(metrics["clip_frac_high"], 3 / 8)
    np.testing.assert_allclose(metrics["clip_frac_low"], 2 / 8)


def test_cispo_truncates_on_both_sides_whatever_the_sign_and_counts_where_it_matters():
    """Ratios 0.5, 0.5, 2, 2, 2 in [0.8, 1.5]; the third and the last have nothing to weigh."""
    ratio, adv = np.array([[0.5], [0.5], [0.5], [2.0], [2.0]]), jnp.array([1.0, -3, 0, 2, 0])
    old, mask = jnp.full((5, 1), -2.0), jnp.ones((5, 1), bool)
    inputs = jnp.array(old + np.log(ratio)), old, adv, mask
    (_, metrics), grad = value_and_grad(cispo, *inputs, cap=1.5, floor=0.8)
    np.testing.assert_allclose(grad[:, 0], np.array([-0.8, 2.4, 0, -3.0, 0]) / 5, rtol=1e-12)
    np.testing.assert_allclose(metrics["clip_frac_low"], 2 / 5)
    np.testing.assert_allclose(metrics["clip_frac_high"], 1 / 5)


def test_the_gradient_of_sapo_keeps_its_digits_far_from_the_policy():
    """sech²(τ(w - 1)/2) at w = 20 is 2e-8: in float32, 1 - sigmoid would round it to nothing."""
    old, mask = jnp.full((1, 1), -3.2, jnp.float32), jnp.ones((1, 1), bool)
    logp = old + np.float32(np.log(20))
    _, grad = value_and_grad(sapo, logp, old, jnp.ones(1, jnp.float32), mask)
    w = np.exp(np.float64(logp - old)[0, 0])
    np.testing.assert_allclose(grad[0, 0], -w / np.cosh((w - 1) / 2) ** 2, rtol=1e-5)


def test_ppo_is_the_same_surrogate_averaged_over_tokens():
    grad = np.zeros((4, 3))
    grad[0] = [-np.exp(0.1) * A / 9, -np.exp(-0.1) * A / 9, 0]
    grad[2, 0] = -np.exp(0.1) * A / 9
    grad[3] = A / 9
    check(ppo, {"clip_low": 0.2, "clip_high": 0.27}, 0.020671135903751, grad)


def test_reinforce_is_the_weighted_likelihood_over_tokens():
    # A * (-3.2 + 2.4 - 0.6 + 2.5) / 9 with the sums of logp by row
    grad = -np.array([A, -A, A, -A])[:, None] * MASK / 9
    check(reinforce, {}, -A * (-3.2 + 2.4 - 0.6 + 2.5) / 9, grad)


def test_reinforce_with_advantage_one_is_the_negative_log_likelihood():
    logp, _, adv, mask = arrays()
    (value, _), grad = value_and_grad(reinforce, logp, None, jnp.ones_like(adv), mask)
    np.testing.assert_allclose(value, (3.2 + 2.4 + 0.6 + 2.5) / 9, rtol=1e-14)
    np.testing.assert_allclose(grad, MASK / -9)


def test_ratio_diagnostics_of_a_sequence_loss_run_over_responses():
    (_, metrics), _ = value_and_grad(gspo, *arrays())
    s = np.exp([0.1, -0.35, 0.1, 0])
    assert_ratios(metrics, s)


def test_ratio_diagnostics_of_a_token_loss_run_over_tokens():
    (_, metrics), _ = value_and_grad(grpo, *arrays())
    assert_ratios(metrics, np.exp((np.array(NEW) - np.array(OLD))[MASK]))


def assert_ratios(metrics, ratios):
    expected = {
        "ratio_mean": ratios.mean(),
        "ratio_min": ratios.min(),
        "ratio_max": ratios.max(),
        "ratio_std": ratios.std(),
        **{f"ratio_q{q:02d}": np.percentile(ratios, q) for q in (5, 50, 95)},
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_single_token_everything_is_finite_and_zero(name):
    logp, old, adv, mask = arrays()
    loss, metrics = LOSSES[name](logp, old, adv * jnp.nan, jnp.zeros_like(mask))
    assert (loss.total, loss.weight) == (0, 0)
    assert all(np.isfinite(x) for x in metrics.values())
    assert {k: float(v) for k, v in metrics.items() if "clip" in k and v != 0} == {}
    assert float(metrics["ratio_mean"]) == float(metrics["ratio_q05"]) == 1

    grad = jax.grad(lambda lp: LOSSES[name](lp, old, adv, jnp.zeros_like(mask))[0].total)(logp)
    np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_response_does_not_trip_the_search_for_nans(name):
    """Whoever hunts a NaN of their own with jax.debug_nans must not be stopped by ours."""
    logp, old, adv, mask = arrays()
    logp, old = (jnp.where(mask, x, 0.0) for x in (logp, old))
    mask = mask.at[2].set(False)

    def loss(logp):
        loss, metrics = LOSSES[name](logp, old, adv, mask, weight=jnp.ones(4))
        return loss.total, metrics

    with jax.debug_nans(True):
        grad, _ = jax.grad(loss, has_aux=True)(logp)
    assert np.abs(grad).max() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_the_weight_of_the_mean_depends_on_the_mask_alone(name):
    logp, old, adv, mask = arrays()
    loss, _ = LOSSES[name](logp, old, adv, mask)
    blank, _ = LOSSES[name](jnp.zeros_like(logp), None, jnp.zeros_like(adv), mask)
    assert loss.weight == blank.weight


def test_a_response_without_tokens_is_not_counted():
    """verl's choice. TRL divides by 5 here, which would make rows of padding cost."""
    logp, old, adv, mask = (jnp.concatenate([x, x[:1]]) for x in arrays())
    loss, metrics = gspo(logp, old, adv, mask.at[4].set(False))
    assert loss.weight == 4
    np.testing.assert_allclose(loss.total / loss.weight, -0.000238156986041, atol=1e-12)
    np.testing.assert_allclose(metrics["clip_frac_seq"], 3 / 4)


@pytest.mark.parametrize("name", LOSSES)
def test_only_logp_has_a_gradient(name):
    logp, old, adv, mask = arrays()
    logp, old = (jnp.where(mask, x, -1.0) for x in (logp, old))
    weight = jnp.ones(4)

    def loss(old, adv, weight):
        return LOSSES[name](logp, old, adv, mask, weight=weight)[0].total

    for grad in jax.grad(loss, argnums=(0, 1, 2))(old, adv, weight):
        np.testing.assert_array_equal(grad, 0)


def test_a_weight_scales_terms_and_not_the_denominator():
    """Row 3 alone is left: -1 * 0.5 * (-A) over 4 responses."""
    for loss_fn in (gspo, gspo_token):
        loss, _ = loss_fn(*arrays(), weight=jnp.array([0.0, 0, 0, 0.5]))
        assert loss.weight == 4
        np.testing.assert_allclose(loss.total, 0.5 * A)


def test_a_weight_per_token_counts_with_its_mean_in_gspo_and_token_by_token_in_gspo_token():
    logp, old, adv, mask = arrays()
    weight = jnp.array([[0.0] * 3] * 3 + [[0.1, 0.2, 0.6]])
    by_mean = jax.grad(lambda lp: gspo(lp, old, adv, mask, weight=weight)[0].total)(logp)
    by_token = jax.grad(lambda lp: gspo_token(lp, old, adv, mask, weight=weight)[0].total)(logp)
    np.testing.assert_allclose(by_mean[3], A / 3 * 0.3)
    np.testing.assert_allclose(by_token[3], A / 3 * np.array([0.1, 0.2, 0.6]))


def test_delta_bounds_the_ratio_of_bad_responses_only():
    logp, old, adv, mask = arrays()
    # Without it, row 0 with A < 0 and s = 1.105 keeps its full ratio: -1.105 A.
    kwargs = {"clip_low": 0.04, "clip_high": 0.05}
    free, _ = gspo(logp, old, -adv, mask, **kwargs)
    bound, metrics = gspo(logp, old, -adv, mask, delta=1.06, **kwargs)
    s = np.exp([0.1, -0.35, 0.1, 0])
    np.testing.assert_allclose(free.total, A * (s[0] - s[1] + s[2] - s[3]))
    np.testing.assert_allclose(bound.total, A * (1.06 - s[1] + 1.06 - s[3]))
    np.testing.assert_allclose(metrics["clip_frac_delta"], 4 / 9)
    assert metrics["clip_frac"] == 0  # as in TRL, delta is not part of the clip range
    plain, _ = gspo(logp, old, adv, mask, **kwargs)  # rows 0 and 2 are good now, and above 1.06
    assert gspo(logp, old, adv, mask, delta=1.06, **kwargs)[0].total == plain.total

    with pytest.raises(ValueError, match=r"delta=1.01 must be above 1 \+ clip_high = 1.05"):
        gspo(logp, old, adv, mask, clip_high=0.05, delta=1.01)


@pytest.mark.parametrize("loss_fn", [gspo, luspo, gmpo])
def test_a_ratio_per_response_refuses_an_advantage_per_token(loss_fn):
    logp, old, adv, mask = arrays()
    with pytest.raises(ValueError, match="For one per token use gspo_token"):
        loss_fn(logp, old, jnp.broadcast_to(adv[:, None], logp.shape), mask)


def test_half_precision_is_computed_in_float32_and_float64_stays():
    logp, old, adv, mask = arrays()
    half, old_half = logp.astype(jnp.bfloat16), old.astype(jnp.bfloat16)
    single = [x.astype(jnp.float32) for x in (half, old_half)]
    for name, loss_fn in LOSSES.items():
        got, metrics = loss_fn(half, old_half, adv.astype(jnp.float32), mask)
        expected, _ = loss_fn(*single, adv.astype(jnp.float32), mask)
        assert got.total.dtype == got.weight.dtype == jnp.float32, name
        assert {x.dtype for x in metrics.values()} == {jnp.dtype("float32")}, name
        assert got.total == expected.total, name
        full, metrics = loss_fn(logp, old, adv, mask)
        assert {x.dtype for x in (*full, *metrics.values())} == {jnp.dtype("float64")}, name


def test_advantages_may_have_another_precision_than_log_probabilities():
    logp, old, adv, mask = arrays()
    for name, loss_fn in LOSSES.items():
        full, _ = loss_fn(logp, old, adv.astype(jnp.float32), mask, weight=adv.astype(jnp.float32))
        assert full.total.dtype == jnp.float64, name
        half, _ = loss_fn(logp.astype(jnp.float32), old, adv, mask, weight=adv)
        assert half.total.dtype == jnp.float32, name


def test_every_loss_says_what_its_ratio_covers():
    assert RATIO.keys() == LOSSES.keys()
    assert set(RATIO.values()) == {"sequence", "token"}


@pytest.mark.parametrize("option", ["aggregation", "loss_agg_mode", "mean", "reduction"])
def test_gspo_takes_no_other_mean(option):
    with pytest.raises(TypeError, match=option):
        gspo(*arrays(), **{option: "token"})

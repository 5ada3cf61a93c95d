"""The shared parts by themselves; what they are for is tested through the losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo_jax.algo.masked import (
    diagnostics,
    log_ratio,
    mean_over_constant,
    mean_over_responses,
    mean_over_rows,
    mean_over_tokens,
    on_mask,
    row_mean,
    saturated,
)

NAN, INF = jnp.nan, jnp.inf
MASK = jnp.array([[True, True, True], [False, True, False], [False, False, False]])
X = jnp.array([[1.0, 2.0, 6.0], [NAN, 5.0, NAN], [NAN, NAN, NAN]])


def test_on_mask_replaces_and_widens():
    np.testing.assert_array_equal(on_mask(X, MASK), [[1, 2, 6], [0, 5, 0], [0, 0, 0]])
    by_row = on_mask(jnp.array([7.0, 8.0, NAN], jnp.bfloat16), MASK)
    np.testing.assert_array_equal(by_row, [[7, 7, 7], [0, 8, 0], [0, 0, 0]])
    assert by_row.dtype == jnp.float32


def test_row_mean_is_zero_where_there_is_nothing():
    np.testing.assert_allclose(row_mean(on_mask(X, MASK), MASK), [3, 5, 0])


def test_the_four_means():
    x = on_mask(X, MASK)
    assert mean_over_tokens(x, MASK) == (14, 4)
    assert mean_over_responses(x, MASK) == (3 + 5, 2)
    assert mean_over_rows(jnp.array([10.0, 20.0, NAN]), MASK) == (30, 2)
    assert mean_over_constant(x, MASK, None, None) == (14, 2 * 3)
    assert mean_over_constant(x, MASK, None, 7) == (14, 2 * 7)


def test_the_four_means_with_a_weight():
    x = on_mask(X, MASK)
    by_row, by_token = jnp.array([0.5, 2.0, NAN]), jnp.array([[0.0, 1, 2]] * 3)
    assert mean_over_tokens(x, MASK, by_row) == (4.5 + 10, 4)
    assert mean_over_tokens(x, MASK, by_token) == (2 + 12 + 5, 4)
    assert mean_over_responses(x, MASK, by_row) == (1.5 + 10, 2)
    assert mean_over_rows(jnp.array([10.0, 20.0, NAN]), MASK, by_row) == (5 + 40, 2)
    assert mean_over_constant(x, MASK, by_row, 7) == (14.5, 14)


def test_log_ratio_against_itself_is_zero_and_moves():
    x = jnp.array([[-1.0, -2.0, NAN]])
    mask = ~jnp.isnan(x)
    np.testing.assert_array_equal(log_ratio(x, None, mask), [[0, 0, 0]])
    slope = jax.grad(lambda x: log_ratio(x, None, mask).sum())(x)
    np.testing.assert_array_equal(slope, [[1, 1, 0]])


def test_saturated_bounds_the_value_and_keeps_the_slope():
    x = jnp.array([-100.0, -20.5, -3.0, 0.0, 3.0, 20.5, 100.0])
    np.testing.assert_array_equal(saturated(x), [-20, -20, -3, 0, 3, 20, 20])
    np.testing.assert_array_equal(jax.grad(lambda x: saturated(x).sum())(x), 1)


def test_a_log_ratio_is_bounded_where_either_side_is_minus_infinity():
    """A token that neither policy can draw has the same probability under both: its ratio is 1."""
    logp, old = jnp.array([[-INF, -1.0, -INF, -3.0]]), jnp.array([[-1.0, -INF, -INF, -1.0]])
    mask = jnp.ones_like(logp, bool)
    got = log_ratio(logp, old, mask)
    np.testing.assert_array_equal(saturated(got), [[-20, 20, 0, -2]])
    assert jnp.isfinite(row_mean(got, mask)[0])  # with infinity on both sides it would be NaN
    slope = jax.grad(lambda x: saturated(log_ratio(x, old, mask)).sum())(logp)
    np.testing.assert_array_equal(slope, 1)
    np.testing.assert_array_equal(log_ratio(logp, None, mask), 0)
    assert jnp.isnan(saturated(log_ratio(jnp.array([[NAN]]), old[:, :1], mask[:, :1])))


def test_diagnostics_of_what_is_clipped_by_row_or_by_token():
    low, high = jnp.array([False, True, True]), jnp.array([[True, False, True]] * 3)
    got = diagnostics(jnp.zeros((3, 3)), MASK, low=low, high=high, extra=high & False)
    # low: the one token of row 1; high: two of row 0
    assert {k: float(v) for k, v in got.items() if "clip" in k} == pytest.approx(
        {
            "clip_frac": 0.75,
            "clip_frac_low": 0.25,
            "clip_frac_high": 0.5,
            "clip_frac_extra": 0,
            "clip_frac_seq": (2 / 3 + 1) / 2,
        }
    )

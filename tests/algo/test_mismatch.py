"""Weights against data of another policy, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo_jax.algo.losses import LOSSES
from gspo_jax.algo.mismatch import mismatch_weight, off_policy_weight

# log ρ of two responses: [log 3, log 1/2] and [log 1.2]; what is NaN is padding.
ROLLOUT = np.array([[-2.0, -1.0], [-0.5, np.nan]])
RHO = np.array([[3.0, 0.5], [1.2, np.nan]])
MASK = jnp.array(~np.isnan(RHO))


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def weight(**options):
    return np.asarray(
        mismatch_weight(jnp.array(ROLLOUT + np.log(RHO)), jnp.array(ROLLOUT), MASK, **options)
    )


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("truncate", [[2.0, 0.6], [1.2, 1.0]]),
        ("mask", [[0.0, 0.0], [1.2, 1.0]]),
        ("reject", [[0.0, 0.0], [1.0, 1.0]]),
    ],
)
def test_token_weights(rule, expected):
    """Outside the mask log ρ is 0; there the loss ignores the weight anyway."""
    np.testing.assert_allclose(weight(rule=rule, low=0.6, high=2.0), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("level", "rho"), [("sequence", [1.5, 1.2]), ("geometric", [np.sqrt(1.5), 1.2])]
)
def test_sequence_weights_are_the_product_and_its_root(level, rho):
    np.testing.assert_allclose(weight(level=level, high=9.0), rho, rtol=1e-12)
    kept = weight(level=level, rule="reject", low=1.21, high=1.45)
    np.testing.assert_array_equal(kept, [level == "geometric", 0])
    cut = weight(level=level, rule="mask", low=1.21, high=9.0)
    np.testing.assert_allclose(cut, [rho[0], 0], rtol=1e-12)


def test_the_defaults_truncate_each_token_at_two():
    np.testing.assert_allclose(weight(), [[2.0, 0.5], [1.2, 1.0]], rtol=1e-12)


def test_a_sampler_that_agrees_has_weight_one():
    logp = jnp.array(ROLLOUT)
    for level in ("token", "sequence", "geometric"):
        for rule in ("truncate", "mask", "reject"):
            got = mismatch_weight(logp, logp, MASK, level=level, rule=rule)
            np.testing.assert_array_equal(got, 1)


def test_a_long_product_stays_finite():
    """4096 tokens of +1 nat: e^4096, bounded to e^20 before the rule is applied."""
    zeros, mask = jnp.zeros((1, 4096)), jnp.ones((1, 4096), bool)
    got = mismatch_weight(zeros + 1, zeros, mask, level="sequence", high=float("inf"))
    np.testing.assert_allclose(got, np.exp(20))
    dropped = mismatch_weight(zeros + 1, zeros, mask, level="sequence", rule="mask", high=3.0)
    np.testing.assert_array_equal(dropped, 0)


@pytest.mark.parametrize("option", [{"level": "word"}, {"rule": "cap"}])
def test_unknown_choices_are_refused(option):
    with pytest.raises(ValueError, match="is not known; choose"):
        weight(**option)


def test_off_policy_weight_drops_bad_responses_that_were_left_behind():
    """Mean drift log π_rollout - log π_θ is 0.4 in all four; bad ones are dropped above delta."""
    rollout, mask = jnp.full((4, 2), -1.0), jnp.ones((4, 2), bool)
    logp = rollout - jnp.array([[0.8, 0.0]])
    adv = jnp.array([1.0, 0.0, -0.1, -2.0])
    for delta, bad in [(0.39, 0), (0.41, 1)]:
        got = off_policy_weight(logp, rollout, adv, mask, delta=delta)
        np.testing.assert_array_equal(got, [1, 1, bad, bad])
    came_up = off_policy_weight(rollout + 5, rollout, adv, mask, delta=0.1)
    np.testing.assert_array_equal(came_up, 1)


def test_the_drift_is_a_mean_over_real_tokens():
    """0.4 over 2 tokens and nothing over the padding: dropped at 0.15, kept at 0.25."""
    rollout = jnp.array([[-1.0, -1.0, np.nan, np.nan]])
    logp, mask = rollout - jnp.array([[0.4, 0.0, 0.0, 0.0]]), ~jnp.isnan(rollout)
    for delta, kept in [(0.15, 0), (0.25, 1)]:
        assert off_policy_weight(logp, rollout, jnp.array([-1.0]), mask, delta=delta) == kept


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_flows_through_a_weight(name):
    """The loss of a weight that depends on logp has the gradient of that weight as a constant."""
    rollout, mask = jnp.array([[-1.0, -0.5], [-0.3, -2.0]]), jnp.ones((2, 2), bool)
    logp, adv = rollout + jnp.array([[0.3, 0.1], [-0.2, 0.4]]), jnp.array([1.0, -2.0])
    constant = mismatch_weight(logp, rollout, mask, level="geometric")

    def loss(logp, weight=None):
        if weight is None:
            weight = mismatch_weight(logp, rollout, mask, level="geometric")
        return LOSSES[name](logp, rollout, adv, mask, weight=weight)[0].total

    np.testing.assert_array_equal(jax.grad(loss)(logp), jax.grad(loss)(logp, constant))

"""Identities between the losses, on and off the policy, clipped and not.

Claims "for all" draw their inputs with hypothesis. Everything is float64; finite differences stand
in where no closed form is at hand.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import WIDE, batch, batches, few, one_response, run, same, some

from gspo_jax.algo.losses import (
    LOSSES,
    RATIO,
    cispo,
    dapo,
    gmpo,
    grpo,
    gspo,
    gspo_token,
    luspo,
    sapo,
)

BY_RESPONSE = ["gspo", "gspo_token", "gmpo", "grpo", "sapo"]  # one weight per response
BY_TOKEN = ["dapo", "ppo", "cispo", "reinforce"]  # one weight per token


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


# --- The ratio ---


def test_the_sequence_ratio_is_the_ratio_of_perplexities():
    logp, old, adv, mask = batch()
    before, after = (np.exp(-np.mean(x, -1, where=np.asarray(mask))) for x in (old, logp))
    s = ratios_by_row(gspo, logp, old, adv, mask)["ratio_mean"]
    np.testing.assert_allclose(s, before / after)


def test_swapping_the_policies_inverts_the_sequence_ratio():
    logp, old, adv, mask = batch(rows=1)
    there = run("gspo", logp, old, adv, mask)[2]["ratio_mean"]
    back = run("gspo", old, logp, adv, mask)[2]["ratio_mean"]
    np.testing.assert_allclose(there * back, 1)


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"cispo", "reinforce"}))
def test_only_the_log_ratio_counts(name):
    logp, old, adv, mask = batch()
    shift = jnp.array(np.random.default_rng(1).normal(size=logp.shape))
    same(run(name, logp, old, adv, mask), run(name, logp + shift, old + shift, adv, mask))


@some
@given(batches())
def test_the_sequence_ratio_is_a_mean_of_the_token_ratios(inputs):
    """Geometric, so within their range and at most their arithmetic mean."""
    sequence, token = ratios_by_row(gspo, *inputs), ratios_by_row(grpo, *inputs)
    assert np.all(token["ratio_min"] <= sequence["ratio_mean"] * (1 + 1e-12))
    assert np.all(sequence["ratio_mean"] <= token["ratio_mean"] * (1 + 1e-12))
    assert np.all(sequence["ratio_mean"] <= token["ratio_max"] * (1 + 1e-12))


@partial(jax.jit, static_argnums=0)
def ratios_by_row(loss_fn, *inputs):
    rows = (x[:, None] for x in inputs)
    return jax.vmap(lambda *row: loss_fn(*row)[1])(*rows)


@pytest.mark.long
@some
@given(batches())
def test_unclipped_grpo_is_above_gspo_for_good_responses_and_below_for_bad_ones(inputs):
    logp, old, adv, mask = inputs
    for sign in (1, -1):
        good = sign * jnp.abs(adv)
        by_token, by_sequence = (
            -run(name, logp, old, good, mask, **WIDE)[0] for name in ("grpo", "gspo")
        )
        assert sign * (by_token - by_sequence) >= -1e-10


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_tokens_within_a_response_does_not_matter(name):
    logp, old, adv, mask = batch(lengths=(5, 5, 5, 5))
    order = np.array([3, 0, 4, 1, 2])
    plain = run(name, logp, old, adv, mask)
    permuted = run(name, logp[:, order], old[:, order], adv, mask)
    same((plain[0], plain[1][:, order]), permuted)


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_responses_does_not_matter(name):
    inputs, order = batch(), np.array([2, 0, 3, 1])
    plain = run(name, *inputs)
    permuted = run(name, *(x[order] for x in inputs))
    same((plain[0], plain[1][order]), permuted)
    for key, value in plain[2].items():
        np.testing.assert_allclose(permuted[2][key], value, rtol=1e-12, err_msg=key)


@pytest.mark.parametrize("c", [-0.5, -0.1, 0.15, 0.6])
def test_with_one_log_ratio_everywhere_gspo_is_grpo_is_gmpo(c):
    """At equal ranges, which for GMPO are given as log-ratios."""
    _, old, adv, mask = batch()
    logp, options = old + c, {"clip_low": 0.2, "clip_high": 0.3}
    sequence = run("gspo", logp, old, adv, mask, **options)
    same(sequence, run("grpo", logp, old, adv, mask, **options))
    log_options = {"log_clip_low": -np.log(0.8), "log_clip_high": np.log(1.3)}
    same(sequence, run("gmpo", logp, old, adv, mask, **log_options))


def test_with_one_token_per_response_gspo_is_grpo_clip_metrics_included():
    inputs, options = batch(lengths=(1, 1, 1, 1)), {"clip_low": 0.1, "clip_high": 0.1}
    sequence, token = run("gspo", *inputs, **options), run("grpo", *inputs, **options)
    same(sequence, token)
    assert sequence[2].keys() == token[2].keys()
    for key, value in sequence[2].items():
        np.testing.assert_allclose(token[2][key], value, rtol=1e-12, err_msg=key)
    assert 0 < sequence[2]["clip_frac"] < 1


def test_unclipped_gmpo_is_unclipped_gspo():
    inputs = batch()
    free = {"log_clip_low": float("inf"), "log_clip_high": float("inf")}
    same(run("gmpo", *inputs, **free), run("gspo", *inputs, **WIDE))


def test_luspo_is_gspo_with_every_response_weighted_by_its_length():
    inputs, options = batch(), {"clip_low": 0.1, "clip_high": 0.1}
    lengths = jnp.array([5.0, 1, 3, 4])
    same(run("luspo", *inputs, **options), run("gspo", *inputs, lengths, **options))


def test_with_equal_lengths_luspo_is_their_length_times_gspo():
    inputs, options = batch(lengths=(3, 3, 3, 3)), {"clip_low": 0.1, "clip_high": 0.1}
    value, grad, _ = run("gspo", *inputs, **options)
    same((3 * value, 3 * grad), run("luspo", *inputs, **options))


def test_grpo_dr_grpo_and_dapo_differ_in_their_mean_alone():
    """Equal lengths: token mean = response mean = constant, if that is the length."""
    inputs, options = batch(lengths=(3, 3, 3, 3)), {"clip_low": 0.1, "clip_high": 0.2}
    by_response = run("grpo", *inputs, **options)
    same(by_response, run("dapo", *inputs, **options))
    same(by_response, run("ppo", *inputs, **options))
    same(by_response, run("dr_grpo", *inputs, max_length=3, **options))


# --- The on-policy point ---


@pytest.mark.parametrize("old", ["given", "none"])
@pytest.mark.parametrize("name", BY_RESPONSE)
def test_on_policy_the_losses_by_response_share_one_gradient(name, old):
    """(1/B) (Âᵢ / |yᵢ|) on every token of response i."""
    logp, _, adv, mask = batch()
    _, grad, metrics = run(name, logp, logp if old == "given" else None, adv, mask)
    expected = -np.where(mask, (np.asarray(adv) / [5, 1, 3, 4])[:, None] / 4, 0)
    np.testing.assert_allclose(grad, expected, rtol=1e-12)
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1
    assert metrics["clip_frac"] == metrics["clip_frac_seq"] == 0


@pytest.mark.parametrize("name", BY_TOKEN)
def test_on_policy_the_losses_by_token_share_one_gradient(name):
    """Âᵢ / Σ|yᵢ|: that of the losses by response only if all lengths are equal."""
    logp, _, adv, mask = batch()
    _, grad, _ = run(name, logp, None, adv, mask)
    expected = -np.where(mask, np.asarray(adv)[:, None] / 13, 0)
    np.testing.assert_allclose(grad, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "grpo", "luspo", "dapo"])
def test_on_policy_the_clip_range_has_no_effect(name):
    logp, _, adv, mask = batch()
    narrow = run(name, logp, None, adv, mask, clip_low=1e-9, clip_high=1e-9)
    same(narrow, run(name, logp, None, adv, mask, **WIDE))


def test_on_policy_the_loss_of_a_centred_group_is_zero_and_its_gradient_is_not():
    logp, _, adv, mask = batch()
    value, grad, _ = run("gspo", logp, None, adv - adv.mean(), mask)
    np.testing.assert_allclose(value, 0, atol=1e-15)
    assert np.abs(grad).max() > 0.01


def test_on_policy_sapo_is_worth_two_over_tau():
    logp, _, _, mask = batch()
    for adv, tau in [(1.5, 1.0), (-1.5, 1.05)]:
        value, _, _ = run("sapo", logp, None, jnp.full(4, adv), mask)
        np.testing.assert_allclose(value, -2 * adv / tau, rtol=1e-12)


def test_away_from_the_policy_grpo_and_gspo_part_by_how_tokens_spread():
    """grad J_grpo - grad J_gspo = Âᵢ / (B |yᵢ|) (lᵢₜ - mean_t l) + O(l²): the rest falls as h²."""
    _, old, adv, mask = batch()
    direction = np.random.default_rng(5).normal(size=old.shape)
    rest = []
    for h in (1e-1, 1e-2, 1e-3):
        step = np.where(mask, h * direction, 0)
        token, sequence = (
            -run(name, old + step, old, adv, mask, **WIDE)[1] for name in ("grpo", "gspo")
        )
        length = np.asarray(mask).sum(-1, keepdims=True)
        spread = np.where(mask, step - step.sum(-1, keepdims=True) / length, 0)
        first_order = np.asarray(adv)[:, None] / (4 * length) * spread
        rest.append(np.abs(token - sequence - first_order).max() / h**2)
    assert max(rest) < 2 * min(rest) < 2


# --- Clipping ---


@few
@given(
    st.lists(st.floats(0.3, 3), min_size=4, max_size=4), st.floats(1e-4, 0.9), st.floats(1e-4, 1)
)
@pytest.mark.parametrize("adv", [-2.0, -0.1, 0.0, 0.1, 2.0])
@pytest.mark.parametrize("name", ["gspo", "gspo_token", "grpo", "ppo", "luspo"])
def test_truth_table_of_clipping(name, adv, s, low, high):
    """d/ds of min(s Â, clip(s) Â) is 0 where Â > 0 and s above, or Â < 0 and s below; else Â.

    And the value is that min; on a bound itself nothing is claimed. Four responses of one token.
    """
    s = np.array(s)
    above, below = (adv > 0) & (s > 1 + high), (adv < 0) & (s < 1 - low)
    if np.any(np.abs(np.stack([s - (1 - low), s - (1 + high)])) < 1e-9):
        return
    _, old, _, mask = batch(lengths=(1, 1, 1, 1))
    inputs = old + np.log(s)[:, None], old, jnp.full(4, adv), mask
    value, grad, metrics = run(name, *inputs, clip_low=low, clip_high=high)
    np.testing.assert_allclose(
        value, -np.minimum(s * adv, np.clip(s, 1 - low, 1 + high) * adv).mean(), atol=1e-14
    )
    expected = np.where(above | below, 0, -s * adv / 4)  # d/dlogp = s d/ds
    np.testing.assert_allclose(grad[:, 0], expected, rtol=1e-12)
    assert metrics["clip_frac"] == metrics["clip_frac_seq"] == np.mean(above | below)
    assert (metrics["clip_frac_low"], metrics["clip_frac_high"]) == (below.mean(), above.mean())


def test_a_clipped_response_loses_all_gradient_and_touches_no_other():
    logp, old, adv, mask = batch(drift=0.0)
    adv, options = jnp.abs(adv), {"clip_low": 0.1, "clip_high": 0.1}
    before = run("gspo", logp, old, adv, mask, **options)[1]
    after = run("gspo", logp.at[2].add(0.5), old, adv, mask, **options)[1]
    assert np.all(before[2, :3] != 0)
    np.testing.assert_array_equal(after[2], 0)
    np.testing.assert_array_equal(np.delete(after, 2, 0), np.delete(before, 2, 0))


def test_opposite_token_drifts_clip_in_grpo_and_pass_in_gspo():
    """Log-ratios +0.5 and -0.5: far outside GRPO's band, and s = 1."""
    inputs = one_response([0.5, -0.5])
    _, grad, metrics = run("gspo", *inputs)
    assert metrics["clip_frac"] == 0
    assert run("grpo", *inputs)[2]["clip_frac"] == 0.5
    np.testing.assert_allclose(grad, [[-0.5, -0.5, 0, 0, 0]])


def test_a_small_common_drift_clips_in_gspo_and_passes_in_grpo():
    inputs = one_response([1e-3] * 3)
    assert run("gspo", *inputs)[2]["clip_frac"] == 1
    assert run("grpo", *inputs)[2]["clip_frac"] == 0


@few
@given(batches())
@pytest.mark.parametrize("name", ["gspo", "grpo"])
def test_a_wider_range_clips_less_and_clipping_only_lowers_the_objective(name, inputs):
    shares, objectives = [], []
    for low, high in [(1e-4, 1e-4), (0.05, 0.1), (0.3, 0.5), (1.0, float("inf"))]:
        value, _, metrics = run(name, *inputs, clip_low=low, clip_high=high)
        shares.append(float(metrics["clip_frac"]))
        objectives.append(-float(value))
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == 0
    np.testing.assert_array_less(np.array(objectives[:-1]), objectives[-1] + 1e-12)


def test_the_two_clip_shares_weigh_tokens_and_responses():
    """Rows 0 (5 tokens) and 1 (1 token) clipped: 6 of 13 tokens, 2 of 4 responses."""
    _, old, _, mask = batch()
    logp = old + jnp.array([0.2, 0.2, 0.0, 0.0])[:, None]
    _, _, metrics = run("gspo", logp, old, jnp.ones(4), mask)
    np.testing.assert_allclose(metrics["clip_frac"], 6 / 13)
    np.testing.assert_allclose(metrics["clip_frac_seq"], 2 / 4)


def test_cispo_keeps_the_gradient_of_capped_tokens_at_the_cap():
    logp, old, adv, mask = batch(drift=1.0)
    _, grad, metrics = run("cispo", logp, old, adv, mask, cap=1.2, floor=0.9)
    weight = np.clip(np.exp(np.asarray(logp - old)), 0.9, 1.2)
    expected = -np.where(mask, weight * np.asarray(adv)[:, None], 0) / 13
    np.testing.assert_allclose(grad, expected, rtol=1e-12)
    assert metrics["clip_frac_low"] > 0 < metrics["clip_frac_high"]


def test_the_gate_of_sapo_fades_as_a_squared_hyperbolic_secant():
    """f'(w) = sech²(τ (w - 1) / 2), which also gives its slope of 1 at w = 1."""
    w = np.array([[0.2, 0.8, 1.0, 1.5, 4.0]])
    for sign, tau in [(1.0, 1.7), (-1.0, 0.6)]:
        _, grad, _ = run("sapo", *one_response(np.log(w[0]), sign), tau_pos=1.7, tau_neg=0.6)
        expected = -sign * w / np.cosh(tau * (w - 1) / 2) ** 2 / 5
        np.testing.assert_allclose(grad, expected, rtol=1e-10)


# --- GSPO-token ---


@some
@given(batches())
def test_gspo_token_is_gspo_where_a_response_has_one_advantage(inputs):
    options = {"clip_low": 0.05, "clip_high": 0.1}
    a, b = run("gspo", *inputs, **options), run("gspo_token", *inputs, **options)
    same(a, b)
    assert a[2] == pytest.approx(b[2], rel=1e-12)


def test_gspo_token_is_gspo_under_any_weight_per_response():
    inputs, weight = batch(), jnp.array([0.3, 2.0, 0.0, 1.1])
    same(run("gspo", *inputs, weight, **WIDE), run("gspo_token", *inputs, weight, **WIDE))


def test_the_gradient_of_gspo_token_is_not_that_of_its_value_when_advantages_vary():
    """Autodiff gives s Âₜ / (B |y|) token by token; finite differences of the value s mean(Â)."""
    logp, old, _, mask = batch(rows=1)
    adv = jnp.array([[1.0, -2.0, 0.5, 3.0, -1.0]])
    s = np.exp(np.mean(logp - old))
    _, grad, _ = run("gspo_token", logp, old, adv, mask, **WIDE)
    np.testing.assert_allclose(grad, -s * adv / 5, rtol=1e-12)
    numeric = finite_differences("gspo_token", logp, old, adv, mask, **WIDE)
    np.testing.assert_allclose(numeric, np.full((1, 5), -s * 0.3 / 5), rtol=1e-6)


def test_in_a_mixed_response_only_the_good_tokens_are_clipped_from_above():
    logp, old, _, mask = one_response([0.01] * 3)
    adv = jnp.array([[1.0, -1.0, 2.0, 0.0, 0.0]])
    _, grad, metrics = run("gspo_token", logp, old, adv, mask)
    np.testing.assert_allclose(grad, [[0, np.exp(0.01) / 3, 0, 0, 0]], rtol=1e-12)
    np.testing.assert_allclose(metrics["clip_frac_high"], 2 / 3)


@pytest.mark.parametrize(
    "name", ["gspo", "luspo", "gmpo", "grpo", "dr_grpo", "dapo", "ppo", "sapo"]
)
def test_the_gradient_is_that_of_the_value(name):
    """Central differences; for the losses without a stop-gradient in their objective."""
    inputs = batch(drift=0.8)
    _, grad, metrics = run(name, *inputs)
    numeric = finite_differences(name, *inputs)
    np.testing.assert_allclose(grad, numeric, rtol=1e-5, atol=1e-9)
    assert name == "sapo" or metrics["clip_frac"] > 0


def finite_differences(name, logp, old, adv, mask, h=1e-6, **options):
    """Central differences of the value with respect to each element of logp."""

    @jax.jit
    @jax.vmap
    def value(logp):
        loss, _ = LOSSES[name](logp, old, adv, mask, **options)
        return loss.total / loss.weight

    steps, logp = h * np.eye(logp.size).reshape(-1, *logp.shape), np.asarray(logp)[None]
    return ((value(logp + steps) - value(logp - steps)) / (2 * h)).reshape(logp.shape[1:])


def test_every_loss_is_tested_here():
    """A new loss joins every test above by being in the table."""
    functions = {cispo, dapo, gmpo, grpo, gspo, gspo_token, luspo, sapo}
    assert functions < set(LOSSES.values())
    assert len(LOSSES) == len(RATIO) == 11

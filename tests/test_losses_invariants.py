"""What must hold for any input: identities between the losses, and what may not matter.

Claims "for all" draw their inputs with hypothesis. Everything is float64; finite differences and
exact enumeration stand in where no closed form is at hand.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gspo_jax.losses import LOSSES, RATIO, cispo, dapo, gmpo, grpo, gspo, gspo_token, luspo, sapo

WIDE = {"clip_low": 1.0, "clip_high": float("inf")}  # clips nothing
BY_RESPONSE = ["gspo", "gspo_token", "gmpo", "grpo", "sapo"]  # one weight per response
BY_TOKEN = ["dapo", "ppo", "cispo", "reinforce"]  # one weight per token
TAKES_TOKEN_ADV = sorted(LOSSES.keys() - {"gspo", "luspo", "gmpo"})

# Without shrinking: an example is a seed, and a smaller seed explains nothing.
FIXED = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "phases": [Phase.explicit, Phase.generate],
}
some, few = settings(max_examples=20, **FIXED), settings(max_examples=3, **FIXED)


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def batch(seed=0, rows=4, width=5, drift=0.3, lengths=(5, 1, 3, 4)):
    """Ragged responses; everything outside the mask is NaN."""
    rng = np.random.default_rng(seed)
    mask = np.arange(width)[None] < np.array(lengths)[:rows, None]
    old = np.where(mask, -rng.exponential(1.0, (rows, width)) - 0.05, np.nan)
    logp = old + rng.normal(0, drift, (rows, width))
    adv = rng.normal(0.2, 1, rows)
    return jnp.array(logp), jnp.array(old), jnp.array(adv), jnp.array(mask)


@st.composite
def batches(draw, **fixed):
    """Random lengths (0 included), drifts from on-policy to wild, seeds."""
    lengths = draw(st.lists(st.integers(0, 5), min_size=4, max_size=4))
    drift = draw(st.sampled_from([0.0, 1e-4, 0.05, 0.4, 3.0]))
    return batch(draw(st.integers(0, 10_000)), drift=drift, lengths=lengths, **fixed)


def run(name, logp, old, adv, mask, weight=None, **options):
    """Value of the mean, gradient of the mean, metrics.

    Not jitted: few shapes occur here, so primitives are compiled once and every loss shares them.
    """

    def total(logp):
        loss, metrics = LOSSES[name](logp, old, adv, mask, weight=weight, **options)
        return loss.total, (loss, metrics)

    grad, (loss, metrics) = jax.grad(total, has_aux=True)(logp)
    by = np.maximum(loss.weight, 1)
    metrics = {key: float(x) for key, x in metrics.items()}
    return np.asarray(loss.total / by), np.asarray(grad / by), metrics


def one_response(log_ratio, adv=1.0):
    """A single response with these log-ratios, in arrays as wide as those of `batch`."""
    padding = [np.nan] * (5 - len(log_ratio))
    log_ratio = jnp.array([[*log_ratio, *padding]])
    old = jnp.full((1, 5), -1.0)
    return old + log_ratio, old, jnp.array([adv]), ~jnp.isnan(log_ratio)


def same(a, b, rtol=1e-10, atol=1e-13):
    """Equal value and gradient, of two results of `run`."""
    np.testing.assert_allclose(a[0], b[0], rtol=rtol, atol=atol)
    np.testing.assert_allclose(a[1], b[1], rtol=rtol, atol=atol)


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


# --- Masks, padding, empty responses, splits of the batch ---


@pytest.mark.parametrize("garbage", [np.nan, -np.inf, 1e30])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_outside_the_mask_reaches_value_gradient_or_metrics(name, garbage):
    logp, old, adv, mask = batch()
    clean = run(name, *(jnp.where(mask, x, -1.0) for x in (logp, old)), adv, mask)
    dirty = run(name, *(jnp.where(mask, x, garbage) for x in (logp, old)), adv, mask)
    np.testing.assert_array_equal(clean[0], dirty[0])
    np.testing.assert_array_equal(clean[1], dirty[1])
    assert clean[2] == dirty[2]
    np.testing.assert_array_equal(np.where(mask, 0, dirty[1]), 0)


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
@pytest.mark.parametrize("name", TAKES_TOKEN_ADV)
def test_advantages_and_weights_outside_the_mask_have_no_effect(name, garbage):
    logp, old, adv, mask = batch()
    adv = jnp.broadcast_to(adv[:, None], mask.shape)
    dirty = jnp.where(mask, adv, garbage)
    clean = run(name, logp, old, adv, mask, jnp.ones(mask.shape))
    same(clean, run(name, logp, old, dirty, mask, jnp.where(mask, 1.0, garbage)))


@few
@given(batches())
@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"dr_grpo"}))
def test_appended_padding_changes_nothing(name, inputs):
    """Except for dr_grpo, whose constant is the width until it is told."""
    logp, old, adv, mask = inputs
    more = ((0, 2), (0, 3))
    wide = [jnp.pad(x, more, constant_values=jnp.nan) for x in (logp, old)]
    plain = run(name, *inputs)
    padded = run(name, *wide, jnp.pad(adv, (0, 2)), jnp.pad(mask, more))
    same((plain[0], np.pad(plain[1], more)), padded)
    for key, value in plain[2].items():
        np.testing.assert_allclose(padded[2][key], value, rtol=1e-12, atol=1e-15, err_msg=key)


def test_dr_grpo_divides_by_the_longest_response_it_is_told_and_else_by_the_width():
    logp, old, adv, mask = batch()
    told, width = (
        run("dr_grpo", logp, old, adv, mask, max_length=20),
        run("dr_grpo", logp, old, adv, mask),
    )
    np.testing.assert_allclose(told[0] * 20, width[0] * 5, rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_holes_in_the_mask_are_as_if_the_tokens_were_not_there(name):
    """Tool output between two stretches of the response: out of the sum and of the length."""
    logp, old, adv, _ = batch(lengths=(5, 5, 5, 5))
    mask = jnp.array([[True, False, True, True, False]] * 4)
    keep = np.array([0, 2, 3])
    options = {"max_length": 5} if name == "dr_grpo" else {}
    holes = run(name, logp, old, adv, mask, **options)
    tight = run(name, logp[:, keep], old[:, keep], adv, mask[:, keep], **options)
    same((holes[0], holes[1][:, keep]), tight)
    np.testing.assert_array_equal(holes[1][:, [1, 4]], 0)


@pytest.mark.parametrize("name", LOSSES)
def test_empty_responses_are_as_if_they_were_not_there(name):
    logp, old, adv, mask = batch()
    mask = mask.at[1].set(False)
    keep = np.array([0, 2, 3])
    with_empty = run(name, logp, old, adv.at[1].set(jnp.nan), mask)
    without = run(name, logp[keep], old[keep], adv[keep], mask[keep])
    same((with_empty[0], with_empty[1][keep]), without)
    np.testing.assert_array_equal(with_empty[1][1], 0)


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_batch_twice_is_the_same_loss(name):
    inputs = batch()
    once, twice = run(name, *inputs), run(name, *(jnp.concatenate([x, x]) for x in inputs))
    np.testing.assert_allclose(twice[0], once[0], rtol=1e-12)
    np.testing.assert_allclose(twice[1], np.tile(once[1] / 2, (2, 1)), rtol=1e-12)


@few
@given(batches())
@pytest.mark.parametrize("name", LOSSES)
def test_uneven_microbatches_add_up_to_the_whole_batch(name, inputs):
    """One response and three, whatever their lengths: totals and weights add, gradients line up."""
    parts = [tuple(x[part] for x in inputs) for part in (slice(0, 1), slice(1, 4))]
    (whole, grad), *pieces = (total_and_grad(name, *part) for part in (inputs, *parts))
    for half in (0, 1):  # total and weight
        added = sum(float(loss[half]) for loss, _ in pieces)
        np.testing.assert_allclose(added, whole[half], rtol=1e-10, atol=1e-13)
    joined = np.concatenate([g for _, g in pieces])
    np.testing.assert_allclose(joined, grad, rtol=1e-10, atol=1e-13)


def total_and_grad(name, logp, *rest):
    def total(logp):
        loss, _ = LOSSES[name](logp, *rest)
        return loss.total, loss

    grad, loss = jax.grad(total, has_aux=True)(logp)
    return loss, grad


@few
@given(batches(), st.floats(0.01, 100))
@pytest.mark.parametrize("name", LOSSES)
def test_advantages_c_times_as_large_give_c_times_the_loss(name, inputs, c):
    """For c > 0; a negative factor would also turn the clip around."""
    logp, old, adv, mask = inputs
    value, grad, _ = run(name, *inputs)
    same((c * value, c * grad), run(name, logp, old, c * adv, mask), rtol=1e-9, atol=1e-10)


def test_a_negative_factor_turns_the_clip_around():
    up, down = (run("gspo", *one_response([0.1, 0.1], adv))[0] for adv in (1.0, -1.0))
    np.testing.assert_allclose(up, -1.0004)
    np.testing.assert_allclose(down, np.exp(0.1))


@pytest.mark.parametrize("name", LOSSES)
def test_advantages_of_zero_give_no_gradient_and_are_never_clipped(name):
    logp, old, adv, mask = batch(drift=3.0)
    value, grad, metrics = run(name, logp, old, 0 * adv, mask)
    assert value == 0
    np.testing.assert_array_equal(grad, 0)
    assert {k: v for k, v in metrics.items() if k.startswith("clip") and v != 0} == {}


@pytest.mark.parametrize("name", LOSSES)
def test_a_weight_per_response_scales_its_share_and_not_the_denominator(name):
    inputs, weight = batch(), np.array([0.5, 2.0, 0.0, 1.0])
    _, grad, _ = run(name, *inputs)
    value, weighted, _ = run(name, *inputs, jnp.array(weight))
    np.testing.assert_allclose(weighted, grad * weight[:, None], rtol=1e-12)
    alone = [run(name, *inputs, jnp.eye(4)[i])[0] for i in range(4)]
    np.testing.assert_allclose(value, weight @ np.array(alone), rtol=1e-12)


# --- Numerics ---


def test_bfloat16_inputs_are_computed_as_their_float32_values():
    """In bfloat16 itself the spacing above 1 is 8e-3, twenty GSPO bands wide."""
    logp, old, adv, mask = (np.asarray(x) for x in batch(drift=0.002))
    half = [jnp.array(x, jnp.bfloat16) for x in (logp, old)]
    single = [x.astype(jnp.float32) for x in half]
    rest = jnp.array(adv, jnp.float32), jnp.array(mask)
    (a, metrics), (b, _) = (jax.jit(gspo)(*x, *rest) for x in (half, single))
    assert a.total.dtype == np.float32
    assert a == b
    assert float(metrics["ratio_mean"]) % 2**-7 != 0


def test_float32_resolves_the_band_of_gspo():
    """4096 tokens of about -1 nat and a drift of 3.9e-4 or 4.1e-4: differenced before summed."""
    rng = np.random.default_rng(0)
    old = jnp.array(-rng.exponential(1, (1, 4096)), jnp.float32)
    mask, adv = jnp.ones((1, 4096), bool), jnp.ones(1, jnp.float32)
    for drift, clipped in [(3.9e-4, 0), (4.1e-4, 1)]:
        assert jax.jit(gspo)(old + np.float32(drift), old, adv, mask)[1]["clip_frac"] == clipped


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("drift", [50.0, -50.0, 1e4])
@pytest.mark.parametrize("name", LOSSES)
def test_huge_drifts_stay_finite(name, drift, dtype):
    _, old, _, mask = (jnp.array(x, dtype) if x.dtype != bool else x for x in batch())
    for adv in (1.0, -1.0):
        value, grad, metrics = run(name, old + drift, old, jnp.full(4, adv, dtype), mask)
        assert np.isfinite(value)
        assert np.all(np.isfinite(grad))
        assert all(np.isfinite(x) for x in metrics.values())


def test_a_spike_on_one_token_is_bounded_in_the_mean_and_not_by_itself():
    """log-ratio 50 on one of 5 tokens: s = e^10. Bounding tokens at 20 would make it e^4."""
    _, _, metrics = run("gspo", *one_response([0, 0, 0, 50.0, 0]))
    np.testing.assert_allclose(metrics["ratio_max"], np.exp(10), rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_jit_vmap_and_remat_change_nothing(name):
    """vmap over two batches equals the loop; jit equals eager; jax.checkpoint equals neither."""
    a, b = batch(1), batch(2)
    both = [jnp.stack(x) for x in zip(a, b, strict=True)]

    def loss(*inputs):
        return LOSSES[name](*inputs)[0].total

    grad = jax.grad(loss)
    vmapped, in_vmap = jax.vmap(loss)(*both), jax.vmap(grad)(*both)
    for i, inputs in enumerate((a, b)):
        np.testing.assert_allclose(vmapped[i], loss(*inputs), rtol=1e-12)
        np.testing.assert_allclose(in_vmap[i], grad(*inputs), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(jax.jit(grad)(*inputs), grad(*inputs), rtol=1e-12, atol=1e-15)
        remat = jax.grad(jax.checkpoint(loss))(*inputs)
        np.testing.assert_allclose(remat, grad(*inputs), rtol=1e-12, atol=1e-15)


def test_every_loss_is_tested_here():
    """A new loss joins every test above by being in the table."""
    functions = {cispo, dapo, gmpo, grpo, gspo, gspo_token, luspo, sapo}
    assert functions < set(LOSSES.values())
    assert len(LOSSES) == len(RATIO) == 11

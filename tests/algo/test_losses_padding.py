"""What may not matter to any loss: padding, empty responses, splits, precision, jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import EACH, batch, batches, few, one_response, run, same

from gspo_jax.algo.losses import LOSSES, gspo

TAKES_TOKEN_ADV = sorted(LOSSES.keys() - {"gspo", "luspo", "gmpo"})


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("garbage", [np.nan, -np.inf])
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
@pytest.mark.parametrize("name", [x for x in EACH if "dr_grpo" not in str(x)])
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


@pytest.mark.parametrize("name", EACH)
def test_empty_responses_are_as_if_they_were_not_there(name):
    logp, old, adv, mask = batch()
    mask = mask.at[1].set(False)
    keep = np.array([0, 2, 3])
    with_empty = run(name, logp, old, adv.at[1].set(jnp.nan), mask)
    without = run(name, logp[keep], old[keep], adv[keep], mask[keep])
    same((with_empty[0], with_empty[1][keep]), without)
    np.testing.assert_array_equal(with_empty[1][1], 0)


@pytest.mark.parametrize("name", EACH)
def test_the_same_batch_twice_is_the_same_loss(name):
    inputs = batch()
    once, twice = run(name, *inputs), run(name, *(jnp.concatenate([x, x]) for x in inputs))
    np.testing.assert_allclose(twice[0], once[0], rtol=1e-12)
    np.testing.assert_allclose(twice[1], np.tile(once[1] / 2, (2, 1)), rtol=1e-12)


@few
@given(batches())
@pytest.mark.parametrize("name", EACH)
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
@pytest.mark.parametrize("name", EACH)
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


@pytest.mark.parametrize("name", EACH)
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
@pytest.mark.parametrize("drift", [50.0, -1e4])
@pytest.mark.parametrize("name", EACH)
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


@pytest.mark.long
@pytest.mark.parametrize("name", EACH)
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

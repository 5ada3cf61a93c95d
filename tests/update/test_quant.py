"""The 8-bit codes: bounded relative error, exact zeros, order and sign kept, no underflow."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_jax.update.quant import block_size, dequantise, hashed, quantise

# Half a step: 2^(24/254/2) - 1 and 2^(16/126/2) - 1, with a little room for float32's log2.
HALF_STEP = {False: 2 ** (24 / 508) - 1 + 1e-4, True: 2 ** (16 / 252) - 1 + 1e-4}
OCTAVES = {False: 24, True: 16}


def spread(seed: int, octaves: float, signed: bool) -> np.ndarray:
    """Numbers over `octaves` octaves, a tenth of them 0, in four rows of two blocks of 32."""
    rng = np.random.default_rng(seed)
    x = 2.0 ** -rng.uniform(0, octaves, (4, 64)) * 10.0 ** rng.uniform(-12, 3)
    x *= rng.random((4, 64)) > 0.1
    return (x * rng.choice([-1, 1], x.shape) if signed else x).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), signed=st.booleans())
def test_relative_error_is_at_most_half_a_step_within_the_range(seed, signed):
    x = spread(seed, OCTAVES[signed] - 0.5, signed)
    back = np.asarray(dequantise(quantise(jnp.asarray(x), signed=signed, block=32)))
    assert np.all(np.abs(back - x) <= HALF_STEP[signed] * np.abs(x))
    np.testing.assert_array_equal(np.sign(back), np.sign(x))  # zeros exactly 0, signs kept


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), signed=st.booleans())
def test_nothing_underflows_and_order_is_kept(seed, signed):
    x = np.sort(spread(seed, 60, signed), axis=None).reshape(1, -1)  # far beyond the range
    back = np.asarray(dequantise(quantise(jnp.asarray(x), signed=signed, block=256)))
    assert np.all((back == 0) == (x == 0))
    assert np.all(np.diff(back) >= 0)
    # What lies below the range is over-estimated, never under.
    floor = np.abs(x).max() * 2.0 ** -OCTAVES[signed]
    tiny = (x != 0) & (np.abs(x) < floor)
    assert np.all(np.abs(back[tiny]) >= np.abs(x[tiny]))


def test_each_block_has_its_own_scale():
    x = jnp.asarray([[1.0, 0.5, 1e-9, 2e-9]])
    q = quantise(x, signed=False, block=2)
    np.testing.assert_array_equal(q.scale, np.float32([[1.0, 2e-9]]))
    # The largest of each block is exact; 0.5 and 1e-9 are one octave below: 254/24 = 10.58 codes.
    np.testing.assert_array_equal(q.codes, [[255, 244, 244, 255]])


def test_a_block_of_zeros_stays_zero_without_nan():
    back = dequantise(quantise(jnp.zeros((2, 8)), signed=True, block=8))
    np.testing.assert_array_equal(back, np.zeros((2, 8)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_block_has_a_scale_of_its_own_whatever_the_dtype(dtype):
    """Blocks of 96, of which 32 are looked at together, whose sizes are 1, 100 and 10,000."""
    sizes = np.repeat([1.0, 1e2, 1e4], 96)[None]
    x = jnp.asarray(sizes * np.random.default_rng(0).uniform(0.5, 1, (2, 288)), dtype)
    coded, wide = quantise(x, signed=True, block=96), np.asarray(x, np.float32)
    np.testing.assert_array_equal(coded.scale, np.abs(wide).reshape(2, 3, 96).max(2))
    np.testing.assert_allclose(dequantise(coded), wide, rtol=HALF_STEP[True])


@pytest.mark.parametrize(("n", "want"), [(256, 256), (1536, 256), (8960, 256), (384, 192), (7, 7)])
def test_block_size_is_the_largest_divisor(n, want):
    assert block_size(n) == want


def test_a_block_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="does not split into block=3"):
        quantise(jnp.ones((2, 8)), signed=True, block=3)


@pytest.mark.parametrize("signed", [False, True])
def test_rounded_by_chance_the_mean_is_the_value_and_no_error_is_beyond_a_step(signed):
    x = spread(7, 12, signed).reshape(-1)  # 256 values; each gets 4096 draws
    draws = 4096
    many = jnp.broadcast_to(jnp.asarray(x), (draws, x.size))
    coded = quantise(many, signed=signed, block=256, uniform=hashed(many.shape, 3))
    back = np.asarray(dequantise(coded), np.float64)
    step = (1 + HALF_STEP[signed]) ** 2 - 1
    assert np.all(np.abs(back - x) <= 1.01 * step * np.abs(x))
    # A draw's deviation is at most half a step, so the mean's is step / 2 / 64; five of those.
    error = (back.mean(0) - x) / np.where(x == 0, 1, x)
    assert np.abs(error).max() < 5 * step / 2 / 64
    # Over all 256 it is 16 times smaller still. Chances even in the logarithm, not in the value,
    # would be wrong by step² / 12: twice this bound.
    assert abs(error[x != 0].mean()) < 5 * step / 2 / 64 / 15
    np.testing.assert_array_equal(back[:, x == 0], 0.0)
    largest = np.abs(x).argmax()
    np.testing.assert_array_equal(back[:, largest], x[largest])  # exact, whatever is drawn


def test_by_chance_nothing_underflows_either():
    x = np.sort(spread(5, 60, False), axis=None).reshape(1, -1)
    coded = quantise(jnp.asarray(x), signed=False, block=256, uniform=hashed(x.shape, 0))
    np.testing.assert_array_equal(np.asarray(coded.codes) == 0, x == 0)


def test_hashed_numbers_are_uniform_and_differ_by_index_and_by_each_seed():
    u = np.asarray(hashed((512, 128), 5, 9))
    assert u.min() >= 0 and u.max() < 1
    counts, _ = np.histogram(u, bins=64, range=(0, 1))
    # 65536 draws, 1024 per bin, standard deviation 32; chi-squared of 63 degrees is 63 ± 11.
    assert ((counts - 1024.0) ** 2 / 1024).sum() < 63 + 5 * 11.3
    others = [hashed((512, 128), 6, 9), hashed((512, 128), 5, 10), hashed((512, 128), 9, 5)]
    for v in [*map(np.asarray, others), np.roll(u, 1, axis=0), np.roll(u, 1, axis=1)]:
        # The correlation of 65536 independent pairs has standard deviation 1 / 256.
        assert abs(np.corrcoef(u.ravel(), v.ravel())[0, 1]) < 5 / 256

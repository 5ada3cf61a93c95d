"""The 8-bit codes: bounded relative error, exact zeros, order and sign kept, no underflow."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_jax.quant import block_size, dequantise, quantise

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


@pytest.mark.parametrize(("n", "want"), [(256, 256), (1536, 256), (8960, 256), (384, 192), (7, 7)])
def test_block_size_is_the_largest_divisor(n, want):
    assert block_size(n) == want


def test_a_block_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="does not split into block=3"):
        quantise(jnp.ones((2, 8)), signed=True, block=3)

"""Random batches for the tests of losses, and how they are run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st

from gspo_jax.algo.losses import LOSSES

WIDE = {"clip_low": 1.0, "clip_high": float("inf")}  # clips nothing

# What has to hold for every loss is shown on two by make test and on all by make long.
EACH = [
    name if name in ("gspo", "grpo") else pytest.param(name, marks=pytest.mark.long)
    for name in LOSSES
]

# Without shrinking: an example is a seed, and a smaller seed explains nothing.
FIXED = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "phases": [Phase.explicit, Phase.generate],
}
some, few = settings(max_examples=20, **FIXED), settings(max_examples=3, **FIXED)


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

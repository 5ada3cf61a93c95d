"""Which gradients are unusually long: compared with those of the last updates.

A window of norms is part of the state, so a resumed run skips what the straight one skips.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SPIKE_WINDOW = 128  # updates that a gradient is compared with
SPIKE_FEWEST = 32  # without so many, nothing is a spike
SPIKE_PATIENCE = 8  # so many in a row are a new level; the window begins anew


class Spikes(NamedTuple):
    """What says whether a gradient is unusually long; kept with the state, so resuming is exact."""

    norms: Float[Array, " window"]  # of the last updates; NaN for those still to come
    in_a_row: Int[Array, ""]
    skipped: Int[Array, ""]


def empty_window() -> Spikes:
    """Before the first update."""
    norms = jnp.full(SPIKE_WINDOW, jnp.nan, jnp.float32)
    return Spikes(norms, jnp.int32(0), jnp.int32(0))


def is_spike(
    spikes: Spikes, norm: Float[Array, ""], sigmas: float | Float[Array, ""]
) -> Bool[Array, ""]:
    """norm > mean + sigmas std of the last norms, but for the next of SPIKE_PATIENCE in a row."""
    known = ~jnp.isnan(spikes.norms)
    mean, std = jnp.mean(spikes.norms, where=known), jnp.std(spikes.norms, where=known)
    enough = jnp.sum(known, dtype=jnp.int32) >= SPIKE_FEWEST
    return enough & (norm > mean + sigmas * std) & (spikes.in_a_row < SPIKE_PATIENCE)


def remember(
    spikes: Spikes,
    norm: Float[Array, ""],
    updates: Int[Array, ""],
    spike: Bool[Array, ""],
    taken: Bool[Array, ""],
) -> Spikes:
    """The window after update number `updates`, whose gradient was a spike, or taken, or neither.

    One that is taken after SPIKE_PATIENCE spikes in a row is the first of a new window.
    """
    anew = taken & (spikes.in_a_row >= SPIKE_PATIENCE)
    earlier = jnp.where(anew, jnp.nan, spikes.norms)
    place = updates % SPIKE_WINDOW
    norms = earlier.at[place].set(jnp.where(taken, norm, earlier[place]))
    one = spike.astype(jnp.int32)
    in_a_row = jnp.where(taken, 0, spikes.in_a_row + one)
    return Spikes(norms, in_a_row, spikes.skipped + one)

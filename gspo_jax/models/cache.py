"""The key/value cache: one pair of buffers per layer, written in place.

Layout [B, K, S, H] per layer, so that attention reads it without a transpose, in separate
buffers, so that a layer's update never copies another layer's. All rows write the same slot:
prompts are padded on the left and end together.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class LayerCache(NamedTuple):
    """Keys (after rotation) and values of one layer; S slots, most of them not yet written."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]


Cache = tuple[LayerCache, ...]


def write(
    cache: LayerCache,
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    slot: Int[Array, ""],
) -> LayerCache:
    """The cache with T new positions from `slot` on; in place where the caller donates it."""
    start = (0, 0, slot, 0)
    return LayerCache(
        jax.lax.dynamic_update_slice(cache.k, k, start),
        jax.lax.dynamic_update_slice(cache.v, v, start),
    )


def share(cache: Cache, group_size: int, slots: int) -> Cache:
    """Each prompt's cache, computed once, repeated for its group and widened to `slots`."""

    def widen(x: Float[Array, "P K S H"]) -> Float[Array, "B K W H"]:
        x = jnp.repeat(x, group_size, axis=0)
        return jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0)))

    return tuple(LayerCache(widen(layer.k), widen(layer.v)) for layer in cache)

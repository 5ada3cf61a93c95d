"""The key/value cache: one pair of buffers per layer, written in place.

Layout [B, K, S, H] per layer, so that attention reads it without a transpose, in separate
buffers, so that a layer's update never copies another layer's. All rows write the same slot:
prompts are padded on the left and end together. The buffers are no longer than decoding needs
for the time being, since attention reads all of them; `fit` widens them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gspo_jax.mesh.sharding import constrain

AXES = ("batch", "kv_heads", None, None)


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
        constrain(jax.lax.dynamic_update_slice(cache.k, k, start), *AXES),
        constrain(jax.lax.dynamic_update_slice(cache.v, v, start), *AXES),
    )


def fit(
    x: Float[Array, "B K S H"], rows: Int[Array, " C"] | None, slots: int
) -> Float[Array, "C K W H"]:
    """The given rows of one layer's keys or values (None: all as they are), in `slots` slots.

    It shares a prompt with its group, shrinks a batch to the rows that still grow, and makes
    room for more tokens.
    """
    x = x if rows is None else x[rows]
    return jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0)))

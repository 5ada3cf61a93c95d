"""Blockwise 8-bit logarithmic codes: floats of any spread in one byte each.

A linear 8-bit code sends the small second moments of a block to 0, and Adam then divides by
epsilon: updates a thousand times too large. A logarithmic code keeps the relative error constant
over many octaves instead, and never maps a nonzero number to 0.

    unsigned   code = 255 + round(254/24 * log2(x / max))      24 octaves, relative step 6.8 %
    signed     code = ±(127 + round(126/16 * log2(|x| / max))) 16 octaves, relative step 9.2 %

where `max` is the largest magnitude of the block, code 0 means exactly 0, and whatever lies below
the range takes code ±1 (over-estimating a tiny second moment is safe).

Rounding to the nearest code loses changes of less than half a step. Given `uniform` numbers, a
value takes one of its two neighbouring codes by chance instead, and is right on average.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

UNSIGNED_OCTAVES, SIGNED_OCTAVES = 24.0, 16.0

# Elements that are looked at together, at most. Where devices split the last axis, it need be a
# multiple of this on each of them, not of whole blocks: of those only the maxima of parts travel.
PART = 32


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["signed"])
@dataclass(frozen=True)
class Quantised:
    """An array in 8 bits: a pytree node, so its leaves may also be shapes or shardings.

    Attributes:
        codes: uint8, one per element, in the array's own shape.
        scale: float32, one per block of the last axis: its largest magnitude.
        signed: which of the two codes.
    """

    codes: Any
    scale: Any
    signed: bool


def block_size(last_axis: int, largest: int = 256) -> int:
    """The largest divisor of `last_axis` up to `largest`: blocks never cross a row."""
    return max(n for n in range(1, min(largest, last_axis) + 1) if last_axis % n == 0)


def quantise(
    x: Float[Array, "*shape"],
    *,
    signed: bool,
    block: int = 256,
    uniform: Float[Array, "*shape"] | None = None,
) -> Quantised:
    """`x` as 8-bit codes with one scale per `block` elements of the last axis.

    The relative error of an element is at most half a step: 3.3 % unsigned, 4.5 % signed, while
    it lies within 24 or 16 octaves of its block's largest magnitude. Zeros stay exact. With
    `uniform` the error is up to a whole step, and 0 on average.

    Args:
        x: any float array with at least one axis; non-negative if `signed` is false.
        signed: keep signs, at the price of one bit.
        block: elements per scale; must divide the last axis (see `block_size`).
        uniform: numbers from [0, 1), one per element (see `hashed`).
    """
    if x.shape[-1] % block:
        raise ValueError(f"{x.shape[-1]=} does not split into {block=}; take block_size(n).")
    wide = x.astype(jnp.float32)
    magnitude = jnp.abs(wide)
    parts = magnitude.reshape(*x.shape[:-1], -1, block_size(block, PART))
    count = block // parts.shape[-1]
    scale = jnp.max(jnp.max(parts, axis=-1).reshape(*x.shape[:-1], -1, count), axis=-1)
    # Empty blocks divide by 1; a magnitude of 0 is set apart before the logarithm.
    ratio = (parts / _each(jnp.where(scale > 0, scale, 1.0), count)).reshape(x.shape)
    log2 = jnp.log2(jnp.where(magnitude > 0, ratio, 1.0))
    top, octaves = (127.0, SIGNED_OCTAVES) if signed else (255.0, UNSIGNED_OCTAVES)
    step = octaves / (top - 1)
    place = jnp.round(log2 / step) if uniform is None else _by_chance(log2, step, uniform)
    code = jnp.clip(top + place, 1, top)
    if signed:
        code = jnp.where(wide < 0, code + 128, code)
    code = jnp.where(magnitude > 0, code, 0.0)
    return Quantised(code.astype(jnp.uint8), scale, signed)


def dequantise(q: Quantised) -> Float[Array, "*shape"]:
    """The float32 array that `q` stands for."""
    code = q.codes.astype(jnp.float32)
    top, octaves = (127.0, SIGNED_OCTAVES) if q.signed else (255.0, UNSIGNED_OCTAVES)
    sign = 1.0
    if q.signed:
        sign = jnp.where(code > 128, -1.0, 1.0)
        code = jnp.where(code > 128, code - 128, code)
    ratio = jnp.exp2((code - top) * (octaves / (top - 1)))
    block = code.shape[-1] // q.scale.shape[-1]
    parts = ratio.reshape(*code.shape[:-1], -1, block_size(block, PART))
    parts = parts * _each(q.scale, block // parts.shape[-1])
    return jnp.where(code > 0, sign * parts.reshape(q.codes.shape), 0.0)


def _each(scale: Float[Array, "*rows blocks"], count: int) -> Float[Array, "*rows parts 1"]:
    """The scale of each part: every block has `count` of them."""
    parts = jnp.broadcast_to(scale[..., None], (*scale.shape, count))
    return parts.reshape(*scale.shape[:-1], -1, 1)


def _by_chance(log2, step: float, uniform) -> Float[Array, "*shape"]:
    """The code below or above, so that the mean of the two *values* is 2 ** log2."""
    below = jnp.floor(log2 / step)
    share = (jnp.exp2(log2 - below * step) - 1) / (2**step - 1)
    return jnp.where(uniform < share, below + 1, below)


def hashed(shape: tuple[int, ...], *seeds: Int[Array, ""] | int) -> Float[Array, "*shape"]:
    """Numbers from [0, 1) that depend on an element's index and the seeds alone.

    Elementwise, so it fuses and shards with what it is used in: a generator's key would have to
    be carried from step to step, and its bits written to memory.
    """
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    salt = jnp.uint32(0)
    for seed in seeds:
        salt = _mix(salt * jnp.uint32(31) + jnp.asarray(seed, jnp.uint32))
    return (_mix(_mix(index) ^ salt) >> jnp.uint32(8)).astype(jnp.float32) * 2.0**-24


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: every input bit flips every output bit half of the time."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x ^ (x >> jnp.uint32(16))

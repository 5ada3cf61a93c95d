"""The optimizer: AdamW as an optax chain, its state kept in 8 bits.

    compress_state(inner)   any optax transformation, its large moments stored as quant codes
    make_optimizer(...)     clip by global norm -> Adam -> weight decay -> learning rate

Master parameters stay in float32: an RL step of 1e-6 is far below bfloat16's spacing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from gspo_jax.quant import Quantised, block_size, dequantise, hashed, quantise

NON_NEGATIVE = ("nu", "v")  # optax's names for second moments
SHORTEST_BLOCK = 16  # below this the scales would cost as much as they save


class CompressedState(NamedTuple):
    """The inner state, with `Quantised` nodes in place of large float arrays."""

    inner: PyTree


def compress_state(
    inner: optax.GradientTransformation,
    *,
    block: int = 256,
    min_size: int = 4096,
    stochastic: bool = False,
    select: Callable[[tuple[Any, ...], jax.Array], bool] | None = None,
) -> optax.GradientTransformation:
    """`inner`, with its state held in 8 bits between updates.

    Each update dequantises the state, runs `inner`, and quantises what it returns:
    2.03 bytes per parameter for Adam instead of 8. Quantised leaves are pytree nodes (codes of
    the parameter's shape, one scale per block), so sharding, donation and checkpoints apply
    to them leaf by leaf.

    Args:
        inner: any optax transformation; fields named "nu" or "v" are taken to be non-negative.
        block: elements per scale along the last axis, less where it does not divide.
        min_size: smaller leaves stay in float32.
        stochastic: round second moments by chance. An update moves one by about 1 - b2 of itself,
            0.1 % at b2 = 0.999: far below half a step (3.3 %), so beside a block's steady maximum
            rounding to the nearest code would leave it where it is.
        select: (path, leaf) -> may this leaf be compressed; default all matrices.
    """

    def chosen(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        large = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size >= min_size
        fits = leaf.ndim >= 2 and block_size(leaf.shape[-1], block) >= SHORTEST_BLOCK
        return large and fits and (select is None or select(path, leaf))

    def compress(path: tuple[Any, ...], leaf: Any, count: Any) -> Any:
        if not chosen(path, leaf):
            return leaf
        signed = _names(path).isdisjoint(NON_NEGATIVE)
        uniform = None
        if stochastic and not signed:
            uniform = hashed(leaf.shape, count, crc32(jax.tree_util.keystr(path).encode()))
        size = block_size(leaf.shape[-1], block)
        return quantise(leaf, signed=signed, block=size, uniform=uniform)

    def compressed(full: PyTree) -> CompressedState:
        count = _count_of(full) if stochastic else None
        coded = jax.tree_util.tree_map_with_path(partial(compress, count=count), full)
        return CompressedState(coded)

    def decompress(leaf: Any) -> Any:
        return dequantise(leaf) if isinstance(leaf, Quantised) else leaf

    def init(params: PyTree) -> CompressedState:
        # Unseen by the compiler, which would work out the codes of all zeros itself, for minutes.
        return compressed(jax.tree.map(jax.lax.optimization_barrier, inner.init(params)))

    def update(updates: PyTree, state: Any, params: PyTree | None = None):
        full = jax.tree.map(decompress, state.inner, is_leaf=lambda x: isinstance(x, Quantised))
        updates, full = inner.update(updates, full, params)
        return updates, compressed(full)

    return optax.GradientTransformation(init, update)


def _names(path: tuple[Any, ...]) -> set[Any]:
    return {getattr(key, "name", getattr(key, "key", None)) for key in path}


def _count_of(state: PyTree) -> jax.Array:
    """The inner state's own count of updates."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if "count" in _names(path[-1:]):
            return leaf
    raise ValueError(
        "stochastic=True draws by the inner state's `count`, as Adam's, and this state has none; "
        "leave it False."
    )


def make_schedule(
    learning_rate: float, *, kind: str = "constant", warmup: int = 0, updates: int = 1
) -> optax.Schedule:
    """Learning rate against the count of optimizer updates.

    Args:
        learning_rate: the peak.
        kind: "constant", "linear" or "cosine" (the latter two end at 0 after `updates`).
        warmup: updates of linear rise; the first one already has learning_rate / warmup.
        updates: updates of the whole run.
    """
    decay = max(updates - warmup, 1)
    after = {
        "constant": optax.constant_schedule(learning_rate),
        "linear": optax.linear_schedule(learning_rate, 0.0, decay),
        "cosine": optax.cosine_decay_schedule(learning_rate, decay),
    }[kind]
    if not warmup:
        return after
    rise = optax.linear_schedule(learning_rate / warmup, learning_rate, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    schedule: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    state: str = "8bit",
) -> optax.GradientTransformation:
    """AdamW with its moments in 8 bits ("8bit") or in float32; decay on matrices alone."""
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        compress_state(adam) if state == "8bit" else adam,
        optax.add_decayed_weights(weight_decay, mask=_matrices),
        optax.scale_by_learning_rate(schedule),
    )


def _matrices(params: PyTree) -> PyTree:
    return jax.tree.map(lambda p: p.ndim >= 2, params)

"""Which rows of a minibatch run together: long ones with long ones, in arrays of few shapes.

A sequence-level loss needs a row whole but rows in no particular company, and the halves of every
mean are added (`masked.Mean`). So rows are sorted by length and cut into microbatches of about
equally many tokens: a few long rows, or many short ones. Each has one of at most four widths,
hence at most four compiled programs, all known before the first step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from gspo_jax.batch import TrainBatch
from gspo_jax.mesh.sharding import constrain

Carry = TypeVar("Carry")

WIDTHS = 4  # at most, equally spaced ...
SPACING = 32  # ... by this many tokens at least: a program less is worth more than less padding

# Per forward and backward pass where algo.microbatch does not say. On a CPU small buffers stay in
# the heap and page faults are saved; an accelerator wants large matmuls.
MICROBATCH_TOKENS = {"cpu": 512, "accelerator": 16384}


class Microbatches(NamedTuple):
    """Microbatches of one width, run one after the other by one program.

    Attributes:
        rows: the row numbers of each; B stands for no row.
        number: how many of the K there are; the rest keeps the shape, and is not run.
        width: tokens of a row.
    """

    rows: Int[Any, "K m"]
    number: int | Int[Array, ""]
    width: int


def widths(longest: int) -> tuple[int, ...]:
    """The widths of microbatches of rows of at most `longest` tokens, widest first."""
    step = max(SPACING, -(-longest // WIDTHS))
    return tuple(range(longest, 0, -step))


def rows_of(width: int, tokens: int, rows: int, ways: int = 1) -> int:
    """Rows of a microbatch of this width: `tokens` in all, `rows` at most, a multiple of `ways`."""
    most = -(-rows // ways) * ways
    return min(max(tokens // width // ways * ways, ways), most) if tokens else most


def shapes(longest: int, tokens: int, rows: int, ways: int = 1) -> list[tuple[int, int]]:
    """(width, rows) of each microbatch that a minibatch of `rows` can have, widest first."""
    return [(width, rows_of(width, tokens, rows, ways)) for width in widths(longest)]


def split(
    length: Int[np.ndarray, " B"], longest: int, *, tokens: int, ways: int = 1
) -> list[Microbatches]:
    """Every row in one microbatch, longest first; those of length 0 in none.

    Args:
        length: tokens of each row.
        longest: no row is longer, in this batch or any other of the run.
        tokens: per microbatch, padding included; 0 is one microbatch of everything.
        ways: devices that rows are split over.
    """
    B, done, groups = len(length), 0, []
    order = np.argsort(-length, kind="stable").astype(np.int32)[: np.count_nonzero(length)]
    for width, narrower in zip(widths(longest), [*widths(longest)[1:], 0], strict=True):
        m = rows_of(width, tokens, B, ways)
        too_long = int((length > narrower).sum()) - done  # for the next width, and still to run
        count = -(-max(too_long, 0) // m)
        if not count:
            continue
        rows = np.full((-(-B // m), m), B, np.int32)
        chosen = order[done : done + count * m]  # filled up with the longest of the next
        rows.reshape(-1)[: len(chosen)] = chosen
        groups.append(Microbatches(rows, count, width))
        done += len(chosen)
    return groups


def fold(function: Callable[[Carry, Array], Carry], group: Microbatches, so_far: Carry) -> Carry:
    """`function(so_far, rows)` over the microbatches of a group, in a loop on the device."""
    rows = jnp.asarray(group.rows)
    return jax.lax.fori_loop(0, group.number, lambda i, x: function(x, rows[i]), so_far)


def take(batch: TrainBatch, rows: Int[Array, " m"], width: int) -> TrainBatch:
    """These rows of the batch, their texts cut to `width`; no row has no tokens at all."""
    short = batch._replace(
        tokens=batch.tokens[:, :width],
        routing=None if batch.routing is None else batch.routing[:, :width],
    )
    return pick(short, rows)


def pick(tree: PyTree, rows: Int[Array, " m"]) -> PyTree:
    """These rows of every array, split over the devices; zeros for no row."""

    def one(x: Array) -> Array:
        x = jnp.take(x, rows, axis=0, mode="fill", fill_value=0)
        return constrain(x, "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(one, tree)


def put(whole: PyTree, part: PyTree, rows: Int[Array, " m"]) -> PyTree:
    """`whole` with these rows replaced; axes that are shorter in `part` are filled with zeros."""

    def place(x: Array, y: Array) -> Array:
        short = [(0, n - k) for n, k in zip(x.shape[1:], y.shape[1:], strict=True)]
        return x.at[rows].set(jnp.pad(y, [(0, 0), *short]), mode="drop")

    return jax.tree.map(place, whole, part)

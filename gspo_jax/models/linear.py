"""Products with weights that devices share, and look-ups in them: what is communicated, and when.

    dense    y = x W       the shards of W that fsdp splits are gathered for the product, and the
                           gradient is reduce-scattered; W's columns split over tensor leave y
                           split, and W's rows split over tensor are summed after it
    joint    several of them as one, of matrices that lie side by side (`beside`)
    lookup   table[ids]    the ids travel to the slices of the table, what is found comes back
    spread   a bias or a scale, once for each row of what it is added to or multiplied with

On one device they are `x @ W`, `table[ids]` and a broadcast. On more, `dense` and `lookup` are one
`jax.shard_map` each: its collectives are the ones written here, whatever compiler or backend; their
transposes are those of the backward pass.

Gradients are summed in float32. A product's are by the matmul itself. To pick and to repeat are
exact in any dtype, but the transpose of either is a sum over tokens, in the dtype of what was
picked or repeated: in bfloat16 256 + 1 is 256. So that is done to a copy in float32 and rounded
after it, which gives the same numbers forwards, and backwards one rounding of a finished sum.
"""

from collections.abc import Sequence
from itertools import accumulate

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gspo_jax.mesh.sharding import (
    GATHERED,
    current_mesh,
    fill_up,
    gathered,
    partition_spec,
    split_by,
    widened,
)


def dense(x: Float[Array, "B S I"], *kernels: nnx.Variable) -> list[Float[Array, "B S _"]]:
    """x @ kernel for each of the kernels, which split their rows alike.

    On flattened rows, whose weight gradient is one plain matmul.
    """
    B, S, width = x.shape
    rows, matrices = x.reshape(B * S, width), [kernel[...] for kernel in kernels]
    if (mesh := current_mesh()) is None:
        return [(rows @ matrix).reshape(B, S, -1) for matrix in matrices]
    specs = [partition_spec(k.axes, mesh, k.shape) for k in kernels]
    inner = _stays(specs[0][0])

    def local(x, *shards):
        for axis in {_stays(spec[1]) for spec in specs} - {None}:
            # Once for all kernels: the gradient of x is summed over their columns once, too.
            x = jax.lax.pcast(widened(x), axis, to="varying").astype(x.dtype)
        # Before they are gathered, so that of their gradients only shares are summed over data.
        shards = (_by_row(w, spec, batch) for w, spec in zip(shards, specs, strict=True))
        out = [x @ gathered(w, spec, x.dtype) for w, spec in zip(shards, specs, strict=True)]
        return [jax.lax.psum(y, inner) if inner else y for y in out]

    batch = partition_spec(("batch",), mesh)[0]
    run = jax.shard_map(
        local,
        in_specs=(PartitionSpec(batch, inner), *specs),
        out_specs=[PartitionSpec(batch, _stays(spec[1])) for spec in specs],
    )
    found = run(fill_up(rows, mesh), *map(widened, matrices))
    return [y[: B * S].reshape(B, S, -1) for y in found]


def beside(*kernels: nnx.Param) -> nnx.Variable:
    """Kernels in one; where devices split the columns of each, they have their own of all."""
    widths = [kernel.shape[-1] for kernel in kernels]
    ways = _shares(kernels[0].axes[-1], widths)
    cut = [kernel[...].reshape(kernel.shape[0], ways, -1) for kernel in kernels]
    rows, columns = kernels[0].axes
    whole = jnp.concatenate(cut, axis=-1).reshape(-1, sum(widths))
    return kernels[0].replace(whole, axes=(rows, columns if ways > 1 else None))


def joint(x: Float[Array, "B S I"], kernel: nnx.Variable, widths: Sequence[int]) -> list[Array]:
    """x @ each of the kernels of these widths that lie `beside` each other in `kernel`."""
    (y,) = dense(x, kernel)
    ways = _shares(kernel.axes[-1], widths)
    ends = list(accumulate(width // ways for width in widths))[:-1]
    parts = jnp.split(y.reshape(*y.shape[:-1], ways, -1), ends, axis=-1)
    return [part.reshape(*y.shape[:-1], -1) for part in parts]


def _shares(axis: str | None, widths: Sequence[int]) -> int:
    """Devices that split each of these widths of a logical axis."""
    over = {split_by(axis, width) for width in widths}
    mesh, (part, *others) = current_mesh(), over
    return 1 if mesh is None or part is None or others else mesh.shape[part]


def lookup(table: nnx.Param, ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """table[ids]: rows of a [V, D] table, which is split along V over tensor and D over fsdp."""
    if (mesh := current_mesh()) is None:
        return widened(table[...])[ids].astype(table.dtype)
    spec = partition_spec(table.axes, mesh, table.shape)
    (tokens, slices), dtype = spec, table.dtype

    def local(ids, table):
        table = _by_row(table, spec, batch[0])
        if slices:  # every device has a slice of every row: it serves the ids of all of them
            ids = jax.lax.all_gather(ids, slices, tiled=True)
        if tokens:
            ids = ids - jax.lax.axis_index(tokens) * len(table)
            here = (ids >= 0) & (ids < len(table))
            found = table[jnp.where(here, ids, 0)].astype(dtype)
            found = jax.lax.psum(jnp.where(here[:, None], found, 0), tokens)
        else:
            found = table[ids].astype(dtype)
        return jax.lax.all_to_all(found, slices, 0, 1, tiled=True) if slices else found

    batch = partition_spec(("batch",), mesh)
    run = jax.shard_map(local, in_specs=(batch, spec), out_specs=batch)
    flat = fill_up(ids.reshape(-1), mesh)
    return run(flat, widened(table[...]))[: ids.size].reshape(*ids.shape, -1)


def spread(vector: Float[Array, " D"], shape: tuple[int, ...]) -> Float[Array, "*batch D"]:
    """`vector` repeated along all but the last axis of `shape`."""
    return jax.lax.broadcast_in_dim(widened(vector), shape, (len(shape) - 1,)).astype(vector.dtype)


def _by_row(w: Array, spec: PartitionSpec, batch: str | tuple[str, ...] | None) -> Array:
    """`w`, said to differ between the devices that have other rows: as the product with it does."""
    rows = (batch,) if isinstance(batch, str) else batch or ()
    return jax.lax.pcast(w, tuple(axis for axis in rows if axis not in spec), to="varying")


def _stays(part: str | None) -> str | None:
    """The mesh axis over which a weight is split while it is used."""
    return None if part == GATHERED else part

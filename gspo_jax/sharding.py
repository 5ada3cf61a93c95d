"""Where every array lives: one mesh, one table from logical axes to mesh axes.

Models and batches name their axes by meaning ("embed", "heads", "batch"); only RULES knows the
mesh. Changing the parallelism of the whole library is changing this table. On one device every
function here is the identity.

    mesh axis   what it splits
    data        rows of the batch; parameters are copied
    fsdp        rows of the batch, and parameters, gradients and moments along "embed"
"""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from gspo_jax.distributed import place
from gspo_jax.errors import ConfigError

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": None,
    "heads": None,
    "kv_heads": None,
    "mlp": None,
    "experts": None,
    "norm": None,
}


def make_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
    """A mesh of `data` x `fsdp` devices; -1 stands for all devices that the other axis leaves.

    Raises:
        ConfigError: the axes do not multiply to a number of devices that exists.
    """
    count = jax.device_count()
    if data == -1:
        data = max(count // fsdp, 1)
    elif fsdp == -1:
        fsdp = max(count // data, 1)
    if data * fsdp > count or data < 1 or fsdp < 1:
        raise ConfigError(
            f"mesh.data={data} x mesh.fsdp={fsdp} needs {data * fsdp} devices and {count} exist; "
            "set one of them to -1 to use what is left."
        )
    devices = jax.devices()[: data * fsdp]
    return jax.make_mesh(
        (data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def partition_spec(
    axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh, shape: tuple[int, ...] | None = None
) -> PartitionSpec:
    """Logical axis names -> mesh axes. An axis of `shape` that does not divide stays whole."""
    parts = [RULES[axis] if axis is not None else None for axis in axes]
    if shape is not None:
        parts = [p if _divides(n, p, mesh) else None for n, p in zip(shape, parts, strict=True)]
    return PartitionSpec(*parts)


def sharding_for(
    axes: tuple[str | None, ...], mesh: Mesh, shape: tuple[int, ...] | None = None
) -> NamedSharding:
    """The sharding of an array with these logical axes on this mesh."""
    return NamedSharding(mesh, partition_spec(axes, mesh, shape))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Inside a jitted function: keep `x` sharded by its logical axes on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, mesh, x.shape))


def batch_ways() -> int:
    """Devices of the current mesh that a batch is split over: what its rows must divide into."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES["batch"] or ())


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Put a tree of host arrays on the mesh, their leading axis being the batch."""

    def put(x):
        axes = ("batch",) + (None,) * (x.ndim - 1)
        return place(x, sharding_for(axes, mesh, x.shape))

    return jax.tree.map(put, batch)


def state_shardings(tree: PyTree, params: PyTree, mesh: Mesh) -> PyTree:
    """Shardings for a tree that holds copies of the parameters' structure, like optimizer state.

    A leaf whose path ends in a parameter's path follows that parameter wherever its own axis
    divides (8-bit codes have the parameter's shape, their scales a shorter last axis); any other
    leaf is copied to every device. `tree` may hold shapes instead of arrays.
    """
    axes_of = {_names(path): variable for path, variable in _logical_axes(params).items()}

    def place(path, leaf):
        names = _names(path)
        for start in range(len(names)):
            for end in range(len(names), start, -1):
                axes = axes_of.get(names[start:end])
                if axes is not None and len(axes) == len(leaf.shape):
                    return sharding_for(axes, mesh, leaf.shape)
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def _logical_axes(params: PyTree) -> dict[tuple, tuple[str | None, ...]]:
    """Path of each parameter -> its logical axes, as the model declared them."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: hasattr(x, "axes"))
    return {path: leaf.axes for path, leaf in leaves}


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A tree path as plain names; wrappers that hold a single `value` add nothing."""
    keys = (str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
    return tuple(k for k in keys if k != "value")


def _divides(size: int, part: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> bool:
    if part is None:
        return True
    ways = 1
    for axis in (part,) if isinstance(part, str) else part:
        ways *= mesh.shape[axis]
    return size % ways == 0

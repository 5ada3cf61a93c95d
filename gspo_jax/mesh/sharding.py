"""Where every array lives: one mesh, one table from logical axes to mesh axes.

Models and batches name their axes by meaning ("embed", "heads", "batch"); only RULES knows the
mesh. Changing the parallelism of the whole library is changing this table. On one device every
function here is the identity.

    mesh axis   what it splits
    data        rows of the batch; parameters are copied
    fsdp        rows of the batch; parameters, gradients and moments along "embed", put together
                for the time of their use
    expert      rows of the batch; experts, to which their tokens travel
    tensor      heads, MLP and vocabulary: of parameters, activations, cache and logits

What is communicated where, `models.linear` and `models.moe` say.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import DTypeLike, PyTree

from gspo_jax.algo.masked import float_dtype
from gspo_jax.errors import ConfigError
from gspo_jax.mesh.distributed import check_backend, place

Names = tuple[str, ...]
Axes = tuple[str | None, ...]

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp", "expert"),
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    "norm": None,
}
GATHERED = "fsdp"  # of the mesh axes that split parameters: the one that is undone to use them
MESH_AXES = ("data", "fsdp", "expert", "tensor")  # neighbouring devices talk most: tensor last


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    expert: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh of `data` x `fsdp` x `expert` x `tensor` devices.

    One of them may be -1: all devices that the others leave.

    Args:
        devices: the first of these `jax.Device`s; None are JAX's own.

    Raises:
        ConfigError: the axes do not multiply to a number of devices that exists, or the devices
            cannot be arranged like that; or see `distributed.check_backend`.
    """
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor}
    check_backend()
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    given = math.prod(n for n in sizes.values() if n != -1)
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = max(count // max(given, 1), 1)
            break
    needed = math.prod(sizes.values())
    shown = {axis: n for axis, n in sizes.items() if n != 1 or axis == "data"}
    text = " x ".join(f"mesh.{axis}={n}" for axis, n in shown.items())
    if needed > count or min(sizes.values()) < 1:
        raise ConfigError(
            f"{text} needs {needed} devices and {count} exist; set one of them to -1 to use what "
            "is left."
        )
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    try:
        arranged = _arranged(shape, devices[:needed])
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise ConfigError(
            f"{text}: of {count} x {devices[0].device_kind} the first {needed} cannot be arranged "
            f"like that; use all of them, or as many as form a block of a slice."
        ) from error
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices in this shape: neighbours in a TPU's torus along the last axes, and slices, which
    only the network joins, along the first that they divide.

    Raises:
        ValueError, NotImplementedError, AssertionError: there is no such arrangement.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1 or devices[0].platform != "tpu":  # others are numbered by node
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    across, left = [], slices
    for size in shape:
        across.append(math.gcd(size, left))
        left //= across[-1]
    if left > 1:
        raise ValueError(f"no axis divides by its {slices} slices")
    within = [size // n for size, n in zip(shape, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


def platform_of(shardings: PyTree) -> str:
    """The platform where these live, "cpu", "gpu" or "tpu"; of none, that of JAX's own devices.

    Args:
        shardings: a mesh, or a tree of shardings.
    """
    for leaf in jax.tree.leaves(shardings):
        mesh = getattr(leaf, "mesh", leaf)
        if isinstance(mesh, Mesh):
            return mesh.devices.flat[0].platform
    return jax.default_backend()


def current_mesh() -> AbstractMesh | None:
    """The mesh of `jax.set_mesh`, where it has several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def partition_spec(
    axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh, shape: tuple[int, ...] | None = None
) -> PartitionSpec:
    """Logical axis names -> mesh axes of several devices.

    An axis of `shape` that they do not divide stays whole.
    """
    parts = [_several(RULES[axis], mesh) if axis is not None else None for axis in axes]
    if shape is not None:
        parts = [p if _divides(n, p, mesh) else None for n, p in zip(shape, parts, strict=True)]
    return PartitionSpec(*parts)


def _several(
    part: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh
) -> str | tuple[str, ...] | None:
    """Those of the mesh axes along which there are several devices."""
    axes = (part,) if isinstance(part, str) else part or ()
    several = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    return several if len(several) > 1 else several[0] if several else None


def sharding_for(
    axes: tuple[str | None, ...], mesh: Mesh, shape: tuple[int, ...] | None = None
) -> NamedSharding:
    """The sharding of an array with these logical axes on this mesh."""
    return NamedSharding(mesh, partition_spec(axes, mesh, shape))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Inside a jitted function: keep `x` sharded by its logical axes on the current mesh."""
    if (mesh := current_mesh()) is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, mesh, x.shape))


def batch_ways() -> int:
    """Devices of the current mesh that a batch is split over: what its rows must divide into."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else ways_of(RULES["batch"], mesh)


def ways_of(part: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> int:
    """Parts into which these mesh axes split."""
    axes = (part,) if isinstance(part, str) else part or ()
    return math.prod(mesh.shape[axis] for axis in axes)


def split_by(axis: str | None, size: int) -> str | None:
    """The mesh axis that splits a weight's logical axis of this size while it is used, if any."""
    part = RULES[axis] if axis else None
    if (mesh := current_mesh()) is None or part is None or part == GATHERED:
        return None
    assert isinstance(part, str)
    return part if mesh.shape[part] > 1 and _divides(size, part, mesh) else None


def unsplit(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """The logical axes without those that are put together for use: of a sampler's weights."""
    return tuple(None if axis and RULES[axis] == GATHERED else axis for axis in axes)


def by_rows(
    function: Callable[..., PyTree],
    rows: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    axes: Sequence[tuple[str | None, ...]],
) -> PyTree:
    """`function(*rows, *weights)`, by each device on rows of its own and its shares of the weights.

    What is split over GATHERED is put together for the call; the gradients are scattered, and
    summed over the rows. Other mesh axes of a weight are for `function` to sum over. It does so
    with gradients that count each device's copy of an output as one of several
    (`check_vma=False`).

    Args:
        rows: their leading axis is the batch, as it is in the result; filled up where the
            devices do not divide it.
        axes: the logical axes of each weight.
    """
    if (mesh := current_mesh()) is None:
        return function(*rows, *weights)
    specs = [partition_spec(a, mesh, w.shape) for a, w in zip(axes, weights, strict=True)]

    def local(*given):
        shares = zip(given[len(rows) :], specs, weights, strict=True)
        whole = (gathered(share, spec, w.dtype) for share, spec, w in shares)
        own = (x.astype(row.dtype) for x, row in zip(given, rows, strict=False))
        return function(*own, *whole)

    count, split = len(rows[0]), partition_spec(("batch",), mesh)
    spread = jax.shard_map(
        local,
        in_specs=(*(split for _ in rows), *specs),
        out_specs=split,
        check_vma=False,
    )
    out = spread(*(fill_up(widened(x), mesh) for x in rows), *map(widened, weights))
    return jax.tree.map(lambda y: y[:count], out)


def fill_up(rows: jax.Array, mesh: AbstractMesh) -> jax.Array:
    """Rows of zeros added, until the devices that split the batch divide them."""
    short = -len(rows) % ways_of(RULES["batch"], mesh)
    return jnp.pad(rows, [(0, short), *((0, 0) for _ in rows.shape[1:])]) if short else rows


def gathered(x: jax.Array, spec: PartitionSpec, dtype: DTypeLike) -> jax.Array:
    """Inside `jax.shard_map`: `x` in `dtype`, put together along GATHERED.

    Its gradient is scattered again, and summed over devices in float32 at least.
    """
    x = x.astype(dtype)
    for i, part in enumerate(spec):
        if part == GATHERED:
            x = gather(x, i, GATHERED)
    return x


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(x: jax.Array, axis: int, over: str) -> jax.Array:
    """Inside `jax.shard_map`: the shares of the devices of `over`, side by side along `axis`.

    Its gradient is scattered again, and summed over devices in float32 at least.
    """
    return jax.lax.all_gather(x, over, axis=axis, tiled=True)


def _gather_forward(x: jax.Array, axis: int, over: str) -> tuple[jax.Array, None]:
    return jax.lax.all_gather(x, over, axis=axis, tiled=True), None


def _scatter(axis: int, over: str, _: None, g: jax.Array) -> tuple[jax.Array]:
    total = jax.lax.psum_scatter(widened(g), over, scatter_dimension=axis, tiled=True)
    # Without the barrier XLA's TPU compiler sees a sum that is rounded and then widened where
    # gradients are accumulated, tries to move it out of the loop over microbatches, and fails.
    return (jax.lax.optimization_barrier(total.astype(g.dtype)),)


gather.defvjp(_gather_forward, _scatter)


def widened(x: jax.Array) -> jax.Array:
    """What is about to be repeated, picked from or shared, in float32 at least.

    Whoever takes it rounds it to its own dtype after that, and its gradient is summed in float32
    before. Integers stay.
    """
    return x.astype(float_dtype(x)) if jnp.issubdtype(x.dtype, jnp.floating) else x


def regathering(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose backward pass gathers again what it gathers, and keeps all else."""
    if current_mesh() is None:
        return function

    def kept(primitive, *_, **__) -> bool:
        return primitive.name != "all_gather"

    return jax.checkpoint(function, policy=kept)


def regathers(shardings: PyTree) -> bool:
    """Whether the parameters of a state with these shardings are gathered for use."""
    meshes = (getattr(s, "mesh", None) for s in jax.tree.leaves(shardings))
    return any(mesh is not None and mesh.shape.get(GATHERED, 1) > 1 for mesh in meshes)


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
    found = {path: axes for path, _, axes in leaves_of(tree, params)}

    def place(path, leaf):
        return sharding_for(found[path][1], mesh, leaf.shape)

    return jax.tree_util.tree_map_with_path(place, tree)


def leaves_of(tree: PyTree, params: PyTree) -> list[tuple[Any, Any, tuple[Names, Axes]]]:
    """Of each leaf its path, itself, the parameter that it belongs to, and its logical axes.

    A leaf that belongs to none has the name () and no axes that are split.
    """
    known = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: hasattr(x, "axes"))
    axes_of: dict[Names, Axes] = {_names(path): leaf.axes for path, leaf in known}

    def owner(path, leaf) -> tuple[Names, Axes]:
        names = _names(path)
        for start in range(len(names)):
            for end in range(len(names), start, -1):
                axes = axes_of.get(names[start:end])
                if axes is not None and len(axes) == len(leaf.shape):
                    return names[start:end], axes
        return (), (None,) * len(leaf.shape)

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(path, leaf, owner(path, leaf)) for path, leaf in leaves]


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """A tree path as plain names; wrappers that hold a single `value` add nothing."""
    keys = (str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
    return tuple(k for k in keys if k != "value")


def _divides(size: int, part: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> bool:
    return size % ways_of(part, mesh) == 0

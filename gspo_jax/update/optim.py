"""The optimizer: AdamW as an optax chain, its state kept in 8 bits.

    compress_state(inner)   any optax transformation, its large moments stored as quant codes
    leaf_by_leaf(inner)     one parameter after the other, so that one at a time is unpacked
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
from jaxtyping import Array, Bool, Float, Int, PyTree

from gspo_jax.errors import check_choice
from gspo_jax.update.quant import Quantised, block_size, dequantise, hashed, quantise

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

    def compress(field: tuple[Any, ...], path: tuple[Any, ...], leaf: Any, count: Any) -> Any:
        if not chosen(field + path, leaf):
            return leaf
        signed = _names(field).isdisjoint(NON_NEGATIVE)
        uniform = None
        if stochastic and not signed:
            seed = crc32(jax.tree_util.keystr(field + path).encode())
            uniform = hashed(leaf.shape, count, seed)
        size = block_size(leaf.shape[-1], block)
        return quantise(leaf, signed=signed, block=size, uniform=uniform)

    def compressed(full: PyTree, tree: Any) -> CompressedState:
        # A parameter may be called "v" too: the state's own fields end where its path begins.
        count = _count_of(full) if stochastic else None

        def node(field: tuple[Any, ...], x: Any) -> Any:
            return jax.tree_util.tree_map_with_path(partial(compress, field, count=count), x)

        like = partial(_is_like, tree=tree)
        return CompressedState(jax.tree_util.tree_map_with_path(node, full, is_leaf=like))

    def decompress(leaf: Any) -> Any:
        return dequantise(leaf) if isinstance(leaf, Quantised) else leaf

    def init(params: PyTree) -> CompressedState:
        # Unseen by the compiler, which would work out the codes of all zeros itself, for minutes.
        zeros = jax.tree.map(jax.lax.optimization_barrier, inner.init(params))
        return compressed(zeros, jax.tree.structure(params))

    def update(updates: PyTree, state: Any, params: PyTree | None = None):
        full = jax.tree.map(decompress, state.inner, is_leaf=lambda x: isinstance(x, Quantised))
        tree = jax.tree.structure(updates)
        updates, full = inner.update(updates, full, params)
        return updates, compressed(full, tree)

    return optax.GradientTransformation(init, update)


class LeafByLeaf(NamedTuple):
    """An optax transformation that can also be run, and applied, one parameter at a time.

    Attributes:
        init, update: as optax has them.
        step: (gradients, state, parameters, go) -> the parameters and state after the update; where
            the scalar `go` is false, the very same parameters, and the state that `let_pass` gives.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    step: Callable[..., tuple[PyTree, PyTree]]


Optimizer = optax.GradientTransformation | LeafByLeaf


def leaf_by_leaf(inner: optax.GradientTransformation, *, max_grad_norm: float) -> LeafByLeaf:
    """`inner` after clipping by the norm of all gradients, with a `step` that takes little memory.

    Run on a whole tree, XLA may unpack every 8-bit moment before it packs the first one again
    (five times the parameters, on a CPU). Each parameter has a conditional of its own here, and
    the buffers of one conditional are gone before the next.

    Args:
        inner: treats parameters alone, as Adam, weight decay and schedules do. Its state may hold
            trees like the parameters, and numbers that are the same for all of them.
        max_grad_norm: longer gradients are scaled down to this length, as in
            `optax.clip_by_global_norm`.
    """
    whole = optax.chain(optax.clip_by_global_norm(max_grad_norm), inner)

    def step(grads: PyTree, state: Any, params: PyTree, go: Bool[Array, ""]):
        norm = global_norm(grads)

        def one(grad, state, param):
            grad = jnp.where(norm < max_grad_norm, grad, grad / norm * max_grad_norm)
            change, state = inner.update(grad, state, param)
            return optax.apply_updates(param, change), state

        leaves, tree = jax.tree.flatten(params)
        clipping, moments = state  # in the order of `whole`

        def none(_, state, param):
            return param, let_pass(state)

        done = [
            jax.lax.cond(go, one, none, *leaf)
            for leaf in zip(tree.flatten_up_to(grads), _by_leaf(moments, tree), leaves, strict=True)
        ]
        params = tree.unflatten([param for param, _ in done])
        return params, (clipping, _joined(moments, tree, [of_one for _, of_one in done]))

    return LeafByLeaf(whole.init, whole.update, step)


def let_pass(state: PyTree) -> PyTree:
    """The optimizer's state after an update that is left out.

    The moments and their count stay, the schedule's count rises: a schedule is laid over all
    updates of a run, so its warm-up and its end come when they were planned.
    """

    def later(x: Any) -> Any:
        return x._replace(count=x.count + jnp.ones_like(x.count)) if _is_clock(x) else x

    return jax.tree.map(later, state, is_leaf=_is_clock)


def schedule_count(state: PyTree) -> Int[Array, ""]:
    """How many updates the schedule of `make_optimizer` has seen, those left out included."""
    return next(x.count for x in jax.tree.leaves(state, is_leaf=_is_clock) if _is_clock(x))


def _is_clock(x: Any) -> bool:
    return isinstance(x, optax.ScaleByScheduleState)


def global_norm(grads: PyTree) -> Float[Array, ""]:
    """√(Σ g²) over every element of every leaf: what is clipped by, logged and compared."""
    return optax.tree.norm(grads)


def _by_leaf(state: PyTree, tree: Any) -> list[PyTree]:
    """A state for each leaf of `tree`, as if it were the only parameter."""
    like = partial(_is_like, tree=tree)

    def part(i: int) -> PyTree:
        return jax.tree.map(lambda x: _leaves(x)[i] if like(x) else x, state, is_leaf=like)

    return [part(i) for i in range(tree.num_leaves)]


def _joined(state: PyTree, tree: Any, parts: list[PyTree]) -> PyTree:
    """`state` again, from those of the leaves; what they share is the last one's."""
    like = partial(_is_like, tree=tree)
    nodes, outer = jax.tree.flatten(state, is_leaf=like)
    columns = zip(*(outer.flatten_up_to(part) for part in parts), strict=True)
    joined = [
        tree.unflatten(column) if like(node) else column[-1]
        for node, column in zip(nodes, columns, strict=True)
    ]
    return outer.unflatten(joined)


def _leaves(x: PyTree) -> list[Any]:
    return jax.tree.leaves(x, is_leaf=lambda leaf: isinstance(leaf, Quantised))


def _is_like(x: PyTree, tree: Any) -> bool:
    """Whether `x` has one entry per parameter, packed or not."""
    return jax.tree.structure(x, is_leaf=lambda leaf: isinstance(leaf, Quantised)) == tree


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
    """Learning rate against the count of updates, those that are left out included (`let_pass`).

    Args:
        learning_rate: the peak.
        kind: "constant", "linear" or "cosine" (the latter two end at 0 after `updates`).
        warmup: updates of linear rise; the first one already has learning_rate / warmup.
        updates: updates of the whole run.

    Raises:
        ConfigError: another `kind`.
    """
    check_choice("kind", kind, ("constant", "linear", "cosine"))
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
) -> LeafByLeaf:
    """AdamW with its moments in 8 bits ("8bit") or in float32; decay on matrices alone.

    Raises:
        ConfigError: another `state`.
    """
    check_choice("state", state, ("8bit", "float32"))
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    inner = optax.chain(
        compress_state(adam) if state == "8bit" else adam,
        optax.add_decayed_weights(weight_decay, mask=_matrices),
        optax.scale_by_learning_rate(schedule),
    )
    return leaf_by_leaf(inner, max_grad_norm=max_grad_norm)


def _matrices(params: PyTree) -> PyTree:
    return jax.tree.map(lambda p: p.ndim >= 2, params)

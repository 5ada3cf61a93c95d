"""A mixture of experts in place of a layer's MLP, as in Qwen3-MoE, and routing replay.

    p = softmax(h @ router)                          [.., E], in float32
    ids = top_k(p)                                   X experts of each token, or those replayed
    gates = p[ids] (/ Σ p[ids] if normalised)        the gradient reaches the router through here
    y = Σ_x gates_x · expert_{ids_x}(h)              expert(h) = (silu(h gate) * (h up)) down

No token is dropped and no expert runs on tokens that are not its own: the N·X assignments are
sorted by expert into tiles of a few rows, each tile belongs to one expert, and one batched matmul
multiplies every tile by its expert's matrix.

Experts may be split over devices (the mesh axis `expert`). Then every device sends its tokens to
those it shares the experts with, computes what falls to its own experts, and gets back the sum
over all of them: no weights travel. It cannot know beforehand how much will fall to it, so it
loops over as many tiles as there turn out to be.

Routing replay: after a policy update the router may choose other experts for the same text, and
then π_θ / π_old compares two different networks. Given the ids that π_old chose, every π_θ of the
update runs on those; "R2" replays the ids of the training program (update.steps hands them on),
"R3" those of the sampler (rollout.engine records, rollout.train_rows places them). Zheng et al.,
2025, GSPO, https://arxiv.org/abs/2507.18071, §5.3, name and motivate it; R3 is from Ma et al.,
2025, https://arxiv.org/abs/2510.11370.

Axes: N tokens (B · S), M layers with experts, E experts, X experts per token, F expert width,
t tiles of r rows, c tiles at a time.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from gspo_jax.algo.masked import float_dtype
from gspo_jax.mesh.sharding import by_rows, gather, split_by, widened
from gspo_jax.models.config import QwenConfig
from gspo_jax.models.init import kernel
from gspo_jax.models.linear import dense


class Routing(NamedTuple):
    """What the routers of one forward pass chose, over the layers that have experts.

    Attributes:
        experts: the router's own choice, most likely first, whether or not another was replayed.
        probability: Σ of each expert's probability over the row's counted tokens.
        z: Σ of (log Σ exp logits)² over the row's counted tokens.
    """

    experts: Int[Array, "B S M X"]
    probability: Float[Array, "B M E"]
    z: Float[Array, "B M"]


class Experts(nnx.Module):
    """E gated MLPs and the router that sends each token to X of them."""

    def __init__(self, config: QwenConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        assert config.experts is not None
        D, E, F = config.hidden_size, config.experts.count, config.experts.size
        self.config = config.experts
        self.router = kernel(rngs, (D, E), ("embed", None), dtype)
        self.gate = kernel(rngs, (E, D, F), ("experts", "embed", "mlp"), dtype)
        self.up = kernel(rngs, (E, D, F), ("experts", "embed", "mlp"), dtype)
        self.down = kernel(rngs, (E, F, D), ("experts", "mlp", "embed"), dtype)

    def __call__(
        self,
        h: Float[Array, "B S D"],
        replay: Int[Array, "B S X"] | None = None,
        counted: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Routing]:
        """The mixed outputs, and the routing of this one layer (M = 1).

        Args:
            h: normalised hidden states.
            replay: experts to use instead of the router's own; where it is negative, its own.
            counted: the tokens that the sums in `Routing` run over; None is all.
        """
        B, S, D = h.shape
        X = self.config.per_token
        rows = h.reshape(B * S, D)
        logits = dense(h, self.router)[0].reshape(B * S, -1).astype(float_dtype(h))
        p = jax.nn.softmax(logits, axis=-1)
        # Left to the compiler, every device would sort the rows of all of them.
        own = by_rows(lambda p: jax.lax.top_k(p, X)[1], [jax.lax.stop_gradient(p)], [], [])
        ids = own if replay is None else replay.reshape(own.shape).astype(own.dtype)
        ids = jnp.where(ids < 0, own, ids)
        gates = jnp.take_along_axis(p, ids, axis=-1)
        if self.config.normalise:
            gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
        y = spread_mixture(rows, ids, gates.astype(h.dtype), self.gate, self.up, self.down)
        where = jnp.ones((B, S), bool) if counted is None else counted
        z = jnp.sum(jax.nn.logsumexp(logits, axis=-1).reshape(B, S) ** 2, axis=1, where=where)
        total = jnp.sum(p.reshape(B, S, -1), axis=1, where=where[..., None])
        chosen = own.reshape(B, S, 1, X).astype(jnp.int16)
        return y.reshape(B, S, D), Routing(chosen, total[:, None], z[:, None])


def join(layers: list[Routing]) -> Routing | None:
    """The routing of all layers from that of each; None where no layer has experts."""
    if not layers:
        return None
    experts, probability, z = zip(*layers, strict=True)
    return Routing(
        jnp.concatenate(experts, axis=2),
        jnp.concatenate(probability, axis=1),
        jnp.concatenate(z, axis=1),
    )


def balance(
    routing: Routing, counted: Bool[Array, "B S"]
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, "M E"]]:
    """Load-balancing loss, router z-loss, and the load of each expert; means over M layers.

        aux = E Σ_e load_e · p̄_e        load_e: tokens per token sent to e; p̄_e: mean probability
        z   = mean (log Σ exp logits)²

    The loads sum to X, and aux is X where all are equal; only p̄ has a gradient. Fedus et al.,
    2021, https://arxiv.org/abs/2101.03961, eq. 4-6; Zoph et al., 2022,
    https://arxiv.org/abs/2202.08906, eq. 5. transformers' `router_aux_loss_coef` weighs the same
    aux, its means taken over all layers at once.
    """
    count = jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1)
    _, M, E = routing.probability.shape
    weight = jnp.broadcast_to(counted[:, :, None, None], routing.experts.shape)
    layer = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32)[None, None, :, None], weight.shape)
    sent = jnp.zeros((M, E), jnp.float32)
    load = sent.at[layer, routing.experts].add(weight.astype(jnp.float32)) / count
    p = jnp.sum(routing.probability, axis=0) / count
    aux = E * jnp.mean(jnp.sum(jax.lax.stop_gradient(load) * p, axis=1))
    return aux, jnp.mean(jnp.sum(routing.z, axis=0) / count), load


def router_metrics(
    routing: Routing, recorded: Int[Array, "B S M X"] | None, counted: Bool[Array, "B S"]
) -> dict[str, Float[Array, ""]]:
    """How evenly the routers load the experts, and how far they moved from a recorded choice.

    router/load_max         load of the busiest expert of any layer, 1 where all are equal
    router/unused           share of experts that no token chose
    router/changed          1 - |old ∩ new| / X, mean over tokens and layers
    router/changed_tokens   share of tokens with a change in any layer
    """
    aux, z, load = balance(routing, counted)
    X, E = routing.experts.shape[-1], load.shape[1]
    metrics = {
        "router/aux_loss": aux,
        "router/z_loss": z,
        "router/load_max": jnp.max(load) * E / X,
        "router/unused": jnp.mean(load == 0, dtype=jnp.float32),
    }
    if recorded is None:
        return metrics
    old, new = recorded[..., None, :].astype(jnp.int16), routing.experts[..., None]
    moved = 1 - jnp.mean(jnp.any(new == old, axis=-1), axis=-1, dtype=jnp.float32)  # [B, S, M]
    known = counted & (recorded[:, :, 0, 0] >= 0)
    return metrics | {
        "router/changed": jnp.mean(moved, where=known[..., None]),
        "router/changed_tokens": jnp.mean(jnp.any(moved > 0, axis=-1), where=known),
    }


def spread_mixture(
    h: Float[Array, "N D"],
    ids: Int[Array, "N X"],
    gates: Float[Array, "N X"],
    gate: nnx.Param,
    up: nnx.Param,
    down: nnx.Param,
) -> Float[Array, "N D"]:
    """`mixture`, with tokens and experts as the current mesh splits them."""
    E, _, F = gate.shape
    owners, inner = split_by(gate.axes[0], E), split_by(gate.axes[2], F)

    def local(h, ids, gates, *kernels):
        if owners is None:
            y = mixture(h, ids, gates, *kernels)
        else:
            ids = jax.lax.all_gather(ids.astype(jnp.int32), owners, tiled=True)
            h, gates = gather(h, 0, owners), gather(gates, 0, owners)
            own = ids - jax.lax.axis_index(owners) * kernels[0].shape[0]
            y = own_mixture(E, h, own, gates, *kernels)
            y = jax.lax.psum_scatter(y, owners, tiled=True)
        return y if inner is None else jax.lax.psum(y, inner)

    weights = (gate, up, down)
    return by_rows(local, (h, ids, gates), [w[...] for w in weights], [w.axes for w in weights])


def mixture(
    h: Float[Array, "N D"],
    ids: Int[Array, "N X"],
    gates: Float[Array, "N X"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "N D"]:
    """Σ_x gates_x expert_{ids_x}(h), each expert on its own tokens alone (plus tile padding)."""
    source, slot, expert = tiles(ids, gate.shape[0])
    N, X = ids.shape
    # A padding row reads no token (mode fill gives zeros), and no token reads its output.
    x = jnp.take(widened(h), source // X, axis=0, mode="fill", fill_value=0)  # [t, r, D]
    x = x.astype(h.dtype)
    inner = jax.nn.silu(tile_matmul(x, gate, expert)) * tile_matmul(x, up, expert)
    out = tile_matmul(inner, down, expert).reshape(-1, h.shape[1])
    y = out[slot].reshape(N, X, -1)
    return jnp.einsum("nxd,nx->nd", y, gates, preferred_element_type=float_dtype(h)).astype(h.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def own_mixture(
    count: int,
    h: Float[Array, "N D"],
    ids: Int[Array, "N X"],
    gates: Float[Array, "N X"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "N D"]:
    """The part of `mixture` over `count` experts that falls to E of them; other ids are no one's.

    A loop over the tiles in use, whose number is only known when it runs; the backward pass is a
    second loop, which computes each tile again: nothing but the arguments is kept.
    """
    source, expert, used = _portions(ids, gate.shape[0], count)

    def add(i, y):
        x, weight, token = _portion(h, gates, source[i])
        out = _weighted(expert[i], x, weight, gate, up, down)
        return y.at[token].add(out, mode="drop")

    y = jnp.zeros(h.shape, float_dtype(h))
    return jax.lax.fori_loop(0, used, add, y).astype(h.dtype)


def _own_forward(count, h, ids, gates, gate, up, down):
    return own_mixture(count, h, ids, gates, gate, up, down), (h, ids, gates, gate, up, down)


def _own_backward(count, kept, dy):
    h, ids, gates, *kernels = kept
    source, expert, used = _portions(ids, kernels[0].shape[0], count)
    wide = float_dtype(h)

    def add(i, so_far):
        dh, dgates, dkernels = so_far
        x, weight, token = _portion(h, gates, source[i])
        pull = jax.vjp(lambda *given: _weighted(expert[i], *given), x, weight, *kernels)[1]
        dx, dweight, *more = pull(
            jnp.take(dy, token, axis=0, mode="fill", fill_value=0).astype(wide)
        )
        dh = dh.at[token].add(dx.astype(wide), mode="drop")
        dgates = dgates.at[source[i]].add(dweight.astype(wide), mode="drop")
        return dh, dgates, [a + b.astype(wide) for a, b in zip(dkernels, more, strict=True)]

    zeros = (
        jnp.zeros(h.shape, wide),
        jnp.zeros(gates.size, wide),
        [jnp.zeros(w.shape, wide) for w in kernels],
    )
    dh, dgates, dkernels = jax.lax.fori_loop(0, used, add, zeros)
    dkernels = [d.astype(w.dtype) for d, w in zip(dkernels, kernels, strict=True)]
    return dh.astype(h.dtype), None, dgates.reshape(gates.shape).astype(gates.dtype), *dkernels


own_mixture.defvjp(_own_forward, _own_backward)


def _portions(
    ids: Int[Array, "N X"], own: int, count: int
) -> tuple[Int[Array, "n c r"], Int[Array, "n c"], Int[Array, ""]]:
    """`tiles` of the `own` experts, a few at a time, and how many portions are in use.

    A portion is a quarter of what falls to a device where all load is equal.
    """
    ids = jnp.where((ids >= 0) & (ids < own), ids, own)
    source, _, expert = tiles(ids, own, count - own)
    amount, rows = source.shape
    portion = max(amount * own // (4 * count), 1)
    short = -amount % portion
    source = jnp.pad(source, ((0, short), (0, 0)), constant_values=ids.size)
    expert = jnp.pad(expert, (0, short))
    used = jnp.sum(jnp.any(source < ids.size, axis=1), dtype=jnp.int32)  # they come first
    return source.reshape(-1, portion, rows), expert.reshape(-1, portion), -(-used // portion)


def _portion(
    h: Float[Array, "N D"], gates: Float[Array, "N X"], source: Int[Array, "c r"]
) -> tuple[Float[Array, "c r D"], Float[Array, "c r"], Int[Array, "c r"]]:
    """The states and the weights of these assignments, and their tokens; zeros for none."""
    token = source // gates.shape[1]
    x = jnp.take(h, token, axis=0, mode="fill", fill_value=0)
    return x, jnp.take(gates.reshape(-1), source, mode="fill", fill_value=0), token


def _weighted(expert, x, weight, gate, up, down) -> Float[Array, "c r D"]:
    inner = jax.nn.silu(tile_matmul(x, gate, expert)) * tile_matmul(x, up, expert)
    out = tile_matmul(inner, down, expert).astype(float_dtype(x))
    return out * weight[..., None].astype(out.dtype)


def tiles(
    ids: Int[Array, "N X"], count: int, others: int = 0
) -> tuple[Int[Array, "t r"], Int[Array, " NX"], Int[Array, " t"]]:
    """Assignments sorted by expert, each expert's share filled up to whole tiles.

    Σ_e ceil(c_e / r) tiles are needed for loads c_e that sum to A = N X: at most
    (A + E (r - 1)) / r, and never more than A.

    Args:
        count: experts 0 to count - 1 have tiles; ids from there on have none.
        others: how many experts those ids stand for.

    Returns:
        source: the assignment (token · X + choice) of each tile row; on padding out of range.
        slot: the flat tile row of each assignment; out of range where it has none.
        expert: the expert of each tile; of unused tiles, any.
    """
    flat = ids.reshape(-1)
    A = flat.shape[0]
    rows = tile_rows(A, count + others)
    amount = min(A, (A + count * (rows - 1)) // rows)
    load = jnp.bincount(flat, length=count)
    end = jnp.cumsum(-(-load // rows))  # of each expert's tiles
    first = end - -(-load // rows)
    order = jnp.argsort(flat, stable=True)
    sort = flat[order]
    rank = jnp.arange(A, dtype=jnp.int32) - (jnp.cumsum(load) - load)[sort]
    place = first[sort] * rows + rank
    if others:
        place = jnp.where(sort < count, place, amount * rows)
    slot = jnp.zeros(A, jnp.int32).at[order].set(place)
    source = jnp.full(amount * rows, A, jnp.int32)
    source = source.at[slot].set(jnp.arange(A, dtype=jnp.int32), mode="drop")
    expert = jnp.searchsorted(end, jnp.arange(amount, dtype=end.dtype), side="right")
    return source.reshape(amount, rows), slot, jnp.minimum(expert, count - 1)


def tile_rows(assignments: int, experts: int) -> int:
    """Rows per tile: about the mean load, so that padding at most doubles the work; 8 to 128."""
    mean = max(assignments // experts, 1)
    return min(128, max(8, 1 << (mean.bit_length() - 1)))


def tile_matmul(
    x: Float[Array, "t r I"], kernel: Float[Array, "E I O"], expert: Int[Array, " t"]
) -> Float[Array, "t r O"]:
    """Each tile times its expert's matrix."""
    return jnp.einsum("tri,tio->tro", x, widened(kernel)[expert].astype(kernel.dtype))

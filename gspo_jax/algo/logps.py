"""Log-probabilities of given tokens, and entropies, without a [B, T, V] array.

    z = hidden @ head / temperature,   logp = z[token] - logsumexp(z),   entropy = -Σ p log p

A few thousand rows of `hidden` meet the whole vocabulary at a time. Of their logits only the
logsumexp is kept; the backward pass computes them once more and makes of them, in one sweep,

    ∂/∂z = g (onehot(token) - p) - h p (log p + entropy),    p = exp(z - logsumexp)

for the gradients g of logp and h of entropy. Automatic differentiation would do the same, but
its two backward matmuls multiply float32 where the network is in 16 bits, several times slower on
a GPU; it scatters into an array of zeros, and sums the head's gradient in the head's own dtype.
(Chunks of the vocabulary instead of the tokens make narrow matmuls, half as fast on a GPU.)
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from gspo_jax.algo.masked import float_dtype

CHUNK = 4096  # positions at a time


def head_bytes(positions: int, vocabulary: int, chunk: int = CHUNK) -> int:
    """Device memory that `token_logps` and its gradient take: three chunks of float32 logits."""
    return 3 * 4 * min(positions, chunk) * vocabulary


def token_logps(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B T"],
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
    axis: str | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """log π(tokens) and the entropy of π at each position, for π = softmax(hidden @ head / temp).

    Extra memory is two or three times chunk * V float32 in either direction, instead of B * T * V,
    and in the backward pass the head's gradient in float32. An entropy that no loss depends on
    costs nothing there. Differentiable once, in reverse mode.

    Args:
        hidden: final hidden states, already shifted, so `hidden[:, t]` predicts `tokens[:, t]`.
        head: unembedding matrix (the embedding transposed, when tied); any float dtype.
        tokens: the token whose log-probability is wanted at each position.
        temperature: the sampling temperature; must equal the one used in the rollout.
        chunk: positions (of all B * T) at a time.
        axis: inside `jax.shard_map`, the mesh axis over which V is split: `head` is this
            device's share of it. Needs `check_vma=False`.

    Returns:
        Natural-log probabilities and entropies in nats: float32, or float64 if given float64.
    """
    B, T, D = hidden.shape
    rows, ids = hidden.reshape(B * T, D), tokens.reshape(B * T)
    chunk = min(chunk, B * T)
    short = -(B * T) % chunk
    rows = jnp.pad(rows, ((0, short), (0, 0))).reshape(-1, chunk, D)
    ids = jnp.pad(ids, (0, short)).reshape(-1, chunk)
    found: Any = _logps(rows, head, ids, temperature, axis)
    logp, entropy = (x.reshape(-1)[: B * T].reshape(B, T) for x in found)
    return logp, entropy


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _logps(
    rows: Float[Array, "n C D"],
    head: Float[Array, "D V"],
    ids: Int[Array, "n C"],
    temp: float,
    axis: str | None,
) -> tuple[Float[Array, "n C"], Float[Array, "n C"]]:
    return _kept(rows, head, ids, temp, axis)[:2]


def _kept(
    rows: Float[Array, "n C D"],
    head: Float[Array, "D V"],
    ids: Int[Array, "n C"],
    temp: float,
    axis: str | None,
) -> tuple[Float[Array, "n C"], Float[Array, "n C"], Float[Array, "n C"]]:
    """Log-probability, entropy and logsumexp of every row."""

    def one(x: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        hidden, tokens = x
        z = _logits(hidden, head, temp)
        # Relative to the largest logit, so that nothing cancels where all of them are large.
        top = _all(jax.lax.pmax, jnp.max(z, axis=-1), axis)
        z = z - top[:, None]
        exp_z = jnp.exp(z)
        total = _all(jax.lax.psum, jnp.sum(exp_z, axis=-1), axis)
        log_total = jnp.log(total)
        picked = _picked(z, tokens, axis)
        mean = _all(jax.lax.psum, jnp.sum(exp_z * z, axis=-1), axis) / total
        entropy = log_total - mean
        return picked - log_total, entropy, top + log_total

    if len(rows) == 1:  # a loop of one is not free
        logp, entropy, lse = one((rows[0], ids[0]))
        return logp[None], entropy[None], lse[None]
    return jax.lax.map(one, (rows, ids))


def _forward(rows: Any, head: Any, ids: Any, temp: float, axis: str | None):
    rows, head, ids = rows.value, head.value, ids.value
    logp, entropy, lse = _kept(rows, head, ids, temp, axis)
    return (logp, entropy), (rows, head, ids, lse, entropy)


def _backward(temp: float, axis: str | None, kept: tuple[Array, ...], gradients: tuple[Any, Any]):
    rows, head, ids, lse, entropy = kept
    # Of an output that all devices of `axis` have, each is given its share of the gradient; of
    # `rows` each gives back what comes through its own part of the vocabulary.
    g, h = (None if isinstance(x, SymbolicZero) else _all(jax.lax.psum, x, axis) for x in gradients)
    ids = ids - _first(head, axis)
    wide = float_dtype(rows)

    def one(so_far: Array | None, x: tuple[Any, ...]) -> tuple[Array, Array]:
        hidden, tokens, lse, entropy, g, h = x
        logp = _logits(hidden, head, temp) - lse[:, None]
        is_token = jnp.arange(logp.shape[1], dtype=tokens.dtype)[None] == tokens[:, None]
        g = jnp.zeros_like(lse) if g is None else g
        pull = g[:, None] if h is None else g[:, None] + h[:, None] * (logp + entropy[:, None])
        d = jnp.where(is_token, g[:, None], 0) - jnp.exp(logp) * pull
        d = (d / temp).astype(hidden.dtype)
        rows = jnp.einsum("cv,dv->cd", d, head, preferred_element_type=wide)
        total = jnp.einsum("cd,cv->dv", hidden, d, preferred_element_type=wide)
        return total if so_far is None else so_far + total, rows.astype(hidden.dtype)

    each = (rows, ids, lse, entropy, g, h)
    if len(rows) == 1:
        total, d_rows = one(None, jax.tree.map(lambda x: x[0], each))
        return d_rows[None], total.astype(head.dtype), None
    total, d_rows = jax.lax.scan(one, jnp.zeros(head.shape, wide), each)
    return d_rows, total.astype(head.dtype), None


_logps.defvjp(_forward, _backward, symbolic_zeros=True)


def _all(combine: Any, x: Array, axis: str | None) -> Array:
    """`combine` over the devices that split the vocabulary, if any do."""
    return x if axis is None else combine(x, axis)


def _first(head: Float[Array, "D V"], axis: str | None) -> Int[Array, ""] | int:
    """The first token of this device's part of the vocabulary."""
    return 0 if axis is None else jax.lax.axis_index(axis) * head.shape[1]


def _picked(
    z: Float[Array, "C V"], tokens: Int[Array, " C"], axis: str | None
) -> Float[Array, " C"]:
    """z at each row's token, wherever it lies."""
    if axis is None:
        return jnp.take_along_axis(z, tokens[:, None], axis=-1)[:, 0]
    tokens = tokens - jax.lax.axis_index(axis) * z.shape[1]
    here = (tokens >= 0) & (tokens < z.shape[1])
    found = jnp.take_along_axis(z, jnp.where(here, tokens, 0)[:, None], axis=-1)[:, 0]
    return jax.lax.psum(jnp.where(here, found, 0), axis)


def _logits(
    hidden: Float[Array, "C D"], head: Float[Array, "D V"], temp: float
) -> Float[Array, "C V"]:
    wide = float_dtype(hidden)
    return jnp.einsum("cd,dv->cv", hidden, head, preferred_element_type=wide) / temp

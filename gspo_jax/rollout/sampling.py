"""How one token is drawn, and with which key.

Keys are stateless: row (prompt p, sample g) draws token t with fold_in(fold_in(fold_in(key, p),
g), t). So the samples do not depend on batch layout, device count, chunk length or when other
rows stop.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class Sampling(NamedTuple):
    """How a token is drawn. Temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@jax.jit
def row_keys(
    key: Key[Array, ""], prompt: Int[Array, " B"], sample: Int[Array, " B"]
) -> Key[Array, " B"]:
    """The key of each row, from its prompt's number and its own among the prompt's samples."""
    fold = jax.vmap(jax.random.fold_in, (0, 0))
    return fold(jax.vmap(jax.random.fold_in, (None, 0))(key, prompt), sample)


def at_position(row_keys: Key[Array, " B"], position: Int[Array, ""]) -> Key[Array, " B"]:
    """The key with which each row draws its token at this position."""
    return jax.vmap(jax.random.fold_in, (0, None))(row_keys, position)


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draw one token per row by the Gumbel-max rule, with its log-probability.

    argmax(z / temperature + gumbel) is a draw from softmax(z / temperature). With gumbel =
    -log(-log u) it is argmax(p / -log u): one logarithm less, and p is wanted for the
    log-probability anyway. That one is of the full vocabulary at this temperature, as the
    training program computes it.
    """
    z = logits / sampling.temperature if sampling.temperature > 0 else logits
    top = jnp.max(z, axis=-1, keepdims=True)
    p = jnp.exp(z - top)  # up to a factor
    choice = z
    if sampling.temperature > 0:
        kept = keep_likely(z, sampling.top_p, sampling.top_k)
        tiny = jnp.finfo(z.dtype).tiny
        draw = partial(jax.random.uniform, shape=z.shape[1:], dtype=z.dtype, minval=tiny)
        choice = jnp.where(kept > -jnp.inf, p, 0) / -jnp.log(jax.vmap(draw)(keys))
    token = jnp.argmax(choice, axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(z, token[:, None], axis=-1)
    return token, (chosen - top)[:, 0] - jnp.log(jnp.sum(p, axis=-1))


def keep_likely(z: Float[Array, "B V"], top_p: float, top_k: int) -> Float[Array, "B V"]:
    """Logits with -inf outside the top_k most likely tokens and the top_p nucleus of those.

    The nucleus is { p >= τ } for the largest τ whose mass reaches top_p. 40 bisections find τ to
    1e-12 of the largest probability: a few passes over the row, and no sort of the vocabulary.
    """
    if top_k:
        kth = jax.lax.top_k(z, top_k)[0][:, -1:]
        z = jnp.where(z >= kth, z, -jnp.inf)
    if top_p < 1:
        p = jax.nn.softmax(z, axis=-1)

        def halve(_, bounds):
            low, high = bounds  # mass(p >= low) >= top_p > mass(p >= high)
            mid = (low + high) / 2
            enough = jnp.sum(p, axis=-1, keepdims=True, where=p >= mid) >= top_p
            return jnp.where(enough, mid, low), jnp.where(enough, high, mid)

        top = jnp.max(p, axis=-1, keepdims=True)
        low, _ = jax.lax.fori_loop(0, 40, halve, (jnp.zeros_like(top), top * 1.0001))
        z = jnp.where(p >= low, z, -jnp.inf)
    return z

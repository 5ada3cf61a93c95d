"""Log-probabilities of given tokens, and entropies, without a [B, T, V] array.

    z = hidden @ head / temperature,   logp = z[token] - logsumexp(z),   entropy = -Σ p log p

A few thousand rows of `hidden` meet the whole vocabulary at a time; their logits are dropped
after use and recomputed in the backward pass. (Chunks of the vocabulary instead of the tokens
make narrow matmuls, about half as fast on a GPU.)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gspo_jax.masked import float_dtype


def token_logps(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    tokens: Int[Array, "B T"],
    *,
    temperature: float = 1.0,
    chunk: int = 4096,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """log π(tokens) and the entropy of π at each position, for π = softmax(hidden @ head / temp).

    Extra memory is chunk * V float32 in either direction, instead of B * T * V.

    Args:
        hidden: final hidden states, already shifted, so `hidden[:, t]` predicts `tokens[:, t]`.
        head: unembedding matrix (the embedding transposed, when tied); any float dtype.
        tokens: the token whose log-probability is wanted at each position.
        temperature: the sampling temperature; must equal the one used in the rollout.
        chunk: positions (of all B * T) at a time.

    Returns:
        Natural-log probabilities and entropies in nats: float32, or float64 if given float64.
    """
    B, T, D = hidden.shape
    rows, ids = hidden.reshape(B * T, D), tokens.reshape(B * T)
    if chunk >= B * T:
        logp, entropy = _chunk_logps(rows, ids, head, temperature)
        return logp.reshape(B, T), entropy.reshape(B, T)

    short = -(B * T) % chunk
    rows = jnp.pad(rows, ((0, short), (0, 0))).reshape(-1, chunk, D)
    ids = jnp.pad(ids, (0, short)).reshape(-1, chunk)
    step = jax.checkpoint(lambda x: _chunk_logps(x[0], x[1], head, temperature))
    logp, entropy = jax.lax.map(step, (rows, ids))
    return logp.reshape(-1)[: B * T].reshape(B, T), entropy.reshape(-1)[: B * T].reshape(B, T)


def _chunk_logps(
    hidden: Float[Array, "C D"], tokens: Int[Array, " C"], head: Float[Array, "D V"], temp: float
) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
    wide = float_dtype(hidden)
    z = jnp.einsum("cd,dv->cv", hidden, head, preferred_element_type=wide) / temp
    z = z - jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))
    exp_z = jnp.exp(z)
    total = jnp.sum(exp_z, axis=-1)
    log_total = jnp.log(total)
    picked = jnp.take_along_axis(z, tokens[:, None], axis=-1)[:, 0]
    entropy = log_total - jnp.sum(exp_z * z, axis=-1) / total
    return picked - log_total, entropy

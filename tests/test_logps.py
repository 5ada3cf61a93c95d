"""token_logps equals a dense log-softmax, in value and gradient, and never builds it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo_jax.logps import token_logps

B, T, D, V = 3, 7, 16, 50


@pytest.fixture(scope="module")
def case():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (B, T, D))
    head = jax.random.normal(keys[1], (D, V))
    tokens = jax.random.randint(keys[2], (B, T), 0, V)
    return hidden, head, tokens, jax.random.normal(keys[3], (2, B, T))


def dense(hidden, head, tokens, temperature):
    logp = jax.nn.log_softmax(hidden @ head / temperature)
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    return jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0], entropy


@pytest.mark.parametrize("chunk", [1, 4, 21, 4096])  # 21 tokens: uneven, even, whole, oversized
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_value_and_gradient_equal_a_dense_log_softmax(case, chunk, temperature):
    hidden, head, tokens, weights = case

    def weighted(f, hidden, head):  # asymmetric weights on both outputs
        logp, entropy = f(hidden, head)
        return jnp.sum(weights[0] * logp + weights[1] * entropy)

    def ours(hidden, head):
        return token_logps(hidden, head, tokens, temperature=temperature, chunk=chunk)

    def reference(hidden, head):
        return dense(hidden, head, tokens, temperature)

    for got, want in zip(ours(hidden, head), reference(hidden, head), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    got = jax.grad(lambda *a: weighted(ours, *a), argnums=(0, 1))(hidden, head)
    want = jax.grad(lambda *a: weighted(reference, *a), argnums=(0, 1))(hidden, head)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * float(jnp.abs(w).max()))


def test_no_buffer_of_all_logits_exists_in_either_direction():
    """XLA's own account: 4096 tokens x 4096 entries would be 64 MiB; chunks of 128 take 2 MiB."""
    tokens, vocab, chunk = 4096, 4096, 128
    shapes = [
        jax.ShapeDtypeStruct((1, tokens, 8), jnp.float32),
        jax.ShapeDtypeStruct((8, vocab), jnp.float32),
        jax.ShapeDtypeStruct((1, tokens), jnp.int32),
    ]

    def total(hidden, head, ids, chunk):
        return sum(x.sum() for x in token_logps(hidden, head, ids, chunk=chunk))

    def peak(chunk):
        both = jax.jit(jax.value_and_grad(lambda *a: total(*a, chunk), argnums=(0, 1)))
        return both.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    one_dense_array = tokens * vocab * 4
    assert peak(chunk) < one_dense_array / 4
    assert peak(tokens) > one_dense_array  # the measure does see it when it is there


def test_a_large_offset_of_the_logits_does_not_overflow():
    hidden = jnp.ones((1, 2, 1))
    head = jnp.array([[1e4, 1e4 - 1.0, -1e4]])
    logp, entropy = token_logps(hidden, head, jnp.array([[0, 1]]))
    # softmax over {0, -1} (the third is 20,000 below): log(1/(1+e^-1)), and 1 less.
    np.testing.assert_allclose(logp, [[-0.3132617, -1.3132617]], rtol=1e-5)
    # -Σ p log p with p = 0.7310586, 0.2689414
    np.testing.assert_allclose(entropy, 0.5822031 * jnp.ones((1, 2)), rtol=1e-5)


def test_bfloat16_inputs_give_float32_log_probabilities(case):
    hidden, head, tokens, _ = case
    logp, entropy = token_logps(hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16), tokens)
    assert logp.dtype == entropy.dtype == jnp.float32

"""token_logps equals a dense log-softmax, in value and gradient, and never builds it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo_jax.algo.logps import token_logps

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


@pytest.mark.parametrize("chunk", [4, 4096])
def test_gradients_are_finite_differences_in_float64(chunk):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        hidden, head = (jnp.asarray(rng.normal(size=shape)) for shape in ((2, 3, 4), (4, 9)))
        tokens = jnp.asarray(rng.integers(0, 9, (2, 3)))
        weights = jnp.asarray(rng.normal(size=(2, 2, 3)))

        @jax.jit
        def weighted(hidden, head):
            outputs = token_logps(hidden, head, tokens, temperature=0.7, chunk=chunk)
            return sum(jnp.sum(w * x) for w, x in zip(weights, outputs, strict=True))

        got = jax.grad(weighted, argnums=(0, 1))(hidden, head)
        assert got[0].dtype == got[1].dtype == jnp.float64
        for number, gradient in enumerate(got):
            for place in np.ndindex(gradient.shape):
                step = np.zeros(gradient.shape)
                step[place] = 1e-6
                up, down = ([hidden, head] for _ in range(2))
                up[number], down[number] = up[number] + step, down[number] - step
                slope = (weighted(*up) - weighted(*down)) / 2e-6
                np.testing.assert_allclose(gradient[place], slope, rtol=1e-6, atol=1e-8)


def test_an_entropy_that_is_only_looked_at_costs_nothing_in_the_backward_pass(case):
    """XLA's count of operations: as many as where its gradient is stopped, fewer than with it."""
    hidden, head, tokens, weights = case

    def operations(of_entropy):
        def loss(hidden, head):
            logp, entropy = token_logps(hidden, head, tokens, chunk=7)
            return jnp.sum(weights[0] * logp) + of_entropy(jnp.sum(entropy)), entropy

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        return gradient.lower(hidden, head).compile().cost_analysis()["flops"]

    unused = operations(lambda x: 0.0)
    assert operations(jax.lax.stop_gradient) <= unused + 25  # their sum
    assert operations(lambda x: 0.1 * x) > unused + V * 7


@pytest.mark.parametrize("chunk", [4, 4096])
def test_every_matmul_of_half_precision_takes_half_precision_and_adds_up_in_float32(case, chunk):
    """Automatic differentiation would multiply float32 backwards, far slower on a GPU."""
    hidden, head, tokens, _ = case
    half = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)

    def total(hidden, head):
        return sum(jnp.sum(x) for x in token_logps(hidden, head, tokens, chunk=chunk))

    text = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*half).as_text()
    matmuls = re.findall(
        r"dot_general.*: \(tensor<.*x(\w+)>, tensor<.*x(\w+)>\) -> .*x(\w+)>", text
    )
    assert matmuls == [("bf16", "bf16", "f32")] * 4


def test_the_heads_gradient_is_summed_over_chunks_in_float32():
    """513 chunks give 1/2 each: in bfloat16 their sum would stop growing at 128."""
    n = 513
    hidden, head = jnp.ones((1, n, 1), jnp.bfloat16), jnp.zeros((1, 2), jnp.bfloat16)
    tokens = jnp.zeros((1, n), jnp.int32)
    gradient = jax.grad(lambda head: jnp.sum(token_logps(hidden, head, tokens, chunk=1)[0]))(head)
    np.testing.assert_allclose(gradient.astype(jnp.float32), [[n / 2, -n / 2]], rtol=2**-8)

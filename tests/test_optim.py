"""compress_state follows the float32 optimizer; the chain and the schedule are optax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gspo_jax.optim import compress_state, make_optimizer, make_schedule
from gspo_jax.quant import Quantised


@pytest.fixture(autouse=True)
def _optax_relies_on_implicit_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def regression(seed=0, features=64, outputs=128, rows=256):
    """A noisy linear problem with features of very different scale: loss(params), params."""
    k = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(k[0], (rows, features)) * jnp.logspace(-1, 0.5, features)[None]
    y = x @ jax.random.normal(k[1], (features, outputs)) * 0.1
    y = y + 0.1 * jax.random.normal(k[2], y.shape)
    params = {"w": jnp.zeros((features, outputs)), "b": jnp.zeros((outputs,))}
    return lambda p: jnp.mean((x @ p["w"] + p["b"][None] - y) ** 2), params


def descend(tx, loss, params, steps):
    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, values = tx.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state)
        values.append(float(value))
    return params, state, values


def test_training_in_8_bits_reaches_the_loss_of_float32_state_over_300_steps():
    loss, params = regression()
    _, _, exact = descend(optax.adamw(1e-2), loss, params, 300)
    _, _, coded = descend(compress_state(optax.adamw(1e-2)), loss, params, 300)
    assert exact[-1] < exact[0] / 10  # it is a problem that trains
    np.testing.assert_allclose(coded[-1], exact[-1], rtol=0.03)
    np.testing.assert_allclose(coded[30:], exact[30:], rtol=0.1)


def test_moments_take_two_bytes_per_parameter_and_small_leaves_stay_float32():
    params = {"w": jnp.zeros((512, 512)), "b": jnp.zeros((512,))}
    state = compress_state(optax.scale_by_adam()).init(params).inner
    assert isinstance(state.mu["w"], Quantised) and state.mu["w"].signed
    assert isinstance(state.nu["w"], Quantised) and not state.nu["w"].signed
    assert state.mu["b"].dtype == jnp.float32
    stored = sum(x.nbytes for x in jax.tree.leaves((state.mu["w"], state.nu["w"])))
    # one byte of code each, and one float32 scale per 256 codes: 2 * (1 + 4 / 256) = 2.03
    assert stored / params["w"].size == pytest.approx(2.03125)


def test_with_min_size_out_of_reach_it_is_the_inner_transformation_exactly():
    loss, params = regression(1)
    a, _, _ = descend(optax.adam(1e-2), loss, params, 3)
    b, _, _ = descend(compress_state(optax.adam(1e-2), min_size=10**9), loss, params, 3)
    np.testing.assert_array_equal(a["w"], b["w"])


def test_it_wraps_any_transformation_and_survives_multisteps():
    loss, params = regression(2)
    tx = optax.MultiSteps(compress_state(optax.lion(1e-3)), every_k_schedule=2)
    _, state, values = descend(tx, loss, params, 40)
    assert values[-1] < values[0]
    assert isinstance(state.inner_opt_state.inner[0].mu["w"], Quantised)


def test_the_chain_in_float32_is_optax_adamw_with_clipping():
    loss, params = regression(3)
    ours = make_optimizer(
        optax.constant_schedule(1e-2), b2=0.95, weight_decay=0.1, max_grad_norm=0.5, state="float32"
    )
    matrices = {"w": True, "b": False}
    reference = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(1e-2, b2=0.95, weight_decay=0.1, mask=matrices)
    )
    a, _, _ = descend(ours, loss, params, 5)
    b, _, _ = descend(reference, loss, params, 5)
    np.testing.assert_allclose(a["w"], b["w"], rtol=1e-6)
    np.testing.assert_allclose(a["b"], b["b"], rtol=1e-6)


def test_a_learning_rate_of_1e_6_changes_float32_parameters_of_ordinary_size():
    """bfloat16 would round every such step away: its spacing at 0.02 is 1.2e-4."""
    params = {"w": jnp.full((64, 64), 0.02)}
    tx = make_optimizer(optax.constant_schedule(1e-6))
    updates, _ = tx.update({"w": jnp.ones((64, 64))}, tx.init(params), params)
    moved = optax.apply_updates(params, updates)["w"]
    # Adam's first step is lr * g / |g| = 1e-6 everywhere (0.02's float32 spacing is 1.9e-9).
    np.testing.assert_allclose(params["w"] - moved, 1e-6 * jnp.ones((64, 64)), rtol=5e-3)
    rounded = params["w"].astype(jnp.bfloat16) + updates["w"].astype(jnp.bfloat16)
    assert jnp.all(rounded == params["w"].astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("kind", "warmup", "at", "want"),
    [
        ("constant", 0, [0, 7, 99], [1.0, 1.0, 1.0]),
        ("constant", 4, [0, 1, 3, 4, 9], [0.25, 0.5, 1.0, 1.0, 1.0]),
        ("linear", 0, [0, 5, 10], [1.0, 0.5, 0.0]),
        ("linear", 2, [0, 1, 2, 6, 10], [0.5, 1.0, 1.0, 0.5, 0.0]),
        ("cosine", 0, [0, 5, 10], [1.0, 0.5, 0.0]),
    ],
)
def test_schedule_by_hand_over_10_updates(kind, warmup, at, want):
    schedule = make_schedule(1.0, kind=kind, warmup=warmup, updates=10)
    np.testing.assert_allclose([float(schedule(n)) for n in at], want, atol=1e-6)

"""compress_state follows the float32 optimizer; the chain and the schedule are optax's own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gspo_jax.update.optim import (
    CompressedState,
    compress_state,
    leaf_by_leaf,
    let_pass,
    make_optimizer,
    make_schedule,
)
from gspo_jax.update.quant import Quantised, dequantise, quantise


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


@pytest.mark.long
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


def test_what_is_no_matrix_of_whole_blocks_stays_in_float32_however_large():
    """257 is a prime beyond the largest block: its blocks would be one element and its scale."""
    shapes = {"embed": (512, 64), "norm": (8192,), "odd": (64, 257)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    tx = make_optimizer(optax.constant_schedule(1e-3))
    (_, (packed, *_)) = jax.eval_shape(tx.init, params)
    for moment in (packed.inner.mu, packed.inner.nu):
        kept = {name: isinstance(x, Quantised) for name, x in moment.items()}
        assert kept == {"embed": True, "norm": False, "odd": False}


def test_chance_is_not_the_same_for_every_parameter_nor_every_update():
    """Equal gradients, so equal moments; what is drawn for each decides what they become."""
    tx = compress_state(optax.scale_by_adam(b2=0.5), stochastic=True)
    grads = {name: jax.random.normal(jax.random.key(0), (64, 128)) for name in ("a", "b")}
    _, state = tx.update(grads, tx.init(grads), grads)
    codes = [np.int32(state.inner.nu[name].codes) for name in grads]
    again = state.inner._replace(nu=jax.tree.map(jnp.zeros_like, state.inner.nu))
    _, later = tx.update(grads, CompressedState(again), grads)
    codes.append(np.int32(later.inner.nu["a"].codes))
    for other in codes[1:]:
        apart = np.abs(codes[0] - other)
        # Two draws between two codes differ with chance 2 s (1 - s): a third for a uniform s.
        assert apart.max() == 1 and 0.25 < apart.mean() < 0.42


def test_a_parameter_named_like_a_second_moment_keeps_the_signs_of_its_first():
    """Attention's value projection is called v, as is the second moment of some optimizers."""
    params = {"layer": {"v": jnp.zeros((64, 128)), "nu": jnp.zeros((64, 128))}}
    grads = jax.tree.map(lambda x: x - 1.0, params)
    tx = compress_state(optax.scale_by_adam())
    _, state = tx.update(grads, tx.init(params), params)
    for name in ("v", "nu"):
        assert state.inner.mu["layer"][name].signed and not state.inner.nu["layer"][name].signed
        np.testing.assert_allclose(dequantise(state.inner.mu["layer"][name]), -0.1, rtol=1e-5)


def test_with_min_size_out_of_reach_it_is_the_inner_transformation_exactly():
    loss, params = regression(1)
    a, _, _ = descend(optax.adam(1e-2), loss, params, 3)
    b, _, _ = descend(compress_state(optax.adam(1e-2), min_size=10**9), loss, params, 3)
    np.testing.assert_array_equal(a["w"], b["w"])


@pytest.mark.parametrize(
    ("inner", "rate"),
    [(optax.lion, 1e-3), (lambda rate: optax.sgd(rate, momentum=0.9), 0.02), (optax.rmsprop, 1e-3)],
    ids=["lion", "momentum", "rmsprop"],
)
def test_it_wraps_any_transformation(inner, rate):
    loss, params = regression(2)
    _, _, exact = descend(inner(rate), loss, params, 60)
    _, state, coded = descend(compress_state(inner(rate)), loss, params, 60)
    assert exact[-1] < exact[0] / 2
    np.testing.assert_allclose(coded[-1], exact[-1], rtol=0.1)  # midway down
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Quantised))
    # One moment each: of rmsprop the second, so unsigned.
    assert [q.signed for q in nodes if isinstance(q, Quantised)] == [inner is not optax.rmsprop]


@pytest.mark.parametrize("stochastic", [False, True])
def test_under_multisteps_two_half_steps_are_one_step_on_their_mean(stochastic):
    """MultiSteps keeps the state where it accumulates: the codes may not move meanwhile."""
    params = {"w": jnp.zeros((64, 128))}
    tx = compress_state(optax.adam(1e-3), stochastic=stochastic)
    many = optax.MultiSteps(tx, every_k_schedule=2)
    state, single = many.init(params), tx.init(params)
    for n in range(3):
        key = jax.random.split(jax.random.key(n))
        a, b = ({"w": jax.random.normal(k, (64, 128))} for k in key)
        before = state.inner_opt_state
        _, state = many.update(a, state, params)
        jax.tree.map(np.testing.assert_array_equal, before, state.inner_opt_state)
        got, state = many.update(b, state, params)
        want, single = tx.update(jax.tree.map(lambda a, b: (a + b) / 2, a, b), single, params)
        np.testing.assert_allclose(got["w"], want["w"], rtol=1e-5, atol=1e-8)
    for name in ("mu", "nu"):
        got, want = (getattr(x.inner[0], name)["w"] for x in (state.inner_opt_state, single))
        moved = got.codes != want.codes  # compiled or not, a tie may fall to either side
        assert moved.mean() < 1e-3


def wandering(stochastic):
    """Second moments after 1000 updates with b2 = 0.999 whose gradients have gone from 1 to 2."""
    tx = compress_state(optax.scale_by_adam(b2=0.999), stochastic=stochastic)
    params = jnp.zeros((16, 256))
    calm = jnp.ones((16, 256)).at[:, 0].set(10.0)  # the block's maximum: 10 throughout
    state = tx.init(params).inner
    full = state._replace(mu=jnp.zeros_like(params), nu=calm**2, count=jnp.int32(10**6))
    moved = (2 * calm).at[:, 0].set(10.0)

    @jax.jit
    def run(state):
        return jax.lax.fori_loop(0, 1000, lambda _, s: tx.update(moved, s, params)[1], state)

    coded = full._replace(mu=quantise(full.mu, signed=True), nu=quantise(full.nu, signed=False))
    return np.asarray(dequantise(run(CompressedState(coded)).inner.nu))[:, 1:]


def test_a_slow_second_moment_stalls_in_8_bits_and_moves_if_rounded_by_chance():
    # In float32: 4 - 3 * 0.999 ** 1000 = 2.897. One update adds 0.3 %, half a step is 3.3 %.
    np.testing.assert_allclose(wandering(False), 1.0, rtol=0.034)
    nu = wandering(True)
    assert nu.mean() == pytest.approx(2.897, rel=0.02)
    assert nu.std() < 0.25 * nu.mean()  # the price: noise of a few codes


def test_rounding_by_chance_trains_as_well_as_float32_state():
    loss, params = regression(4)
    _, _, exact = descend(optax.adamw(1e-2, b2=0.999), loss, params, 300)
    tx = compress_state(optax.adamw(1e-2, b2=0.999), stochastic=True)
    _, _, coded = descend(tx, loss, params, 300)
    np.testing.assert_allclose(coded[-1], exact[-1], rtol=0.03)


def test_rounding_by_chance_is_refused_without_a_count():
    with pytest.raises(ValueError, match="stochastic=True draws by the inner state's `count`"):
        compress_state(optax.trace(0.9), stochastic=True).init({"w": jnp.zeros((64, 128))})


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        *(pytest.param(x, marks=pytest.mark.long) for x in (P("x", None), P(None, "x"))),
        P("x", "y"),
    ],
)
def test_sharded_and_donated_it_computes_the_same_codes(spec, stochastic):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    place = partial(jax.device_put, device=NamedSharding(mesh, spec))
    tx = compress_state(optax.adam(1e-3), block=64, stochastic=stochastic)

    @partial(jax.jit, donate_argnums=(1, 2))
    def step(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def run(put):
        params = put(jnp.ones((16, 512)))
        state = jax.tree.map(lambda x: put(x) if x.ndim == 2 else x, tx.init(params))
        for n in range(2):
            donated = state
            grads = put(jax.random.normal(jax.random.key(n), (16, 512)))
            params, state = step(grads, params, state)
            assert donated.inner[0].nu.codes.is_deleted()
        return params, state.inner[0]

    params, adam = run(place)
    whole_params, whole = run(lambda x: x)
    np.testing.assert_array_equal(params, whole_params)
    for sharded, single in ((adam.mu, whole.mu), (adam.nu, whole.nu)):
        np.testing.assert_array_equal(sharded.codes, single.codes)
        np.testing.assert_array_equal(sharded.scale, single.scale)
        assert sharded.codes.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)


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


def test_a_step_parameter_by_parameter_is_that_of_optax_adamw_or_none_at_all():
    """Short and long gradients, one left out, whose place in the schedule goes by all the same."""
    params = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([1.0, -1.0])}
    schedule, fixed = optax.linear_schedule(1e-2, 0, 9), {"b2": 0.95, "weight_decay": 0.1}
    ours = make_optimizer(schedule, max_grad_norm=0.5, state="float32", **fixed)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(schedule, mask={"w": True, "b": False}, **fixed),
    )
    step = jax.jit(lambda params, state, grads, go: ours.step(grads, state, params, go))
    mine, want, state = (params, ours.init(params)), params, theirs.init(params)
    for size in (0.01, 1.0, np.nan, 2.0):
        grads = {
            "w": size * jnp.array([[1.0, 2.0], [3.0, -1.0]]),
            "b": size * jnp.array([0.5, 4.0]),
        }
        at_once = optax.apply_updates(mine[0], ours.update(grads, mine[1], mine[0])[0])
        mine = step(*mine, grads, bool(np.isfinite(size)))
        if np.isfinite(size):
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), mine[0], at_once)
            change, state = theirs.update(grads, state, want)
            want = optax.apply_updates(want, change)
        else:
            state = let_pass(state)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), mine[0], want)


def same(x, y):
    if x.dtype == jnp.uint8:
        assert (np.abs(np.int32(x) - np.int32(y)) <= 1).all() and (x == y).mean() > 0.999
    else:
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("state", ["8bit", "float32"])
@pytest.mark.parametrize("max_grad_norm", [0.5, 1e9])  # the gradients' norm is about 30
def test_leaf_by_leaf_is_the_whole_tree_at_once_but_for_rounding(state, max_grad_norm):
    shapes = {"a": (64, 128), "b": (128,), "c": {"d": (3, 32, 64), "e": (96, 50)}}
    draw = partial(jax.tree.map, is_leaf=lambda x: isinstance(x, tuple))
    keys = iter(jax.random.split(jax.random.key(0), 40))
    params = draw(lambda s: jax.random.normal(next(keys), s), shapes)
    tx = make_optimizer(
        optax.linear_schedule(1e-2, 0, 9),
        weight_decay=0.1,
        max_grad_norm=max_grad_norm,
        state=state,
    )

    @jax.jit
    def whole(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    one_by_one = jax.jit(lambda params, state, grads, go: tx.step(grads, state, params, go))
    a = b = (params, tx.init(params))
    for n in range(4):
        grads = draw(lambda s, n=n: 0.2 * (n + 1) * jax.random.normal(next(keys), s), shapes)
        a, b = whole(*a, grads), one_by_one(*b, grads, True)
        assert jax.tree.structure(a) == jax.tree.structure(b)
        # Two programs round the last bit differently, which may choose the neighbouring code.
        jax.tree.map(same, a, b)
    poisoned = jax.tree.map(lambda x: x * jnp.nan, grads)
    params, state = b
    jax.tree.map(
        np.testing.assert_array_equal, (params, let_pass(state)), one_by_one(*b, poisoned, False)
    )


@pytest.mark.long
def test_leaf_by_leaf_takes_any_transformation_of_single_parameters():
    loss, params = regression(4)
    for inner in (optax.sgd(1e-2, momentum=0.9), optax.lion(1e-3), optax.adafactor(1e-2)):
        tx = leaf_by_leaf(inner, max_grad_norm=1e9)
        whole, _, _ = descend(tx, loss, params, 3)
        one_by_one, state = params, tx.init(params)
        for _ in range(3):
            one_by_one, state = tx.step(
                jax.grad(loss)(one_by_one), state, one_by_one, jnp.bool_(True)
            )
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), whole, one_by_one)


def test_one_parameter_at_a_time_is_unpacked():
    """Both moments, both new ones and the change: 5 float32 arrays, of one of 16 parameters.

    Beside them XLA keeps the new codes of all, half a float32 array. A whole tree takes 5 of all.
    """
    params = {f"w{i}": jax.ShapeDtypeStruct((256, 512), jnp.float32) for i in range(16)}
    size = 16 * 4 * 256 * 512
    tx = make_optimizer(optax.constant_schedule(1e-6))
    state, go = jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((), bool)
    step = jax.jit(lambda p, s, g, go: tx.step(g, s, p, go), donate_argnums=(0, 1))
    found = step.lower(params, state, params, go).compile().memory_analysis()
    assert found.temp_size_in_bytes < size * (5 / 16 + 0.51)


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

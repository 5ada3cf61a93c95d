"""A mixture of experts: only the chosen experts work, and replay changes nothing but the choice."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models.test_models_config import QWEN3_MOE

from gspo_jax.models import Qwen, QwenConfig
from gspo_jax.models.moe import (
    Experts,
    Routing,
    balance,
    mixture,
    router_metrics,
    tile_rows,
    tiles,
)

D, F, E, X = 12, 7, 6, 2  # widths that differ, so that no transpose goes unnoticed
CONFIG = QwenConfig.from_hf(
    {
        "model_type": "qwen3_moe",
        "vocab_size": 40,
        "hidden_size": D,
        "intermediate_size": 9,
        "moe_intermediate_size": F,
        "num_experts": E,
        "num_experts_per_tok": X,
        "norm_topk_prob": True,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 6,
    }
)


def dense_mixture(h, ids, gates, gate, up, down):
    """The definition, in one line each: every expert on every token. `mixture` must equal it."""
    weight = jnp.sum(jax.nn.one_hot(ids, gate.shape[0], dtype=h.dtype) * gates[..., None], axis=1)
    inner = jax.nn.silu(jnp.einsum("nd,edf->enf", h, gate)) * jnp.einsum("nd,edf->enf", h, up)
    return jnp.einsum("enf,efd,ne->nd", inner, down, weight)


def weights(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((E, D, F), (E, D, F), (E, F, D))
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def routed(case, tokens):
    """Ids and gates of `tokens` tokens; distinct experts per token, as top_k gives them."""
    rng = np.random.default_rng(3)
    ids = np.stack([rng.permutation(E)[:X] for _ in range(tokens)])
    if case == "all tokens to the same experts":
        ids[:] = [4, 1]
    if case == "one expert has a single token":
        ids[:] = [0, 5]
        ids[-1] = [3, 0]
    return jnp.asarray(ids, jnp.int32), jnp.asarray(rng.random((tokens, X)), jnp.float32)


@pytest.mark.parametrize("tokens", [1, 5, 130])
@pytest.mark.parametrize(
    "case", ["spread", "all tokens to the same experts", "one expert has a single token"]
)
def test_the_tiled_experts_equal_the_definition_and_so_do_their_gradients(case, tokens):
    ids, gates = routed(case, tokens)
    h = jax.random.normal(jax.random.key(1), (tokens, D))

    @partial(jax.jit, static_argnums=0)
    def run(function, h, gates, weights):
        def loss(h, gates, weights):
            y = function(h, ids, gates, *weights)
            return jnp.sum(y * jnp.cos(jnp.arange(D, dtype=jnp.float32))[None] * y), y

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(h, gates, weights)

    (_, ours), grads = run(mixture, h, gates, weights())
    (_, plain), expected = run(dense_mixture, h, gates, weights())
    np.testing.assert_allclose(ours, plain, rtol=2e-5, atol=1e-4)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_the_work_is_that_of_the_chosen_experts_not_of_all():
    """2 of 32 experts: 1/16 of the dense work, and twice that at most for padding to tiles."""
    ids = jax.random.randint(jax.random.key(0), (512, 2), 0, 32)
    gates, h = jnp.ones((512, 2)), jnp.ones((512, 16))
    shapes = [jnp.ones((32, 16, 24)), jnp.ones((32, 16, 24)), jnp.ones((32, 24, 16))]

    def flops(function):
        cost = jax.jit(function).lower(h, ids, gates, *shapes).compile().cost_analysis()
        assert cost is not None
        return cost["flops"]

    assert flops(mixture) < flops(dense_mixture) * (2 / 16 + 0.05)


@pytest.mark.parametrize("assignments", [1, 7, 8, 64, 1000])
def test_every_assignment_has_one_tile_row_of_its_expert_and_the_rest_is_padding(assignments):
    rng = np.random.default_rng(assignments)
    ids = jnp.asarray(rng.choice([0, 3, 4], assignments), jnp.int32)[:, None]
    source, slot, expert = tiles(ids, E)
    rows = tile_rows(assignments, E)
    assert source.shape[1] == rows and len(set(slot.tolist())) == assignments
    np.testing.assert_array_equal(source.reshape(-1)[slot], np.arange(assignments))
    np.testing.assert_array_equal(expert[slot // rows], ids[:, 0])
    assert np.sum(source < assignments) == assignments


def test_tiles_are_about_the_mean_load_high():
    # 64 rows decode with 8 of 128 experts: 4 each. 16,384 tokens train: 1,024 each.
    assert (tile_rows(512, 128), tile_rows(3000, 128), tile_rows(131072, 128)) == (8, 16, 128)


@pytest.fixture(scope="module")
def layer():
    experts = Experts(CONFIG, rngs=nnx.Rngs(0))
    experts.router[...] = experts.router[...] * 50  # choices that differ from token to token
    for kernel in (experts.gate, experts.up, experts.down):
        kernel[...] = kernel[...] * 20
    return experts


@pytest.fixture(scope="module")
def hidden():
    return jax.random.normal(jax.random.key(5), (2, 4, D))


@pytest.mark.long
def test_gates_sum_to_one_where_they_are_normalised(layer, hidden):
    """An expert whose output is the same for all shows the sum of the gates."""
    p = jax.nn.softmax(hidden @ layer.router[...], axis=-1)
    top = np.sort(p, axis=-1)[..., -X:].sum(-1)
    for normalise, expected in ((True, np.ones((2, 4))), (False, top)):
        same = Experts(CONFIG, rngs=nnx.Rngs(0))
        same.router[...] = layer.router[...]
        for kernel in (same.gate, same.up, same.down):
            kernel[...] = jnp.broadcast_to(kernel[...][:1], kernel[...].shape)
        same.config = dataclasses.replace(layer.config, normalise=normalise)
        one = mixture(
            hidden.reshape(-1, D),
            jnp.zeros((8, 1), jnp.int32),
            jnp.ones((8, 1)),
            *(k[...] for k in (same.gate, same.up, same.down)),
        )
        y, _ = same(hidden)
        np.testing.assert_allclose(y.reshape(8, D), one * expected.reshape(8, 1), rtol=1e-4)


def test_replaying_the_routers_own_choice_is_the_identity_bit_for_bit(layer, hidden):
    run = nnx.jit(lambda layer, replay: layer(hidden, replay))
    y, routing = run(layer, None)
    again, same = run(layer, routing.experts[:, :, 0])
    np.testing.assert_array_equal(y, again)
    np.testing.assert_array_equal(routing.experts, same.experts)


def test_replay_uses_the_given_experts_and_reports_the_routers_own(layer, hidden):
    y, routing = layer(hidden)
    other = (routing.experts[:, :, 0] + 1) % E
    moved, seen = layer(hidden, other)
    assert np.abs(moved - y).max() > 1e-3
    np.testing.assert_array_equal(seen.experts, routing.experts)
    # By hand for one token: gates are the router's probabilities of the given experts.
    p = jax.nn.softmax(hidden[1, 2] @ layer.router[...])
    gates = p[other[1, 2]] / p[other[1, 2]].sum()
    expected = dense_mixture(
        hidden[1, 2][None],
        other[1, 2][None].astype(jnp.int32),
        gates[None],
        *(k[...] for k in (layer.gate, layer.up, layer.down)),
    )
    np.testing.assert_allclose(moved[1, 2], expected[0], rtol=1e-4, atol=1e-6)


def test_where_nothing_was_recorded_the_router_decides(layer, hidden):
    y, routing = layer(hidden)
    replay = ((routing.experts[:, :, 0] + 1) % E).at[0].set(-1)
    mixed, _ = layer(hidden, replay)
    np.testing.assert_allclose(mixed[0], y[0], rtol=1e-6, atol=1e-7)
    assert np.abs(mixed[1] - y[1]).max() > 1e-3


def test_under_replay_the_gradient_still_reaches_the_router(layer, hidden):
    graphdef, params = nnx.split(layer)
    replay = jnp.broadcast_to(jnp.array([2, 5]), (2, 4, X))

    def loss(params):
        y, _ = nnx.merge(graphdef, params)(hidden, replay)
        return jnp.sum(y * jnp.sin(jnp.arange(D, dtype=jnp.float32))[None, None])

    grad = jax.grad(loss)(params)["router"][...]
    # With two gates that sum to 1, only the logits of the replayed experts matter.
    assert np.abs(grad[:, [2, 5]]).min() > 0
    np.testing.assert_allclose(grad[:, [0, 1, 3, 4]], 0, atol=1e-5)

    # And it is the slope: one weight moved by 1e-2 either way.
    def moved(step):
        router = params["router"][...].at[3, 5].add(step)
        return loss(params | {"router": params["router"].replace(router)})

    slope = (moved(1e-2) - moved(-1e-2)) / 2e-2
    np.testing.assert_allclose(grad[3, 5], slope, rtol=1e-2)


def test_sums_run_over_counted_tokens_alone(layer, hidden):
    counted = jnp.array([[True, True, False, False], [True, False, False, False]])
    poisoned = jnp.where(counted[..., None], hidden, jnp.nan)
    _, clean = layer(hidden, None, counted)
    _, routing = layer(poisoned, None, counted)
    logits = hidden @ layer.router[...]
    p, z = jax.nn.softmax(logits), jax.nn.logsumexp(logits, axis=-1) ** 2
    np.testing.assert_allclose(routing.probability[0, 0], p[0, :2].sum(0), rtol=1e-5)
    np.testing.assert_allclose(routing.probability[1, 0], p[1, 0], rtol=1e-5)
    np.testing.assert_allclose(routing.z[:, 0], [z[0, :2].sum(), z[1, 0]], rtol=1e-5)
    np.testing.assert_array_equal(routing.probability, clean.probability)


def test_balance_of_a_hand_made_routing():
    """One layer, 3 experts, 2 per token, three counted tokens: (0,1), (0,2), (0,1).

    loads 3/3, 2/3, 1/3; mean probabilities 0.5, 0.3, 0.2; aux = 3 (0.5 + 0.2 + 0.2/3) = 2.3.
    """
    experts = jnp.array([[[[0, 1]], [[0, 2]]], [[[0, 1]], [[2, 1]]]], jnp.int16)
    counted = jnp.array([[True, True], [True, False]])
    probability = jnp.array([[[1.0, 0.6, 0.4]], [[0.5, 0.3, 0.2]]])  # sums over 2 and 1 tokens
    routing = Routing(experts, probability, jnp.array([[4.0], [5.0]]))
    aux, z, load = balance(routing, counted)
    np.testing.assert_allclose(load, [[1, 2 / 3, 1 / 3]], rtol=1e-6)
    np.testing.assert_allclose((aux, z), (2.3, 3.0), rtol=1e-6)
    metrics = router_metrics(routing, None, counted)
    np.testing.assert_allclose(metrics["router/load_max"], 1.5)  # 1 of a fair 2/3
    assert "router/changed" not in metrics


def test_equal_load_has_an_auxiliary_loss_of_experts_per_token():
    experts = jnp.arange(6, dtype=jnp.int16).reshape(1, 3, 1, 2)  # each of 6 experts once
    routing = Routing(experts, jnp.full((1, 1, 6), 3 / 6), jnp.zeros((1, 1)))
    np.testing.assert_allclose(balance(routing, jnp.ones((1, 3), bool))[0], 2.0, rtol=1e-6)


def test_the_change_of_routing_counts_sets_not_order():
    """Two layers, two per token. Token 0: same sets, other order. Token 1: one of two new in one
    layer. Token 2 is padding, token 3 was not recorded."""
    old = jnp.array([[[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0, 1], [2, 3]], [[-1, -1]] * 2]])
    new = jnp.array([[[[1, 0], [3, 2]], [[0, 4], [2, 3]], [[4, 5], [4, 5]], [[4, 5]] * 2]])
    routing = Routing(new.astype(jnp.int16), jnp.ones((1, 2, 6)), jnp.ones((1, 2)))
    counted = jnp.array([[True, True, False, True]])
    metrics = router_metrics(routing, old.astype(jnp.int16), counted)
    np.testing.assert_allclose(metrics["router/changed"], 0.5 / 4)  # of 2 tokens x 2 layers
    np.testing.assert_allclose(metrics["router/changed_tokens"], 1 / 2)


@pytest.mark.long
def test_a_model_returns_the_routing_of_its_sparse_layers_and_takes_it_back():
    model = Qwen(CONFIG, rngs=nnx.Rngs(2))
    assert [layer.sparse for layer in model.layers] == [True, False, True]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 5)), jnp.int32)
    run = nnx.jit(
        lambda model, replay, remat: model.routed(tokens, replay=replay, remat=remat),
        static_argnums=2,
    )
    hidden, routing = run(model, None, "none")
    assert routing.experts.shape == (2, 5, 2, X) and routing.experts.dtype == jnp.int16
    for remat in ("none", "dots", "full"):
        again, _ = run(model, routing.experts, remat)
        np.testing.assert_array_equal(hidden, again)
    # Other experts in the last layer alone change the output, and the first layer's stay.
    swapped = routing.experts.at[:, :, 1].set((routing.experts[:, :, 1] + 1) % E)
    moved, seen = run(model, swapped, "none")
    assert np.abs(moved - hidden).max() > 1e-6
    np.testing.assert_array_equal(seen.experts[:, :, 0], routing.experts[:, :, 0])


def test_a_dense_model_has_no_routing(tiny):
    assert tiny.routed(jnp.ones((1, 3), jnp.int32))[1] is None


def test_the_published_shape_has_the_published_number_of_parameters():
    """Qwen3-30B-A3B, by hand: per layer 2 · 2048 · (32 + 4) · 128 of attention, two head norms of
    128, two norms of 2048, a router of 2048 · 128 and 128 experts of 3 · 2048 · 768; 48 layers;
    an embedding and a head of 151936 · 2048, and a norm: 30.5 billion, as its card says."""
    layer = 2 * 2048 * (32 + 4) * 128 + 2 * 128 + 2 * 2048 + 2048 * 128 + 128 * 3 * 2048 * 768
    total = 48 * layer + 2 * 151936 * 2048 + 2048
    assert round(total / 1e9, 1) == 30.5
    config = QwenConfig.from_hf(QWEN3_MOE)
    shapes = nnx.state(nnx.eval_shape(lambda: Qwen(config, rngs=nnx.Rngs(0))))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == total

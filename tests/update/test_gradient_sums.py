"""Gradients are sums over tokens: in 16 bits they are added up in float32, in every leaf."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mesh_cases import DENSE, MOE
from update_cases import IDENTITY, programs_of

from gspo_jax.algo.losses import LOSSES
from gspo_jax.batch import TrainBatch
from gspo_jax.mesh.sharding import make_mesh, shard_batch
from gspo_jax.models.config import QwenConfig
from gspo_jax.models.linear import dense, lookup, spread
from gspo_jax.models.moe import mixture, tile_matmul
from gspo_jax.models.qwen import Qwen, rms_norm
from gspo_jax.update.objective import Given, Gradients, Objective

N, D = 4096, 8  # in bfloat16 the sum of 4,096 ones ends at 256: 256 + 1 rounds to 256


def of_all_ones(function, x):
    """The gradient of the sum of what `function` makes of `x` in bfloat16."""
    return jax.grad(lambda x: jnp.sum(function(x), dtype=jnp.float32))(x.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda w: lookup(nnx.Param(w), jnp.zeros((1, N), jnp.int32)), (1, D)),
        (lambda w: spread(w, (1, N, D)), (D,)),
        (lambda w: rms_norm(jnp.ones((1, N, D), jnp.bfloat16), w, 0.0), (D,)),
        # Each of N tiles of one row asks for the one expert's matrix.
        (
            lambda w: tile_matmul(jnp.ones((N, 1, 1), jnp.bfloat16), w, jnp.zeros(N, jnp.int32)),
            (1, 1, D),
        ),
    ],
    ids=["lookup", "bias", "scale", "expert"],
)
def test_a_gradient_of_4096_ones_is_4096(function, shape):
    np.testing.assert_array_equal(of_all_ones(function, jnp.ones(shape)), N)


def test_the_gradient_of_a_token_is_the_sum_over_its_experts_in_float32():
    """300 experts that are one: a token's gradient is 1 from each, and 256 + 1 is 256."""
    E = 300
    ids, gates = jnp.arange(E)[None], jnp.ones((1, E), jnp.bfloat16)
    # silu(8) 8 is about linear where it is; its slope is the same for all, so all are alike.
    kernel = jnp.ones((E, 1, 1), jnp.bfloat16)

    def of(h):
        return mixture(h, ids, gates, kernel, kernel, kernel).astype(jnp.float32).sum()

    h = jnp.full((1, 1), 8, jnp.bfloat16)
    by_one = jax.grad(
        lambda h: mixture(h, ids[:, :1], gates[:, :1], *[kernel[:1]] * 3).astype(jnp.float32).sum()
    )(h)
    got, want = jax.grad(of)(h), E * by_one.astype(jnp.float32)
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-8)  # one rounding


# ---------------------------------------------------------------------- leaf by leaf

P = 8
QWEN3_MOE = MOE | {"num_key_value_heads": 2}
QWEN3 = QWEN3_MOE | {"model_type": "qwen3"}
FAMILIES = {"qwen2": DENSE, "qwen3": QWEN3, "qwen3_moe": QWEN3_MOE}


def network(hf):
    """Weights that bfloat16 has, so that both dtypes begin with the same ones."""
    graphdef, params = nnx.split(Qwen(QwenConfig.from_hf(hf), rngs=nnx.Rngs(0)))
    return graphdef, jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), params)


def texts(rows, width, vocab, layers, *, adv=1.0):
    """Random tokens, a third of them the same one; and experts, which are given.

    The router's own would be some others in bfloat16: another function, with another gradient.
    """
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (rows, width)).astype(np.int32)
    tokens[rng.random((rows, width)) < 1 / 3] = 7
    routing = np.argsort(rng.random((rows, width, layers, 8)), axis=-1)[..., :2].astype(np.int16)
    prompt, length = np.full(rows, P, np.int32), np.full(rows, width, np.int32)
    mask = np.ones((rows, width - P), bool)
    return TrainBatch(tokens, prompt, length, mask, np.resize(np.float32(adv), rows), routing)


def gradient(view, batch, dtype, loss):
    graphdef, params = view
    sparse = nnx.merge(graphdef, params).config.experts is not None
    how = Objective(LOSSES[loss], dtype=dtype, shortest_prompt=P, routing_replay="R2")
    how = how if sparse else how._replace(routing_replay="off")
    batch = batch if sparse else batch._replace(routing=None)
    programs = programs_of(graphdef, IDENTITY, how)
    return jax.device_get(programs.accumulate(Gradients(params), batch)[0].grads.policy)


def above(limit, got, want, whole=None):
    """The leaves whose difference is above `limit` of their norm, or of that in `whole`."""
    size = np.linalg.norm
    apart = jax.tree.map(
        lambda a, b, c: float(size(a - b) / size(c)), got, want, want if whole is None else whole
    )
    leaves = jax.tree_util.tree_leaves_with_path(apart)
    return {jax.tree_util.keystr(path): x for path, x in leaves if not x <= limit}


@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_64_equal_rows_have_the_gradient_of_one(family):
    """Each leaf is a mean over rows, so what is lost is lost in sums: no forward pass differs.

    They are 64 * 64 tokens. One rounding of a finished sum is 2**-9 of it at most, here on either
    side; a leaf that is used twice (the tied embedding) is rounded three times.
    """
    hf = FAMILIES[family] | {"num_hidden_layers": 1}
    view, row = network(hf), texts(1, 64, 160, 1)
    rows = jax.tree.map(lambda x: np.repeat(x, 64, axis=0), row)
    got, want = (gradient(view, batch, "bfloat16", "reinforce") for batch in (rows, row))
    assert above(3 * 2**-9, got, want) == {}


@pytest.mark.long
@pytest.mark.parametrize("loss", ["reinforce", "gspo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_leaf_of_a_bfloat16_gradient_is_within_a_percent_of_float32(family, loss):
    """On 8,192 tokens; most of what is left is the rounding of activations, not of sums.

    Advantages of a group add up to 0, and so do many of the terms, but not their roundings: these
    are held against the gradient of as many terms that do not cancel, with each advantage's size.
    """
    hf = FAMILIES[family] | {"vocab_size": 512, "intermediate_size": 128}
    hf |= {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    adv = {"reinforce": [1.0], "gspo": [1.5, -0.5, -0.5, -0.5]}[loss]
    view, batch = network(hf), texts(16, 512, 512, 2, adv=adv)
    got, want = (gradient(view, batch, dtype, loss) for dtype in ("bfloat16", "float32"))
    whole = gradient(view, batch._replace(adv=np.abs(batch.adv)), "float32", loss)
    assert above(0.01, got, want, whole) == {}


# ---------------------------------------------------------------------------- meshes


def sums_in_16_bits(text):
    """The scatters and the collectives that add, whose result is bfloat16, in a lowered program."""
    found = re.findall(
        r'stablehlo\.(scatter|all_reduce|reduce_scatter)"[^\n]*(.*?\}\) : [^\n]*)', text, re.DOTALL
    )
    return [kind for kind, rest in found if re.search(r"-> .*bf16", rest.splitlines()[-1])]


def test_a_weight_that_devices_share_has_its_gradient_summed_in_32_bits_and_so_has_its_input():
    """W [D, F] split over fsdp and tensor, rows over fsdp: one sum for W, and one for x."""
    with jax.set_mesh(make_mesh(data=1, fsdp=2, tensor=2)):
        x, w = (jax.ShapeDtypeStruct((2, 4, 4), jnp.bfloat16) for _ in range(2))

        def total(x, w):
            (y,) = dense(x, nnx.Param(w[0], axes=("embed", "mlp")))
            return jnp.sum(y, dtype=jnp.float32)

        text = jax.jit(jax.grad(total, argnums=(0, 1))).lower(x, w).as_text()
    assert "all_reduce" in text and "reduce_scatter" in text
    assert sums_in_16_bits(text) == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        (DENSE, {"data": 2, "fsdp": 2, "tensor": 2}),
        (MOE, {"data": 2, "expert": 4}),
    ],
    ids=["tensor", "expert"],
)
def test_the_backward_pass_on_a_mesh_adds_no_sum_in_16_bits(kind, axes):
    """The sums of the forward pass (over heads, MLP and experts) are all that there are."""
    graphdef, params = nnx.split(Qwen(QwenConfig.from_hf(kind), rngs=nnx.Rngs(0)))
    how = Objective(partial(LOSSES["gspo"]), dtype="bfloat16", shortest_prompt=P)
    rows, width = 8, 16
    batch = texts(rows, width, 160, 2)._replace(routing=None)
    with jax.set_mesh(mesh := make_mesh(**axes)):
        programs = programs_of(graphdef, IDENTITY, how)
        whole, trained = shard_batch(batch, mesh), Gradients(params)
        given = Given(jnp.zeros((rows, width - P)))
        order = np.arange(rows, dtype=np.int32)[None]
        blank = jax.eval_shape(programs.start_logps, params, whole)
        total = jax.eval_shape(programs.start_grads, trained, whole)
        forward = programs.add_logps.lower(
            blank, params, whole, order, np.int32(1), width=width
        ).as_text()
        both = programs.add_grads.lower(
            total, trained, whole, given, order, np.int32(1), width=width
        ).as_text()
    assert both.count("stablehlo") > 1.5 * forward.count("stablehlo")
    assert "all_reduce" in both or "reduce_scatter" in both
    assert sorted(sums_in_16_bits(both)) == sorted(sums_in_16_bits(forward))

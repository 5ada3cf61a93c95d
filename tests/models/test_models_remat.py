"""What is recomputed is not kept, and what is kept is what was foretold."""

import dataclasses
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gspo_jax.algo.losses import gspo
from gspo_jax.config.load import load_config
from gspo_jax.mesh.sharding import make_mesh
from gspo_jax.models import Qwen, QwenConfig
from gspo_jax.models.remat import POLICIES, activation_bytes, choose_remat, compiler_options
from gspo_jax.plan import memory
from gspo_jax.policy import Policy, TextSizes
from gspo_jax.update.objective import Objective

DENSE = QwenConfig(
    family="qwen2",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=176,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    qkv_bias=True,
    qk_norm=False,
)
B, S = 16, 64


def hidden_sum(config, remat):
    """(a function of parameters, their shapes)"""
    model = nnx.eval_shape(lambda: Qwen(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    tokens = jnp.ones((B, S), jnp.int32)
    return lambda p: nnx.merge(graphdef, p)(tokens, remat=remat).sum(), params


@cache
def temporaries(remat, options=True):
    """XLA's own account of a forward and backward pass, parameters and gradients left out."""
    function, params = hidden_sum(DENSE, remat)
    options = compiler_options(remat) if options else {}
    program = jax.jit(jax.grad(function), compiler_options=options).lower(params).compile()
    return program.memory_analysis().temp_size_in_bytes


def residuals(config, remat):
    """Bytes that the forward pass hands to the backward pass, of arrays with a row per token."""
    function, params = hidden_sum(config, remat)
    kept = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(function, p)[1], params))
    return sum(x.size * x.dtype.itemsize for x in kept if x.shape[:1] in ((B,), (B * S,)))


def estimate(config, remat):
    return activation_bytes(config, remat, tokens=B * S, width=S, itemsize=4, attention="xla")


@pytest.mark.long
def test_less_memory_is_taken_the_more_is_recomputed():
    none, dots, full = (temporaries(remat) for remat in POLICIES)
    assert none > 1.5 * dots and dots > 1.5 * full


@pytest.mark.long
def test_without_its_option_the_cpus_compiler_would_keep_everything():
    """If this fails, `compiler_options` may be done without."""
    assert temporaries("full", options=False) > 0.8 * temporaries("none")


@pytest.mark.long
@pytest.mark.parametrize("remat", POLICIES)
def test_the_estimate_is_near_xlas_own_account(remat):
    assert 0.75 < estimate(DENSE, remat) / temporaries(remat) < 1.5


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_what_a_layer_keeps_is_exactly_as_counted(remat):
    """The difference that a seventh layer makes; in `estimate`, one working layer cancels."""
    deeper = dataclasses.replace(DENSE, num_layers=7)
    got = residuals(deeper, remat) - residuals(DENSE, remat)
    assert got == estimate(deeper, remat) - estimate(DENSE, remat)


@pytest.mark.parametrize(("dtype", "per_score"), [("float32", 13), ("bfloat16", 11)])
def test_what_attention_keeps_of_each_score_is_exactly_as_counted(dtype, per_score):
    """Masked and as weights in float32, as weights in the dtype, and the mask: 4 + 4 + x + 1."""

    def scores(config):
        model = nnx.eval_shape(lambda: Qwen(config, rngs=nnx.Rngs(0)))
        graphdef, params = nnx.split(model)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)

        def hidden(p):
            return nnx.merge(graphdef, p)(jnp.ones((B, S), jnp.int32)).astype(jnp.float32).sum()

        kept = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(hidden, p)[1], params))
        of_pairs = config.num_heads * B * S * S
        return sum(x.dtype.itemsize for x in kept if x.size == of_pairs and x.ndim > 3)

    one, two = (dataclasses.replace(DENSE, num_layers=n) for n in (1, 2))
    assert scores(two) - scores(one) == per_score
    size = {"tokens": B * S, "width": S, "itemsize": jnp.dtype(dtype).itemsize}
    with_scores, without = (
        activation_bytes(one, "none", attention=kind, **size) for kind in ("xla", "cudnn")
    )
    assert with_scores - without == per_score * one.num_heads * B * S * S


def test_the_estimate_of_a_known_model():
    """R1-Distill-Qwen-1.5B, 16,384 tokens in bfloat16, attention without scores; by hand.

    full: 1536.  dots: 2 * 1536 + 2048 + 2 * 8960 = 23,040.
    none: 8 * 1536 + 2 * 2048 + 1536 + 5 * 8960 = 62,720 numbers per token and layer.
    """
    shape = dataclasses.replace(
        DENSE,
        hidden_size=1536,
        intermediate_size=8960,
        num_layers=28,
        num_heads=12,
        num_kv_heads=2,
        head_dim=128,
    )

    def gigabytes(remat, attention="cudnn"):
        size = {"tokens": 16384, "width": 1280, "itemsize": 2, "attention": attention}
        return activation_bytes(shape, remat, **size) / 1e9

    token = 2 * 16384 / 1e9
    assert gigabytes("none") == pytest.approx(28 * 62720 * token)
    assert gigabytes("dots") == pytest.approx((28 * 23040 + 62720) * token)
    assert gigabytes("full") == pytest.approx((28 * 1536 + 62720) * token)
    # Scores: 12 heads x 1280 positions x (4 + 4 + 2 + 1) bytes per token.
    more = gigabytes("none", "xla") - gigabytes("none")
    assert more == pytest.approx(28 * 12 * 1280 * 11 * 16384 / 1e9)


def test_the_least_is_recomputed_that_fits_into_four_fifths():
    need = {"none": 80, "dots": 40, "full": 8}
    assert choose_remat(100, need) == "none"
    assert choose_remat(99, need) == "dots"
    assert choose_remat(49, need) == "full"
    assert choose_remat(-5, need) == "full"


SIZES = TextSizes(microbatch_tokens=B * S, longest=S, shortest_prompt=1)
HELD = memory.Held(masters=1000, moments=2000, gradients=1000)


@pytest.fixture
def decided(monkeypatch):
    """The remat that `passes` decides on a device with these statistics."""
    ask = memory._of_device

    def decide(*overrides, stats=None, platform="gpu", **options):
        device = SimpleNamespace(platform=platform, memory_stats=lambda: stats)
        monkeypatch.setattr(memory, "_of_device", lambda _: ask(device))
        policy = Policy(None, None, None, make_mesh(data=1), "float32", Path())
        config = load_config(None, list(overrides))
        return memory.passes(config, policy, DENSE, HELD, SIZES, **options).remat

    return decide


@pytest.mark.parametrize("room", POLICIES)
def test_auto_leaves_room_for_gradients_and_logits(decided, room):
    """3000 bytes held, 1000 of accumulated gradients and 1000 of a microbatch's, 500 of others."""
    fixed = 3000 + 2 * 1000 + 3 * 4 * B * S * DENSE.vocab_size
    free = int(estimate(DENSE, room) / 0.8) + 10
    for spare, want in ((free, room), (free - 500, None)):
        stats = {"bytes_limit": fixed + 500 + spare, "bytes_in_use": 3500}
        for found in (decided(stats=stats), decided(limit=fixed + spare)):
            assert (found == room) == (want is not None or room == "full")


def test_a_cpu_recomputes_nothing_unless_told(decided):
    assert decided(platform="cpu") == "none"
    assert decided("model.remat=dots", platform="cpu") == "dots"


def test_an_objective_recomputes_nothing_by_itself():
    assert Objective(gspo).remat == "none"

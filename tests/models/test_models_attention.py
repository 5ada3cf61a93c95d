"""cuDNN's attention where it proves right, and our own wherever it does not."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gspo_jax.models import attention, load_model
from gspo_jax.models.attention import Choice, attend, choose, disagreement, fused
from gspo_jax.models.qwen import head_logits

FIXTURES = Path(__file__).parents[1] / "fixtures"
REAL = jax.nn.dot_product_attention


def stand_in(change=lambda out: out):
    """JAX's own reference in the place of cuDNN's kernel; takes what cuDNN would take alone."""

    def run(q, k, v, bias=None, mask=None, *, is_causal, implementation):
        assert implementation == "cudnn" and bias is None and mask is None
        wide = (x.astype(jnp.float32) for x in (q, k, v))
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            out = REAL(*wide, is_causal=is_causal, implementation="xla")
        return change(out.astype(q.dtype))

    return run


@pytest.fixture
def nvidia(monkeypatch):
    """A machine that says it is CUDA's, with the given kernel in it."""

    def install(kernel):
        monkeypatch.setattr(attention, "on_nvidia", lambda device: True)
        monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
        choose.cache_clear()

    yield install
    choose.cache_clear()


def test_a_cpu_has_our_own_attention_and_nothing_to_say():
    assert not attention.on_nvidia(jax.devices()[0])
    assert choose("bfloat16", 4, 2, 16) == Choice("xla")


def test_a_kernel_that_is_right_is_chosen(nvidia):
    nvidia(stand_in())
    assert choose("bfloat16", 4, 2, 16) == Choice("cudnn")
    assert disagreement("bfloat16", 4, 2, 16) < 0.02


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("float32", 16), ("bfloat16", 12), ("bfloat16", 264)]
)
def test_what_cudnn_does_not_take_is_not_tried(nvidia, dtype, head_dim):
    def never(*_, **__):
        raise AssertionError

    nvidia(never)
    assert choose(dtype, 4, 2, head_dim) == Choice("xla")


def test_a_kernel_that_fails_is_replaced_and_the_reason_said(nvidia):
    def fail(*_, **__):
        raise RuntimeError("cuDNN is not detected.\nStack: ...")

    nvidia(fail)
    choice = choose("bfloat16", 4, 2, 16)
    assert choice.name == "xla"
    assert "(RuntimeError: cuDNN is not detected.)" in choice.trouble


def wrong_gradient(out):
    return 2 * out - jax.lax.stop_gradient(out)  # right values


def one_bad_row(out):
    return out.at[1, 150, 3].multiply(1.2)


def not_a_number(out):
    return out.at[0, 199].set(jnp.nan)


def other_heads(out):
    return out[:, :, jnp.array([0, 2, 1, 3])]  # query heads dealt out to key heads in turn


@pytest.mark.parametrize("change", [wrong_gradient, one_bad_row, not_a_number, other_heads])
def test_a_kernel_that_is_wrong_is_replaced_and_the_reason_said(nvidia, change):
    nvidia(stand_in(change))
    choice = choose("bfloat16", 4, 2, 16)
    assert choice.name == "xla" and "differs from our own by" in choice.trouble


@pytest.mark.parametrize("error", ["a key too many", "a key too few"])
def test_a_mask_that_is_off_by_one_is_noticed(nvidia, error):
    """On the long rows such an error is small; on the short ones it is not."""

    def shifted(q, k, v, *, is_causal, implementation):
        S = q.shape[1]
        back = np.arange(S)[:, None] - np.arange(S)[None]
        allowed = back >= -1 if error == "a key too many" else (back >= 0) & (back != 1)
        allowed = jnp.broadcast_to(jnp.asarray(allowed)[None], (len(q), S, S))
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return attend(q, k, v, allowed).reshape(len(q), S, q.shape[1], -1)

    nvidia(shifted)
    assert disagreement("bfloat16", 4, 2, 16) > 0.2
    assert choose("bfloat16", 4, 2, 16).name == "xla"


@pytest.mark.long
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (3, 1)])
def test_values_and_gradients_of_both_agree_at_every_position(nvidia, heads, kv_heads):
    """Layout and grouping of heads; positions of padding included, since neither masks it."""
    nvidia(stand_in())
    keys = jax.random.split(jax.random.key(heads), 4)
    q, k, v = (
        jax.random.normal(key, (2, n, 11, 8))
        for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=False)
    )
    direction = jax.random.normal(keys[3], (2, 11, heads * 8))
    allowed = jnp.broadcast_to(jnp.tril(jnp.ones((11, 11), bool))[None], (2, 11, 11))

    @partial(jax.jit, static_argnums=0)
    def everything(function):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(direction)

    own = everything(lambda *qkv: attend(*qkv, allowed))
    for a, b in zip(everything(fused), own, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen3_untied", "qwen2_tied", "qwen2_windows", "qwen3_moe"])
def test_a_model_is_the_same_with_either(nvidia, name):
    """Right-padded rows: hidden states everywhere and every gradient; windows keep our own."""
    calls = []
    kernel = stand_in()

    def counted(*args, **kwargs):
        calls.append(args[0].shape)
        return kernel(*args, **kwargs)

    nvidia(counted)
    graphdef, params = nnx.split(load_model(FIXTURES / name))
    expected = np.load(FIXTURES / name / "expected.npz")
    tokens, length = jnp.asarray(expected["tokens"]), expected["length"]
    real = jnp.asarray(np.arange(tokens.shape[1]) < length[:, None])
    direction = jnp.sin(jnp.arange(tokens.size * 96.0)).reshape(*tokens.shape, 96)

    def loss(params, kind):
        model = nnx.merge(graphdef, params)
        hidden = model(tokens, attention=kind)
        return jnp.sum(direction * head_logits(hidden, model.unembed()), where=real[..., None])

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    got, want = both(params, "cudnn"), both(params, "xla")
    config = nnx.merge(graphdef, params).config
    assert len(calls) == config.num_layers - len(config.window_layers) > 0
    B, S = tokens.shape
    assert set(calls) == {(B, S, config.num_heads, config.head_dim)}
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-7)


def test_a_mask_and_prefill_and_decoding_never_meet_cudnn(nvidia, tiny):
    def never(*_, **__):
        raise AssertionError

    nvidia(never)
    tokens, mask = jnp.ones((2, 5), jnp.int32), jnp.arange(5)[None] >= jnp.array([[0], [2]])
    tiny(tokens, mask=mask, attention="cudnn")
    tiny.prefill(tokens, mask)
    with pytest.raises(AssertionError):
        tiny(tokens, attention="cudnn")

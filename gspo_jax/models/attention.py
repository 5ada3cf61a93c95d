"""Attention: our own, which runs anywhere with any mask, and cuDNN's for whole rows on NVIDIA.

    attend    softmax(q kᵀ / sqrt(H)) v over what a mask allows: prefill, decoding, windows
    fused     the same over all earlier positions, in one kernel that keeps no [S, S] array

Training and scoring see whole rows padded on the right, where a causal mask is all the mask that
is needed: no real token looks at padding. So `fused` takes neither masks nor lengths (with a
mask cuDNN is several times slower), and padded positions get the same numbers from both.
JAX never picks cuDNN by itself. `choose` does, once it has seen it give the right answer.

Axes: B rows, S positions, N query heads, K key/value heads, H head width, W slots.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gspo_jax.algo.masked import float_dtype
from gspo_jax.errors import check_choice
from gspo_jax.mesh.sharding import constrain

KINDS = ("xla", "cudnn")  # `attend`, `fused`
TOLERANCE = 0.05  # bfloat16 rounding measures 0.004; a mask that is off by one above 1


def check_attention(kind: str) -> None:
    """Refuse what is not in KINDS.

    Raises:
        ConfigError: "auto" included, which `choose` decides.
    """
    check_choice("attention", kind, KINDS)


class Choice(NamedTuple):
    """Which attention training runs, and what is wrong with the better one, if anything is."""

    name: str  # "xla" is `attend`, "cudnn" is `fused`
    trouble: str = ""


def attend(
    q: Float[Array, "B N S H"],
    k: Float[Array, "B K W H"],
    v: Float[Array, "B K W H"],
    allowed: Bool[Array, "B S W"],
) -> Float[Array, "B S NH"]:
    """softmax(q kᵀ / sqrt(H)) v over allowed slots; R = N // K query heads share one key head."""
    B, N, S, H = q.shape
    K, W = k.shape[1], k.shape[2]
    grouped = q.reshape(B, K, (N // K) * S, H)  # one matmul per key head
    if S == 1:
        scores = jax.lax.platform_dependent(grouped, k, cpu=_scores_of_one, default=_scores)
    else:
        scores = _scores(grouped, k)
    scores = scores.reshape(B, K, N // K, S, W) * H**-0.5
    scores = jnp.where(allowed[:, None, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, K, (N // K) * S, W)
    out = jnp.einsum("bkqw,bkwh->bkqh", weights, v).reshape(B, N, S, H)
    return out.swapaxes(1, 2).reshape(B, S, N * H)


def _scores(q: Float[Array, "B K Q H"], k: Float[Array, "B K W H"]) -> Float[Array, "B K Q W"]:
    return jnp.einsum("bkqh,bkwh->bkqw", q, k, preferred_element_type=float_dtype(q))


def _scores_of_one(
    q: Float[Array, "B K Q H"], k: Float[Array, "B K W H"]
) -> Float[Array, "B K Q W"]:
    """With keys on the left: XLA's CPU programs would pack a right operand at every step. On a GPU
    the softmax of what comes out transposed is three kernels instead of one."""
    scores = jnp.einsum("bkwh,bkqh->bkwq", k, q, preferred_element_type=float_dtype(q))
    return jax.lax.optimization_barrier(scores).swapaxes(2, 3)


def fused(
    q: Float[Array, "B N S H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"]
) -> Float[Array, "B S NH"]:
    """`attend` over each position and those before it, by cuDNN; 16-bit floats alone."""
    B, N, S, H = q.shape
    # cuDNN wants [B, S, heads, H], and all three split over devices in the same way.
    q, k, v = (
        constrain(y.swapaxes(1, 2), "batch", None, heads, None)
        for y, heads in ((q, "heads"), (k, "kv_heads"), (v, "kv_heads"))
    )
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return out.reshape(B, S, N * H)


@cache
def choose(dtype: str, heads: int, kv_heads: int, head_dim: int, device: Any = None) -> Choice:
    """The attention for whole rows of this kind on this device; None is JAX's own.

    Where cuDNN could serve it is tried first, forward and backward, against `attend` in float32;
    it is only taken if it agrees. Takes some seconds on a GPU, once per process. On a device that
    is not here, for which one can only compile, it is taken to agree.
    """
    here = jax.devices()
    device = here[0] if device is None else device
    shape_fits = head_dim <= 256 and head_dim % 8 == 0
    if not on_nvidia(device) or dtype not in ("bfloat16", "float16") or not shape_fits:
        return Choice("xla")
    if device not in here:
        return Choice("cudnn")
    try:
        error = disagreement(dtype, heads, kv_heads, head_dim)
    except Exception as failure:  # whatever it is, the run can do without
        what = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
    else:
        if error <= TOLERANCE:
            return Choice("cudnn")
        what = f"differs from our own by {error:.3g}, wanted {TOLERANCE:g} at most"
    return Choice("xla", f"cuDNN attention is not used ({what}); training is slower without it.")


def on_nvidia(device: Any) -> bool:
    """True of CUDA's devices."""
    said = f"{device.client.platform_version} {device.device_kind}".lower()
    return device.platform == "gpu" and ("cuda" in said or "nvidia" in said)


def disagreement(dtype: str, heads: int, kv_heads: int, head_dim: int) -> float:
    """How far `fused` is from `attend` in float32, at the worst position; NaN if that is NaN.

    Of the output and the three gradients: |difference| / (|value| + mean |value|) of the vector
    that one head has at one position. 200 positions: no multiple of any kernel's tile.
    """
    B, S = 2, 200
    rng = np.random.default_rng(0)
    shapes = [(B, n, S, head_dim) for n in (heads, kv_heads, kv_heads)]
    shapes += [(B, S, heads * head_dim)]
    *qkv, direction = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
    allowed = jnp.broadcast_to(jnp.tril(jnp.ones((S, S), bool))[None], (B, S, S))

    def everything(function: Callable[..., Array], *args: Array) -> list[np.ndarray]:
        def run(*args):
            *qkv, direction = args
            out, pull = jax.vjp(function, *qkv)
            return out.reshape(B, S, heads, head_dim), *pull(direction)

        return [np.asarray(x, np.float32) for x in jax.jit(run)(*args)]

    got = everything(fused, *qkv, direction)
    exact = (x.astype(jnp.float32) for x in (*qkv, direction))
    want = everything(lambda q, k, v: attend(q, k, v, allowed), *exact)

    def worst(got: np.ndarray, want: np.ndarray) -> float:
        size = np.linalg.norm(want, axis=-1)
        return float((np.linalg.norm(got - want, axis=-1) / (size + size.mean())).max())

    return float(np.max([worst(*pair) for pair in zip(got, want, strict=True)]))

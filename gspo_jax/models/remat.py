"""Rematerialisation: what a layer's backward pass recomputes instead of keeping.

    none   nothing: fastest, and largest
    dots   all but the products with weight matrices: scores, norms, rotations, activations
    full   everything but the layer's input: smallest, a third more compute

Numbers per token and layer, in the notation of `qwen`, with X experts of width F per token where
a layer has them (1 where it does not):

    full   D
    dots   2 D + (N + 2 K) H + 2 X F
    none   8 D + 2 (N + 2 K) H + N H + 5 X F, and N S scores thrice where attention keeps them:
           masked and as weights in float32, as weights in the activations' dtype, and which were
           masked in a byte

The first two are exact, and so are the bytes of the scores; the rest of the last is near. All but
`none` have one layer's `none` at a time in addition, while that layer is recomputed.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
from jaxtyping import PyTree

from gspo_jax.errors import check_choice
from gspo_jax.mesh.sharding import platform_of, regathering, regathers
from gspo_jax.models.attention import check_attention
from gspo_jax.models.config import QwenConfig

POLICIES = ("none", "dots", "full")  # largest first
SHARE = 0.8  # of the free memory: the allocator leaves gaps, and the estimate is one


def check_remat(remat: str) -> None:
    """Refuse what is not in POLICIES.

    Raises:
        ConfigError: "auto" included, which `memory.passes` decides, and booleans.
    """
    check_choice("remat", remat, POLICIES)


def recomputed(layer: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """`layer` with what its backward pass recomputes; gathered weights are never kept.

    Raises:
        ConfigError: `remat` is none of POLICIES.
    """
    check_remat(remat)
    if remat == "none":
        return regathering(layer)
    # A product of activations with each other has batch dimensions, one with weights has none.
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(layer, policy=dots if remat == "dots" else None)


def compiler_options(remat: str, shardings: PyTree = None) -> dict[str, Any]:
    """What `jax.jit` needs to be told, for programs with a backward pass.

    XLA's CPU compiler removes the barriers around what is recomputed, finds it to be the same as
    what was computed before, and keeps that: it must not, nor where weights that devices share are
    gathered again.

    Args:
        shardings: of the parameters; None is one device, JAX's own.

    Raises:
        ConfigError: `remat` is none of POLICIES.
    """
    check_remat(remat)
    if (remat == "none" and not regathers(shardings)) or platform_of(shardings) != "cpu":
        return {}
    return {"xla_disable_hlo_passes": "cse_barrier_expander"}


def activation_bytes(
    c: QwenConfig, remat: str, *, tokens: int, width: int, itemsize: int, attention: str
) -> int:
    """Device memory that one forward and backward pass of `tokens` tokens takes, estimated.

    Args:
        remat: one of POLICIES.
        width: tokens of a row.
        itemsize: bytes of an activation.
        attention: "xla" keeps its scores, "cudnn" does not but in layers with a window.

    Raises:
        ConfigError: another `remat` or `attention`.
    """
    check_remat(remat)
    check_attention(attention)
    D, N, KH = c.hidden_size, c.num_heads, c.num_kv_heads * c.head_dim
    NH = N * c.head_dim
    sparse = None if c.experts is None else c.experts.per_token * c.experts.size
    dense = c.intermediate_size
    inner = [sparse if sparse and c.is_sparse(i) else dense for i in range(c.num_layers)]
    has_scores = [attention == "xla" or i in c.window_layers for i in range(c.num_layers)]
    layers = list(zip(inner, has_scores, strict=True))

    def kept(policy: str, F: int, scores: bool) -> int:
        if policy == "full":
            return itemsize * D
        if policy == "dots":
            return itemsize * (2 * D + NH + 2 * KH + 2 * F)
        of_scores = N * width * (2 * 4 + itemsize + 1) if scores else 0
        return itemsize * (8 * D + 2 * (NH + 2 * KH) + NH + 5 * F) + of_scores

    again = 0 if remat == "none" else max(kept("none", *layer) for layer in layers)
    return tokens * (sum(kept(remat, *layer) for layer in layers) + again)


def share_of(c: QwenConfig, ways: int) -> QwenConfig:
    """The part of the network that each of `ways` devices computes, which split heads and MLP."""
    return replace(
        c,
        num_heads=c.num_heads // ways,
        num_kv_heads=c.num_kv_heads // ways,
        intermediate_size=-(-c.intermediate_size // ways),
        experts=c.experts and replace(c.experts, size=-(-c.experts.size // ways)),
    )


def choose_remat(free: int, need: Mapping[str, int]) -> str:
    """The fastest policy whose need fits into SHARE of the free bytes; "full" if none does."""
    return next((name for name in POLICIES if need[name] <= SHARE * free), "full")

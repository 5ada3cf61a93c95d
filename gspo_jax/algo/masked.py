"""What every loss does with a mask, in one place: log-ratios, means and diagnostics.

The rule is `where` before the arithmetic. Multiplying by a mask would not do: 0 * inf is nan, and
the gradient of a masked branch is nan as well.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

PerToken = Float[Array, "B T"]
PerRowOrToken = Float[Array, " B"] | Float[Array, "B T"]
Mask = Bool[Array, "B T"]
RowsOrTokens = Bool[Array, " B"] | Bool[Array, "B T"]
Metrics = dict[str, Float[Array, ""]]

# exp(±20) is far outside every clip range and far inside float32.
LOG_RATIO_LIMIT = 20.0
# In place of infinity, so that a row whose sum has it on both sides still has a mean.
FARTHEST = 1e30


class Mean(NamedTuple):
    """A mean kept as its two halves, so that microbatches add up to exactly one big batch."""

    total: Float[Array, ""]
    weight: Float[Array, ""]


def float_dtype(x: Float[Array, "..."]) -> Any:
    """float32 at least; float64 stays."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def on_mask(x: PerRowOrToken, mask: Mask, dtype: Any = None) -> PerToken:
    """[B] or [B, T] as [B, T], 0 where `mask` is false; by default in float32 at least."""
    x = x[:, None] if x.ndim == 1 else x
    return jnp.where(mask, x.astype(dtype or float_dtype(x)), 0)


def log_ratio(logp: PerToken, old_logp: PerToken | None, mask: Mask) -> PerToken:
    """log π_θ - log π_old, which is fixed; 0 where `mask` is false. None means π_θ itself.

    Where one of them is -inf it is ±1e30, where both are it is 0: a token that a top-k mask left
    out of one policy is as far away as can be, of both it is the same. The gradient stays 1.
    """
    logp = on_mask(logp, mask)
    old_logp = logp if old_logp is None else on_mask(old_logp, mask, logp.dtype)
    old_logp = stop_gradient(old_logp)
    fixed = stop_gradient(logp)
    return _with_value(
        logp, jnp.where(fixed == old_logp, 0, jnp.clip(fixed - old_logp, -FARTHEST, FARTHEST))
    )


def saturated(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """Bounded to ±20 in value only: beyond, the gradient is that of the bound, not 0."""
    return _with_value(log_ratio, jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


@jax.custom_jvp
def _with_value(x: Float[Array, "..."], value: Float[Array, "..."]) -> Float[Array, "..."]:
    """`value`, with the gradient of `x`: x + (value - x) would be NaN where x is infinite."""
    return value


@_with_value.defjvp
def _slope_of_x(primals, tangents):
    return _with_value(*primals), tangents[0]


def row_mean(x: PerToken, mask: Mask) -> Float[Array, " B"]:
    """1/|yᵢ| Σₜ xᵢₜ; 0 for a response without tokens."""
    return jnp.sum(x, -1, where=mask) / jnp.maximum(mask.sum(-1, dtype=x.dtype), 1)


def mean_over_rows(x: Float[Array, " B"], mask: Mask, weight: PerRowOrToken | None = None) -> Mean:
    """Of one term per response; a weight per token counts with its mean."""
    real = mask.any(-1)
    if weight is not None:
        x *= stop_gradient(row_mean(on_mask(weight, mask, x.dtype), mask))
    return Mean(jnp.sum(x, where=real), real.sum(dtype=x.dtype))


def mean_over_responses(x: PerToken, mask: Mask, weight: PerRowOrToken | None = None) -> Mean:
    """Of one term per token: the mean over responses of each one's mean over tokens."""
    return mean_over_rows(row_mean(_weighted(x, mask, weight), mask), mask)


def mean_over_tokens(x: PerToken, mask: Mask, weight: PerRowOrToken | None = None) -> Mean:
    """Of one term per token, all tokens of the batch alike."""
    return Mean(jnp.sum(_weighted(x, mask, weight), where=mask), mask.sum(dtype=x.dtype))


def mean_over_constant(
    x: PerToken, mask: Mask, weight: PerRowOrToken | None, max_length: int | None
) -> Mean:
    """Of one term per token, divided by the responses times `max_length` (None: times T)."""
    total, _ = mean_over_tokens(x, mask, weight)
    return Mean(total, mask.any(-1).sum(dtype=x.dtype) * (max_length or mask.shape[-1]))


def _weighted(x, mask, weight):
    return x if weight is None else x * stop_gradient(on_mask(weight, mask, x.dtype))


def diagnostics(log_ratio: PerRowOrToken, mask: Mask, **clipped: RowsOrTokens) -> Metrics:
    """How far the ratios are from 1, over responses ([B]) or tokens ([B, T]), and what is clipped.

    `clip_frac*` are shares of tokens; `clip_frac_seq` is the mean over responses of the share of
    their tokens. Without a single token the ratios are 1 and the shares 0.

    Args:
        clipped: where a bound was selected, by the ending of its metric: `low`, `high`, `delta`.
    """
    valid = mask if log_ratio.ndim == 2 else mask.any(-1)
    ratio = stop_gradient(jnp.where(valid, jnp.exp(log_ratio), 1))
    count = jnp.maximum(valid.sum(dtype=ratio.dtype), 1)
    mean = jnp.where(valid.any(), jnp.sum(ratio, where=valid) / count, 1)
    largest = jnp.where(valid.any(), jnp.max(ratio, where=valid, initial=0), 1)
    smallest = jnp.where(valid.any(), jnp.min(ratio, where=valid, initial=jnp.inf), 1)
    in_order = jnp.sort(jnp.where(valid, ratio, largest), axis=None)  # padding last
    quantiles = {f"ratio_q{q:02d}": _quantile(in_order, q / 100, count) for q in (5, 50, 95)}

    nowhere = jnp.zeros_like(mask)
    hits = {
        name: mask & (hit[:, None] if hit.ndim == 1 else hit)
        for name, hit in ({"low": nowhere, "high": nowhere} | clipped).items()
    }
    outside = hits["low"] | hits["high"]
    tokens = jnp.maximum(mask.sum(dtype=ratio.dtype), 1)
    by_row = mean_over_responses(outside.astype(ratio.dtype), mask)
    return {
        "ratio_mean": mean,
        "ratio_min": smallest,
        "ratio_max": largest,
        "ratio_std": jnp.sqrt(jnp.sum((ratio - mean) ** 2, where=valid) / count),
        **quantiles,
        "clip_frac": outside.sum(dtype=ratio.dtype) / tokens,
        "clip_frac_seq": by_row.total / jnp.maximum(by_row.weight, 1),
        **{f"clip_frac_{name}": hit.sum(dtype=ratio.dtype) / tokens for name, hit in hits.items()},
    }


def _quantile(in_order, q, count):
    """Of the first `count` numbers, interpolated as NumPy does."""
    at = q * (count - 1)
    left = at.astype(jnp.int32)
    right = jnp.minimum(left + 1, in_order.size - 1)
    return in_order[left] + (at - left.astype(at.dtype)) * (in_order[right] - in_order[left])

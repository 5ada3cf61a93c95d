"""The policy losses of the GSPO family: arrays in, a mean kept as its two halves out.

    loss        ratio that multiplies Â                      bound                       mean over
    gspo        sᵢ = (π_θ(yᵢ) / π_old(yᵢ))^(1/|yᵢ|)          clip  3e-4, 4e-4            responses
    gspo_token  sᵢ, its gradient taken token by token        clip  3e-4, 4e-4            responses
    luspo       sᵢ |yᵢ|                                      clip  2e-3, 2.5e-3          responses
    gmpo        geometric mean of the clipped wᵢₜ            clip  ±0.4 of log wᵢₜ       responses
    grpo        wᵢₜ = π_θ(yᵢₜ) / π_old(yᵢₜ)                  clip  0.2, 0.2              responses
    sapo        4/τ sigmoid(τ(wᵢₜ - 1))                      soft, τ = 1 and 1.05        responses
    dr_grpo     wᵢₜ                                          clip  0.2, 0.2              a constant
    dapo        wᵢₜ                                          clip  0.2, 0.28             tokens
    ppo         wᵢₜ                                          clip  0.2, 0.2              tokens
    cispo       sg[wᵢₜ] log π_θ                              cap 5 (keeps the gradient)  tokens
    reinforce   log π_θ                                      none                        tokens

Every policy loss is called as `loss(logp, old_logp, adv, mask, *, weight=None, **its own)`:

    logp      log π_θ of each sampled token, in nats; the only differentiated input.
    old_logp  log π_old of the same tokens, fixed since the rollout; None means on-policy, that is
              `stop_gradient(logp)`: the ratio is exactly 1 and has a gradient.
    adv       Âᵢ, one number per response; or Âᵢₜ per token where the ratio is per token.
    mask      true on response tokens up to and including EOS. What lies elsewhere, NaN included,
              reaches neither the value nor the gradient.
    weight    optional fixed factor on each response's or each token's term, for example
              `mismatch_weight`. It does not change what the mean divides by.

and returns -J as a `Mean` with its diagnostics. `Mean.weight` depends on the mask alone. A response
without tokens adds nothing and is not counted, so rows of padding are free (verl's choice; TRL
counts them). Half precision is computed in float32; float64 stays float64.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

# exp(±20) is far outside every clip range and far inside float32.
_LOG_RATIO_LIMIT = 20.0

Metrics = dict[str, Float[Array, ""]]
PerRowOrToken = Float[Array, " B"] | Float[Array, "B T"]


class Mean(NamedTuple):
    """A mean kept as its two halves, so that microbatches add up to exactly one big batch."""

    total: Float[Array, ""]
    weight: Float[Array, ""]


def gspo(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"] | None,
    adv: PerRowOrToken,
    mask: Bool[Array, "B T"],
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    delta: float | None = None,
    weight: PerRowOrToken | None = None,
) -> tuple[Mean, Metrics]:
    """Group Sequence Policy Optimization: one clipped importance ratio per response.

        sᵢ(θ) = exp( 1/|yᵢ| Σₜ log [π_θ(yᵢₜ|·) / π_old(yᵢₜ|·)] )            (7)
        J(θ)  = E[ min( sᵢ Âᵢ, clip(sᵢ, 1 - ε_low, 1 + ε_high) Âᵢ ) ]       (5)

    Zheng et al., 2025, https://arxiv.org/abs/2507.18071; default clip range from §5.1. There is
    no other mean to choose: weighting responses by their length is `luspo`.

    Args:
        clip_low: ε_low. About 1000x smaller than in GRPO, because sᵢ is a geometric mean.
        clip_high: ε_high.
        delta: upper bound of sᵢ where Âᵢ < 0, which (5) leaves unbounded; above 1 + ε_high.
    """
    _, log_ratio = _on_mask(logp, old_logp, mask)
    adv = _per_row(adv, mask, log_ratio.dtype)
    log_s = _row_mean(log_ratio, mask)  # (7)
    s, clipped = _clip(log_s, adv, clip_low, clip_high, delta)
    return _mean_over_rows(s * adv, mask, weight), _diagnostics(log_s, clipped, mask)  # (5)


def gspo_token(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"] | None,
    adv: PerRowOrToken,
    mask: Bool[Array, "B T"],
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    delta: float | None = None,
    weight: PerRowOrToken | None = None,
) -> tuple[Mean, Metrics]:
    """GSPO with an advantage per token; equal to `gspo` where Âᵢₜ is one number per response.

        sᵢₜ(θ) = sg[sᵢ(θ)] π_θ(yᵢₜ|·) / sg[π_θ(yᵢₜ|·)]                                    (14)
        J(θ)   = E[ 1/|yᵢ| Σₜ min( sᵢₜ Âᵢₜ, clip(sᵢₜ, 1 - ε_low, 1 + ε_high) Âᵢₜ ) ]      (13)

    The stop-gradients make it differ from finite differences of its own value when Âᵢₜ varies
    within a response; that is the paper's (17), not an error. Zheng et al., 2025, §4.3.
    """
    logp, log_ratio = _on_mask(logp, old_logp, mask)
    adv = _per_token(adv, mask, log_ratio.dtype)
    log_s = stop_gradient(_row_mean(log_ratio, mask))
    log_s_token = log_s[:, None] + (logp - stop_gradient(logp))  # (14)
    s, clipped = _clip(log_s_token, adv, clip_low, clip_high, delta)
    return _mean_over_responses(s * adv, mask, weight), _diagnostics(log_s, clipped, mask)  # (13)


def grpo(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"] | None,
    adv: PerRowOrToken,
    mask: Bool[Array, "B T"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    weight: PerRowOrToken | None = None,
) -> tuple[Mean, Metrics]:
    """Group Relative Policy Optimization: one clipped importance ratio per token.

        wᵢₜ(θ) = π_θ(yᵢₜ|·) / π_old(yᵢₜ|·)
        J(θ)   = E[ 1/|yᵢ| Σₜ min( wᵢₜ Âᵢₜ, clip(wᵢₜ, 1 - ε_low, 1 + ε_high) Âᵢₜ ) ]      (3)

    Shao et al., 2024, https://arxiv.org/abs/2402.03300, without its KL term, which is `kl`.

    Args:
        delta: upper bound of wᵢₜ where Âᵢₜ < 0, above 1 + ε_high: the "dual clip" of Ye et al.,
            2019 (https://arxiv.org/abs/1912.09729), verl's `clip_ratio_c`, TRL's `delta`.
    """
    objective, metrics = _token_surrogate(
        logp, old_logp, adv, mask, clip_low=clip_low, clip_high=clip_high, delta=delta
    )
    return _mean_over_responses(objective, mask, weight), metrics  # (3)


def ppo(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"] | None,
    adv: PerRowOrToken,
    mask: Bool[Array, "B T"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    weight: PerRowOrToken | None = None,
) -> tuple[Mean, Metrics]:
    """The clipped policy term of PPO, each token of the batch weighing the same.

        L(θ) = Ê[ min( wₜ Âₜ, clip(wₜ, 1 - ε_low, 1 + ε_high) Âₜ ) ]                       (7)

    Schulman et al., 2017, https://arxiv.org/abs/1707.06347. The critic's term is `value`.
    """
    objective, metrics = _token_surrogate(
        logp, old_logp, adv, mask, clip_low=clip_low, clip_high=clip_high, delta=delta
    )
    return _mean_over_tokens(objective, mask, weight), metrics  # (7)


def reinforce(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"] | None,
    adv: PerRowOrToken,
    mask: Bool[Array, "B T"],
    *,
    weight: PerRowOrToken | None = None,
) -> tuple[Mean, Metrics]:
    """The score-function gradient, no ratio: J(θ) = E_tokens[ Âᵢₜ log π_θ(yᵢₜ|·) ].

    With Â = 1 its value is the negative log-likelihood of supervised fine-tuning. `old_logp` is
    used for the diagnostics alone. Williams, 1992, https://doi.org/10.1007/BF00992696.
    """
    logp, log_ratio = _on_mask(logp, old_logp, mask)
    objective = _per_token(adv, mask, logp.dtype) * logp
    return _mean_over_tokens(objective, mask, weight), _diagnostics(log_ratio, None, mask)


def kl(
    logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    kind: str = "k3",
) -> tuple[Mean, Metrics]:
    """KL(π_θ ‖ π_ref) estimated from the sampled tokens; mean over responses of their token mean.

        d = log π_ref - log π_θ;    k1 = -d,    k2 = d²/2,    k3 = exp(d) - 1 - d

    k1 and k3 are unbiased as values. As a *loss* over fixed samples, k2 has the gradient of
    KL(π_θ ‖ π_ref), k3 that of KL(π_ref ‖ π_θ), and k1 has none in expectation: use k1 in the
    reward. Schulman, 2020, http://joschu.net/blog/kl-approx.html.
    """
    per_token = token_kl(logp, ref_logp, mask, kind)
    mean = _mean_over_responses(-per_token, mask, None)
    tokens = jnp.maximum(mask.sum(dtype=per_token.dtype), 1)
    return mean, {"kl": stop_gradient(jnp.sum(per_token)) / tokens}


def token_kl(
    logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    kind: str = "k3",
) -> Float[Array, "B T"]:
    """The estimate of `kl` at every token, 0 outside the mask."""
    _, log_ratio = _on_mask(logp, ref_logp, mask)
    d = _saturated(-log_ratio)
    match kind:
        case "k1":
            return -d
        case "k2":
            return d * d / 2
        case "k3":
            return jnp.expm1(d) - d
    raise ValueError(f"kl kind={kind!r} is not known; choose k1, k2 or k3.")


# --- Shared parts. Everything that meets the mask happens here. ---


def _on_mask(logp, old_logp, mask):
    """`logp` and the log-ratio in float32 or float64, and 0 where `mask` is false."""
    dtype = jnp.float64 if logp.dtype == jnp.float64 else jnp.float32
    logp = jnp.where(mask, logp.astype(dtype), 0)
    old_logp = logp if old_logp is None else jnp.where(mask, old_logp.astype(dtype), 0)
    return logp, logp - stop_gradient(old_logp)


def _per_row(x, mask, dtype):
    """[B] as it is, 0 for empty responses."""
    if x.ndim != 1:
        raise ValueError(
            f"adv has shape {x.shape}; a loss with one ratio per response takes one advantage per "
            "response [B]. For one per token use gspo_token."
        )
    return stop_gradient(jnp.where(mask.any(-1), x.astype(dtype), 0))


def _per_token(x, mask, dtype):
    """[B] or [B, T] as [B, T], 0 where `mask` is false."""
    x = x[:, None] if x.ndim == 1 else x
    return stop_gradient(jnp.where(mask, x.astype(dtype), 0))


def _saturated(log_ratio):
    """Bounded to ±20 in value only: beyond, the gradient is that of the bound, not 0."""
    bounded = jnp.clip(log_ratio, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
    return log_ratio + stop_gradient(bounded - log_ratio)


def _row_mean(log_ratio, mask):
    """1/|y| Σₜ; bounded after the mean, because bounding single tokens would move it."""
    length = mask.sum(-1, dtype=log_ratio.dtype)
    return _saturated(jnp.sum(log_ratio, -1) / jnp.maximum(length, 1))


def _clip(log_ratio, adv, clip_low, clip_high, delta):
    """The ratio that min(ratio Â, clip(ratio) Â) selects, and the masks (below, above, capped).

    Decided in log space, where a band of 3e-4 keeps its resolution. Where a bound is selected it
    is a constant, so the gradient is exactly 0 there.
    """
    low, high = jnp.asarray(clip_low, log_ratio.dtype), jnp.asarray(clip_high, log_ratio.dtype)
    below = (adv < 0) & (log_ratio < jnp.log1p(-jnp.minimum(low, 1)))
    above = (adv > 0) & (log_ratio > jnp.log1p(high))
    ratio = jnp.where(above, 1 + high, jnp.where(below, 1 - low, jnp.exp(log_ratio)))
    if delta is None:
        return ratio, (below, above)
    if delta <= 1 + clip_high:
        raise ValueError(f"delta={delta} must be above 1 + clip_high = {1 + clip_high}.")
    capped = (adv < 0) & (log_ratio > jnp.log(jnp.asarray(delta, log_ratio.dtype)))
    return jnp.where(capped, delta, ratio), (below, above, capped)


def _token_surrogate(logp, old_logp, adv, mask, *, clip_low, clip_high, delta):
    """min( wᵢₜ Âᵢₜ, clip(wᵢₜ) Âᵢₜ ) at every token, and its diagnostics."""
    _, log_ratio = _on_mask(logp, old_logp, mask)
    adv = _per_token(adv, mask, log_ratio.dtype)
    log_w = _saturated(log_ratio)
    w, clipped = _clip(log_w, adv, clip_low, clip_high, delta)
    return w * adv, _diagnostics(log_w, clipped, mask)


def _mean_over_rows(objective, mask, weight):
    """-J for one term per response; a weight per token counts with its mean."""
    real = mask.any(-1)
    if weight is not None:
        weight = _per_token(weight, mask, objective.dtype)
        objective *= jnp.sum(weight, -1) / jnp.maximum(mask.sum(-1, dtype=weight.dtype), 1)
    return Mean(-jnp.sum(objective, where=real), real.sum(dtype=objective.dtype))


def _mean_over_responses(objective, mask, weight):
    """-J for one term per token: the mean over responses of each one's token mean."""
    if weight is not None:
        objective *= _per_token(weight, mask, objective.dtype)
    length = mask.sum(-1, dtype=objective.dtype)
    row = jnp.sum(objective, -1, where=mask) / jnp.maximum(length, 1)
    return Mean(-jnp.sum(row), mask.any(-1).sum(dtype=objective.dtype))


def _mean_over_tokens(objective, mask, weight):
    """-J for one term per token, all tokens of the batch alike."""
    if weight is not None:
        objective *= _per_token(weight, mask, objective.dtype)
    return Mean(-jnp.sum(objective, where=mask), mask.sum(dtype=objective.dtype))


def _diagnostics(log_ratio, clipped, mask):
    """Ratios over responses ([B]) or tokens ([B, T]); the shares that are clipped.

    `clip_frac*` are shares of tokens; `clip_frac_seq` is the mean over responses of the share of
    their tokens. Without a single token the ratios are 1 and the shares 0.
    """
    log_ratio = stop_gradient(log_ratio)
    dtype, length = log_ratio.dtype, mask.sum(-1, dtype=log_ratio.dtype)
    tokens, rows = jnp.maximum(length.sum(), 1), jnp.maximum(mask.any(-1).sum(dtype=dtype), 1)

    valid = mask if log_ratio.ndim == 2 else mask.any(-1)
    count = jnp.maximum(valid.sum(dtype=dtype), 1)
    ratio = jnp.where(valid, jnp.exp(log_ratio), 1)
    mean = jnp.where(valid.any(), jnp.sum(ratio, where=valid) / count, 1)
    largest = jnp.where(valid.any(), jnp.max(ratio, where=valid, initial=0), 1)
    smallest = jnp.min(ratio, where=valid, initial=jnp.inf)
    in_order = jnp.sort(jnp.where(valid, ratio, largest), axis=None)  # padding last
    metrics = {
        "ratio_mean": mean,
        "ratio_min": jnp.where(valid.any(), smallest, 1),
        "ratio_max": largest,
        "ratio_std": jnp.sqrt(jnp.sum((ratio - mean) ** 2, where=valid) / count),
    }
    for percent in (5, 50, 95):
        at = (percent / 100) * (count - 1)
        left = at.astype(jnp.int32)
        right = jnp.minimum(left + 1, in_order.size - 1)
        value = in_order[left] + (at - left.astype(dtype)) * (in_order[right] - in_order[left])
        metrics[f"ratio_q{percent:02d}"] = value

    def share(hit):
        return jnp.sum(hit, where=mask, dtype=dtype) / tokens

    none = jnp.zeros(mask.shape, bool)
    below, above, *capped = (
        hit[:, None] & mask if hit.ndim == 1 else hit & mask for hit in clipped or (none, none)
    )
    per_row = jnp.sum(below | above, -1, dtype=dtype) / jnp.maximum(length, 1)
    metrics |= {
        "clip_frac": share(below | above),
        "clip_frac_low": share(below),
        "clip_frac_high": share(above),
        "clip_frac_seq": per_row.sum() / rows,
    }
    return metrics | ({"clip_frac_delta": share(capped[0])} if capped else {})


LOSSES: dict[str, Callable[..., tuple[Mean, Metrics]]] = {
    "gspo": gspo,
    "gspo_token": gspo_token,
    "grpo": grpo,
    "ppo": ppo,
    "reinforce": reinforce,
}
"""Every policy loss by its name in the configuration."""

RATIO = {
    "gspo": "sequence",
    "gspo_token": "sequence",
    "grpo": "token",
    "ppo": "token",
    "reinforce": "token",
}
"""What one importance ratio covers. Clip ranges of the two kinds differ by three decades."""


def loss_options(name: str) -> set[str]:
    """The settings of a loss: its keyword arguments that are numbers, not arrays."""
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"weight"}

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
    clip_low, clip_high    ε_low and ε_high: the ratio is clipped to [1 - ε_low, 1 + ε_high].
    delta     bound above 1 + ε_high for ratios where Â < 0, which are otherwise unbounded: the
              dual clip of Ye et al., 2019, https://arxiv.org/abs/1912.09729 (`clip_ratio_c` in
              verl, `delta` in TRL). None is no bound.
    weight    fixed factor on each response's or token's term, for example one of `mismatch`. It
              does not change what the mean divides by.

and returns -J as a `Mean` with its diagnostics. `Mean.weight` depends on the mask alone. A response
without tokens adds nothing and is not counted, so rows of padding are free (verl's choice; TRL
counts them). Half precision is computed in float32; float64 stays float64. What may be added to a
policy loss (`kl`, `entropy_bonus`, `value`) is in `penalties` and can be imported from here too.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from gspo_jax.algo.masked import (
    Mask,
    Mean,
    Metrics,
    PerRowOrToken,
    PerToken,
    diagnostics,
    float_dtype,
    log_ratio,
    mean_over_constant,
    mean_over_responses,
    mean_over_rows,
    mean_over_tokens,
    on_mask,
    row_mean,
    saturated,
)
from gspo_jax.algo.penalties import entropy_bonus as entropy_bonus
from gspo_jax.algo.penalties import kl as kl
from gspo_jax.algo.penalties import token_kl as token_kl
from gspo_jax.algo.penalties import value as value


def gspo(
    logp: PerToken,
    old_logp: PerToken | None,
    adv: PerRowOrToken,
    mask: Mask,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    delta: float | None = None,
    weight: PerRowOrToken | None = None,
) -> tuple[Mean, Metrics]:
    """Group Sequence Policy Optimization: one clipped importance ratio per response.

        sᵢ(θ) = exp( 1/|yᵢ| Σₜ log [π_θ(yᵢₜ|·) / π_old(yᵢₜ|·)] )            (7)
        J(θ)  = E[ min( sᵢ Âᵢ, clip(sᵢ, 1 - ε_low, 1 + ε_high) Âᵢ ) ]       (5)

    Zheng et al., 2025, https://arxiv.org/abs/2507.18071; clip range from §5.1, 1000x smaller than
    GRPO's because sᵢ is a geometric mean. There is no other mean to choose: `luspo` is the loss
    that weighs responses by their length.
    """
    adv = _one_per_row(adv, logp)
    log_s = saturated(row_mean(log_ratio(logp, old_logp, mask), mask))  # (7)
    s, clipped = _clip(log_s, adv, clip_low, clip_high, delta)
    return mean_over_rows(-s * adv, mask, weight), diagnostics(log_s, mask, **clipped)  # (5)


def gspo_token(
    logp: PerToken,
    old_logp: PerToken | None,
    adv: PerRowOrToken,
    mask: Mask,
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
    adv, logp = _one_per_token(adv, mask, logp), on_mask(logp, mask)
    log_s = stop_gradient(saturated(row_mean(log_ratio(logp, old_logp, mask), mask)))
    log_s_token = log_s[:, None] + (logp - stop_gradient(logp))  # (14)
    s, clipped = _clip(log_s_token, adv, clip_low, clip_high, delta)
    return mean_over_responses(-s * adv, mask, weight), diagnostics(log_s, mask, **clipped)  # (13)


def luspo(
    logp: PerToken,
    old_logp: PerToken | None,
    adv: PerRowOrToken,
    mask: Mask,
    *,
    clip_low: float = 2e-3,
    clip_high: float = 2.5e-3,
    delta: float | None = None,
    weight: PerRowOrToken | None = None,
) -> tuple[Mean, Metrics]:
    """Length-Unbiased Sequence Policy Optimization: GSPO with each response weighted by |yᵢ|.

        J(θ) = E[ |yᵢ| min( sᵢ Âᵢ, clip(sᵢ, 1 - ε_low, 1 + ε_high) Âᵢ ) ],    sᵢ as in `gspo`

    So the gradient of a token no longer has the factor 1/|yᵢ| that favours short good responses.
    Liu et al., 2026, https://arxiv.org/abs/2602.05261.
    """
    adv = _one_per_row(adv, logp)
    log_s = saturated(row_mean(log_ratio(logp, old_logp, mask), mask))
    s, clipped = _clip(log_s, adv, clip_low, clip_high, delta)
    length = mask.sum(-1, dtype=s.dtype)
    return mean_over_rows(-length * s * adv, mask, weight), diagnostics(log_s, mask, **clipped)


def gmpo(
    logp: PerToken,
    old_logp: PerToken | None,
    adv: PerRowOrToken,
    mask: Mask,
    *,
    log_clip_low: float = 0.4,
    log_clip_high: float = 0.4,
    weight: PerRowOrToken | None = None,
) -> tuple[Mean, Metrics]:
    """Geometric-Mean Policy Optimization: token ratios clipped, then multiplied.

        lᵢₜ  = log [π_θ(yᵢₜ|·) / π_old(yᵢₜ|·)],  ≤ ε_high where Âᵢ > 0, ≥ -ε_low where Âᵢ < 0
        J(θ) = E[ Âᵢ exp( 1/|yᵢ| Σₜ lᵢₜ ) ]

    The range is one of log-ratios: ±0.4 lets wᵢₜ go from 0.67 to 1.49. Without it the loss is
    `gspo` unclipped. Zhao et al., 2025, https://arxiv.org/abs/2507.20673.
    """
    adv = _one_per_row(adv, logp)
    log_w, sign = log_ratio(logp, old_logp, mask), adv[:, None]
    above, below = (sign > 0) & (log_w > log_clip_high), (sign < 0) & (log_w < -log_clip_low)
    log_w = jnp.where(above, log_clip_high, jnp.where(below, -log_clip_low, log_w))
    log_s = saturated(row_mean(log_w, mask))
    loss = mean_over_rows(-jnp.exp(log_s) * adv, mask, weight)
    return loss, diagnostics(log_s, mask, low=below, high=above)


def grpo(
    logp: PerToken,
    old_logp: PerToken | None,
    adv: PerRowOrToken,
    mask: Mask,
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
    """
    objective, metrics = _surrogate(logp, old_logp, adv, mask, clip_low, clip_high, delta)
    return mean_over_responses(-objective, mask, weight), metrics  # (3)


def dr_grpo(
    logp: PerToken,
    old_logp: PerToken | None,
    adv: PerRowOrToken,
    mask: Mask,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    max_length: int | None = None,
    weight: PerRowOrToken | None = None,
) -> tuple[Mean, Metrics]:
    """GRPO done right: the sum over tokens divided by a constant, so that length has no effect.

        J(θ) = 1/(B L_max) Σᵢ Σₜ min( wᵢₜ Âᵢₜ, clip(wᵢₜ, 1 - ε_low, 1 + ε_high) Âᵢₜ )

    Meant for `group_centred` advantages. Liu et al., 2025, https://arxiv.org/abs/2503.20783.

    Args:
        max_length: L_max, the longest response that the sampler may give; None is T, the width of
            the arrays, which makes the loss depend on padding.
    """
    objective, metrics = _surrogate(logp, old_logp, adv, mask, clip_low, clip_high, delta)
    return mean_over_constant(-objective, mask, weight, max_length), metrics


def dapo(
    logp: PerToken,
    old_logp: PerToken | None,
    adv: PerRowOrToken,
    mask: Mask,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    delta: float | None = None,
    weight: PerRowOrToken | None = None,
) -> tuple[Mean, Metrics]:
    """DAPO: GRPO's surrogate with the upper clip raised, each token of the batch weighing the same.

        J(θ) = E[ 1/Σᵢ|yᵢ| Σᵢ Σₜ min( wᵢₜ Âᵢₜ, clip(wᵢₜ, 1 - ε_low, 1 + ε_high) Âᵢₜ ) ]      (8)

    Yu et al., 2025, https://arxiv.org/abs/2503.14476; the rest of its recipe is in the data.
    """
    objective, metrics = _surrogate(logp, old_logp, adv, mask, clip_low, clip_high, delta)
    return mean_over_tokens(-objective, mask, weight), metrics  # (8)


def ppo(
    logp: PerToken,
    old_logp: PerToken | None,
    adv: PerRowOrToken,
    mask: Mask,
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
    objective, metrics = _surrogate(logp, old_logp, adv, mask, clip_low, clip_high, delta)
    return mean_over_tokens(-objective, mask, weight), metrics  # (7)


def cispo(
    logp: PerToken,
    old_logp: PerToken | None,
    adv: PerRowOrToken,
    mask: Mask,
    *,
    cap: float = 5.0,
    floor: float = 0.0,
    weight: PerRowOrToken | None = None,
) -> tuple[Mean, Metrics]:
    """CISPO: the likelihood weighted by a truncated ratio, so that no token loses its gradient.

        J(θ) = E[ 1/Σᵢ|yᵢ| Σᵢ Σₜ sg[ clip(wᵢₜ, floor, cap) ] Âᵢₜ log π_θ(yᵢₜ|·) ]

    MiniMax, 2025, https://arxiv.org/abs/2506.13585. The bounds are those of the ratio itself: TRL
    calls the cap `epsilon_high`; verl has floor = 1 - ε_low and cap = 1 + ε_high.
    """
    log_w = stop_gradient(saturated(log_ratio(logp, old_logp, mask)))
    adv, w = _one_per_token(adv, mask, logp), jnp.exp(log_w)
    objective = jnp.clip(w, floor, cap) * adv * on_mask(logp, mask)
    metrics = diagnostics(log_w, mask, low=(adv != 0) & (w < floor), high=(adv != 0) & (w > cap))
    return mean_over_tokens(-objective, mask, weight), metrics


def sapo(
    logp: PerToken,
    old_logp: PerToken | None,
    adv: PerRowOrToken,
    mask: Mask,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    weight: PerRowOrToken | None = None,
) -> tuple[Mean, Metrics]:
    """Soft Adaptive Policy Optimization: a smooth gate instead of a clip.

        f(w) = 4/τ sigmoid( τ (w - 1) ),    τ = τ_pos where Âᵢₜ > 0, else τ_neg
        J(θ) = E[ 1/|yᵢ| Σₜ f(wᵢₜ) Âᵢₜ ]

    f'(1) = 1 whatever τ, so the gradient on-policy is GRPO's; away from 1 it fades in both
    directions. Gao et al., 2025, https://arxiv.org/abs/2511.20347.
    """
    log_w, adv = saturated(log_ratio(logp, old_logp, mask)), _one_per_token(adv, mask, logp)
    tau = jnp.where(adv > 0, tau_pos, tau_neg).astype(log_w.dtype)
    # The gradient of exp(log_sigmoid) has no 1 - sigmoid in it, which float32 cancels to noise.
    gate = 4 / tau * jnp.exp(jax.nn.log_sigmoid(tau * (jnp.exp(log_w) - 1)))
    return mean_over_responses(-gate * adv, mask, weight), diagnostics(log_w, mask)


def reinforce(
    logp: PerToken,
    old_logp: PerToken | None,
    adv: PerRowOrToken,
    mask: Mask,
    *,
    weight: PerRowOrToken | None = None,
) -> tuple[Mean, Metrics]:
    """The score-function gradient, no ratio: J(θ) = E_tokens[ Âᵢₜ log π_θ(yᵢₜ|·) ].

    With Â = 1 its value is the negative log-likelihood of supervised fine-tuning. `old_logp` is
    used for the diagnostics alone. Williams, 1992, https://doi.org/10.1007/BF00992696.
    """
    log_w = saturated(log_ratio(logp, old_logp, mask))
    objective = _one_per_token(adv, mask, logp) * on_mask(logp, mask)
    return mean_over_tokens(-objective, mask, weight), diagnostics(log_w, mask)


def _clip(log_ratio, adv, clip_low, clip_high, delta):
    """The ratio that min(ratio Â, clip(ratio) Â) selects, and where it is a bound, by metric name.

    Decided in log space, where a band of 3e-4 keeps its resolution. A selected bound is a
    constant, so the gradient is exactly 0 there.
    """
    low, high = jnp.asarray(clip_low, log_ratio.dtype), jnp.asarray(clip_high, log_ratio.dtype)
    below = (adv < 0) & (log_ratio < jnp.log1p(-low))
    above = (adv > 0) & (log_ratio > jnp.log1p(high))
    ratio = jnp.where(above, 1 + high, jnp.where(below, 1 - low, jnp.exp(log_ratio)))
    clipped = {"low": below, "high": above}
    if delta is not None:
        if delta <= 1 + clip_high:
            raise ValueError(f"delta={delta} must be above 1 + clip_high = {1 + clip_high}.")
        clipped["delta"] = (adv < 0) & (log_ratio > jnp.log(jnp.asarray(delta, log_ratio.dtype)))
        ratio = jnp.where(clipped["delta"], delta, ratio)
    return ratio, clipped


def _surrogate(logp, old_logp, adv, mask, clip_low, clip_high, delta):
    """min( wᵢₜ Âᵢₜ, clip(wᵢₜ) Âᵢₜ ) at every token, and its diagnostics."""
    log_w, adv = saturated(log_ratio(logp, old_logp, mask)), _one_per_token(adv, mask, logp)
    w, clipped = _clip(log_w, adv, clip_low, clip_high, delta)
    return w * adv, diagnostics(log_w, mask, **clipped)


def _one_per_token(adv, mask, logp):
    """Âᵢₜ, fixed; 0 where `mask` is false."""
    return stop_gradient(on_mask(adv, mask, float_dtype(logp)))


def _one_per_row(adv, logp):
    """Âᵢ, fixed."""
    if adv.ndim != 1:
        raise ValueError(
            f"adv has shape {adv.shape}; gspo, luspo and gmpo take one advantage per response, "
            "[B]. For one per token use gspo_token."
        )
    return stop_gradient(adv.astype(float_dtype(logp)))


LOSSES: dict[str, Callable[..., tuple[Mean, Metrics]]] = {
    loss.__name__: loss
    for loss in (gspo, gspo_token, luspo, gmpo, grpo, sapo, dr_grpo, dapo, ppo, cispo, reinforce)
}
"""Every policy loss by its name in the configuration."""

RATIO = dict.fromkeys(LOSSES, "token")
RATIO |= dict.fromkeys(("gspo", "gspo_token", "luspo", "gmpo"), "sequence")
"""What one importance ratio covers. Clip ranges of the two kinds differ by three decades."""

MEAN = dict.fromkeys(LOSSES, "responses")
MEAN |= dict.fromkeys(("dapo", "ppo", "cispo", "reinforce"), "tokens") | {"dr_grpo": "constant"}
"""What a loss is the mean over, as `penalties.kl` names it."""

"""Weights against data of another policy: the sampler's, or one several updates old.

The sampler's log-probabilities differ from the trainer's by rounding, by quantisation and by the
updates in between. Each function here returns a fixed factor for `weight=` of a policy loss. A
response that is dropped has weight 0 and still counts in the mean (as in TRL): what is left is
not amplified.
"""

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from gspo_jax.algo.masked import Mask, PerRowOrToken, PerToken, log_ratio, row_mean, saturated


def mismatch_weight(
    old_logp: PerToken,
    rollout_logp: PerToken,
    mask: Mask,
    *,
    level: str = "token",
    rule: str = "truncate",
    low: float = 0.0,
    high: float = 2.0,
) -> PerRowOrToken:
    """ρ = π_old / π_rollout, made harmless: corrects for a sampler that is not the trainer.

        level     token      ρᵢₜ                     [B, T]
                  sequence   Πₜ ρᵢₜ, unbiased        [B]
                  geometric  (Πₜ ρᵢₜ)^(1/|yᵢ|)       [B]
        rule      truncate   ρ clipped to [low, high]                   TIS
                  mask       ρ inside [low, high], else 0               MIS, IcePop
                  reject     1 inside [low, high], else 0               rejection

    Typical: token truncate to 2 (verl, slime); sequence mask to 3 (TRL); geometric reject in
    [0.999, 1.001] (verl).

    Raises:
        ValueError: an unknown level or rule.
    """
    log_rho = stop_gradient(log_ratio(old_logp, rollout_logp, mask))
    if level == "sequence":
        log_rho = jnp.sum(log_rho, -1)
    elif level == "geometric":
        log_rho = row_mean(log_rho, mask)
    elif level != "token":
        raise ValueError(f"level={level!r} is not known; choose token, sequence or geometric.")
    bounds = jnp.asarray([low, high], log_rho.dtype)
    inside = (log_rho >= jnp.log(bounds[0])) & (log_rho <= jnp.log(bounds[1]))
    rho = jnp.exp(saturated(log_rho))
    match rule:
        case "truncate":
            return jnp.clip(rho, *bounds)
        case "mask":
            return jnp.where(inside, rho, 0)
        case "reject":
            return inside.astype(rho.dtype)
    raise ValueError(f"rule={rule!r} is not known; choose truncate, mask or reject.")


def off_policy_weight(
    logp: PerToken,
    rollout_logp: PerToken,
    adv: Float[Array, " B"],
    mask: Mask,
    *,
    delta: float,
) -> Float[Array, " B"]:
    """0 for bad responses that the policy has left behind, 1 for all others.

        0 where Âᵢ < 0 and 1/|yᵢ| Σₜ log [π_rollout(yᵢₜ|·) / π_θ(yᵢₜ|·)] > δ

    Pushing down what is already unlikely is what destabilises; good responses are kept however
    far. Equation (9) of DeepSeek-V3.2, https://arxiv.org/abs/2512.02556; TRL's
    `off_policy_mask_threshold` (its example is 0.5), slime's OPSM (1e-4).
    """
    drift = -row_mean(stop_gradient(log_ratio(logp, rollout_logp, mask)), mask)
    return 1 - ((adv < 0) & (drift > delta)).astype(drift.dtype)

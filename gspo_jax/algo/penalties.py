"""What may be added to a policy loss: the distance to a reference, entropy, the critic's error.

Called and returned as in `losses`: a `Mean` to be minimised and its diagnostics.
"""

from functools import partial

import jax.numpy as jnp
from jax.lax import stop_gradient

from gspo_jax.algo.masked import (
    Mask,
    Mean,
    Metrics,
    PerToken,
    log_ratio,
    mean_over_constant,
    mean_over_responses,
    mean_over_tokens,
    on_mask,
    saturated,
)


def kl(
    logp: PerToken,
    ref_logp: PerToken,
    mask: Mask,
    kind: str = "k3",
    *,
    over: str = "responses",
    max_length: int | None = None,
    old_logp: PerToken | None = None,
) -> tuple[Mean, Metrics]:
    """KL(π_θ ‖ π_ref) estimated from the sampled tokens, as a loss.

        d = log π_ref - log π_θ;    k1 = -d,    k2 = d²/2,    k3 = exp(d) - 1 - d

    k1 and k3 are unbiased as values. As a *loss* over fixed samples of π_θ, k2 has the gradient of
    KL(π_θ ‖ π_ref), k3 that of KL(π_ref ‖ π_θ), and k1 has none in expectation: put k1 in the
    reward (`advantages.token_rewards`). Schulman, 2020, http://joschu.net/blog/kl-approx.html.

    Args:
        over: "responses" for the mean of their token means, "tokens", or "constant" for the sum
            over B `max_length` as in `losses.dr_grpo`; in a run that of the policy loss.
        max_length: with "constant", the longest response there may be; None is T.
        old_logp: if given, each token counts w = π_θ / π_old times, which makes the gradient of k3
            that of KL(π_θ ‖ π_ref) (TRL's `use_bias_correction_kl`, with the ratio of the token).

    Returns:
        The mean to be minimised, and {"kl": the mean over tokens}.
    """
    estimate = token_kl(logp, ref_logp, mask, kind)
    if old_logp is not None:
        estimate *= jnp.exp(saturated(log_ratio(logp, old_logp, mask)))
    means = {
        "responses": mean_over_responses,
        "tokens": mean_over_tokens,
        "constant": partial(mean_over_constant, weight=None, max_length=max_length),
    }
    if over not in means:
        raise ValueError(f"kl over={over!r} is not known; choose from {list(means)}.")
    total, tokens = mean_over_tokens(stop_gradient(estimate), mask)
    return means[over](estimate, mask), {"kl": total / jnp.maximum(tokens, 1)}


def token_kl(logp: PerToken, ref_logp: PerToken, mask: Mask, kind: str = "k3") -> PerToken:
    """The estimate of `kl` at every token, 0 where `mask` is false."""
    d = saturated(-log_ratio(logp, ref_logp, mask))
    match kind:
        case "k1":
            return -d
        case "k2":
            return d * d / 2
        case "k3":
            return jnp.expm1(d) - d
    raise ValueError(f"kl kind={kind!r} is not known; choose k1, k2 or k3.")


def entropy_bonus(entropy: PerToken, mask: Mask) -> tuple[Mean, Metrics]:
    """Minus the mean entropy per token, to be added to a loss with a positive coefficient."""
    loss = mean_over_tokens(-on_mask(entropy, mask), mask)
    return loss, {"entropy": stop_gradient(-loss.total) / jnp.maximum(loss.weight, 1)}


def value(
    predicted: PerToken,
    old_value: PerToken,
    returns: PerToken,
    mask: Mask,
    *,
    clip: float | None = 0.2,
) -> tuple[Mean, Metrics]:
    """The critic's term of PPO: half the squared error, pessimistic about moving far.

        V_c  = V_old + clip( V - V_old, -ε, ε )
        L(θ) = 1/2 mean_tokens max( (V - R)², (V_c - R)² )

    Schulman et al., 2017, as in their code; verl clips at 0.5, TRL at 0.2. None is plain MSE.
    """
    predicted = on_mask(predicted, mask)
    old_value = stop_gradient(on_mask(old_value, mask, predicted.dtype))
    returns = stop_gradient(on_mask(returns, mask, predicted.dtype))
    error, far = (predicted - returns) ** 2, jnp.zeros(mask.shape, bool)
    if clip is not None:
        near = old_value + jnp.clip(predicted - old_value, -clip, clip)
        far = (near - returns) ** 2 > error
        error = jnp.where(far, (near - returns) ** 2, error)
    clipped, tokens = mean_over_tokens(far.astype(error.dtype), mask)
    metrics = {"value_clip_frac": clipped / jnp.maximum(tokens, 1)}
    return mean_over_tokens(error / 2, mask), metrics

"""From rewards to advantages: pure functions of arrays, usable inside and outside jit.

A NaN reward means "not scored": its advantage is 0 and no baseline contains it. A group whose
rewards are all equal gives exactly 0, not the rounding error of its mean divided by a small std.
Half precision is computed in float32; float64 stays float64. Means are of what rewards have above
the lowest of them, and squares of shares of the largest, so that neither a large offset (1e7 + 1 of
1e7) nor a large scale (1e20, whose square is none in float32) costs digits.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gspo_jax.algo.masked import float_dtype


def group_normalised(
    reward: Float[Array, " B"],
    group_size: int | None,
    *,
    ddof: int = 1,
    eps: float = 1e-4,
    scale: str = "group",
    groups: Int[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Âᵢ = (rᵢ - mean_group(r)) / (std_group(r) + eps), the advantage of GRPO and GSPO.

    Equation (6) of https://arxiv.org/abs/2507.18071, which says neither `ddof` nor `eps`; the
    defaults are TRL's (verl has eps = 1e-6). With ddof = 0 all advantages grow by √(G/(G-1)).

    Args:
        reward: one score per response; NaN means not scored.
        group_size: G; row b belongs to group b // G.
        ddof: 1 for the sample standard deviation, 0 for that of the population.
        eps: added to the standard deviation, in units of reward.
        scale: whose standard deviation: "group", "batch" (of all rewards), or "none" for 1.
        groups: the group of each row as any integers, instead of `group_size`.

    Raises:
        ValueError: B is not a multiple of `group_size`, or `scale` is none of the three.
    """
    centred, count, over_group = _centre(reward, group_size, groups)
    match scale:
        case "group":
            return _scaled(centred, centred, count, over_group, ddof, eps)
        case "batch":
            return _scaled(centred, *_centre(reward, reward.size, None), ddof, eps)
        case "none":
            return centred
    raise ValueError(f"scale={scale!r} is not known; choose group, batch or none.")


def group_centred(
    reward: Float[Array, " B"],
    group_size: int | None,
    *,
    groups: Int[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Âᵢ = rᵢ - mean_group(r), the advantage of Dr. GRPO (https://arxiv.org/abs/2503.20783)."""
    return _centre(reward, group_size, groups)[0]


def leave_one_out(
    reward: Float[Array, " B"],
    group_size: int | None,
    *,
    groups: Int[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Âᵢ = rᵢ - mean of the others in the group, the unbiased baseline of RLOO.

    Equal to G/(G-1) times `group_centred`. Ahmadian et al., 2024,
    https://arxiv.org/abs/2402.14740. A response that is alone in its group gets 0.
    """
    centred, count, _ = _centre(reward, group_size, groups)
    return centred * count / jnp.maximum(count - 1, 1)


def reinforce_pp(
    reward: Float[Array, " B"],
    group_size: int | None,
    *,
    eps: float = 1e-8,
    groups: Int[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """REINFORCE++ with baseline: the group's mean is subtracted, the batch's spread divides.

    Hu et al., 2025, https://arxiv.org/abs/2501.03262. Without a baseline it is `batch_whitened`.
    """
    centred = _centre(reward, group_size, groups)[0]
    whitened = batch_whitened(jnp.where(jnp.isnan(reward), jnp.nan, centred), eps=eps)
    return jnp.where(centred == 0, 0, whitened)  # no spread, no signal: not even rounding


def batch_whitened(
    x: Float[Array, " B"] | Float[Array, "B T"],
    mask: Bool[Array, "B T"] | None = None,
    *,
    eps: float = 1e-8,
) -> Float[Array, " B"] | Float[Array, "B T"]:
    """(x - mean) / √(var + eps) over all that is true in `mask` and not NaN; 0 elsewhere.

    Of rewards [B] it is the advantage of REINFORCE++, of advantages per token [B, T] the
    whitening of PPO. The variance is the sample's, as in TRL and verl.
    """
    x = x.astype(float_dtype(x))
    valid = ~jnp.isnan(x) if mask is None else mask & ~jnp.isnan(x)
    count = valid.sum(dtype=x.dtype)
    lowest = jnp.min(x, where=valid, initial=jnp.inf)
    spread = jnp.max(x, where=valid, initial=-jnp.inf) > lowest
    above = jnp.where(valid & spread, x - lowest, 0)
    centred = jnp.where(valid, above - jnp.sum(above) / jnp.maximum(count, 1), 0)
    largest = jnp.where(spread, jnp.max(jnp.abs(centred)), 1)
    unit = centred / largest
    variance = jnp.sum(unit**2) / jnp.maximum(count - 1, 1)  # in units of largest²
    return jnp.where(valid & spread, unit * jax.lax.rsqrt(variance + eps / largest / largest), 0)


def weighted_sum(rewards: Float[Array, "B F"], weights: Float[Array, " F"]) -> Float[Array, " B"]:
    """Σ_f w_f r_f over the functions that scored; NaN where none did."""
    scored = ~jnp.isnan(rewards)
    total = jnp.sum(rewards * weights[None, :].astype(rewards.dtype), axis=1, where=scored)
    return jnp.where(scored.any(axis=1), total, jnp.nan)


def normalise_then_sum(
    rewards: Float[Array, "B F"],
    weights: Float[Array, " F"],
    group_size: int,
    *,
    ddof: int = 1,
    eps: float = 1e-4,
    scale: str = "group",
) -> Float[Array, " B"]:
    """The weighted sum of each function's `group_normalised`, normalised over the batch (GDPO).

    So that each function counts by its weight, whatever its units. Liu et al., 2026,
    https://arxiv.org/abs/2601.05242; TRL's `multi_objective_aggregation="normalize_then_sum"`.
    """
    normalise = partial(group_normalised, ddof=ddof, eps=eps)
    by_function = [normalise(column, group_size, scale=scale) for column in rewards.T]
    by_function = jnp.where(jnp.isnan(rewards), jnp.nan, jnp.stack(by_function, axis=1))
    total = weighted_sum(by_function, weights)
    return normalise(total, total.size)


def gae(
    reward: Float[Array, "B T"],
    value: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    gamma: float,
    lam: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimation over the tokens of each response.

        δₜ = rₜ + γ Vₜ₊₁ - Vₜ,    Âₜ = δₜ + γλ Âₜ₊₁,    returns = Â + V

    V after the last token is 0. Tokens outside the mask are stepped over, wherever they lie: the
    next value and the next advantage are those of the next true token. Schulman et al., 2015,
    https://arxiv.org/abs/1506.02438.

    Returns:
        The advantages and the returns (the critic's targets), both 0 outside the mask.
    """
    dtype = float_dtype(reward)
    reward = jnp.where(mask, reward.astype(dtype), 0)
    value = jnp.where(mask, value.astype(dtype), 0)

    def step(after, now):
        next_value, next_adv = after
        r, v, real = now
        adv = r + gamma * next_value - v + gamma * lam * next_adv
        return (jnp.where(real, v, next_value), jnp.where(real, adv, next_adv)), adv

    end = jnp.zeros(reward.shape[0], dtype)
    _, adv = jax.lax.scan(step, (end, end), (reward.T, value.T, mask.T), reverse=True)
    adv = jnp.where(mask, adv.T, 0)
    return adv, adv + value


def token_rewards(
    reward: Float[Array, " B"],
    kl: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    coef: float,
) -> Float[Array, "B T"]:
    """rₜ = -coef klₜ, plus the response's reward on its last token: the KL inside the reward.

    For `gae`; its sum over t is the penalised reward per response for the group advantages. `kl`
    is `penalties.token_kl(old_logp, ref_logp, mask, "k1")`. A response that is not scored gets 0.
    """
    penalty = jnp.where(mask, kl.astype(float_dtype(reward)), 0)
    last = mask & (jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)
    score = jnp.where(last, reward[:, None].astype(penalty.dtype), 0)
    return jnp.where(jnp.isnan(reward)[:, None], 0, score - coef * penalty)


def adapted_coef(coef: float, kl: float, *, target: float, horizon: float, count: int) -> float:
    """β (1 + clip(KL / target - 1, ±0.2) count / horizon): drives the KL to its target.

    Ziegler et al., 2019, https://arxiv.org/abs/1909.08593; `count` is the responses since the
    last change.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * count / horizon)


def soft_overlong(length: Int[Array, " B"], *, max_length: int, buffer: int) -> Float[Array, " B"]:
    """DAPO's punishment of long responses, in tokens: 0, then falling to -1 over the buffer.

        0 up to L_max - L_buffer,    (L_max - L_buffer - |y|) / L_buffer up to L_max,    -1 beyond

    Equation (13) of https://arxiv.org/abs/2503.14476. To be added to the reward.
    """
    over = (max_length - buffer - length).astype(jnp.float32)
    return jnp.clip(over / max(buffer, 1), -1, 0)


def _centre(reward, group_size, groups):
    """Reward minus the mean of its group, how many rows of the group are scored, and the group sum.

    Sums run over a fixed order of rows rather than a scatter-add, whose order may vary on a GPU.
    """
    reward = reward.astype(float_dtype(reward))
    if groups is None and (not group_size or group_size < 1 or reward.size % group_size):
        raise ValueError(
            f"{reward.size} rewards do not split into groups of group_size={group_size}; "
            "give every prompt the same number of responses, or name the groups."
        )

    def over_group(reduce, x, initial=0.0):
        if groups is None:
            rows = reduce(x.reshape(-1, group_size), axis=1, initial=initial)
            return jnp.repeat(rows, group_size)
        same = groups[:, None] == groups[None, :]
        return reduce(jnp.broadcast_to(x, same.shape), axis=1, where=same, initial=initial)

    scored = ~jnp.isnan(reward)
    count = over_group(jnp.sum, scored.astype(reward.dtype))
    highest = over_group(jnp.max, jnp.where(scored, reward, -jnp.inf), -jnp.inf)
    lowest = over_group(jnp.min, jnp.where(scored, reward, jnp.inf), jnp.inf)
    above = jnp.where(scored & (highest > lowest), reward - lowest, 0)
    mean = over_group(jnp.sum, above) / jnp.maximum(count, 1)
    centred = jnp.where(scored, above - mean, 0)
    return centred, count, over_group


def _scaled(adv, centred, count, over_group, ddof, eps):
    """`adv` over the standard deviation of what `_centre` returned."""
    # Where there is no spread `adv` is 0; the 1 keeps eps = 0 from making it 0 / 0.
    largest = over_group(jnp.max, jnp.abs(centred))
    unit = centred / jnp.where(largest > 0, largest, 1)
    variance = over_group(jnp.sum, unit**2) / jnp.maximum(count - ddof, 1)
    return adv / jnp.where(largest > 0, largest * jnp.sqrt(variance) + eps, 1)


ADVANTAGES = {
    "group_normalised": group_normalised,
    "group_centred": group_centred,
    "leave_one_out": leave_one_out,
    "reinforce_pp": reinforce_pp,
}
"""What makes advantages [B] of rewards [B] and `group_size`, by its name in the configuration."""

BY_FUNCTION = {"normalise_then_sum": normalise_then_sum}
"""What makes them of the rewards of each function, [B, F], their weights and `group_size`."""

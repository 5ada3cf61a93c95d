"""From rewards to advantages: pure functions of arrays, usable inside and outside jit.

A NaN reward means "not scored": its advantage is 0 and no baseline contains it. A group whose
rewards are all equal gives exactly 0, not the rounding error of its mean divided by a small std.
Half precision is computed in float32; float64 stays float64.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def group_normalised(
    reward: Float[Array, " B"],
    group_size: int | None,
    *,
    ddof: int = 1,
    eps: float = 1e-4,
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
        groups: the group of each row as any integers, instead of `group_size`.

    Raises:
        ValueError: B is not a multiple of `group_size`.
    """
    centred, count, over_group = _centre(reward, group_size, groups)
    variance = over_group(jnp.sum, centred**2) / jnp.maximum(count - ddof, 1)
    # Where a group has no spread `centred` is 0; the 1 keeps eps = 0 from making it 0 / 0.
    return centred / jnp.where(variance > 0, jnp.sqrt(variance) + eps, 1)


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
    dtype = _float_dtype(reward)
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


def _centre(reward, group_size, groups):
    """Reward minus the mean of its group, how many rows of the group are scored, and the group sum.

    Sums run over a fixed order of rows rather than a scatter-add, whose order may vary on a GPU.
    """
    reward = reward.astype(_float_dtype(reward))
    if groups is not None:
        same = groups[:, None] == groups[None, :]

        def over_group(reduce, x, initial=0.0):
            return reduce(jnp.broadcast_to(x, same.shape), axis=1, where=same, initial=initial)

    else:
        if not group_size or group_size < 1 or reward.size % group_size:
            raise ValueError(
                f"{reward.size} rewards do not split into groups of group_size={group_size}; "
                "give every prompt the same number of responses, or name the groups."
            )

        def over_group(reduce, x, initial=0.0):
            rows = reduce(x.reshape(-1, group_size), axis=1, initial=initial)
            return jnp.repeat(rows, group_size)

    scored = ~jnp.isnan(reward)
    count = over_group(jnp.sum, scored.astype(reward.dtype))
    mean = over_group(jnp.sum, jnp.where(scored, reward, 0)) / jnp.maximum(count, 1)
    highest = over_group(jnp.max, jnp.where(scored, reward, -jnp.inf), -jnp.inf)
    lowest = over_group(jnp.min, jnp.where(scored, reward, jnp.inf), jnp.inf)
    centred = jnp.where(scored & (highest > lowest), reward - mean, 0)
    return centred, count, over_group


def _float_dtype(x):
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32

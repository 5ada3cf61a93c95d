"""Advantages by hand and by identity."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gspo_jax.algo.advantages import (
    ADVANTAGES,
    adapted_coef,
    batch_whitened,
    gae,
    group_centred,
    group_normalised,
    leave_one_out,
    normalise_then_sum,
    reinforce_pp,
    soft_overlong,
    token_rewards,
    weighted_sum,
)

NAN = float("nan")
GROUP = list(ADVANTAGES.values())
some = settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # failing, the first example says enough
)
rewards_of_two_groups = st.lists(st.floats(-3, 3, width=16), min_size=8, max_size=8).map(jnp.array)


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def test_group_normalised_by_hand():
    reward = jnp.array([1.0, 0, 1, 0])
    # deviation 1/2; sample std sqrt(4 * 1/4 / 3) = 0.57735, population std 1/2
    signs = np.array([1, -1, 1, -1])
    for options, size in [
        ({"eps": 0.0}, 0.866025403784),
        ({}, 0.865875429761),
        ({"ddof": 0, "eps": 0.0}, 1.0),
    ]:
        np.testing.assert_allclose(group_normalised(reward, 4, **options), size * signs, atol=1e-12)


@pytest.mark.parametrize(("ddof", "best"), [(1, 2.474874), (0, 2.645751)])
def test_one_success_in_eight(ddof, best):
    reward = jnp.zeros(8).at[3].set(1.0)
    np.testing.assert_allclose(group_normalised(reward, 8, ddof=ddof, eps=0.0)[3], best, atol=1e-6)


def test_groups_are_consecutive_rows_and_do_not_meet():
    reward = jnp.array([1.0, 3, 10, 50])
    np.testing.assert_allclose(group_centred(reward, 2), [-1, 1, -20, 20])
    np.testing.assert_allclose(leave_one_out(reward, 2), [-2, 2, -40, 40])


@pytest.mark.parametrize("advantage", GROUP)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_rewards_give_exactly_zero(advantage, dtype):
    """The float32 mean of seven times 0.7 is not 0.7: the residual over eps would be 0.0006."""
    adv = advantage(jnp.full(14, 0.7, dtype), 7)
    assert adv.dtype == jnp.float32
    np.testing.assert_array_equal(adv, 0)
    one_missing = jnp.full(16, 0.7, dtype).at[jnp.array([2, 15])].set(NAN)
    np.testing.assert_array_equal(advantage(one_missing, 8), 0)


@pytest.mark.parametrize("advantage", GROUP)
def test_a_group_without_spread_is_exactly_zero_beside_groups_with_spread(advantage):
    reward = jnp.array([0.1, 0.7, 0.3, 0.7, 0.7, 0.7, 0.9, 0.2, 0.4], jnp.float32)
    adv = np.asarray(advantage(reward, 3))
    np.testing.assert_array_equal(adv[3:6], 0)
    assert np.all(np.delete(adv, [3, 4, 5]) != 0)


@pytest.mark.parametrize("advantage", [group_normalised, group_centred, leave_one_out])
def test_a_response_that_is_not_scored_gets_zero_and_moves_no_baseline(advantage):
    reward = jnp.array([1.0, NAN, 4, 2, NAN, NAN, NAN, NAN, 5, 5, NAN, 5])
    adv = np.asarray(advantage(reward, 4))
    np.testing.assert_allclose(adv[[0, 2, 3]], advantage(reward[jnp.array([0, 2, 3])], 3))
    np.testing.assert_array_equal(np.delete(adv, [0, 2, 3]), 0)


@some
@given(rewards_of_two_groups)
def test_a_group_sums_to_zero_and_its_squares_to_its_degrees_of_freedom(reward):
    for ddof in (1, 0):
        adv = np.asarray(group_normalised(reward, 4, ddof=ddof, eps=0.0)).reshape(2, 4)
        np.testing.assert_allclose(adv.sum(1), 0, atol=1e-9)
        for group, rewards in zip(adv, np.asarray(reward).reshape(2, 4), strict=True):
            expected = 4 - ddof if np.ptp(rewards) > 0 else 0
            np.testing.assert_allclose((group**2).sum(), expected, rtol=1e-9)


@some
@given(rewards_of_two_groups, st.floats(0.1, 10), st.floats(-5, 5))
def test_shifting_and_scaling_rewards_leaves_normalised_advantages(reward, scale, shift):
    reward = jnp.round(reward, 2)  # spread or none, not a spread of rounding
    plain = group_normalised(reward, 4, eps=0.0)
    np.testing.assert_allclose(
        group_normalised(scale * reward, 4, eps=0.0), plain, rtol=1e-6, atol=1e-9
    )
    np.testing.assert_allclose(group_normalised(-reward, 4, eps=0.0), -plain, atol=1e-9)
    shifted = jnp.where(jnp.ptp(reward.reshape(2, 4), 1).repeat(4) > 0, reward + shift, reward)
    np.testing.assert_allclose(group_normalised(shifted, 4, eps=0.0), plain, rtol=1e-6, atol=1e-9)


@some
@given(rewards_of_two_groups)
def test_leave_one_out_is_the_mean_of_the_others_and_four_thirds_of_centred(reward):
    rows = np.asarray(reward).reshape(2, 4)
    others = (rows.sum(1, keepdims=True) - rows) / 3
    got = leave_one_out(reward, 4)
    np.testing.assert_allclose(got, (rows - others).ravel(), atol=1e-12)
    np.testing.assert_allclose(got, 4 / 3 * group_centred(reward, 4), atol=1e-12)


def test_scale_by_batch_divides_by_the_spread_of_all_rewards():
    reward = jnp.array([1.0, 3, 10, 50])
    std = np.std([1, 3, 10, 50], ddof=1)
    adv = group_normalised(reward, 2, scale="batch", eps=0.5)
    np.testing.assert_allclose(adv, np.array([-1, 1, -20, 20]) / (std + 0.5), rtol=1e-12)
    partly = group_normalised(jnp.array([1.0, 3, NAN, 10, 50, NAN]), 3, scale="batch", eps=0.5)
    np.testing.assert_allclose(partly, [*adv[:2], 0, *adv[2:], 0], rtol=1e-12)


def test_scale_none_is_centred_and_others_are_refused():
    reward = jnp.array([1.0, 3, 10, 50])
    np.testing.assert_array_equal(
        group_normalised(reward, 2, scale="none"), group_centred(reward, 2)
    )
    with pytest.raises(ValueError, match="scale='std' is not known; choose group, batch or none"):
        group_normalised(reward, 2, scale="std")


@pytest.mark.parametrize("advantage", GROUP)
def test_a_group_of_one_gets_zero(advantage):
    with jax.debug_nans(True):
        np.testing.assert_array_equal(advantage(jnp.array([3.0, -2.0]), 1), 0)
    np.testing.assert_array_equal(advantage(jnp.array([3.0, NAN, 5.0, NAN]), 2), 0)


@pytest.mark.parametrize("advantage", GROUP)
def test_rows_that_do_not_fill_groups_are_refused(advantage):
    with pytest.raises(ValueError, match="7 rewards do not split into groups of group_size=3"):
        advantage(jnp.zeros(7), 3)
    with pytest.raises(ValueError, match="group_size=0"):
        advantage(jnp.zeros(7), 0)


@pytest.mark.parametrize("advantage", GROUP)
def test_jit_equals_eager(advantage):
    reward = jnp.array([0.3, 0.9, NAN, 0.1, 0.2, 0.2])
    jitted = jax.jit(advantage, static_argnums=1)
    np.testing.assert_allclose(jitted(reward, 3), advantage(reward, 3), rtol=1e-14)


@pytest.mark.parametrize("advantage", GROUP)
def test_groups_by_id_follow_their_rows(advantage):
    reward = jnp.array([0.3, 0.9, 0.4, NAN, 0.2, 0.5, 1.0, 1.0, 1.0])
    order = jnp.array([8, 3, 1, 5, 0, 7, 2, 6, 4])
    ids = jnp.array([70, 70, 70, -4, -4, -4, 2, 2, 2])[order]
    shuffled = advantage(reward[order], None, groups=ids)
    np.testing.assert_allclose(shuffled, advantage(reward, 3)[order], rtol=1e-12)


def test_large_rewards_keep_their_digits():
    """A million plus [0, 1]: the variance is of what is centred, not E[r²] - E[r]²."""
    reward = jnp.array([1e6, 1e6 + 1, 1e6, 1e6 + 1], jnp.float32)
    got = group_normalised(reward, 4, eps=0.0)
    np.testing.assert_allclose(got, 0.8660254 * np.array([-1, 1, -1, 1]), rtol=1e-6)


OFFSETS = [  # of 1e7 float32 has every integer, of their sum 4e7 + 1 only every fourth
    [1e7 + 1, 1e7, 1e7, 1e7],
    [-1e7 + 1, -1e7, -1e7, -1e7],
    [1e20, 0, 0, 0],  # whose square is infinite
    [1e-30, 0, 0, 0],  # whose square is 0
]


@pytest.mark.parametrize("reward", OFFSETS, ids=["offset", "below", "huge", "tiny"])
def test_neither_an_offset_nor_a_scale_costs_digits(reward):
    """One of four above the rest: centred 3/4 and -1/4 of the distance, which has std 1/2 of it."""
    reward = jnp.array([*reward, NAN, *reward[1:]], jnp.float32)  # and a group without spread
    scored = reward[:4]
    distance = np.float64(scored[0]) - np.float64(scored[1])
    ones = np.array([0.75, -0.25, -0.25, -0.25])
    want = np.array([*ones, 0, 0, 0, 0]) * distance
    for advantage in (group_centred, partial(group_normalised, scale="none")):
        np.testing.assert_allclose(advantage(reward, 4), want, rtol=1e-6)
    np.testing.assert_allclose(leave_one_out(reward, 4), want * 4 / 3, rtol=1e-6)
    ids = jnp.array([3, 3, 3, 3, 1, 1, 1, 1])
    for options in ({"group_size": 4}, {"group_size": None, "groups": ids}):
        got = group_normalised(reward, **options, eps=0.0)
        np.testing.assert_allclose(got, [1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0], rtol=1e-6)
    by_batch = group_normalised(scored, 4, scale="batch", eps=0.0)
    np.testing.assert_allclose(by_batch, 2 * ones, rtol=1e-6)
    np.testing.assert_allclose(batch_whitened(scored, eps=0.0), 2 * ones, rtol=1e-6)
    np.testing.assert_allclose(reinforce_pp(scored, 4, eps=0.0), 2 * ones, rtol=1e-6)


def test_eps_is_in_units_of_reward_whatever_its_size():
    reward = jnp.array([1e7 + 1, 1e7, 1e7, 1e7], jnp.float32)  # std 1/2
    np.testing.assert_allclose(group_normalised(reward, 4, eps=0.5), [0.75, *[-0.25] * 3])
    np.testing.assert_allclose(batch_whitened(reward, eps=0.75), [0.75, *[-0.25] * 3])  # 1/4 + 3/4


@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_batch_whitened_has_mean_zero_and_sample_variance_one_over_what_is_valid(eps):
    x, valid = jnp.array([1.0, NAN, 4, 2, 9]), np.array([0, 2, 3, 4])
    got = np.asarray(batch_whitened(x, eps=eps))
    kept = np.asarray(x)[valid]
    expected = (kept - kept.mean()) / np.sqrt(kept.var(ddof=1) + eps)
    np.testing.assert_allclose(got[valid], expected, rtol=1e-12)
    assert got[1] == 0


def test_batch_whitened_of_tokens_sees_the_mask():
    x = jnp.array([[1.0, 2, NAN], [7, 100, 100]])
    mask = jnp.array([[True, True, False], [True, False, False]])
    got = np.asarray(batch_whitened(x, mask))
    np.testing.assert_allclose(got[mask], batch_whitened(jnp.array([1.0, 2, 7])), rtol=1e-12)
    np.testing.assert_array_equal(got[~mask], 0)


def test_batch_whitened_without_spread_or_without_anything_is_zero():
    for x in ([0.7] * 7, [NAN, NAN], [3.0]):
        np.testing.assert_array_equal(batch_whitened(jnp.array(x, jnp.float32)), 0)


def test_reinforce_pp_divides_the_centred_rewards_by_their_own_spread():
    """Group means 2, 30 and 4 go; the spread is that of [-1, 1, -20, 20, 0, 0] about 0."""
    got = reinforce_pp(jnp.array([1.0, 3, 10, 50, 4, 4]), 2, eps=0.0)
    std = np.sqrt((1 + 1 + 400 + 400) / 5)
    np.testing.assert_allclose(got, np.array([-1, 1, -20, 20, 0, 0]) / std, rtol=1e-12)
    with_nan = reinforce_pp(jnp.array([1.0, NAN, 3, 10, 50, NAN, 4, 4, NAN]), 3, eps=0.0)
    np.testing.assert_allclose(with_nan, np.insert(got, [1, 4, 6], 0), rtol=1e-12)


# Two reward functions of very different spread; the second did not score every response.
BY_FUNCTION = [[1.0, 100], [0, 300], [1, 200], [0, NAN], [NAN, NAN], [1, 500], [0, 900], [0, 400]]


def test_weighted_sum_leaves_out_what_a_function_did_not_score():
    got = weighted_sum(jnp.array(BY_FUNCTION), jnp.array([2.0, 0.01]))
    np.testing.assert_allclose(got, [3, 3, 4, 0, NAN, 7, 9, 4])


def test_normalise_then_sum_puts_functions_on_one_scale():
    """By hand with NumPy: each column in its group, weighted, summed, then over the batch."""
    rewards, weights = np.array(BY_FUNCTION), np.array([2.0, 0.5])
    each = np.zeros_like(rewards)
    for group in (slice(0, 4), slice(4, 8)):
        block = rewards[group]
        std = np.nanstd(block, axis=0, ddof=1)
        each[group] = (block - np.nanmean(block, axis=0)) / (std + 0.1)
    total = np.nansum(each * weights, axis=1)
    total[4] = NAN
    expected = (total - np.nanmean(total)) / (np.nanstd(total, ddof=1) + 0.1)
    got = normalise_then_sum(jnp.array(rewards), jnp.array(weights), 4, eps=0.1)
    np.testing.assert_allclose(got, np.nan_to_num(expected), rtol=1e-12)


def test_units_of_a_function_matter_to_the_sum_and_not_to_normalise_then_sum():
    rewards, weights = jnp.array(BY_FUNCTION), jnp.array([1.0, 1.0])
    larger = rewards * jnp.array([[1.0, 1000.0]])
    a, b = (normalise_then_sum(r, weights, 4, eps=0.0) for r in (rewards, larger))
    np.testing.assert_allclose(a, b, atol=1e-9)
    a, b = (group_normalised(weighted_sum(r, weights), 4, eps=0.0) for r in (rewards, larger))
    assert not np.allclose(a, b, atol=1e-9)


def test_token_rewards_spread_the_kl_and_end_with_the_score():
    reward, mask = jnp.array([2.0, 3.0, NAN]), jnp.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]])
    kl = jnp.where(mask == 1, jnp.array([[0.1, 0.2, 0.3, 0.4]]), NAN)
    got = token_rewards(reward, kl, mask == 1, coef=10.0)
    expected = [[-1, -2 + 2, 0, 0], [-1, 0, -3 + 3, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_token_rewards_of_an_empty_response_are_zero():
    got = token_rewards(jnp.array([2.0]), jnp.ones((1, 3)), jnp.zeros((1, 3), bool), coef=1.0)
    np.testing.assert_array_equal(got, 0)


@pytest.mark.parametrize(("kl", "expected"), [(0.05, 0.198976), (0.3, 0.201024), (0.11, 0.200512)])
def test_adapted_coef_moves_towards_the_target_by_a_fifth_of_a_percent_at_most(kl, expected):
    """β 0.2, target 0.1, 256 of a horizon of 10000: the error is cut at ±0.2."""
    got = adapted_coef(0.2, kl, target=0.1, horizon=1e4, count=256)
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_soft_overlong_counts_tokens():
    """L_max 100, buffer 20: free to 80, half at 90, full at 100 and beyond."""
    length = jnp.array([0, 80, 85, 90, 100, 130])
    got = soft_overlong(length, max_length=100, buffer=20)
    np.testing.assert_allclose(got, [0, 0, -0.25, -0.5, -1, -1])
    hard = soft_overlong(jnp.array([99, 100, 101]), max_length=100, buffer=0)
    np.testing.assert_array_equal(hard, [0, 0, -1])


def test_gae_by_hand():
    adv, returns = gae(
        jnp.array([[0.1, -0.2, 0.0, 1.0]]),
        jnp.array([[0.5, 0.4, 0.3, 0.6]]),
        jnp.ones((1, 4), bool),
        gamma=0.9,
        lam=0.8,
    )
    # delta = [-0.04, -0.33, 0.24, 0.4], discounted by 0.72
    np.testing.assert_allclose(adv, [[-0.0038848, 0.05016, 0.528, 0.4]], atol=1e-12)
    np.testing.assert_allclose(returns, [[0.4961152, 0.45016, 0.828, 1.0]], atol=1e-12)


def test_gae_steps_over_what_is_masked():
    """Holes and tails full of NaN change nothing for the true tokens."""
    tight = gae(
        jnp.array([[0.1, -0.2, 0.0, 1.0]]),
        jnp.array([[0.5, 0.4, 0.3, 0.6]]),
        jnp.ones((1, 4), bool),
        gamma=0.9,
        lam=0.8,
    )
    reward = jnp.array([[NAN, 0.1, -0.2, NAN, NAN, 0.0, 1.0, NAN]])
    value = jnp.array([[NAN, 0.5, 0.4, NAN, NAN, 0.3, 0.6, NAN]])
    mask = ~jnp.isnan(reward)
    for wide, expected in zip(gae(reward, value, mask, gamma=0.9, lam=0.8), tight, strict=True):
        np.testing.assert_allclose(wide[mask], expected[0], atol=1e-12)
        np.testing.assert_array_equal(wide[~mask], 0)


def test_gae_with_lambda_zero_is_the_temporal_difference():
    reward, value, mask = random_tokens()
    adv, _ = gae(reward, value, mask, gamma=0.9, lam=0.0)
    after = np.append(np.asarray(value)[:, 1:], np.zeros((3, 1)), axis=1)
    np.testing.assert_allclose(adv, reward + 0.9 * after - value, rtol=1e-12)


def test_gae_with_lambda_one_is_the_return_minus_the_value():
    reward, value, mask = random_tokens()
    adv, returns = gae(reward, value, mask, gamma=0.9, lam=1.0)
    to_go = np.zeros(np.shape(reward))
    for t in range(5):
        to_go[:, t] = sum(0.9 ** (k - t) * np.asarray(reward)[:, k] for k in range(t, 5))
    np.testing.assert_allclose(adv, to_go - value, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(returns, to_go, rtol=1e-12, atol=1e-12)


def test_gae_without_discount_gives_a_terminal_reward_to_every_token():
    reward = jnp.zeros((1, 4)).at[0, 3].set(2.5)
    mask = jnp.ones((1, 4), bool)
    adv, _ = gae(reward, jnp.zeros((1, 4)), mask, gamma=1.0, lam=1.0)
    np.testing.assert_allclose(adv, 2.5)


def random_tokens():
    rng = np.random.default_rng(3)
    return (*(jnp.array(rng.normal(size=(3, 5))) for _ in range(2)), jnp.ones((3, 5), bool))

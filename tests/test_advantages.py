"""Advantages by hand and by identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo_jax.advantages import gae, group_centred, group_normalised, leave_one_out

NAN = float("nan")
GROUP = [group_normalised, group_centred, leave_one_out]


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


@pytest.mark.parametrize("advantage", GROUP)
def test_a_response_that_is_not_scored_gets_zero_and_moves_no_baseline(advantage):
    reward = jnp.array([1.0, NAN, 4, 2, NAN, NAN, NAN, NAN, 5, 5, NAN, 5])
    adv = np.asarray(advantage(reward, 4))
    np.testing.assert_allclose(adv[[0, 2, 3]], advantage(reward[jnp.array([0, 2, 3])], 3))
    np.testing.assert_array_equal(np.delete(adv, [0, 2, 3]), 0)


@pytest.mark.parametrize("advantage", GROUP)
def test_a_group_of_one_gets_zero(advantage):
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

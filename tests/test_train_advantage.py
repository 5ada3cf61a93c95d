"""What a run makes of rewards and of the KL: parts of `losses` and `advantages` behind settings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gspo_jax import train as loop
from gspo_jax.advantage import by_group
from gspo_jax.algo.losses import LOSSES
from gspo_jax.batch import Completions, Rollout, TrainBatch
from gspo_jax.config.load import load_config
from gspo_jax.errors import ConfigError
from gspo_jax.mesh.sharding import make_mesh, sharding_for
from gspo_jax.start import kl_term
from gspo_jax.update.objective import Forward, Given, Gradients, Objective, measure
from gspo_jax.update.state import init_state

NAN = np.nan
NOTHING = Completions(*(np.zeros((8, 0), kind) for kind in ("i4", "?", "f4")), np.zeros(8, bool))


def test_rewards_of_unequal_units_can_be_normalised_apart():
    """A function in hundreds drowns the other in the sum; apart, each counts by its weight.

    Row 3 was not scored by "b"; "overlong", which is no function of the user's, counts once.
    """
    rewards = {
        "a": np.array([1, 0, 0, 0, 3, 3, 3, 3], np.float32),
        "b": np.array([0, 300, 0, NAN, 0, 0, 100, 0], np.float32),
        "overlong": np.array([0, 0, -1, 0, 0, 0, 0, -0.5], np.float32),
    }
    total = np.nansum([2 * rewards["a"], rewards["b"], rewards["overlong"]], axis=0)
    rollout = Rollout([], [], NOTHING, [], rewards, total.astype(np.float32))
    batch = TrainBatch(
        np.zeros((8, 4), np.int32),
        np.ones(8, np.int32),
        np.full(8, 2, np.int32),
        np.ones((8, 2), bool),
    )
    overrides = ["rollout.group_size=4", "task.rewards=[f.py:a,f.py:b]"]
    overrides += ["task.reward_weights=[2,1]"]

    def adv(name):
        config = load_config(None, [*overrides, f"algo.advantage={name}"])
        none = np.zeros((8, 2), np.float32)
        return by_group(config)(init_state({}, optax.identity()), batch, rollout, none)[0].adv

    def by_hand(column):  # of one group, in float64
        known = column[~np.isnan(column)]
        return (column - known.mean()) / (known.std(ddof=1) + 1e-4) if np.ptp(known) else 0 * column

    together, apart = adv("group_normalised"), adv("normalise_then_sum")
    assert together[1] > 1 and together[0] < 0
    assert apart[0] > apart[1]
    parts = {n: np.concatenate([by_hand(r[:4]), by_hand(r[4:])]) for n, r in rewards.items()}
    total = np.nansum([2 * parts["a"], parts["b"], parts["overlong"]], axis=0)
    np.testing.assert_allclose(apart, by_hand(total), atol=1e-5)


def test_a_response_without_a_reward_is_in_no_functions_baseline_either():
    """Row 3: "b" failed on it under task.reward_errors=unscored, whatever "a" says of it."""
    advs = []
    for value in (1.0, 50.0):
        rewards = {
            "a": np.array([1, 0, 0, value], np.float32),
            "b": np.array([0, 1, 0, NAN], np.float32),
        }
        rollout = Rollout([], [], NOTHING, [], rewards, np.array([1, 1, 0, NAN], np.float32))
        batch = TrainBatch(
            np.zeros((4, 4), np.int32),
            np.ones(4, np.int32),
            np.full(4, 2, np.int32),
            np.ones((4, 2), bool),
        )
        settings = ["rollout.group_size=4", "algo.advantage=normalise_then_sum"]
        judge = by_group(load_config(None, [*settings, "task.rewards=[f.py:a,f.py:b]"]))
        none = np.zeros((4, 2), np.float32)
        advs.append(judge(init_state({}, optax.identity()), batch, rollout, none)[0].adv)
    np.testing.assert_array_equal(*advs)
    assert advs[0][3] == 0 and advs[0][0] > 0 > advs[0][2]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("loss", "over"),
    [("gspo", "responses"), ("grpo", "responses"), ("dapo", "tokens"), ("dr_grpo", "constant")],
)
def test_the_kl_of_a_run_is_the_mean_over_what_its_loss_is_the_mean_over(loss, over):
    """Rows of 1, 4 and 2 tokens, one with a hole, d = log π_ref - log π_θ per token; k2 = d²/2.

    The metric `kl` is the mean over tokens whatever the loss has.
    """
    mask = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]], bool)
    d = np.where(mask, np.arange(1.0, 13).reshape(3, 4) / 10, NAN).astype(np.float32)
    k2 = np.where(mask, d.astype(float) ** 2 / 2, 0)
    want = {
        "responses": np.mean(k2.sum(1) / mask.sum(1)),
        "tokens": k2.sum() / mask.sum(),
        "constant": k2.sum() / (3 * 5),
    }[over]
    options = ["algo.kl.coef=0.5", "algo.kl.kind=k2", "rollout.max_completion_length=5"]
    options += ["algo.loss.max_length=5"] if loss == "dr_grpo" else []
    config = load_config(None, [f"algo.loss.name={loss}", *options])
    goal = Objective(LOSSES[loss], kl_coef=0.5, kl=kl_term(config))
    batch = TrainBatch(
        jnp.zeros((3, 6), jnp.int32),
        jnp.ones(3, jnp.int32),
        jnp.array([1, 4, 3]),
        jnp.asarray(mask),
        jnp.zeros(3),
    )
    logp = jnp.where(mask, -1.0, NAN)
    at, given = Forward(logp, jnp.where(mask, 1.0, NAN)), Given(logp, logp + d)
    metrics, _ = measure(Gradients({"w": jnp.zeros(1)}), at, batch, given, goal)
    np.testing.assert_allclose(metrics["loss"].value, 0.5 * want, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"].value, k2.sum() / mask.sum(), rtol=1e-5)


def test_a_steered_penalty_follows_its_target_by_the_published_rule():
    """β₊ = β (1 + clip(KL/target - 1, ±0.2) n/10,000) with n = 800 responses a step."""
    options = ["algo.kl.coef=0.02", "algo.kl.placement=reward", "algo.kl.target=0.1"]
    options += ["rollout.prompts=200", "rollout.group_size=4"]
    config = load_config(None, options)
    optimizer = optax.identity()
    everywhere = sharding_for((), make_mesh(data=1), ())
    state = jax.device_put(init_state({}, optimizer, kl_coef=config.algo.kl.coef), everywhere)
    for kl, factor in ((0.0, 0.984), (0.105, 1.004), (5.0, 1.016), (0.1, 1.0)):
        before, state = float(state.kl_coef), loop.steer(config, state, {"kl": kl})
        assert float(state.kl_coef) == pytest.approx(before * factor, rel=1e-6)
    fixed = init_state({}, optimizer)
    assert loop.steer(config, fixed, {"kl": 5.0}) is fixed


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["algo.kl.target=0.1"], "algo.kl.target=0.1: steers the weight of a penalty in the"),
        (
            ["algo.kl.coef=0.1", "algo.kl.placement=reward", "algo.advantage=normalise_then_sum"],
            "algo.kl.placement=reward: normalise_then_sum",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, says):
    with pytest.raises(ConfigError, match=says):
        load_config(None, overrides)

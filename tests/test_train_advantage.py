"""What a run makes of rewards and of the KL: parts of `losses` and `advantages` behind settings."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gspo_jax import train as loop
from gspo_jax.advantage import by_group, by_token, make_advantage
from gspo_jax.algo.losses import LOSSES
from gspo_jax.batch import Completions, Problem, Rollout, TrainBatch
from gspo_jax.config.load import load_config
from gspo_jax.errors import ConfigError
from gspo_jax.mesh.sharding import make_mesh, sharding_for
from gspo_jax.policy import Policy
from gspo_jax.rollout.train_rows import to_train_batch
from gspo_jax.start import kl_term
from gspo_jax.update.critic import Critic
from gspo_jax.update.objective import CriticTerm, Forward, Given, Gradients, Objective, measure
from gspo_jax.update.programs import LogProbs, Programs
from gspo_jax.update.state import CriticState, init_state

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


class Even(Programs):
    """Every token has the log-probability that stands for the parameters."""

    def logps(self, params, batch):
        assert (params == -1) == (batch.routing is None)  # the reference routes for itself
        return LogProbs(jnp.full(batch.mask.shape, params))


def some_policy():
    """Of which the place of its rows is all that is asked."""
    return Policy(*nnx.split(Critic(1)), None, make_mesh(data=1), "float32", Path())


def scored_rollout(reward):
    """Two prompts with two responses of 1, 3, 2 and 2 tokens, and these rewards."""
    mask = np.arange(3)[None] < np.array([1, 3, 2, 2])[:, None]
    tokens, routing = np.ones((4, 3), np.int32), np.zeros((4, 4, 1, 1), np.int16)
    sampled = Completions(tokens, mask, tokens / np.float32(9), np.zeros(4, bool), routing)
    problems, reward = [Problem("a", "?"), Problem("b", "?")], np.array(reward, np.float32)
    return Rollout(problems, [[5], [6]], sampled, ["x"] * 4, {"f": reward}, reward)


@pytest.mark.parametrize(("placement", "coef"), [("loss", None), ("reward", None), ("reward", 4.0)])
def test_the_kl_is_taken_from_the_reward_or_from_the_loss_and_never_from_both(placement, coef):
    """log π = -0.75 and log π_ref = -1: 0.25 a token, times 0.5 or what it has been steered to.

    So a response of n tokens loses n/8 or n: rewards 3, 1 become 3 - 1/8, 1 - 3/8 or 2, -2. The
    mean over tokens is 0.25, since padding has none.
    """
    options = [f"algo.kl.placement={placement}", "algo.kl.coef=0.5", "rollout.group_size=2"]
    config = load_config(None, [*options, "algo.advantage=group_centred"])
    programs = Even(Objective(LOSSES["gspo"]), *[None] * 6)
    state = init_state(np.float32(-0.75), optax.identity(), kl_coef=coef)
    policy = some_policy()
    judge = make_advantage(config, policy, programs.objective, programs, np.float32(-1))
    judged = judge(state, scored_rollout([3, 1, 0, 0]))
    if placement == "loss":
        np.testing.assert_array_equal(judged.batch.adv, [1, -1, 0, 0])
        assert (judged.ref_logp == -1).all() and judged.metrics == {}
    else:
        half = 2 if coef else (3 - 1 / 8 - (1 - 3 / 8)) / 2
        np.testing.assert_allclose(judged.batch.adv, [half, -half, 0, 0], rtol=1e-6)
        assert judged.ref_logp is None
        assert judged.metrics == pytest.approx({"kl": 0.25, "kl_coef": coef or 0.5})
    alone = make_advantage(config, policy, programs.objective, programs, None)
    np.testing.assert_array_equal(alone(state, scored_rollout([3, 1, 0, 0])).batch.adv[:2], [1, -1])


def test_a_critics_advantages_pay_the_penalty_once_and_skip_what_was_not_scored():
    """With V = 0 and γ = λ = 1 the return is the reward less the penalty that is to come.

    The penalty has its weight already: half of it, where it were weighed again.
    """
    options = ["algo.loss=ppo", "algo.critic.kind=separate", "algo.kl.coef=0.5"]
    options += ["algo.advantage=gae", "algo.advantage.lam=1.0", "algo.advantage.whiten=false"]
    config, policy = load_config(None, options), some_policy()
    zero = CriticTerm(
        lambda params, batch, states: jnp.zeros(batch.mask.shape),
        optax.identity(),
        0.2,
        1.0,
        shared=False,
    )
    goal = Objective(LOSSES["ppo"], critic=zero)
    state = init_state({}, optax.identity())._replace(critic=CriticState({}, None))
    rollout = scored_rollout([1, 2, np.nan, 5])
    rows = to_train_batch(rollout)
    penalty = np.where(rows.mask, np.float32(0.25), 0)
    batch, targets, _ = by_token(config, policy, goal, zero)(state, rows, rollout, penalty)
    want = [[0.75, 0, 0], [1.25, 1.5, 1.75], [0, 0, 0], [4.5, 4.75, 0]]
    np.testing.assert_allclose(batch.adv, want, rtol=1e-6)
    np.testing.assert_allclose(targets.returns, want, rtol=1e-6)
    np.testing.assert_array_equal(batch.mask.sum(1), [1, 3, 0, 2])


@pytest.mark.long
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

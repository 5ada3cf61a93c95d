"""Rows whose mask has holes: tokens that stand in the text and are not trained on.

The reference knows neither masks nor padding nor batches: it runs each text alone and whole in
float64, takes the log-probabilities of the trained tokens by a plain log-softmax, and pushes them
together into rows without holes.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gspo_jax.algo.advantages import ADVANTAGES
from gspo_jax.algo.losses import LOSSES
from gspo_jax.batch import Completions, Problem, Rollout, TrainBatch
from gspo_jax.mesh.sharding import make_mesh, shard_batch, state_shardings
from gspo_jax.numbers.tally import numbers
from gspo_jax.rollout.reporting import digest
from gspo_jax.rollout.train_rows import text_lengths, to_train_batch
from gspo_jax.update.critic import estimate, make_critic, make_term
from gspo_jax.update.objective import Gradients, Objective, Targets, measure, real_tokens
from gspo_jax.update.programs import make_programs, microbatches

B, S, T = 8, 20, 10
PROMPT = np.array([2, 5, 3, 8, 2, 4, 6, 3], np.int32)
LENGTH = np.array([10, 7, 4, 10, 1, 9, 6, 8], np.int32)


def make_batch():
    """Holes at the start, inside and at the end; row 6 is not trained on at all.

    What lies behind a text is a token that no text has.
    """
    rng = np.random.default_rng(0)
    mask = (rng.random((B, T)) < 0.5) & (np.arange(T)[None] < LENGTH[:, None])
    mask[0, 0], mask[0, 9], mask[1, LENGTH[1] - 1], mask[4, 0], mask[6] = 0, 1, 0, 1, 0
    assert (mask.sum(1) < LENGTH).sum() >= 6
    tokens = np.full((B, S), 63, np.int32)
    for row in range(B):
        tokens[row, : PROMPT[row] + LENGTH[row]] = rng.integers(1, 60, PROMPT[row] + LENGTH[row])
    adv = rng.normal(size=B).astype(np.float32)
    return TrainBatch(tokens, PROMPT, LENGTH, mask, adv)


def text(batch, row):
    return batch.tokens[row : row + 1, : PROMPT[row] + LENGTH[row]]


def plain_logps(graphdef, params, batch):
    """log π of every trained token, row by row: a list of vectors."""
    model = nnx.merge(graphdef, params)
    rows = []
    for row in range(B):
        logps = jax.nn.log_softmax(model.logits(jnp.asarray(text(batch, row)))[0], axis=-1)
        at = PROMPT[row] + np.flatnonzero(batch.mask[row])
        rows.append(logps[at - 1, batch.tokens[row, at]])
    return rows


def pushed_together(rows):
    """Vectors as the rows of an array, and its mask; as wide as T, so that constants agree."""
    mask = np.array([np.arange(T) < len(row) for row in rows])
    return jnp.stack([jnp.pad(row, (0, T - len(row))) for row in rows]), jnp.asarray(mask)


@pytest.fixture(scope="module")
def case(tiny_view):
    """The batch, the old log-probabilities of its tokens, and the reference in float64."""
    graphdef, params = tiny_view
    batch, rng = make_batch(), np.random.default_rng(1)
    noise = rng.normal(size=(B, T)).astype(np.float32) * 0.05
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda p: jnp.asarray(np.asarray(p), jnp.float64), params)

        def logps(wide):
            return plain_logps(graphdef, wide, batch)

        new, pull = jax.vjp(jax.jit(logps), wide)
        old = np.full((B, T), np.nan, np.float32)
        for row in range(B):
            old[row, batch.mask[row]] = np.asarray(new[row]) + noise[row, batch.mask[row]]
    return graphdef, params, batch, old, new, pull


def reference(case, loss):
    """The value and gradient of a loss over rows without holes, in float64."""
    _, _, batch, old, new, pull = case
    with jax.enable_x64(True):
        before = [jnp.asarray(old[r, batch.mask[r]], jnp.float64) for r in range(B)]
        (total, metrics), cotangent = of_rows(loss, new, before, batch.adv)
        return float(total), metrics, jax.device_get(pull(cotangent)[0])


def of_rows(loss, new, before, adv):
    """A loss of vectors of different lengths, its metrics, and its gradient by those vectors."""
    before = pushed_together(before)[0]

    def value(new):
        logp, mask = pushed_together(new)
        mean, metrics = loss(logp, before, jnp.asarray(adv, logp.dtype), mask)
        return mean.total / mean.weight, metrics

    return jax.value_and_grad(value, has_aux=True)(new)


@pytest.mark.parametrize("name", LOSSES)
def test_a_hole_is_no_token_to_any_loss(name):
    """Value, metrics and gradient are those of the rows without their holes, which hold NaN."""
    batch, rng = make_batch(), np.random.default_rng(1)
    logp, old = (np.where(batch.mask, -x, np.nan) for x in rng.random((2, B, T)))
    with jax.enable_x64(True):
        rows = [[jnp.asarray(x[r, batch.mask[r]]) for r in range(B)] for x in (logp, old)]
        (value, known), by_row = of_rows(LOSSES[name], *rows, batch.adv)

        def whole(logp):
            adv, mask = jnp.asarray(batch.adv, logp.dtype), jnp.asarray(batch.mask)
            mean, metrics = LOSSES[name](logp, jnp.asarray(old), adv, mask)
            return mean.total / mean.weight, metrics

        (got, metrics), gradient = jax.value_and_grad(whole, has_aux=True)(jnp.asarray(logp))
        np.testing.assert_allclose(got, value, rtol=1e-12)
        for key in known:
            np.testing.assert_allclose(metrics[key], known[key], rtol=1e-10, err_msg=key)
        assert not np.asarray(gradient)[~batch.mask].any()
        for row in range(B):
            want = np.asarray(by_row[row])
            np.testing.assert_allclose(gradient[row][batch.mask[row]], want, rtol=1e-10, atol=1e-15)


def assert_close(got, want):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        scale = np.abs(np.asarray(b)).max() + 1e-12
        np.testing.assert_allclose(
            np.asarray(a) / scale, np.asarray(b) / scale, atol=2e-5, err_msg=str(path)
        )


@pytest.mark.long
@pytest.mark.parametrize("devices", [1, 4])
def test_what_is_found_of_rows_with_holes_is_what_each_row_alone_has(case, devices):
    graphdef, params, batch, old, new, _ = case
    mesh = make_mesh(data=devices)
    params = jax.device_put(params, state_shardings(params, params, mesh))
    goal = Objective(LOSSES["gspo"], microbatch_tokens=40, longest=S, shortest_prompt=2)
    with jax.set_mesh(mesh):
        place = partial(shard_batch, mesh=mesh)
        programs = make_programs(graphdef, optax.identity(), goal, place=place)
        total, placed, given = programs.accumulate(Gradients(params), batch, old)
        metrics, _ = measure(total.grads, total.found, placed, given, goal)
    value, known, gradient = reference(case, LOSSES["gspo"])
    assert_close(total.grads.policy, gradient)
    metrics = numbers(metrics)
    assert metrics["loss"] == pytest.approx(value, rel=2e-5, abs=1e-7)
    for key in known:
        assert metrics[key] == pytest.approx(float(known[key]), abs=2e-5), key
    logp = np.asarray(total.found.logp)
    for row in range(B):
        np.testing.assert_allclose(logp[row, batch.mask[row]], new[row], atol=2e-5)
    assert not logp[6].any()  # nothing of it is trained on: it was not run


def test_group_advantages_ask_for_rewards_alone_and_gae_steps_over_holes():
    """A hole gets neither reward nor advantage, and is no step: with and without it all is equal.

    The advantages of groups are functions of [B] rewards: no mask can reach them.
    """
    batch, rng = make_batch(), np.random.default_rng(2)
    value, kl = np.where(batch.mask, rng.normal(size=(2, B, T)), np.nan).astype(np.float32)
    reward = rng.normal(size=B).astype(np.float32)
    options = {"kl_coef": 0.1, "gamma": 0.9, "lam": 0.8, "whiten": True}
    adv, goal, metrics = estimate(*map(jnp.asarray, (reward, value, kl, batch.mask)), **options)
    rows = [pushed_together([x[r, batch.mask[r]] for r in range(B)])[0] for x in (value, kl)]
    mask = np.arange(T)[None] < batch.mask.sum(1)[:, None]
    want = estimate(jnp.asarray(reward), *rows, jnp.asarray(mask), **options)
    for a, b in ((adv, want[0]), (goal.value, want[1].value), (goal.returns, want[1].returns)):
        a, b = np.asarray(a), np.asarray(b)
        assert not a[~batch.mask].any()
        for row in range(B):
            np.testing.assert_allclose(a[row, batch.mask[row]], b[row, mask[row]], atol=1e-5)
    for key in metrics:
        assert float(metrics[key]) == pytest.approx(float(want[2][key]), abs=1e-5)
    for function in ADVANTAGES.values():
        assert "mask" not in function.__annotations__


@pytest.mark.long
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_ppo_over_rows_with_holes_is_that_of_each_text_alone(case, kind, devices):
    """V = h · w at the position before each trained token, and its error; with the ratio at 1, the
    policy's gradient is that of -mean(adv · logp) over the trained tokens."""
    graphdef, params, batch, _, _, _ = case
    critic_graph, critic = make_critic(kind, graphdef, params)
    critic["value_head"] = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(0), x.shape), critic["value_head"]
    )
    term = make_term(
        critic_graph, optax.sgd(1.0), shared=kind == "shared", clip=0.2, coef=0.5, shortest_prompt=2
    )
    goal = Objective(LOSSES["ppo"], microbatch_tokens=40, longest=S, shortest_prompt=2, critic=term)
    rng = np.random.default_rng(3)
    targets = Targets(*rng.normal(size=(2, B, T)).astype(np.float32))
    adv = np.where(batch.mask, rng.normal(size=(B, T)), np.nan).astype(np.float32)
    mesh = make_mesh(data=devices)
    trained = Gradients(params, critic)
    trained = jax.device_put(trained, state_shardings(trained, params, mesh))
    with jax.set_mesh(mesh):
        place = partial(shard_batch, mesh=mesh)
        programs = make_programs(graphdef, optax.sgd(1.0), goal, place=place)
        total, _, _ = programs.accumulate(trained, batch._replace(adv=adv), None, None, targets)

    def loss(networks):
        policy, critic = networks
        head = nnx.merge(critic_graph, critic)
        trunk = nnx.merge(graphdef, policy) if kind == "shared" else head.trunk
        errors = []
        for row in range(B):
            at = np.flatnonzero(batch.mask[row])
            if not len(at):
                continue
            states = trunk(jnp.asarray(text(batch, row)))[0][PROMPT[row] + at - 1]
            value = head(states[None])[0]
            old, returns = targets.value[row, at], targets.returns[row, at]
            near = old + jnp.clip(value - old, -0.2, 0.2)
            errors.append(jnp.maximum((value - returns) ** 2, (near - returns) ** 2))
        logps = plain_logps(graphdef, policy, batch)
        gains = [adv[row, batch.mask[row]] * logps[row] for row in range(B)]
        coef = 0.5 if kind == "shared" else 1.0
        return coef * jnp.mean(jnp.concatenate(errors)) / 2 - jnp.mean(jnp.concatenate(gains))

    want = jax.jit(jax.grad(loss))((params, critic))
    assert_close(total.grads.critic, want[1])
    assert_close(total.grads.policy, want[0])


def test_gspo_over_rows_of_episodes_is_what_was_worked_out_elsewhere():
    """Recorded in float64; two rows share an episode, which counts once."""
    recorded = json.loads((Path(__file__).parents[1] / "golden" / "gspo_rows.json").read_text())
    clip = {k: recorded[k] for k in ("clip_low", "clip_high")}

    def loss(logp):
        mean, _ = LOSSES["gspo"](logp, old, adv, mask, weight=share, **clip)
        return mean.total / recorded["episodes"]

    with jax.enable_x64(True):
        mask = jnp.array(recorded["mask"], bool)
        logp, old = (jnp.where(mask, jnp.array(recorded[k]), jnp.nan) for k in ("logp", "old_logp"))
        adv, share = (jnp.array(recorded[k]) for k in ("advantage_of_row", "share"))
        got, gradient = jax.value_and_grad(loss)(logp)
    np.testing.assert_allclose(got, recorded["loss"], rtol=1e-12)
    np.testing.assert_allclose(gradient, recorded["grad_logp"], rtol=1e-12)


def test_a_row_runs_as_wide_as_its_text_however_few_of_its_tokens_are_trained_on():
    """Widths are 56 and 24; by its trained tokens row 0 would fit into 24, and lose its tail."""
    mask = np.zeros((3, 50), bool)
    mask[0, 49], mask[1, :4] = True, True  # and row 2 is not trained on: nothing runs it
    prompt, length = np.array([[6, 6, 6], [50, 4, 50]], np.int32)
    batch = TrainBatch(np.zeros((3, 56), np.int32), prompt, length, mask, np.ones(3, np.float32))
    parts = microbatches(batch, Objective(LOSSES["gspo"], microbatch_tokens=56, longest=56))
    runs = [(part.width, rows.tolist()) for part in parts for rows in part.rows[: part.number]]
    assert runs == [(56, [0]), (24, [1, 3])]  # 3 stands for no row
    real = np.asarray(real_tokens(jax.tree.map(jnp.asarray, batch)))
    assert real.sum(1).tolist() == [56, 10, 0]


def test_a_response_with_holes_goes_to_the_update_whole():
    """And one that is cut and masked keeps its tokens and its length."""
    tokens = np.arange(10, 24, dtype=np.int32).reshape(2, 7)
    mask = np.array([[1, 1, 0, 0, 1, 0, 0], [1, 0, 1, 1, 1, 1, 1]], bool)
    logp, cut = np.zeros((2, 7), np.float32), np.array([False, True])
    completions, reward = Completions(tokens, mask, logp, cut), np.zeros(2, np.float32)
    rollout = Rollout([Problem("a", "A")], [[1, 2]], completions, ["", ""], {"f": reward}, reward)
    batch = to_train_batch(rollout, reward, mask_truncated=True, pad_id=99, width=10)
    assert batch.tokens.tolist() == [
        [1, 2, 10, 11, 12, 13, 14, 99, 99, 99],
        [1, 2, 17, 18, 19, 20, 21, 22, 23, 99],
    ]
    assert batch.length.tolist() == text_lengths(rollout)[1].tolist() == [5, 7]
    assert batch.mask.tolist() == [mask[0].tolist(), [False] * 7]
    # What lies between the sampled tokens is part of what was seen; what lies behind is not.
    behind, between = tokens.copy(), tokens.copy()
    behind[0, 5:], between[1, 1] = 0, 0
    assert digest(completions._replace(tokens=behind)) == digest(completions)
    assert digest(completions._replace(tokens=between)) != digest(completions)

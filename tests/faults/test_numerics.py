"""Rows 22 to 27: numbers that are not finite, not there, or far too large."""

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from faults.tools import metrics, tiny_run
from gspo_jax.algo.losses import LOSSES
from gspo_jax.algo.masked import LOG_RATIO_LIMIT
from gspo_jax.batch import Completions, TrainBatch
from gspo_jax.config.load import load_config
from gspo_jax.models import load_model
from gspo_jax.rollout.engine import generate
from gspo_jax.train import mismatch, train
from gspo_jax.update.objective import Objective
from gspo_jax.update.optim import make_optimizer
from gspo_jax.update.programs import make_programs
from gspo_jax.update.state import init_state


def finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def without_seconds(rows):
    """Metrics that are numbers, or lists of them, or null."""
    left = ("time/", "step_time")
    return [
        {k: v for k, v in row.items() if not (k.startswith(left) or isinstance(v, str))}
        for row in rows
    ]


def weights(directory):
    return jax.tree.leaves(jax.tree.map(np.asarray, load_model(directory)))


# --------------------------------------------------------------------- 26: nothing was said


@pytest.fixture
def always_ends(tiny_dir, tmp_path):
    """A model of which every token is an end of sequence, as if its logit had infinite bias."""
    directory = Path(shutil.copytree(tiny_dir, tmp_path / "ends"))
    path = directory / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [*range(296)]}))
    return directory


@pytest.mark.faults
def test_row_26_responses_that_end_at_once_train_without_a_nan(always_ends, tmp_path):
    result = train(load_config(None, tiny_run(always_ends, tmp_path, "run.steps=2")))
    assert result.state == "finished"
    for row in without_seconds(metrics(result.run_dir)):
        assert row["completions/max_length"] == 1 and row["completions/clipped_ratio"] == 0
        assert row["skipped_updates"] == 0 and None not in row.values(), row
        assert all(np.isfinite(v).all() for v in row.values())


@pytest.mark.faults
@pytest.mark.parametrize("loss", ["gspo", "dapo"])  # a mean over responses, and one over tokens
def test_row_26_where_all_responses_are_cut_and_masked_nothing_moves(tiny_dir, tmp_path, loss):
    """Truncation masked by option: not one token is left to learn from."""
    options = ["run.steps=2", "algo.mask_truncated=true", "rollout.max_completion_length=2"]
    options += [f"algo.loss={{name: {loss}}}"]
    result = train(load_config(None, tiny_run(tiny_dir, tmp_path, *options)))
    for row in without_seconds(metrics(result.run_dir)):
        assert row["completions/clipped_ratio"] == 1
        assert row["loss"] == row["grad_norm"] == row["clip_frac"] == 0 and row["ratio_mean"] == 1
        assert row["skipped_updates"] == 0 and None not in row.values(), row
    before, after = (weights(path) for path in (tiny_dir, result.run_dir / "export"))
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("lengths", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("name", LOSSES)
def test_row_26_a_response_of_no_token_adds_no_zero_over_zero(name, lengths):
    """In value, gradient and every metric, whatever its padding holds."""
    mask = jnp.arange(4)[None] < jnp.array(lengths)[:, None]
    logp = jnp.where(mask, -1.5, jnp.nan)
    old, adv = jnp.where(mask, -1.25, jnp.inf), jnp.array([2.0, -3.0])

    def mean(logp):
        (total, weight), found = LOSSES[name](logp, old, adv, mask)
        return total / jnp.maximum(weight, 1), found

    (value, found), gradient = jax.value_and_grad(mean, has_aux=True)(logp)
    assert finite((value, found, gradient)), (value, found, gradient)
    if not any(lengths):
        assert value == 0 and not gradient.any()


def test_row_26_the_mismatch_of_nothing_is_0():
    nobody, nothing = np.zeros((2, 3), bool), np.zeros((2, 3), np.float32)
    sampled = Completions(np.zeros((2, 3), np.int32), nobody, nothing, nobody[:, 0])
    assert set(mismatch(nothing, sampled.logp, sampled.mask).values()) == {0.0}


# -------------------------------------------------------------------- 27: a policy far away


@pytest.mark.parametrize("gap", [30.0, 1e4, 1e30])
@pytest.mark.parametrize("name", LOSSES)
def test_row_27_the_exponential_of_a_ratio_cannot_overflow(name, gap):
    """π_old differs by `gap` nats per token, in both directions, for good and bad responses."""
    old = jnp.full((4, 3), -5.0)
    sign, adv = jnp.array([1, 1, -1, -1.0])[:, None], jnp.array([1, -1, 1, -1.0])
    logp = jnp.broadcast_to(-5.0 + sign * gap, old.shape)
    mask = jnp.ones(old.shape, bool)

    def mean(logp):
        (total, weight), found = LOSSES[name](logp, old, adv, mask)
        return total / weight, found

    (value, found), gradient = jax.value_and_grad(mean, has_aux=True)(logp)
    assert finite((value, found, gradient)), (value, found, gradient)
    assert found["ratio_max"] <= np.exp(LOG_RATIO_LIMIT) * 1.01


@pytest.mark.faults
@pytest.mark.parametrize("name", ["gspo", "grpo"])
def test_row_27_a_policy_that_changed_since_the_rollout_is_clipped_and_trains_on(name, tiny_view):
    """Sampled from one policy, updated from another whose weights are noise."""
    graphdef, params = tiny_view
    prompts = [[5, 6, 7], [8, 9]]
    sampled = generate(
        (graphdef, params),
        prompts,
        group_size=4,
        max_new_tokens=6,
        eos_ids=(0,),
        key=jax.random.key(0),
    )
    tokens = np.zeros((8, 16), np.int32)
    lengths = np.repeat([3, 2], 4).astype(np.int32)
    for row, used in enumerate(sampled.mask.sum(1)):
        filled = [*prompts[row // 4], *sampled.tokens[row, :used]]
        tokens[row, : len(filled)] = filled
    adv = np.linspace(-2, 3, 8).astype(np.float32)
    batch = TrainBatch(tokens, lengths, sampled.mask.sum(1, dtype=np.int32), sampled.mask, adv)

    noise = iter(jax.random.split(jax.random.key(1), 1000))
    moved = jax.tree.map(lambda p: p + 3.0 * jax.random.normal(next(noise), p.shape), params)
    optimizer = make_optimizer(optax.constant_schedule(1e-3), max_grad_norm=1.0)
    programs = make_programs(graphdef, optimizer, Objective(partial(LOSSES[name])))
    state = init_state(moved, optimizer)
    for _ in range(3):
        state, found, _ = programs.update(state, batch, sampled.logp)
        assert found["ratio_max"].value > 10 or found["ratio_min"].value < 0.1  # far away indeed
        assert finite((found, state.params, state.opt_state)) and state.skipped == 0
        assert found["clip_frac"].value > 0.25

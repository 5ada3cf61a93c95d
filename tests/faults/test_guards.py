"""Rows 22, 23 and 25: a number that is no number, a gradient that is none, changes nothing."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from test_end_to_end import stored

from faults.small_runs import config, metrics, settings
from faults.tools import one_line, status
from gspo_jax import train as train_module
from gspo_jax.cli.commands import main
from gspo_jax.errors import NumericalError
from gspo_jax.run import checkpoint
from gspo_jax.text.console import Display
from gspo_jax.train import train
from gspo_jax.update.spikes import (
    SPIKE_FEWEST,
    SPIKE_PATIENCE,
    SPIKE_WINDOW,
    Spikes,
    is_spike,
    remember,
)

FOUR = ["mesh.data=2", "mesh.fsdp=2"]
SAVED = ["eval.split=test", "run.save_every=1", "run.keep=9"]


@pytest.fixture
def poison(monkeypatch):
    """NaN advantages from one step on, in so many steps; a judge cannot do that, a bug could."""

    def from_step(first, count):
        update = train_module.update

        def poisoned(loop, state, begun, *options):
            if first <= int(state.step) + 1 < first + count:
                batch = begun.progress.batch
                batch = batch._replace(adv=np.full_like(batch.adv, np.nan))
                begun = begun._replace(progress=begun.progress._replace(batch=batch))
            return update(loop, state, begun, *options)

        monkeypatch.setattr(train_module, "update", poisoned)

    return from_step


def trained(run_dir, step):
    """Parameters and moments of a checkpoint, by name; the schedule's count goes on in any case."""
    leaves = stored(run_dir, step)
    del leaves["opt_state.1.2.count"]
    return {k: np.asarray(v) for k, v in leaves.items() if k.startswith(("params.", "opt_state."))}


def assert_bitwise_equal(a, b):
    assert a.keys() == b.keys() and len(a) > 60
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name


def changed(a, b):
    return any(a[name].tobytes() != b[name].tobytes() for name in a)


@pytest.mark.faults
def test_row_22_one_poisoned_step_changes_nothing_on_any_device_and_is_counted(
    tiny_dir, tmp_path, poison
):
    poison(2, 1)
    run_dir = train(config(tiny_dir, tmp_path, *FOUR, *SAVED, "run.steps=3")).run_dir
    assert_bitwise_equal(trained(run_dir, 1), trained(run_dir, 2))
    assert changed(trained(run_dir, 2), trained(run_dir, 3))
    rows = metrics(run_dir)
    assert [row["skipped_updates"] for row in rows] == [0, 2, 2]
    assert [row["updates"] for row in rows] == [2, 2, 4]
    assert rows[1]["loss"] is None and rows[2]["loss"] is not None  # null: not a number


@pytest.mark.faults
def test_row_23_a_run_that_stays_poisoned_stops_with_its_last_good_checkpoint(
    tiny_dir, tmp_path, poison, capsys
):
    poison(2, 99)
    given = settings(tiny_dir, tmp_path, *SAVED, "run.steps=9", "run.skip_budget=3")
    assert main(["train", *given]) == 4
    line = one_line(capsys.readouterr().err)
    assert "4 updates had a loss or gradient that was not finite" in line
    run_dir = tmp_path / "run"
    assert status(run_dir)["state"] == "failed"
    # The third step went over the budget; what the second left is what the first did.
    assert checkpoint.steps(run_dir / "checkpoints") == [1, 2]
    assert_bitwise_equal(trained(run_dir, 1), trained(run_dir, 2))
    assert all(np.isfinite(x).all() for x in trained(run_dir, 2).values() if x.dtype.kind == "f")


@pytest.mark.faults
def test_row_23_parameters_that_are_not_finite_are_never_saved(tiny_dir, tmp_path, monkeypatch):
    """Whatever made them so: the guard of the update is not asked."""
    update = train_module.update

    def broken(*arguments):
        state, begun = update(*arguments)
        if int(state.step) == 2:
            leaves, tree = jax.tree.flatten(state.params)
            leaves[3] = leaves[3].at[0].set(jnp.inf)
            state = state._replace(params=jax.tree.unflatten(tree, leaves))
        return state, begun

    monkeypatch.setattr(train_module, "update", broken)
    with pytest.raises(NumericalError, match="not finite after step 2, and are not saved"):
        train(config(tiny_dir, tmp_path, *SAVED))
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [1]


@pytest.mark.faults
@pytest.mark.parametrize("state", ["8bit", "float32"])
def test_row_25_rewards_without_spread_move_neither_weights_nor_moments(
    tiny_dir, tmp_path, capsys, state
):
    """Adam's momentum and the weight decay would, after two steps that had something to learn."""
    more = [*SAVED, "optim.weight_decay=0.1", f"optim.state={state}"]
    reward = "equal_from_the_third_step"
    run_dir = train(config(tiny_dir, tmp_path, *more, reward=reward)).run_dir
    assert changed(trained(run_dir, 1), trained(run_dir, 2))
    assert_bitwise_equal(trained(run_dir, 2), trained(run_dir, 3))
    assert_bitwise_equal(trained(run_dir, 2), trained(run_dir, 4))
    rows = metrics(run_dir)
    assert [row["updates"] for row in rows] == [2, 4, 4, 4]
    assert all(row["skipped_updates"] == 0 for row in rows)
    assert [row["frac_reward_zero_std"] for row in rows[2:]] == [1, 1]
    assert all(row["grad_norm"] == 0 and row["loss"] == 0 for row in rows[2:])
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("within every group all rewards are equal") == 1


# ----------------------------------------------------------------------------- spikes


def window(*norms, in_a_row=0):
    full = np.full(SPIKE_WINDOW, np.nan, np.float32)
    full[: len(norms)] = norms
    return Spikes(jnp.asarray(full), jnp.int32(in_a_row), jnp.int32(0))


def test_a_spike_is_so_many_deviations_above_the_mean():
    """Half 1 and half 3: mean 2, standard deviation 1. Slots still to come count for nothing."""
    norms = window(*[1.0, 3.0] * (SPIKE_FEWEST // 2))
    assert not is_spike(norms, jnp.float32(4.9), 3.0)
    assert is_spike(norms, jnp.float32(5.1), 3.0)
    assert not is_spike(norms, jnp.float32(5.1), 4.0)
    assert not is_spike(norms, jnp.float32(0.01), 3.0)  # short is no spike
    too_few = window(*[1.0, 3.0] * (SPIKE_FEWEST // 2 - 1))
    assert not is_spike(too_few, jnp.float32(1e9), 3.0)


def test_after_many_spikes_in_a_row_the_new_level_is_learned_from():
    spikes, updates, taken = window(*[1.0, 3.0] * 64), 128, []
    for _ in range(2 * SPIKE_PATIENCE + 2):
        norm = jnp.float32(10.0)
        spike = is_spike(spikes, norm, 3.0)
        spikes = remember(spikes, norm, jnp.int32(updates), spike, ~spike)
        updates += int(~spike)
        taken.append(not bool(spike))
    assert taken == [False] * SPIKE_PATIENCE + [True] * (SPIKE_PATIENCE + 2)
    assert int(spikes.skipped) == SPIKE_PATIENCE
    np.testing.assert_array_equal(np.isfinite(spikes.norms).sum(), SPIKE_PATIENCE + 2)


def test_the_oldest_norm_makes_room_and_what_was_not_taken_leaves_none():
    spikes = window(*np.arange(SPIKE_WINDOW))
    yes, no = jnp.bool_(True), jnp.bool_(False)
    after = remember(spikes, jnp.float32(7.5), jnp.int32(SPIKE_WINDOW + 2), no, yes)
    assert after.norms[2] == 7.5 and after.norms[1] == 1 and after.norms[3] == 3
    for spike in (yes, no):  # neither: not finite, or zero
        same = remember(spikes, jnp.float32(jnp.nan), jnp.int32(5), spike, no)
        np.testing.assert_array_equal(same.norms, spikes.norms)
        assert int(same.skipped) == int(same.in_a_row) == int(spike)


@pytest.fixture
def eager(monkeypatch):
    """Two updates are enough to compare with, so that runs of a few steps have spikes."""
    monkeypatch.setattr("gspo_jax.update.spikes.SPIKE_FEWEST", 2)


@pytest.mark.faults
def test_spikes_are_skipped_bitwise_and_a_resumed_run_skips_the_same(tiny_dir, tmp_path, eager):
    more = [*SAVED, "run.spike_sigmas=0.5"]
    whole = train(config(tiny_dir, tmp_path, *more, "run.name=whole")).run_dir
    rows = metrics(whole)
    spikes = [row["skipped_spikes"] for row in rows]
    assert 0 < spikes[-1] < 6 and spikes[0] == 0
    assert [row["updates"] + row["skipped_spikes"] for row in rows] == [2, 4, 6, 8]
    for step in (2, 3, 4):
        both = rows[step - 1]["updates"] == rows[step - 2]["updates"]
        assert changed(trained(whole, step - 1), trained(whole, step)) != both
    start = f"run.resume={whole / 'checkpoints' / '2'}"
    again = train(config(tiny_dir, tmp_path, *more, "run.name=again", start)).run_dir
    ours, theirs = stored(again, 4), stored(whole, 4)
    assert {"spikes.norms", "spikes.in_a_row", "spikes.skipped"} <= ours.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert metrics(again) == rows[2:]


@pytest.mark.faults
def test_spike_sigmas_can_be_switched_on_and_off_in_between(tiny_dir, tmp_path, eager):
    off = train(config(tiny_dir, tmp_path, *SAVED, "run.steps=2")).run_dir
    train(config(tiny_dir, tmp_path, *SAVED, "run.steps=3", "run.spike_sigmas=1e6"))
    norms = stored(off, 3)["spikes.norms"]
    assert np.isfinite(norms).sum() == 2  # of the third step alone
    train(config(tiny_dir, tmp_path, *SAVED, "run.steps=4"))
    straight = train(config(tiny_dir, tmp_path, *SAVED, "run.name=straight")).run_dir
    ours, theirs = stored(off, 4), stored(straight, 4)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.faults
def test_without_spike_sigmas_the_state_holds_no_window(tiny_dir, tmp_path):
    run_dir = train(config(tiny_dir, tmp_path, *SAVED, "run.steps=1")).run_dir
    assert not [name for name in stored(run_dir, 1) if name.startswith("spikes")]
    assert "skipped_spikes" not in metrics(run_dir)[0]


def test_a_skipped_spike_is_told_once():
    out = io.StringIO()
    display = Display(Console(file=out, width=200), of=3)
    for step in (1, 2, 3):
        display.step(step, {"skipped_spikes": step - 1})
    assert out.getvalue().count("run.spike_sigmas") == 1

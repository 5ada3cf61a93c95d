"""A checkpoint gives back every bit, whole or not at all."""

import errno
import os
import re
import stat
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gspo_jax.errors import StorageError
from gspo_jax.files import integrity
from gspo_jax.run import arrays, checkpoint
from gspo_jax.run.checkpoint import Kept, Saver
from gspo_jax.update.optim import make_optimizer
from gspo_jax.update.quant import Quantised
from gspo_jax.update.state import init_state


@pytest.fixture
def state():
    """Float32, bfloat16, 8-bit codes and counters in one tree."""
    params = {
        "w": jax.random.normal(jax.random.key(0), (64, 256)),
        "half": jnp.arange(8, dtype=jnp.bfloat16) / 3,
    }
    optimizer = make_optimizer(optax.constant_schedule(1e-3))
    with jax.numpy_dtype_promotion("standard"):
        state = init_state(params, optimizer)
        _, opt_state = optimizer.update(params, state.opt_state, params)
    return state._replace(opt_state=opt_state, step=jnp.int32(7))


def test_every_leaf_comes_back_bit_for_bit_with_its_dtype(tmp_path, state):
    checkpoint.save(tmp_path, 7, state, {"step": 7, "num_tokens": 123})
    blank = jax.tree.map(jnp.zeros_like, state)
    back, meta = checkpoint.restore(tmp_path, 7, blank)
    assert meta == {"step": 7, "num_tokens": 123}
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert isinstance(back.opt_state[1][0].inner.mu["w"], Quantised)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_only_the_newest_are_kept_and_nothing_else_is_left(tmp_path, state):
    for step in (1, 2, 5, 9):
        checkpoint.save(tmp_path, step, state, {}, keep=2)
    assert checkpoint.steps(tmp_path) == [5, 9]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["5", "9"]


def test_an_unfinished_save_is_not_a_checkpoint(tmp_path, state):
    checkpoint.save(tmp_path, 3, state, {})
    (tmp_path / "4.orbax-checkpoint-tmp-0").mkdir()
    (tmp_path / ".2.removed").mkdir()
    assert checkpoint.steps(tmp_path) == [3]


def test_a_missing_step_is_named_with_those_that_exist(tmp_path, state):
    checkpoint.save(tmp_path, 3, state, {})
    with pytest.raises(StorageError, match="no such checkpoint; found 3"):
        checkpoint.restore(tmp_path, 4, state)


def test_a_checkpoint_of_another_shape_is_refused_in_one_line(tmp_path, state):
    checkpoint.save(tmp_path, 3, state, {})
    other = state._replace(params={**state.params, "w": jnp.zeros((64, 128))})
    with pytest.raises(StorageError, match="does not fit this model and optimizer") as error:
        checkpoint.restore(tmp_path, 3, other)
    assert "\n" not in str(error.value)


def test_a_directory_that_cannot_be_written_is_a_storage_error(tmp_path, state):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    with pytest.raises(StorageError, match="could not be written"):
        checkpoint.save(blocked, 1, state, {})


def values(x):
    """A state of one array, full of one number."""
    return {"w": jnp.full((300,), x, jnp.float32)}


def value_of(directory, name):
    state, _ = checkpoint.restore(directory, name, values(0))
    (value,) = set(np.asarray(state["w"]).tolist())
    return value


@pytest.fixture
def gate(monkeypatch):
    """Closed, no save gets as far as writing; what was written is in `gate.written`."""
    gate, write = threading.Event(), checkpoint._write

    def slowly(path, *args):
        assert gate.wait(20)
        write(path, *args)
        gate.written.append(path.name)

    gate.written = []
    monkeypatch.setattr(checkpoint, "_write", slowly)
    return gate


@partial(jax.jit, donate_argnums=0)
def spoil(state):
    return jax.tree.map(lambda x: x * 0 - 1, state)


def test_a_save_returns_at_once_and_holds_what_was_there_then(tmp_path, gate):
    with Saver(tmp_path, Kept()) as saver:
        state = values(7)
        saver.save(1, state, {})
        state = spoil(state)  # donated: its buffers are used again
        assert float(state["w"][0]) == -1 and checkpoint.names(tmp_path) == []
        gate.set()
    assert value_of(tmp_path, 1) == 7


def test_a_second_save_waits_for_the_first(tmp_path, gate):
    with Saver(tmp_path, Kept()) as saver:
        saver.save(1, values(1), {})
        later = threading.Timer(0.2, gate.set)
        later.start()
        saver.save(2, values(2), {})
        assert gate.written[:1] == ["1"]  # the call came back after the first was done
    assert checkpoint.steps(tmp_path) == [1, 2]


@pytest.fixture
def full_disk(monkeypatch):
    """Sealing fails, as the first to notice that bytes did not reach the disk."""

    def fail(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    def arm(on):
        monkeypatch.setattr(integrity, "seal", fail if on else sealed)

    sealed = integrity.seal
    return arm


def test_an_error_of_the_background_is_raised_by_the_next_call_and_nothing_is_left(
    tmp_path, full_disk
):
    with Saver(tmp_path, Kept()) as saver:
        saver.save(1, values(1), {})
        saver.wait()
        full_disk(True)
        saver.save(2, values(2), {})
        with pytest.raises(StorageError, match=r"2: .*No space left.*Older .* are intact") as error:
            saver.save(3, values(3), {})
        assert "\n" not in str(error.value)
        assert [p.name for p in tmp_path.iterdir()] == ["1"]
        full_disk(False)
        saver.save(2, values(2), {})  # not taken for done
    assert (value_of(tmp_path, 1), value_of(tmp_path, 2)) == (1, 2)


def test_the_end_of_the_context_raises_it_too_but_hides_no_other_error(tmp_path, full_disk):
    full_disk(True)
    with pytest.raises(StorageError), Saver(tmp_path, Kept()) as saver:
        saver.save(1, values(1), {})
    with pytest.raises(KeyError), Saver(tmp_path, Kept()) as saver:
        saver.save(1, values(1), {})
        raise KeyError


def test_the_newest_every_third_and_the_best_are_kept(tmp_path):
    measured = {2: 0.5, 4: 0.9, 7: 0.9, 8: 0.2}
    with Saver(tmp_path, Kept(newest=2, every=3)) as saver:
        for step in range(1, 11):
            saver.save(step, values(step), {"measured": measured.get(step)})
    assert checkpoint.steps(tmp_path) == [3, 4, 6, 9, 10]
    assert checkpoint.best(tmp_path) == (4, 0.9)  # the first of equals
    assert checkpoint.best(tmp_path, until=3) is None


def test_one_in_the_middle_of_a_step_comes_after_it_and_goes_with_the_next(tmp_path):
    pending = checkpoint.Pending(2, {"a": np.arange(3)}, {"b": [1, None]})
    with Saver(tmp_path, Kept(1)) as saver:
        saver.save(9, values(9), {})
        saver.save(10, values(10), {})
        saver.save(10, values(11), {}, pending=pending)
        saver.wait()
        assert checkpoint.names(tmp_path) == ["10", "10+2"]
        assert checkpoint.steps(tmp_path) == [10]
        back = checkpoint.read_pending(tmp_path / "10+2")
        assert (back.updates, back.record) == (2, {"b": [1, None]})
        np.testing.assert_array_equal(back.arrays["a"], [0, 1, 2])
        assert checkpoint.read_pending(tmp_path / "10") is None
        assert value_of(tmp_path, "10+2") == 11
        saver.save(11, values(12), {})
    assert checkpoint.names(tmp_path) == ["11"]


def test_what_comes_after_the_resumed_one_goes_once_another_is_whole(tmp_path, full_disk):
    with Saver(tmp_path, Kept(9)) as saver:
        for step in (1, 2, 3):
            saver.save(step, values(step), {})
    with Saver(tmp_path, Kept(9)) as saver:
        saver.whole, saver.stale = {"1"}, {"2", "3"}
        saver.save(1, values(0), {})  # the one that it came from is not written again
        full_disk(True)
        saver.save(2, values(20), {})
        with pytest.raises(StorageError):
            saver.wait()
        assert checkpoint.steps(tmp_path) == [1, 2, 3]
        full_disk(False)
        saver.save(2, values(20), {})
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert (value_of(tmp_path, 1), value_of(tmp_path, 2)) == (1, 20)


def test_what_a_failed_save_left_is_removed_though_its_writers_are_not_done(tmp_path, monkeypatch):
    """A file that appears while a directory is being removed keeps it; here twice."""
    left, tried, real = tmp_path / ".3.writing", [], checkpoint.shutil.rmtree
    left.mkdir()

    def rmtree(path, **how):
        tried.append(path)
        if len(tried) > 2:
            real(path, **how)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
    assert checkpoint.clean(tmp_path) == [left]
    assert len(tried) == 3 and list(tmp_path.iterdir()) == []


ODD = [
    "lr[3e-5]",
    "[proj]",
    "a]b",
    "back\\slash",
    "st*r",
    "wh?t",
    "sp ace",
    "ünï 漢",
    "{x}",
    "100%",
]


@pytest.mark.parametrize("name", ODD)
def test_a_run_may_have_any_name_that_a_folder_may_have(tmp_path, state, name):
    place = tmp_path / name / "checkpoints"
    assert checkpoint.rehearse(place) == [] and list(place.iterdir()) == []
    checkpoint.save(place, 7, state, {"step": 7})
    back, _ = checkpoint.restore(place, 7, jax.tree.map(jnp.zeros_like, state))
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_what_cannot_be_read_is_no_checkpoint_and_is_found_at_the_start(
    tmp_path, state, monkeypatch
):
    """Without the way around its globbing Orbax merges nothing here, and says nothing."""
    monkeypatch.setattr(arrays, "PATTERN", re.compile("(?!)"))
    place = tmp_path / "[proj]" / "checkpoints"
    with pytest.raises(StorageError, match="cannot be read"):
        checkpoint.save(place, 7, state, {})
    assert checkpoint.names(place) == []
    with pytest.raises(StorageError, match="cannot be read"):
        checkpoint.rehearse(place)
    assert list(place.iterdir()) == []


def test_a_file_system_that_flushes_no_directories_is_told_of_and_used(
    tmp_path, state, monkeypatch
):
    flush = os.fsync

    def refused(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refused)
    (warning,) = checkpoint.rehearse(tmp_path / "checkpoints")
    assert "does not flush directories" in warning
    checkpoint.save(tmp_path / "checkpoints", 7, state, {})
    integrity.verify(tmp_path / "checkpoints" / "7")

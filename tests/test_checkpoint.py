"""A checkpoint gives back every bit, whole or not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gspo_jax import checkpoint
from gspo_jax.errors import StorageError
from gspo_jax.optim import make_optimizer
from gspo_jax.quant import Quantised
from gspo_jax.update import init_state


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
    assert isinstance(back.opt_state[1].inner.mu["w"], Quantised)
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
    with pytest.raises(StorageError, match=r"no such checkpoint; found steps \[3\]"):
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

"""Rows that run together: all of them once, few shapes, little padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gspo_jax.batch import TrainBatch
from gspo_jax.update.microbatch import Microbatches, fold, pick, put, rows_of, split, take, widths


@given(
    length=st.lists(st.integers(2, 300), min_size=1, max_size=70),
    tokens=st.sampled_from([0, 1, 500, 4096]),
    ways=st.sampled_from([1, 2, 8]),
)
def test_every_row_runs_once_in_a_width_that_holds_it(length, tokens, ways):
    length = np.array(length)
    parts = split(length, 300, tokens=tokens, ways=ways)
    run = [(rows, p.width) for p in parts for rows in p.rows[: p.number]]
    rows = np.concatenate([rows for rows, _ in run])
    assert sorted(rows[rows < len(length)]) == list(range(len(length)))
    for rows, width in run:
        real = rows[rows < len(length)]
        assert width in widths(300) and length[real].max() <= width
        assert len(rows) == rows_of(width, tokens, len(length), ways) and len(rows) % ways == 0
        assert np.all(rows[len(real) :] == len(length))  # fillers last
    longest = [length[rows[0]] for rows, _ in run]
    assert longest == sorted(longest, reverse=True)
    assert len({p.width for p in parts}) == len(parts)
    for p in parts:  # the shape does not depend on how many there are
        assert len(p.rows) == -(-len(length) // p.rows.shape[1])


def test_widths_are_few_and_the_longest_is_exact():
    assert widths(1280) == (1280, 960, 640, 320)
    assert widths(96) == (96, 64, 32)  # 32 apart at least
    assert widths(130) == (130, 97, 64, 31)  # a quarter, rounded up: four of them, not five
    assert widths(40) == (40, 8)
    assert widths(20) == (20,)


def test_a_microbatch_has_about_equally_many_tokens_at_every_width():
    # 16,384 tokens: 12 rows of 1280, 17 of 960, 25 of 640, 51 of 320, in multiples of the devices
    assert [rows_of(w, 16384, 128) for w in widths(1280)] == [12, 17, 25, 51]
    assert [rows_of(w, 16384, 128, ways=8) for w in widths(1280)] == [8, 16, 24, 48]
    assert rows_of(1280, 100, 128) == 1  # never none
    assert rows_of(320, 16384, 20) == 20  # never more than there are ...
    assert rows_of(320, 16384, 20, ways=8) == 24  # ... but for what the devices need
    assert rows_of(1280, 0, 128) == 128  # no limit


def test_padding_is_small_where_lengths_vary():
    """512 rows, uniform from 257 to 1280 of 1280 tokens: 2/3 as much again if all were 1280.

    Widths are 320 apart, so a row of 769 on average has 160 of padding, a fifth; the rest is the
    last microbatch, of which few rows are real.
    """
    length = np.random.default_rng(0).integers(257, 1281, 512)
    run = sum(p.number * p.rows.shape[1] * p.width for p in split(length, 1280, tokens=16384))
    assert 512 * 1280 / length.sum() > 1.6
    assert run / length.sum() < 1.27


def test_a_row_as_long_as_a_width_runs_in_it_and_one_without_tokens_in_none():
    """Widths are 96, 64 and 32; 3 stands for no row."""
    parts = split(np.array([64, 0, 32]), 96, tokens=96)
    assert [(p.width, p.rows[: p.number].tolist()) for p in parts] == [
        (64, [[0]]),
        (32, [[2, 3, 3]]),
    ]


def test_of_a_group_the_microbatches_that_there_are_run_in_order():
    rows = np.array([[4, 7], [1, 9], [5, 5]], np.int32)  # the third keeps the shape
    ran = fold(lambda so_far, rows: 100 * so_far + rows.sum(), Microbatches(rows, 2, 8), 0)
    assert int(ran) == 1110


def make_batch():
    tokens = np.arange(24, dtype=np.int32).reshape(3, 8)
    mask = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0]], bool)
    routing = np.arange(3 * 8 * 2, dtype=np.int16).reshape(3, 8, 1, 2)
    return TrainBatch(
        tokens,
        np.array([2, 3, 4], np.int32),
        mask.sum(1, dtype=np.int32),
        mask,
        np.array([0.5, -1, 2], np.float32),
        routing,
    )


def test_take_cuts_the_text_and_leaves_the_response_arrays_whole():
    got = take(jax.tree.map(jnp.asarray, make_batch()), jnp.array([2, 0, 3]), 6)
    np.testing.assert_array_equal(got.tokens[:2], make_batch().tokens[[2, 0], :6])
    np.testing.assert_array_equal(got.mask[:2], make_batch().mask[[2, 0]])
    np.testing.assert_array_equal(got.routing[:2], make_batch().routing[[2, 0], :6])
    assert got.adv.tolist() == [2, 0.5, 0]
    # No row: nothing to learn from, and nothing for a router to balance.
    assert not got.mask[2].any() and got.prompt_length.tolist() == [4, 2, 0]


def test_put_fills_the_rows_and_drops_the_fillers():
    whole = jnp.full((3, 4), 9.0)
    got = put(whole, jnp.array([[1.0, 2.0], [3.0, 4.0], [jnp.nan, jnp.nan]]), jnp.array([2, 0, 3]))
    np.testing.assert_array_equal(got, [[3, 4, 0, 0], [9, 9, 9, 9], [1, 2, 0, 0]])


@pytest.mark.parametrize("rows", [[1, 0], [3, 3]])
def test_pick_of_no_row_is_zero_whatever_the_rows_hold(rows):
    values = jnp.array([[1.0], [jnp.inf], [jnp.nan]])
    got = pick({"x": values}, jnp.array(rows))["x"]
    expected = [[jnp.inf], [1.0]] if rows == [1, 0] else [[0.0], [0.0]]
    np.testing.assert_array_equal(got, expected)

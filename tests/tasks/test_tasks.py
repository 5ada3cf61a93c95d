"""The table of tasks, and the order in which problems are visited."""

import numpy as np
import pytest

from gspo_jax.errors import ConfigError
from gspo_jax.tasks import TASKS, load_task, order
from gspo_jax.tasks.task import curriculum_stages, fingerprint, fraction, staged_order


def test_every_epoch_visits_every_problem_once():
    visited = order(7, 0, 21, seed=3)
    for epoch in range(3):
        assert sorted(visited[7 * epoch : 7 * epoch + 7]) == list(range(7))


def test_epochs_and_seeds_differ_in_their_permutation():
    first, second = order(50, 0, 50, seed=0), order(50, 50, 50, seed=0)
    assert first != second != list(range(50))
    assert order(50, 0, 50, seed=1) != first


@pytest.mark.parametrize("start, count", [(0, 3), (5, 4), (6, 9), (30, 1), (13, 0)])
def test_any_window_is_that_window_of_the_whole(start, count):
    """A resumed run, which starts in the middle, sees what an uninterrupted one sees."""
    assert order(7, start, count, seed=2) == order(7, 0, 40, seed=2)[start : start + count]


def test_order_is_the_same_in_every_version():
    # Philox's raw words are specified; these numbers must never change, or resume breaks.
    assert order(6, 4, 6, seed=11) == [2, 1, 3, 5, 1, 0]


def test_order_takes_a_negative_seed_and_refuses_an_empty_split():
    assert sorted(order(4, 0, 4, seed=-1)) == [0, 1, 2, 3]
    assert order(50, 0, 50, seed=2**60) != order(50, 0, 50, seed=2**60 + 1)  # not rounded
    with pytest.raises(ValueError, match="0 problems"):
        order(0, 0, 1, seed=0)


def test_hash_fractions_are_spread_evenly():
    u = np.array([fraction(str(i)) for i in range(4000)])
    # Four standard errors of a uniform mean: 4 * sqrt(1/12 / 4000) = 0.018.
    assert abs(u.mean() - 0.5) < 0.018
    assert u.min() >= 0 and u.max() < 1
    assert abs((u < 0.1).mean() - 0.1) < 0.02


def test_fingerprint_sees_order_and_content():
    assert len({fingerprint(c) for c in ([1, 2], [2, 1], [1, "2"], [[1], 2])}) == 4
    assert fingerprint([1, 2]) == fingerprint([1, 2])


def test_load_task_by_name_passes_seed_and_options():
    task = load_task("arithmetic", seed=5, slip=0.5, sizes={"train": 10, "val": 3, "test": 4})
    assert task.size == {"train": 10, "val": 3, "test": 4}
    same = TASKS["arithmetic"](seed=5, slip=0.5, sizes=task.size)
    assert [task.problem("train", i) for i in range(10)] == [
        same.problem("train", i) for i in range(10)
    ]


def test_load_task_wants_exactly_one_source():
    with pytest.raises(ConfigError, match="one of the two"):
        load_task()
    with pytest.raises(ConfigError, match="one of the two"):
        load_task("arithmetic", "rows.jsonl")
    with pytest.raises(
        ConfigError, match=r"task\.name=arithmetics: no such task\. Did you mean arithmetic"
    ):
        load_task("arithmetics")
    with pytest.raises(ConfigError, match=r"task\.fields"):
        load_task("arithmetic", fields={"prompt": "q"})


STAGES = [(0.0, [3, 5]), (0.3, [3, 5, 7, 9]), (0.6, [1, 3, 5, 7, 9])]


def test_a_curriculum_opens_its_stages_at_their_share_of_the_run():
    # Of 25 positions, stages begin at ceil(7.5) = 8 and 15.
    visited = staged_order(STAGES, 0, 25, total=25, seed=4)
    assert set(visited[:8]) == {3, 5}
    assert set(visited[8:15]) == {3, 5, 7, 9} and set(visited[15:]) == {1, 3, 5, 7, 9}
    # Within a stage everything is visited once before anything is visited again.
    assert sorted(visited[8:12]) == [3, 5, 7, 9] and sorted(visited[15:20]) == [1, 3, 5, 7, 9]


@pytest.mark.parametrize("start, count", [(0, 3), (7, 2), (5, 20), (8, 7), (14, 1), (20, 30)])
def test_any_window_of_a_curriculum_is_that_window_of_the_whole(start, count):
    whole = staged_order(STAGES, 0, 60, total=25, seed=4)
    assert staged_order(STAGES, start, count, total=25, seed=4) == whole[start : start + count]


def test_one_stage_is_the_plain_order():
    alone = staged_order([(0.0, range(7))], 5, 12, total=10, seed=2)
    assert alone == order(7, 5, 12, seed=2)


def test_levels_join_together_and_stay():
    levels = ["hard", "easy", "medium", "easy", "other"]
    stages = curriculum_stages(levels, {"medium": 0.25, "hard": 0.5, "easy": 0.0})
    assert stages == [(0.0, [1, 3]), (0.25, [1, 2, 3]), (0.5, [0, 1, 2, 3])]


def test_a_curriculum_of_unknown_levels_or_without_a_start_is_refused():
    with pytest.raises(ConfigError, match=r"task\.curriculum\.esay: no such level; the task has"):
        curriculum_stages(["easy", "hard"], {"esay": 0})
    with pytest.raises(ConfigError, match="some level must start at 0"):
        curriculum_stages(["easy", "hard"], {"easy": 0.1})

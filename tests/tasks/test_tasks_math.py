"""Arithmetic: right answers, splits that cannot overlap, and slips that are systematic."""

import re

import pytest

from gspo_jax.answers.verify import check
from gspo_jax.errors import ConfigError
from gspo_jax.tasks.made.arithmetic import (
    ARITHMETIC_SIZES,
    arithmetic,
    canonical_key,
    split_of,
    worked_solution,
)

SMALL = {"train": 300, "val": 60, "test": 90}


def terms(problem):
    return tuple(map(int, re.fullmatch(r"What is (\d+)\+(\d+)-(\d+)\?", problem.prompt).groups()))


def every(task, split):
    return [task.problem(split, i) for i in range(task.size[split])]


@pytest.fixture(scope="module")
def default_task():
    return arithmetic()


def test_default_splits_are_disjoint_by_canonical_key(default_task):
    keys = {
        split: {canonical_key(*terms(p)) for p in every(default_task, split)}
        for split in default_task.size
    }
    # As many keys as problems: nothing is repeated within a split either, in any order of a+b.
    assert {split: len(k) for split, k in keys.items()} == ARITHMETIC_SIZES
    assert not keys["train"] & keys["val"]
    assert not keys["train"] & keys["test"]
    assert not keys["val"] & keys["test"]


def test_no_seed_can_train_on_a_held_out_problem():
    held_out = {canonical_key(*terms(p)) for p in every(arithmetic(seed=1, sizes=SMALL), "test")}
    for seed in (0, 1, 2):
        task = arithmetic(seed=seed, sizes=SMALL)
        for problem in every(task, "train"):
            assert split_of(canonical_key(*terms(problem))) == "train"
        assert not held_out & {canonical_key(*terms(p)) for p in every(task, "train")}


def test_canonical_key_ignores_the_order_of_the_sum_alone():
    assert canonical_key(47, 25, 18) == canonical_key(25, 47, 18)
    assert canonical_key(47, 25, 18) != canonical_key(47, 18, 25)


def test_held_out_problems_do_not_depend_on_the_seed_but_training_ones_do():
    one, two = arithmetic(seed=1, sizes=SMALL), arithmetic(seed=2, sizes=SMALL)
    assert every(one, "test") == every(two, "test")
    assert every(one, "val") == every(two, "val")
    assert every(one, "train") != every(two, "train")
    assert one.fingerprint != two.fingerprint
    assert one.fingerprint == arithmetic(seed=1, sizes=SMALL).fingerprint


def test_a_smaller_split_is_the_start_of_a_larger_one():
    small, large = arithmetic(sizes=SMALL), arithmetic(sizes={"train": 400})
    assert every(small, "train") == every(large, "train")[:300]


def test_answers_are_right_and_in_range(default_task):
    for problem in every(default_task, "val"):
        a, b, c = terms(problem)
        assert all(10 <= n <= 99 for n in (a, b, c))
        assert int(problem.answer) == a + b - c >= 0


def test_without_slips_every_solution_earns_the_reward(default_task):
    for problem in every(default_task, "test"):
        assert check(problem.columns["completion"], problem.answer).reason == "correct"


def test_worked_solution_by_hand():
    assert worked_solution(47, 25, 18) == "47+25=72\n72-18=54\n\\boxed{54}"


def test_a_slip_forgets_one_carry_or_one_borrow():
    # 27+25: 7+5 carries. 52-41: 2-1 does not borrow. Only the carry can be forgotten: 42.
    assert worked_solution(27, 25, 41, slip=1.0) == "27+25=42\n42-41=1\n\\boxed{1}"
    # 21+25: no carry. 46-18: 6-8 borrows; forgotten, the tens stay 4-1: 38 instead of 28.
    assert worked_solution(21, 25, 18, slip=1.0) == "21+25=46\n46-18=38\n\\boxed{38}"
    # 21+25-13 has neither.
    assert worked_solution(21, 25, 13, slip=1.0) == worked_solution(21, 25, 13)
    # 55+45=100 carries (and 100-95 borrows); 90-95 would be negative, so it must be the borrow.
    assert worked_solution(55, 45, 95, slip=1.0) == "55+45=100\n100-95=15\n\\boxed{15}"


def test_slipped_solutions_are_off_by_ten_and_otherwise_consistent():
    task = arithmetic(slip=1.0, sizes=SMALL)
    wrong = {"carry": 0, "borrow": 0}
    for problem in every(task, "train"):
        a, b, c = terms(problem)
        text = problem.columns["completion"]
        pattern = rf"{a}\+{b}=(\d+)\n(\d+)-{c}=(\d+)\n\\boxed{{(\d+)}}"
        total, again, result, boxed = map(int, re.fullmatch(pattern, text).groups())
        assert total == again and result == boxed
        carry, borrow = total - (a + b), result - (total - c)
        assert (carry, borrow) in {(0, 0), (-10, 0), (0, 10)}
        wrong["carry"] += carry != 0
        wrong["borrow"] += borrow != 0
        has_carry, has_borrow = a % 10 + b % 10 >= 10, (a + b) % 10 < c % 10
        if has_borrow or (has_carry and a + b - 10 >= c):
            assert carry or borrow
        else:
            assert not carry and not borrow
    assert min(wrong.values()) > 30  # both kinds occur


def test_slip_is_the_probability_among_problems_that_can_slip():
    def slips(p):
        task = arithmetic(slip=p, sizes={"train": 2000})
        return {q.id for q in every(task, "train") if q.answer not in q.columns["completion"][-8:]}

    never, half, always = slips(0.0), slips(0.5), slips(1.0)
    assert not never
    assert half < always  # the same problems slip, and more of them
    # About 1200 problems can slip; 4 standard errors are 4 * sqrt(0.25 / 1200) = 0.058.
    assert abs(len(half) / len(always) - 0.5) < 0.058


def test_ids_are_unique_within_a_split(default_task):
    ids = [p.id for p in every(default_task, "train")]
    assert len(set(ids)) == len(ids)


def test_impossible_requests_are_refused():
    with pytest.raises(ConfigError, match=r"slip=1\.5 is a probability"):
        arithmetic(slip=1.5)
    with pytest.raises(ConfigError, match=r"\['tset'\]; the splits are"):
        arithmetic(sizes={"tset": 5})
    with pytest.raises(ConfigError, match=r"sizes\.val=100000: must lie between 0 and 18000"):
        arithmetic(sizes={"val": 100_000})


def test_carrying_problems_are_those_that_every_slip_spoils():
    task = arithmetic(slip=1.0, carrying=True, sizes={"train": 300, "val": 0, "test": 200})
    for split in ("train", "test"):
        for i in range(task.size[split]):
            problem = task.problem(split, i)
            assert not problem.columns["completion"].endswith(f"{{{problem.answer}}}")

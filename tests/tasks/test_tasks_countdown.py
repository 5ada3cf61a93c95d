"""Countdown: solvable, scored by exact arithmetic of our own, and not to be talked into a point."""

import re
import sys
from fractions import Fraction
from random import Random

import pytest

from gspo_jax.tasks.made.countdown import (
    COUNT,
    LARGEST,
    countdown_numbers,
    countdown_reward,
    evaluate,
    make_countdown,
    solves,
)


def reachable(numbers):
    """Every value that all of the numbers make, by combining any two of them in every way."""
    if len(numbers) == 1:
        return set(numbers)
    found = set()
    for i, a in enumerate(numbers):
        for j, b in enumerate(numbers):
            if i != j:
                rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
                for value in {a + b, a - b, a * b, *([a / b] if b else [])}:
                    found |= reachable([*rest, value])
    return found


def test_targets_can_be_reached_and_references_reach_them():
    for level, count in COUNT.items():
        for i in range(40):
            numbers, target, expression = make_countdown(Random(f"{level}{i}"), count)
            assert len(numbers) == count and 9 < target <= LARGEST and target not in numbers
            assert sorted(map(int, re.findall(r"\d+", expression))) == sorted(numbers)
            assert eval(expression) == target
            assert solves(expression, numbers, target)
            if count == 3:
                assert target in reachable([Fraction(n) for n in numbers])


def test_values_are_those_of_python_on_random_expressions():
    rng = Random(0)

    def expression(depth):
        if depth == 0 or rng.random() < 0.2:
            return str(rng.randint(0, 30))
        inner = f"{expression(depth - 1)}{rng.choice('+-*/')}{expression(depth - 1)}"
        return f"({inner})" if rng.random() < 0.5 else inner

    for _ in range(500):
        text = expression(4)
        if len(text) > 200:
            continue
        try:
            value = eval(re.sub(r"\d+", lambda n: f"Fraction({n[0]})", text))
        except ZeroDivisionError:
            value = None
        worked = evaluate(text)
        assert (worked and worked[0]) == value
        if worked:
            assert worked[1] == [int(n) for n in re.findall(r"\d+", text)]


NUMBERS, TARGET = [25, 3, 8, 2], 91  # (25 + 8) * 3 - 8 would use 8 twice; 25 * 3 + 8 * 2 = 91


@pytest.mark.parametrize(
    "answer",
    [
        "25 * 3 + 8 * 2",
        "25*3+8*2",
        "(2 * 8) + ((25) * 3)",
        "25*3+8*2 = 91",
        r"25 \times 3 + 8 \cdot 2",
        r"$25 \times 3 + 8 \times 2$",
        r"\left(25 \times 3\right) + 8 \times 2",
        "25 \u00d7 3 + 8 \u00d7 2",
    ],
)
def test_any_right_expression_scores_1(answer):
    assert solves(answer, NUMBERS, TARGET)


@pytest.mark.parametrize(
    "answer",
    [
        "91",
        "25*3+8*2=90",
        "25*3+8*2=91=91",
        "25*3+16",  # a number that was not given
        "25*3+8+8",  # one of them twice, one not at all
        "25*3+8*2+8-8",
        "25*3+8*2*1",
        "25*3+8",
        "2*8*3+25",
        "25*3+8*2)",
        "(25*3+8*2",
        "25*3+8*+2",
        "25*3+8*2+",
        "25(3)+8*2",
        "25 3 8 2",
        "253-82*2",  # digits glued together
        "25*3+8**2",
        "25^3+8*2",
        "25*3+2e8",
        "25*3+8*2.0",
        "-25*-3+8*2",
        "25*3+8*2 or 25*3-8*2",
        "",
        "nan",
        "8/(2-2)*25*3",
        "9*9*9",
    ],
)
def test_any_other_text_scores_0(answer):
    assert not solves(answer, NUMBERS, TARGET)


def test_the_same_number_twice_is_used_twice():
    assert solves("4*4", [4, 4], 16)
    assert not solves("4*4", [4], 16)
    assert not solves("4", [4, 4], 4)


def test_the_reward_takes_boxes_chats_and_no_second_box():
    right = r"\boxed{25*3+8*2}"
    chat = [{"role": "assistant", "content": right}]
    texts = [right, "25*3+8*2", chat, rf"{right} \boxed{{91}}", rf"{right} again {right}", ""]
    scores = countdown_reward(texts, [NUMBERS] * 6, [TARGET] * 6)
    assert scores == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]


HOSTILE = [
    "(" * 1_000_000,
    "(" * 99 + "1" + ")" * 99,
    "9*" * 99 + "9",
    "9" * 1_000_000,
    "1/" * 99 + "1",
    "9**9**9**9",
    "1+" * 500_000,
    "1 " * 500_000,
    "__import__('os').abort()",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_scores_0_with_little_work(text):
    lines = 0

    def count(frame, event, _):
        nonlocal lines
        lines += event == "line"
        return count

    sys.settrace(count)
    try:
        assert not solves(text, [9, 9], 81)
    finally:
        sys.settrace(None)
    assert lines < 100 * 200  # characters that are read


def test_the_largest_numbers_that_can_be_written_stay_small():
    value, used = evaluate("999999*" * 28 + "999")
    assert value == Fraction(999999) ** 28 * 999 and len(used) == 29


def test_the_same_numbers_and_target_are_asked_once():
    task = countdown_numbers(sizes={"train": 300, "val": 0, "test": 0}, levels=["easy"])
    problems = [task.problem("train", i).columns for i in range(300)]
    keys = {(tuple(sorted(p["numbers"])), p["target"]) for p in problems}
    assert len(keys) == 300 and {len(p["numbers"]) for p in problems} == {3}

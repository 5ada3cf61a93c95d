"""Countdown: reach a number from others by + - * /, each of them used once.

Many expressions may be right, so the scorer works the answer out: by a parser of its own for
numbers, four signs and parentheses, exact and bounded; nothing is evaluated.
"""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from random import Random
from typing import Any

from gspo_jax.answers.notation import peeled
from gspo_jax.answers.verify import asked, boxed, counts_reasoning, one_box
from gspo_jax.batch import Problem
from gspo_jax.tasks.draw import (
    Drawn,
    between,
    chosen_sizes,
    chosen_weights,
    listed,
    made_up,
    pick,
    shuffled,
    weighted,
)
from gspo_jax.tasks.task import Task

COUNTDOWN_SIZES = {"train": 10_000, "val": 400, "test": 800}
COUNT = {"easy": 3, "medium": 4, "hard": 5}  # numbers given
LARGEST = 999  # target
MAX_EXPRESSION = 200  # characters
MAX_DEPTH = 20  # parentheses inside of each other
_TOKEN = re.compile(r"\s*([0-9]{1,6}|[-+*/()])")
_SIGNS = {
    r"\times": "*",
    r"\cdot": "*",
    r"\div": "/",
    r"\left": "",
    r"\right": "",
    "\u00d7": "*",
    "\u00b7": "*",
    "\u00f7": "/",
    "\u2212": "-",
    "$": "",
}


def countdown_numbers(
    *,
    seed: int = 0,
    levels: Mapping[str, float | int] | Sequence[str] = ("easy", "medium", "hard"),
    sizes: dict[str, int] | None = None,
) -> Task:
    """Reach a target from 3 (easy), 4 (medium) or 5 (hard) numbers, each used exactly once.

    Every problem has a solution in whole numbers above 0, which is its reference; any expression
    that is worth the target and uses just these numbers scores 1. The same numbers with the same
    target are the same problem.

    Args:
        seed: chooses the training problems.
        levels: a list of names, or how often each of them is wanted.
        sizes: number of problems per split; what is not named keeps COUNTDOWN_SIZES.

    Raises:
        ConfigError: an unknown level or split.
    """
    mix = chosen_weights("levels", levels, list(COUNT))

    def draw(rng: Random, split: str) -> Drawn:
        level = weighted(rng, mix)
        numbers, target, expression = make_countdown(rng, COUNT[level])
        key = f"{sorted(numbers)} {target}"
        prompt = (
            f"Write {target} with the numbers {listed(numbers)}: use each of them exactly once, no "
            "other number, and only +, -, *, / and parentheses.\nGive the expression in \\boxed{}."
        )
        columns = {
            "numbers": numbers,
            "target": target,
            "difficulty": level,
            "completion": f"\\boxed{{{expression}}}",
        }
        name = f"countdown-{'-'.join(map(str, numbers))}-{target}"
        return Drawn(key, key, Problem(name, prompt, expression, columns))

    sizes = chosen_sizes(COUNTDOWN_SIZES, sizes)
    return made_up("countdown", sizes, draw, countdown_reward, seed=seed, answer_in=value_in)


def make_countdown(rng: Random, count: int) -> tuple[list[int], int, str]:
    """Numbers, a target, and an expression of it whose every step is a whole number above 0."""
    while True:
        numbers = [between(rng, 1, 10 if rng.random() < 0.6 else 50) for _ in range(count)]
        # Terms are put together two at a time; the text of a sum needs parentheses in a product.
        terms = [(n, str(n), "") for n in numbers]
        while len(terms) > 1:
            (a, left, inner), (b, right, second) = shuffled(rng, terms, 2)
            terms.remove((a, left, inner))
            terms.remove((b, right, second))
            sign = pick(rng, "++--**/")
            value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else 0}
            if not 0 < value[sign] <= LARGEST or ("1" in (left, right) and sign in "*/"):
                break
            if sign in "*/":
                left = f"({left})" if inner in tuple("+-") else left
                right = f"({right})" if second else right
            elif sign == "-":
                right = f"({right})" if second in tuple("+-") else right
            terms.append((value[sign], f"{left} {sign} {right}", sign))
        else:
            target, expression, _ = terms[0]
            if target not in numbers and target > 9:
                return shuffled(rng, numbers), target, expression


@counts_reasoning
def countdown_reward(completions, numbers, target, **columns) -> list[float | None]:
    """1 where the boxed expression is worth the target and uses each number once, else 0."""
    rows = zip(map(asked, completions), numbers, target, strict=True)
    return [float(solves(one_box(text), given, goal)) for text, given, goal in rows]


def solves(answer: str | None, numbers: Sequence[int], target: int) -> bool:
    """Is `answer` an expression of `target`, perhaps followed by "= target", in these numbers?"""
    if answer is None or len(answer) > MAX_EXPRESSION:
        return False
    left, equals, right = plain(peeled(answer)).partition("=")
    worked = evaluate(left)
    if worked is None or (equals and right.strip() != str(target)):
        return False
    value, used = worked
    return value == target and sorted(used) == sorted(numbers)


def value_in(problem: Problem, text: str) -> str | None:
    """The boxed expression, without spaces, or None."""
    answer = boxed(text)
    return re.sub(r"\s", "", plain(peeled(answer[:MAX_EXPRESSION]))) if answer else None


def plain(answer: str) -> str:
    """The signs of LaTeX and of typography as + - * /."""
    for mark, sign in _SIGNS.items():
        answer = answer.replace(mark, sign)
    return answer


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
    """The exact value of an expression and the numbers in it; None if it is none, or divides by 0.

    Numbers are whole and have at most 6 digits; a sign before a number, as in -3, is none.
    """
    if len(expression) > MAX_EXPRESSION:
        return None
    tokens, end = [], 0
    while match := _TOKEN.match(expression, end):
        tokens.append(match[1])
        end = match.end()
    if expression[end:].strip():
        return None
    try:
        reader = _Reader(tokens)
        value = reader.sum(0)
    except (ValueError, ZeroDivisionError):
        return None
    return None if reader.tokens else (value, reader.used)


class _Reader:
    """Reads tokens from the left; ValueError where none of the expected ones follows."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens[::-1]
        self.used: list[int] = []

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.tokens and self.tokens[-1] in "+-":
            sign, other = self.tokens.pop(), self.product(depth)
            value = value + other if sign == "+" else value - other
        return value

    def product(self, depth: int) -> Fraction:
        value = self.number(depth)
        while self.tokens and self.tokens[-1] in "*/":
            sign, other = self.tokens.pop(), self.number(depth)
            value = value * other if sign == "*" else value / other
        return value

    def number(self, depth: int) -> Fraction:
        token: Any = self.tokens.pop() if self.tokens else ""
        if token == "(" and depth < MAX_DEPTH:
            value = self.sum(depth + 1)
            if not self.tokens or self.tokens.pop() != ")":
                raise ValueError
            return value
        if not token.isdigit():
            raise ValueError
        self.used.append(int(token))
        return Fraction(int(token))

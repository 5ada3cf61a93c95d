"""`zebra-synth`: logic-grid puzzles of our own, each with exactly one solution.

Rows have the fields and formats of ZebraLogic (arXiv 2502.01100), grid and multiple choice, so
that both can be read and scored alike; but no puzzle is from there, and an accuracy on these is
not an accuracy on ZebraLogic.

    hidden solution ─▶ all true clues ─▶ enough of them ─▶ none that could be left out ─▶ words
"""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations
from math import factorial, log10
from random import Random
from typing import Any, NamedTuple

from gspo_jax.batch import Problem
from gspo_jax.errors import ConfigError
from gspo_jax.tasks.draw import Drawn, chosen_sizes, made_up, mark, pick, shuffled, smallest
from gspo_jax.tasks.task import Task
from gspo_jax.tasks.zebra.score import (
    as_solution,
    choice_in,
    grid_prompt,
    grid_reward,
    mc_prompt,
    mc_reward,
    solution_in,
    worked,
)
from gspo_jax.tasks.zebra.solve import BINARY, SYMMETRIC, UNARY, Clue, count_solutions
from gspo_jax.tasks.zebra.words import ATTRIBUTES, CLUES, OPENING, PLACES, person, sentence

ZEBRA_SIZES = {"train": 2000, "val": 200, "test": 400}
SIZES = [f"{n}*{m}" for n in range(2, 7) for m in range(2, 7)]  # houses * attributes
VERSION = "2026-11-23T00:00:00"  # `created_at` of every row: the date of this generator
# How often a kind of clue is offered while some of it are left. Clues that name a house, and
# above all the right one, give much away: puzzles that keep many of them are easy.
WEIGHTS = {"found": 1, "not": 2, "same": 6, "next": 4, "beside": 3, "left": 3, "gap1": 2, "gap2": 1}


class Puzzle(NamedTuple):
    """A puzzle before it is put into words.

    Attributes:
        columns: N values of each of M attributes, in the order in which they are listed.
        solution: house of variable `a * N + v`, counted from 0.
        clues: none of them follows from the others.
        nodes: states that the solver looks at to prove the solution unique; 1: no guess needed.
    """

    columns: dict[str, list[str]]
    solution: tuple[int, ...]
    clues: list[Clue]
    nodes: int

    @property
    def houses(self) -> int:
        return len(self.solution) // len(self.columns)


def zebra_synth(
    *,
    seed: int = 0,
    puzzles: Sequence[str] = ("small",),
    mode: str = "grid",
    reward: str = "puzzle",
    example: bool = False,
    sizes: dict[str, int] | None = None,
) -> Task:
    """Logic-grid puzzles; a response gives the whole grid as JSON, or one letter.

    The split is decided by what a puzzle says when words are taken away (`structure`), so that
    training never sees a test puzzle with other names. Making a 5*5 takes 0.01 s; a problem for
    "test" takes eight tries, because one puzzle in eight belongs there.

    Args:
        seed: chooses the training problems.
        puzzles: sizes houses*attributes such as "3*4", or groups of them by the number of grids
            that have to be told apart, (N!)^M: "small" < 10^3, "medium" < 10^6, "large" < 10^10,
            "xl", "all". Every size is equally frequent.
        mode: "grid", or "mc": one question about one cell, with a choice of N values.
        reward: of a grid: "puzzle" is 1 where every cell is right; "cells" is the share of right
            cells where each column uses all of its values once, else 0.
        example: show a solved puzzle first.
        sizes: number of problems per split; what is not named keeps ZEBRA_SIZES.

    Raises:
        ConfigError: an unknown size, mode, reward or split.
    """
    for name, value, known in (
        ("mode", mode, ("grid", "mc")),
        ("reward", reward, ("puzzle", "cells")),
    ):
        if value not in known:
            raise ConfigError(f"{name}={value}: wanted one of {list(known)}.")
    chosen = _chosen(puzzles)

    def draw(rng: Random, split: str) -> Drawn:
        houses, attributes = map(int, pick(rng, chosen).split("*"))
        puzzle = make_puzzle(rng, houses, attributes)
        row = grid_row(puzzle)
        key = row["puzzle"]
        if mode == "mc":
            row = pick(rng, list(mc_rows(puzzle)))
            key += row["question"]
        return Drawn(structure(puzzle), key, to_problem(row, puzzle, example=example))

    name = "zebra-synth" if mode == "grid" else "zebra-synth-mc"
    return made_up(
        name,
        chosen_sizes(ZEBRA_SIZES, sizes),
        draw,
        grid_reward(reward) if mode == "grid" else mc_reward,
        seed=seed,
        answer_in=solution_in if mode == "grid" else choice_in,
    )


def _chosen(puzzles: Sequence[str]) -> list[str]:
    """Sizes and groups of sizes as a list of sizes."""
    found: list[str] = []
    for name in [puzzles] if isinstance(puzzles, str) else puzzles:
        group = SIZES if name == "all" else [s for s in SIZES if group_of(s) == name]
        found += group or [str(name)]
    if not found or not set(found) <= set(SIZES):
        raise ConfigError(
            f"puzzles={puzzles}: wanted sizes from 2*2 to 6*6 (houses*attributes), or some of "
            "small, medium, large, xl, all."
        )
    return list(dict.fromkeys(found))


def group_of(size: str) -> str:
    """ZebraLogic's name for sizes with about as many grids to tell apart."""
    states = log10_states(size)
    return "small" if states < 3 else "medium" if states < 6 else "large" if states < 10 else "xl"


def log10_states(size: str) -> float:
    """log10 of (N!)^M, the number of grids without clues."""
    houses, attributes = map(int, size.split("*"))
    return attributes * log10(factorial(houses))


# --------------------------------------------------------------------------------- generating


def make_puzzle(rng: Random, houses: int, attributes: int) -> Puzzle:
    """A puzzle with exactly one solution, from which no clue can be left out."""
    names = [
        "Name",
        *shuffled(rng, [name for name in ATTRIBUTES if name != "Name"], attributes - 1),
    ]
    columns = {name: shuffled(rng, ATTRIBUTES[name].values, houses) for name in names}
    solution = tuple(h for _ in names for h in shuffled(rng, range(houses)))
    pool = _offered(rng, true_clues(houses, solution))
    # The first clues that are enough (all of them are: "found" alone fixes every value): their
    # number is doubled, then found by halving.
    low, high = 0, houses * attributes
    while not _is_unique(houses, attributes, pool[:high]):
        low, high = high, min(2 * high, len(pool))
    while high - low > 1:
        middle = (low + high) // 2
        enough = _is_unique(houses, attributes, pool[:middle])
        low, high = (low, middle) if enough else (middle, high)
    clues = pool[:high]
    for clue in shuffled(rng, clues[:-1]):
        without = [other for other in clues if other != clue]
        if _is_unique(houses, attributes, without):
            clues = without
    clues = shuffled(rng, clues)
    count = count_solutions(houses, attributes, clues)
    assert count.solutions == 1 and count.first == solution
    return Puzzle(columns, solution, clues, count.nodes)


def _is_unique(houses: int, attributes: int, clues: list[Clue]) -> bool:
    return count_solutions(houses, attributes, clues).solutions == 1


def true_clues(houses: int, solution: Sequence[int]) -> list[Clue]:
    """Every clue that holds, of every kind, once."""
    clues = []
    for v, at in enumerate(solution):
        clues += [Clue("found" if h == at else "not", v, h) for h in range(houses)]
    for x, y in combinations(range(len(solution)), 2):
        for kind, holds in BINARY.items():
            if holds(solution[x], solution[y]):
                clues.append(Clue(kind, x, y))
            elif kind not in SYMMETRIC and holds(solution[y], solution[x]):
                clues.append(Clue(kind, y, x))
    return clues


def _offered(rng: Random, clues: list[Clue]) -> list[Clue]:
    """The clues in random order, kinds by WEIGHTS as long as some are left."""
    left: dict[str, list[Clue]] = {kind: [] for kind in WEIGHTS}
    for clue in shuffled(rng, clues):
        left[clue.kind].append(clue)
    out = []
    while len(out) < len(clues):
        kinds = [kind for kind, some in left.items() if some for _ in range(WEIGHTS[kind])]
        out.append(left[kinds[int(len(kinds) * rng.random())]].pop())
    return out


def structure(puzzle: Puzzle) -> str:
    """The same text for two puzzles that differ in words and in the order of attributes and clues.

    A value is named by its house in the solution. Attributes are named in the order in which the
    text comes out smallest, tried only among those that their own clues do not tell apart.
    """
    n, attributes = puzzle.houses, range(len(puzzle.columns))
    profiles = {}  # what can be said of an attribute without naming any other
    for a in attributes:
        mine = [c for c in puzzle.clues if c.x // n == a or (c.kind in BINARY and c.y // n == a)]
        profiles[a] = _spelled(puzzle, mine, [int(b != a) for b in attributes])

    def text(order: list[int]) -> str:
        return _spelled(puzzle, puzzle.clues, [order.index(a) for a in attributes])

    return f"{n}*{len(attributes)} {smallest(profiles, text)}"


def _spelled(puzzle: Puzzle, clues: list[Clue], name: list[int]) -> str:
    """The clues with attribute a called name[a] and values by their houses, sorted, as text."""
    n, out = puzzle.houses, []
    for kind, x, y in clues:
        one = f"{name[x // n]}.{puzzle.solution[x]}"
        two = f"@{y}" if kind in UNARY else f"{name[y // n]}.{puzzle.solution[y]}"
        if kind in SYMMETRIC:
            one, two = sorted((one, two))
        out.append(f"{kind}({one},{two})")
    return " ".join(sorted(out))


# ---------------------------------------------------------------------------------- rendering


def grid_row(puzzle: Puzzle) -> dict[str, Any]:
    """A row as in ZebraLogic's grid_mode: id, size, puzzle, solution, created_at."""
    text = puzzle_text(puzzle)
    n, size = puzzle.houses, f"{puzzle.houses}*{len(puzzle.columns)}"
    rows = [
        [str(h + 1), *(_value_at(puzzle, column, h) for column in puzzle.columns)] for h in range(n)
    ]
    return {
        "id": f"zebra-synth-{size.replace('*', 'x')}-{mark(text)}",
        "size": size,
        "puzzle": text,
        "solution": {"header": ["House", *puzzle.columns], "rows": rows},
        "created_at": VERSION,
    }


def mc_rows(puzzle: Puzzle) -> Iterator[dict[str, Any]]:
    """Rows as in ZebraLogic's mc_mode, one for each cell; `answer` is the right choice's text."""
    grid = grid_row(puzzle)
    shared = {key: grid[key] for key in ("size", "puzzle", "created_at")}
    cells = [(column, h) for h in range(puzzle.houses) for column in puzzle.columns]
    for number, (column, h) in enumerate(cells):
        yield {
            "id": f"{grid['id']}#mc-{number}",
            **shared,
            "question": f"What is the {column} of the person who lives in House {h + 1}?",
            "choices": puzzle.columns[column],
            "answer": _value_at(puzzle, column, h),
        }


def puzzle_text(puzzle: Puzzle) -> str:
    """Houses, attributes with their values, and numbered clues."""
    lines = [OPENING.format(n=puzzle.houses)]
    for column, values in puzzle.columns.items():
        listed = ", ".join(f"`{value}`" for value in values)
        lines.append(f"- {column}, the {ATTRIBUTES[column].about}: {listed}")
    lines += ["", "## Clues:"]
    lines += [f"{i}. {_clue_text(puzzle, clue)}" for i, clue in enumerate(puzzle.clues, 1)]
    return "\n".join(lines)


def _clue_text(puzzle: Puzzle, clue: Clue) -> str:
    kind, x, y = clue
    if kind in UNARY:
        return sentence(CLUES[kind].format(x=_person(puzzle, x), place=PLACES[y]))
    if kind in SYMMETRIC and x % 2:  # either may come first
        x, y = y, x
    if kind == "same" and y < puzzle.houses:  # "Ada is the baker" reads better than the reverse
        x, y = y, x
    if kind == "left" and (x + y) % 2:
        kind = "right"
    return sentence(CLUES[kind].format(x=_person(puzzle, x), y=_person(puzzle, y)))


def _person(puzzle: Puzzle, variable: int) -> str:
    column = list(puzzle.columns)[variable // puzzle.houses]
    return person(column, puzzle.columns[column][variable % puzzle.houses])


def _value_at(puzzle: Puzzle, column: str, house: int) -> str:
    start = list(puzzle.columns).index(column) * puzzle.houses
    houses = puzzle.solution[start : start + puzzle.houses]
    return puzzle.columns[column][houses.index(house)]


def to_problem(row: dict[str, Any], puzzle: Puzzle, *, example: bool) -> Problem:
    """The row as a prompt and its answer, with what is known of its difficulty."""
    known = {
        "difficulty": group_of(row["size"]),
        "clues": len(puzzle.clues),
        "nodes": puzzle.nodes,
        "log10_states": round(log10_states(row["size"]), 2),
    }
    shown = example_row() if example else None
    return (mc_problem if "question" in row else grid_problem)(row | known, shown)


def grid_problem(row: dict[str, Any], example: dict[str, Any] | None) -> Problem:
    """A row of grid_mode as a problem whose answer is the solution as JSON."""
    solution = as_solution(row["solution"])
    columns = {key: value for key, value in row.items() if key != "id"}
    columns |= {"completion": worked(solution)}
    return Problem(str(row["id"]), grid_prompt(row, example), json.dumps(solution), columns)


def mc_problem(row: dict[str, Any], example: dict[str, Any] | None) -> Problem:
    """A row of mc_mode as a problem whose answer is the letter of the right choice."""
    letter = chr(65 + row["choices"].index(row["answer"]))
    columns = {key: value for key, value in row.items() if key not in ("id", "answer")}
    columns |= {"completion": worked(letter)}
    return Problem(str(row["id"]), mc_prompt(row, example), letter, columns)


@cache
def example_row() -> dict[str, Any]:
    """The solved puzzle that prompts show: always the same."""
    return grid_row(make_puzzle(Random("zebra-synth example"), 3, 2))

"""Asking for a logic grid, and scoring the one in a response: JSON in, share of right cells out.

The rules are those under which ZebraLogic's accuracies are published: the last JSON object after
the reasoning counts, it needs a "solution", a cell is right if it is the same text up to case and
surrounding space, and what is missing is wrong.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gspo_jax.answers.verify import MAX_TEXT, after_reasoning, asked, counts_reasoning
from gspo_jax.batch import Problem

Grid = dict[str, dict[str, str]]  # "House 1" -> column -> value

MAX_OBJECTS = 50  # objects of a text that are tried, from the last one back
_BRACE = re.compile(r"[{}]")
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:)]?")


class GridScore(NamedTuple):
    """How a response compares with the solution.

    Attributes:
        answered: it has a JSON object with a "solution".
        right, cells: cells that are right, of so many.
        solved: all of them.
        permutations: every column uses each of its values exactly once.
    """

    answered: bool
    right: int
    cells: int
    solved: bool
    permutations: bool


def last_object(text: str, key: str) -> dict[str, Any] | None:
    """The last JSON object after the reasoning that has `key`, or None.

    Objects are found by their braces. One that cannot be read, or has no such key, as the braces
    of a trailing ``\\boxed{}``, does not hide an earlier one that does. Work is linear in the
    length of the text; nothing but JSON is read.
    """
    text = after_reasoning(text)[-MAX_TEXT:]
    spans: list[tuple[int, int]] = []  # balanced, and not inside another balanced one
    starts: list[int] = []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            starts.append(brace.start())
        elif starts:
            start = starts.pop()
            while spans and spans[-1][0] > start:
                spans.pop()
            spans.append((start, brace.end()))
    for start, end in reversed(spans[-MAX_OBJECTS:]):
        try:
            # Models break long texts over lines, which JSON forbids inside of a string.
            found = json.loads(text[start:end].replace("\n", ""), strict=False)
        except (ValueError, RecursionError):
            continue
        if key in found:
            return found
    return None


def cell(value: Any) -> str | None:
    """A cell as it is compared; a list stands for its first element, anything else for itself."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value) if abs(value) < 10**9 else None
    return value.strip().lower() if isinstance(value, str) else None


def score_grid(text: str, gold: Grid) -> GridScore:
    """Compare the grid in `text` with `gold`."""
    cells = [(house, column, cell(v)) for house, row in gold.items() for column, v in row.items()]
    found = last_object(text, "solution")
    given = found["solution"] if found else None
    if not isinstance(given, dict):
        return GridScore(False, 0, len(cells), False, False)

    def given_at(house: str, column: str) -> str | None:
        row = given.get(house)
        return cell(row.get(column)) if isinstance(row, dict) else None

    right = sum(given_at(house, column) == value for house, column, value in cells)
    wanted: dict[str, list] = {}
    got: dict[str, list] = {}
    for house, column, value in cells:
        wanted.setdefault(column, []).append(value)
        got.setdefault(column, []).append(given_at(house, column))
    permutations = all(
        None not in got[column] and sorted(got[column]) == sorted(wanted[column])
        for column in wanted
    )
    return GridScore(True, right, len(cells), right == len(cells), permutations)


def solution_in(problem: Problem, text: str) -> str | None:
    """The grid that `text` gives, in one spelling, or None; equal texts are equal answers."""
    found = last_object(text, "solution")
    if found is None or not isinstance(found["solution"], dict):
        return None
    gold: Grid = json.loads(problem.answer or "{}")
    given = found["solution"]
    rows = {house: given[house] for house in gold if isinstance(given.get(house), dict)}
    return json.dumps(
        {house: {c: cell(row.get(c)) for c in gold[house]} for house, row in rows.items()}
    )


def letter_in(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the one choice that `text` answers with, by letter or by its own words."""
    found = last_object(text, "answer")
    answer = found["answer"] if found else None
    if not isinstance(answer, str):
        return None
    answer = answer.strip()
    named = [i for i, choice in enumerate(choices) if choice.lower() == answer.lower()]
    match = _LETTER.fullmatch(answer)
    if match and not named:
        named = [i for i in range(len(choices)) if chr(65 + i) == match[1].upper()]
    return chr(65 + named[0]) if len(named) == 1 else None


def choice_in(problem: Problem, text: str) -> str | None:
    """The letter that `text` answers with, or None."""
    return letter_in(text, problem.columns["choices"])


def grid_reward(kind: str) -> Callable[..., list[float | None]]:
    """A reward function: 1 for a solved puzzle ("puzzle"), or the share of right cells ("cells").

    The share counts only where every column is a permutation of its values. Writing the most
    frequent value everywhere, which is right in one of N cells, therefore earns nothing.
    """

    @counts_reasoning
    def zebra(completions, answer, **columns):
        scores = []
        for completion, gold in zip(completions, answer, strict=True):
            found = score_grid(asked(completion), json.loads(gold))
            share = found.right / found.cells if found.permutations else 0.0
            scores.append(float(found.solved) if kind == "puzzle" else share)
        return scores

    return zebra


@counts_reasoning
def mc_reward(completions, answer, choices, **columns) -> list[float | None]:
    """1 where the letter is the right one, else 0."""
    return [
        float(letter_in(asked(completion), options) == gold)
        for completion, gold, options in zip(completions, answer, choices, strict=True)
    ]


# ------------------------------------------------------------------------------------ prompts


def as_solution(table: dict[str, Any]) -> Grid:
    """{header, rows} of a data row as the object that a response should give."""
    _, *names = table["header"]
    return {f"House {row[0]}": dict(zip(names, row[1:], strict=True)) for row in table["rows"]}


def worked(answer: Any) -> str:
    """The shortest right response, to supervise a cold start."""
    key = "answer" if isinstance(answer, str) else "solution"
    return json.dumps({key: answer})


def grid_prompt(row: dict[str, Any], example: dict[str, Any] | None = None) -> str:
    """The question to a row of grid_mode; `example` is a row that is shown with its solution."""
    blank = {
        house: dict.fromkeys(values, "___")
        for house, values in as_solution(row["solution"]).items()
    }
    asked = _asked({"reasoning": "___", "solution": blank})
    return f"{_shown(example)}{row['puzzle']}\n\nWho lives where? {asked}"


def mc_prompt(row: dict[str, Any], example: dict[str, Any] | None = None) -> str:
    """The question to a row of mc_mode."""
    choices = "\n".join(f"{chr(65 + i)}) {choice}" for i, choice in enumerate(row["choices"]))
    asked = _asked({"reasoning": "___", "answer": "___"}, where="; the answer is one letter")
    question = f"## Question:\n{row['question']}\n{choices}"
    return f"{_shown(example)}{row['puzzle']}\n\n{question}\n\n{asked}"


def _asked(form: dict[str, Any], where: str = "") -> str:
    return (
        "Reply with one JSON object of this form, with your own words and values in place of "
        f"___{where}:\n{json.dumps(form, indent=1)}"
    )


def _shown(example: dict[str, Any] | None) -> str:
    if example is None:
        return ""
    solved = json.dumps(as_solution(example["solution"]), indent=1)
    return f"# Example\n{example['puzzle']}\n\nIts solution:\n{solved}\n\n# Puzzle\n"

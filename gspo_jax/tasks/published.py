"""Readers of published sets, from the hub or from files: prompts that say where the answer goes.

Nothing of these sets is in the package. On a machine without network, the message of a reader says
what to put where.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gspo_jax.answers.verify import numeric
from gspo_jax.batch import Problem
from gspo_jax.errors import ConfigError, DataError
from gspo_jax.tasks.data import BOX, user_data, with_instruction
from gspo_jax.tasks.sources import (
    SPLIT_NAMES,
    BadRows,
    Row,
    files_by_split,
    kind,
    named_split,
    read_rows,
)
from gspo_jax.tasks.task import SPLITS, Task, fingerprint
from gspo_jax.tasks.zebra.puzzles import example_row, grid_problem, group_of, mc_problem
from gspo_jax.tasks.zebra.score import as_solution, choice_in, grid_reward, mc_reward, solution_in

BOXED = "Reason step by step, and put the final answer in \\boxed{}."
_CALCULATOR = re.compile(r"<<[^<>]*>>")


class Published(NamedTuple):
    """One published set.

    Attributes:
        hub: where it is on the hub, "owner/name[:config]".
        columns: those that the reader needs, for the message to an offline machine.
        also: other hub datasets of the same problems, whose columns have other names.
        evaluation: all of it is for evaluation, whatever its splits are called.
        integers: answers are whole numbers from 0 to 999.
    """

    hub: str
    columns: str
    also: tuple[str, ...] = ()
    evaluation: bool = True
    integers: bool = False


PUBLISHED = {
    "gsm8k": Published("openai/gsm8k:main", "question, answer", evaluation=False),
    "math500": Published("HuggingFaceH4/MATH-500", "problem, answer"),
    "aime24": Published(
        "HuggingFaceH4/aime_2024",
        "problem, answer",
        also=("Maxwell-Jia/AIME_2024",),
        integers=True,
    ),
    "aime25": Published(
        "math-ai/aime25",
        "problem, answer",
        also=("opencompass/AIME2025:AIME2025-I", "opencompass/AIME2025:AIME2025-II"),
        integers=True,
    ),
    # The copy of the authors, allenai/ZebraLogicBench, has its answers masked.
    "zebralogic": Published("WildEval/ZebraLogic:grid_mode", "id, size, puzzle, solution"),
    "zebralogic-mc": Published(
        "WildEval/ZebraLogic:mc_mode", "id, puzzle, question, choices, answer"
    ),
}


def recognised(path: str) -> tuple[str, str] | None:
    """(reader, path) for a set of the hub, or for a file of ZebraLogic's form; else None."""
    for name, spec in PUBLISHED.items():
        if path.lower() in (hub.lower() for hub in (spec.hub, *spec.also)):
            return name, path
        if path.lower() == spec.hub.partition(":")[0].lower():
            return name, spec.hub
    if kind(Path(path)) not in (".jsonl", ".json") or not Path(path).is_file():
        return None
    row = next(iter(read_rows(path, BadRows(10**9))), None)
    columns = set(row.values) if row else set()
    if {"puzzle", "size", "solution"} <= columns:
        return "zebralogic", path
    return ("zebralogic-mc", path) if {"puzzle", "question", "choices"} <= columns else None


def mathematics(
    name: str,
    *,
    seed: int = 0,
    path: str | None = None,
    instruction: str = BOXED,
    max_bad_rows: int = 0,
    checker: str = "exact",
) -> Task:
    """GSM8K, MATH-500 or AIME: the question, the instruction, and the answer that has to be boxed.

    Args:
        seed: not used; every run sees the same problems.
        path: a file, a directory with train.jsonl and test.jsonl, or another hub dataset.
        instruction: what follows each question.
        max_bad_rows: rows with errors that may be left out.
        checker: "exact", or "math-verify" where answers are formulas, as some of MATH-500 are.

    Raises:
        DataError: nothing there, or not what it should be.
        ConfigError: an unknown checker, or one that is not installed.
    """
    spec, source = PUBLISHED[name], path or PUBLISHED[name].hub
    split = "test" if spec.evaluation else _only_split(Path(source))

    def read() -> Task:
        return user_data(source, max_bad_rows=max_bad_rows, split=split, checker=checker)

    data = _read(name, path, read)
    problems = {
        part: [
            with_instruction(_checked(name, data.problem(part, i)), instruction)
            for i in range(data.size[part])
        ]
        for part in SPLITS
    }
    made_of = fingerprint([data.fingerprint, instruction])
    warnings = tuple(w for w in data.warnings if "training rows" not in w)
    if split is None and Path(source).is_file():
        warnings += (
            f"{source}: its name says no split, so {data.size['test']} of its rows are held out; "
            "should they be published test rows, call the file test.jsonl.",
        )
    return replace(
        data,
        name=name,
        problem=lambda part, i: problems[part][i],
        fingerprint=made_of,
        warnings=warnings,
        unboxed="" if BOX in instruction else data.unboxed,
    )


def _only_split(source: Path) -> str | None:
    """The one split that files on this machine are called after; None of several, or of a hub."""
    names = {SPLIT_NAMES[name] for name, _ in files_by_split(source)[0]} if source.is_dir() else ()
    return next(iter(names)) if len(names) == 1 else None if names else named_split(source)


def _checked(name: str, problem: Problem) -> Problem:
    """The problem, which has an answer, with a worked solution where the set has one."""
    answer = problem.answer
    if answer is None:
        raise DataError(f"{name}: problem {problem.id} has no answer.")
    if PUBLISHED[name].integers:
        value = numeric(answer)  # 336^\circ is written so in one copy
        if value is None or value.denominator > 1 or not 0 <= value < 1000:
            raise DataError(f"{name}: problem {problem.id}: got {answer!r:.40}, wanted 0 to 999.")
        answer = str(int(value))  # "033" and 33 are one answer
    solution = problem.columns.get("answer")
    columns = dict(problem.columns)
    if isinstance(solution, str) and "####" in solution:
        steps = _CALCULATOR.sub("", solution).rpartition("####")[0].strip()
        columns["completion"] = f"{steps}\n\\boxed{{{answer}}}"
    return replace(problem, answer=answer, columns=columns)


def zebralogic(
    name: str,
    *,
    seed: int = 0,
    path: str | None = None,
    reward: str = "puzzle",
    example: bool = True,
    max_bad_rows: int = 0,
) -> Task:
    """ZebraLogic's puzzles, the whole grid or one cell as multiple choice; all are "test".

    Args:
        seed: not used.
        path: a file or directory with rows of grid_mode, or of mc_mode.
        reward: of a grid, "puzzle" or "cells", as in zebra-synth.
        example: show a solved puzzle first, one of our own.
        max_bad_rows: rows with errors that may be left out.

    Raises:
        DataError: nothing there, not what it should be, or answers that are masked.
    """
    grid = name == "zebralogic"
    if reward not in ("puzzle", "cells"):
        raise ConfigError(f"reward={reward}: wanted one of ['puzzle', 'cells'].")
    bad = BadRows(max_bad_rows)
    rows = _read(name, path, lambda: list(read_rows(path or PUBLISHED[name].hub, bad)))
    problems = []
    for row in rows:
        try:
            problems.append(_zebra_problem(row, grid, example_row() if example else None))
        except DataError as error:
            bad.add(error)
    if not problems:
        raise DataError(f"{path or PUBLISHED[name].hub}: no rows.")
    left = f"{path}: left out {len(bad.errors)} bad rows, first " if bad.errors else ""
    return Task(
        name=name,
        size={"train": 0, "val": 0, "test": len(problems)},
        problem=lambda split, index: problems[index],
        reward=grid_reward(reward) if grid else mc_reward,
        warnings=(f"{left}{bad.errors[0]}",) if bad.errors else (),
        fingerprint=fingerprint([[p.id, p.prompt, p.answer] for p in problems]),
        answer_in=solution_in if grid else choice_in,
    )


def _zebra_problem(row: Row, grid: bool, example: dict[str, Any] | None) -> Problem:
    values = row.values
    wanted = ("puzzle", "solution") if grid else ("puzzle", "question", "choices", "answer")
    for column in wanted:
        if column not in values:
            raise DataError(f"{row.place}:{column}: missing; the row has {sorted(values)}.")
    try:
        if grid:
            cells = [
                c for house in as_solution(values["solution"]).values() for c in house.values()
            ]
        else:
            cells = [values["answer"]]
            _ = 0 if set(cells) == {"___"} else values["choices"].index(values["answer"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = "a header and rows of one length" if grid else "one of the choices"
        raise DataError(f"{row.place}:{wanted[-1]}: wanted {what} ({error!r:.80}).") from None
    if not cells or "___" in cells:
        raise DataError(
            f"{row.place}:{wanted[-1]}: the answers of this copy are masked (___); take one with "
            "answers, such as WildEval/ZebraLogic."
        )
    given = {"id": Path(row.place).name, **values}
    if isinstance(size := given.get("size"), str) and re.fullmatch(r"[2-9]\*[2-9]", size):
        given["difficulty"] = group_of(size)
    return grid_problem(given, example) if grid else mc_problem(given, example)


def _read(name: str, path: str | None, read: Callable[[], Any]) -> Any:
    """`read()`; where the hub was asked and did not answer, what to do without it."""
    try:
        return read()
    except DataError as error:
        if path is not None or "cannot read this" not in str(error):
            raise
        spec = PUBLISHED[name]
        files = "test.jsonl" if spec.evaluation else "train.jsonl and test.jsonl"
        raise DataError(
            f"{error} Without network: put {files} with the columns {spec.columns} into a "
            f"directory DIR, and set task.name={name} task.options.path=DIR."
        ) from None


READERS: dict[str, Callable[..., Task]] = {
    name: partial(zebralogic if name.startswith("zebralogic") else mathematics, name)
    for name in PUBLISHED
}

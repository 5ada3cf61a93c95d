"""Problems from data of the user's own: JSONL, JSON, parquet, or a Hugging Face dataset.

A row becomes a Problem through the usual column names, in any case:

    prompt   prompt | messages | question | problem | puzzle      a text, or a chat
    answer   answer | solution | ground_truth | reward_model.ground_truth
    split    split        train, val(idation) or test; else prompts are held out by their hash
    id       id | unique_id | problem_idx       unique; else the place of the row in the file

or through `fields`, such as `{"prompt": "text", "answer": "meta.result"}`. All of the row's
columns stay available to reward functions, by their own names.
"""

import json
from decimal import Decimal
from math import isfinite
from pathlib import Path
from typing import Any

from gspo_jax.batch import Problem
from gspo_jax.errors import DataError
from gspo_jax.tasks.math_verify import reward_of
from gspo_jax.tasks.sources import SPLIT_NAMES, BadRows, Row, described, read_rows
from gspo_jax.tasks.task import SPLITS, Task, fingerprint, fraction
from gspo_jax.tasks.verify import MAX_ANSWER, boxed

PROMPT = ("prompt", "messages", "question", "problem", "puzzle")
ANSWER = ("answer", "solution", "ground_truth", "reward_model.ground_truth")
ID = ("id", "unique_id", "problem_idx")
HELD_OUT = 0.1  # share of the prompts that becomes "test" where the data names no splits
MIN_PROMPTS = 5  # with fewer different prompts nothing is held out


def user_data(
    path: str | Path,
    *,
    fields: dict[str, str] | None = None,
    max_bad_rows: int = 0,
    split: str | None = None,
    checker: str = "exact",
) -> Task:
    """The task in a data file, a dataset directory, or a dataset of the Hugging Face hub.

    Where neither the data nor its source names splits, every prompt whose hash falls into the
    lowest tenth is held out as "test", and at least one is; the same prompt is always on the
    same side. With fewer than 5 different prompts all of them are for training.

    A gold answer that is a worked solution is cut down to what follows ``####`` (GSM8K) or to
    its last ``\\boxed{}``. A chat that ends with the assistant's turn is a prompt without that
    turn, which becomes the column "completion".

    Args:
        path: JSONL, JSON or parquet file; directory; or "owner/name[:config]".
        fields: columns by the name they are wanted under, "prompt", "answer", "id", "split" or
            any other; a dotted name reaches into objects. An empty "answer" means there is none.
        max_bad_rows: rows with errors that may be left out; they are counted in a warning.
        split: "train", "val" or "test": what all rows are, whatever the data says.
        checker: "exact", or "math-verify" for answers that are formulas; see `math_verify`.

    Raises:
        ConfigError: an unknown checker, or one that is not installed.
        DataError: the first error beyond `max_bad_rows`, as file:line:column: what is wrong.
    """
    reward = reward_of(checker)
    if split is not None and split not in SPLITS:
        raise DataError(f"split={split}: wanted one of {list(SPLITS)}.")
    bad = BadRows(max_bad_rows)
    rows, warnings = list(read_rows(path, bad)), []
    if split is None:
        rows, warnings = _known_splits(rows, str(path))
    rows = [row._replace(split=split or row.split) for row in rows]
    if not rows:
        raise DataError(f"{path}: no rows.")
    columns = _columns(rows, dict(fields or {}))
    placed: list[tuple[str | None, Problem]] = []
    seen: dict[tuple[str | None, str], str] = {}
    for row in rows:
        try:
            place = split or _split(row, columns)
            problem = _problem(row, columns)
            first = seen.setdefault((place, problem.id), row.place)
            if first != row.place:
                raise _error(row, columns["id"], f"{problem.id!r} is taken by {first}")
        except DataError as error:
            bad.add(error)
        else:
            placed.append((place, problem))
    if not placed:
        raise DataError(f"{path}: no good row is left; the first bad one is {bad.errors[0]}")
    if bad.errors:
        warnings.append(f"{path}: left out {len(bad.errors)} bad rows, first {bad.errors[0]}")
    problems = _by_split(placed)
    warnings += _doubts(problems, str(path))
    return Task(
        name=Path(path).stem,
        size={split: len(problems[split]) for split in SPLITS},
        problem=lambda split, index: problems[split][index],
        reward=reward,
        warnings=tuple(warnings),
        fingerprint=fingerprint([(split, p.prompt, p.answer, p.columns) for split, p in placed]),
    )


def _known_splits(rows: list[Row], path: str) -> tuple[list[Row], list[str]]:
    """Rows with "train", "val", "test" or None for the name their source gives its splits.

    A dataset of nothing but "train" names no splits in effect.
    """
    names = {row.split for row in rows}
    if names <= {None, "train"}:
        return [row._replace(split=None) for row in rows], []
    known = {name for name in names if name in SPLIT_NAMES}
    if not known:
        raise DataError(f"{path}: the splits {sorted(map(str, names))} are none of {list(SPLITS)}.")
    kept = [row._replace(split=SPLIT_NAMES[row.split]) for row in rows if row.split in known]
    left = sorted(map(str, names - known))
    return kept, [f"{path}: the splits {left} are not used."] if left else []


def _columns(rows: list[Row], fields: dict[str, str]) -> dict[str, str]:
    """Which column holds the prompt, and which the answer, the id and the split if any does."""
    present = {name: name for row in rows for name in row.values}
    any_case = {name.lower(): name for name in reversed(present)}
    usual = {"prompt": PROMPT, "answer": ANSWER, "id": ID, "split": ("split",)}
    columns = {}
    for role, names in usual.items():
        if role not in fields:
            found = [any_case[n] for n in names if n in any_case]
            found += [n for n in names if any(_has(row.values, n) for row in rows if "." in n)]
            columns |= {role: found[0]} if found else {}
    columns |= {role: column for role, column in fields.items() if column}
    if "prompt" not in columns:
        raise _error(
            rows[0],
            "prompt",
            f"none of the columns {sorted(present)} is called {' | '.join(PROMPT)}; "
            "say which one it is with task.fields.prompt=NAME",
        )
    return columns


def _problem(row: Row, columns: dict[str, str]) -> Problem:
    extra = {
        role: _get(row, column)
        for role, column in columns.items()
        if role not in ("prompt", "answer", "id", "split")
    }
    prompt = _prompt(row, columns["prompt"])
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        extra.setdefault("completion", prompt[-1]["content"])
        prompt = prompt[:-1]
        if not prompt:
            raise _error(row, columns["prompt"], "got only an answer, wanted a question before it")
    others = {k: v for k, v in row.values.items() if k != columns["prompt"]}
    return Problem(
        id=_id(row, columns["id"]) if "id" in columns else Path(row.place).name,
        prompt=prompt,
        answer=_answer(row, columns["answer"]) if "answer" in columns else None,
        columns=others | extra,
    )


def _prompt(row: Row, column: str) -> str | list[dict[str, str]]:
    value = _get(row, column)
    if isinstance(value, str):
        return _text(row, column, value)
    if not isinstance(value, list):
        got = described(value)
        raise _error(row, column, f"got {got}, wanted a text or a list of messages")
    if not value:
        raise _error(row, column, "got an empty list of messages")
    messages = []
    for index, message in enumerate(value):
        where = f"{column}[{index}]"
        if not isinstance(message, dict):
            raise _error(row, where, f"got {described(message)}, wanted a role and a content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                got = described(message.get(key))
                raise _error(row, f"{where}.{key}", f"got {got}, wanted a text")
        messages.append({"role": message["role"], "content": message["content"]})
    _text(row, f"{column}[-1].content", messages[-1]["content"])
    return messages


def _answer(row: Row, column: str) -> str:
    value = _get(row, column)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _error(
            row,
            column,
            f"got {described(value)}, wanted a text or a number; "
            "task.fields.answer=NAME takes another column",
        )
    if isinstance(value, float):
        if not isfinite(value):
            raise _error(row, column, f"got {value}, wanted a finite number")
        return format(Decimal(repr(value)), "f")
    text = _text(row, column, str(value))
    if "####" in text:
        text = text.rpartition("####")[2].replace(",", "").strip()
    elif inside := boxed(text):
        text = inside
    return _text(row, column, text).strip()


def _id(row: Row, column: str) -> str:
    value = _get(row, column)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _error(row, column, f"got {described(value)}, wanted a text or a whole number")
    return str(value)


def _split(row: Row, columns: dict[str, str]) -> str | None:
    if row.split is not None or "split" not in columns:
        return row.split
    value = _get(row, columns["split"])
    name = SPLIT_NAMES.get(value.lower()) if isinstance(value, str) else None
    if name is None:
        got = repr(value) if isinstance(value, str) else described(value)
        raise _error(row, columns["split"], f"got {got}, wanted one of {list(SPLITS)}")
    return name


def _text(row: Row, column: str, text: str) -> str:
    """`text` as it is, if it says something and a tokenizer can take it."""
    if not text.strip():
        raise _error(row, column, "got an empty text")
    if "\0" in text:
        raise _error(row, column, "got a text with a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _error(row, column, "got half a surrogate pair, which is no character") from None
    return text


def _get(row: Row, column: str) -> Any:
    """The value under a column's name, or under a dotted path into objects."""
    if column in row.values:
        return row.values[column]
    value: Any = row.values
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            raise _error(row, column, f"missing; the row has {sorted(row.values)}")
        value = value[part]
    return value


def _has(values: dict[str, Any], dotted: str) -> bool:
    first, _, rest = dotted.partition(".")
    return isinstance(values.get(first), dict) and rest in values[first]


def _error(row: Row, column: str, what: str) -> DataError:
    return DataError(f"{row.place}:{column}: {what}.")


def _key(problem: Problem) -> str:
    """The same text for the same prompt."""
    return json.dumps(problem.prompt, sort_keys=True)


def _by_split(placed: list[tuple[str | None, Problem]]) -> dict[str, list[Problem]]:
    problems: dict[str, list[Problem]] = {split: [] for split in SPLITS}
    keys = sorted({_key(problem) for split, problem in placed if split is None}, key=fraction)
    held_out = {key for key in keys if fraction(key) < HELD_OUT} | set(keys[:1])
    if len(keys) < MIN_PROMPTS:
        held_out = set()
    for split, problem in placed:
        problems[split or ("test" if _key(problem) in held_out else "train")].append(problem)
    return problems


def _doubts(problems: dict[str, list[Problem]], path: str) -> list[str]:
    """What is allowed, but probably not meant."""
    warnings = []
    if not problems["test"] and not problems["val"]:
        warnings.append(f"{path}: all {len(problems['train'])} rows are training rows.")
    train = {_key(problem) for problem in problems["train"]}
    for split in ("val", "test"):
        if shared := sum(_key(problem) in train for problem in problems[split]):
            n = len(problems[split])
            warnings.append(f"{path}: {shared} of {n} {split} prompts are training prompts too.")
    everything = [problem for split in SPLITS for problem in problems[split]]
    if long := sum(len(problem.answer or "") > MAX_ANSWER for problem in everything):
        warnings.append(
            f"{path}: {long} answers are texts of more than {MAX_ANSWER} characters without a "
            "boxed value; no response can match them."
        )
    return warnings

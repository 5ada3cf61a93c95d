"""One row of data as a Problem: the only reader of columns, for files and for a trainer's items.

Columns are found by their usual names, in any case, or by `task.fields`:

    prompt   prompt | messages | question | problem | puzzle | query | conversations
    answer   answer | final_answer | target_answer | reference_answer | ground_truth |
             reward_model.ground_truth | solution
    id       id | unique_id | problem_idx       else, or where a row has none, its place
"""

import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from math import isfinite
from pathlib import Path
from typing import Any

from gspo_jax.answers.verify import boxed
from gspo_jax.batch import Problem
from gspo_jax.errors import DataError
from gspo_jax.tasks.sources import Row, described

PROMPT = ("prompt", "messages", "question", "problem", "puzzle", "query", "conversations")
# What is short comes before a worked solution.
ANSWER = ("answer", "final_answer", "target_answer", "reference_answer", "ground_truth")
ANSWER += ("reward_model.ground_truth", "solution")
ID = ("id", "unique_id", "problem_idx")
ROLES = ("prompt", "answer", "id", "split")
MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
"""Columns of which a model of texts sees nothing."""
QUESTION_PARTS = ("body", "context", "passage", "paragraph", "article", "story", "premise")
QUESTION_PARTS += ("options", "choices", "table", "input", "tools")
"""Columns that are asked together with the prompt in published sets."""
_HOLE = re.compile(r"\{([^{}]+)\}")
_SPEAKERS = {"human": "user", "gpt": "assistant", "observation": "tool", "tool": "tool"}
_SPEAKERS |= {role: role for role in ("user", "assistant", "system")}


def columns_of(rows: Sequence[Row], fields: Mapping[str, str]) -> dict[str, str]:
    """Which column holds the prompt, and which the answer, the id and the split if any does.

    A column whose first value is an object, or a list of other than one thing, holds no answer;
    it can be named by `fields`.

    Raises:
        DataError: no column holds the prompt.
    """
    present = {name: name for row in rows for name in row.values}
    any_case = {name.lower(): name for name in reversed(present)}
    usual = {"prompt": PROMPT, "answer": ANSWER, "id": ID, "split": ("split",)}
    columns = {}
    for role, names in usual.items():
        if role in fields:
            continue
        matches = [
            any_case.get(name) or name
            for name in names
            if name in any_case or ("." in name and any(_has(row.values, name) for row in rows))
        ]
        if role == "answer":
            matches = [name for name in matches if _is_one(_first(rows, name))]
        columns |= {role: matches[0]} if matches else {}
    columns |= {role: column for role, column in fields.items() if column}
    if "prompt" not in columns:
        raise row_error(
            rows[0],
            "prompt",
            f"none of the columns {sorted(present)} is called {' | '.join(PROMPT)}; say which one "
            'it is with task.fields.prompt=NAME, or make it of several: "{NAME} {NAME}"',
        )
    return columns


def beside_the_prompt(rows: Sequence[Row], fields: Mapping[str, str]) -> list[str]:
    """Columns of the first row that look like a part of the question and are not asked.

    Whoever names the prompt's columns, or gives one of these another meaning, has decided.
    """
    if "prompt" in fields:
        return []
    decided = {*fields, *fields.values()}
    return [
        name
        for name, value in rows[0].values.items()
        if name.lower() in QUESTION_PARTS and name not in decided and value
    ]


def problem_of(row: Row, columns: Mapping[str, str], fields: Mapping[str, str]) -> Problem:
    """The problem in a row. A chat that ends with the assistant's turn is asked without it.

    That turn becomes the column "completion" where it is a text and nothing else.

    Raises:
        DataError: a column that is missing, or not what it should be.
    """
    extra = {role: value_at(row, name) for role, name in columns.items() if role not in ROLES}
    for name in MEDIA.intersection(row.values):
        if row.values[name] and fields.get(name, name):
            raise row_error(
                row,
                name,
                "got a medium, which a model of texts does not see; take it out, or set "
                f"task.fields.{name} to an empty text to ask without it",
            )
    prompt = _prompt(row, columns["prompt"])
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        if set(prompt[-1]) == {"role", "content"}:
            extra.setdefault("completion", prompt[-1]["content"])
        prompt = prompt[:-1]
        if not prompt:
            raise row_error(row, columns["prompt"], "got only an answer, wanted a question first")
    others = {k: v for k, v in row.values.items() if k != columns["prompt"]}
    return Problem(
        id=_id(row, columns["id"]) if "id" in columns else _place(row),
        prompt=prompt,
        answer=answer_of(row, columns["answer"]) if "answer" in columns else None,
        columns=others | extra,
    )


def instructed(prompt: Any, instruction: str) -> Any:
    """The prompt with the instruction after its question: the text, or the last user's turn."""
    if not instruction:
        return prompt
    if isinstance(prompt, str):
        return f"{prompt.strip()}\n\n{instruction}"
    last = max((i for i, m in enumerate(prompt) if m["role"] == "user"), default=len(prompt) - 1)
    turn = prompt[last] | {"content": instructed(prompt[last]["content"], instruction)}
    return [*prompt[:last], turn, *prompt[last + 1 :]]


def words_of(prompt: str | list[dict[str, Any]]) -> str:
    """All that a prompt says."""
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


def row_error(row: Row, column: str, what: str) -> DataError:
    """The error of a row: its place, the column, and what is wrong."""
    return DataError(f"{row.place}:{column}: {what}.")


def _prompt(row: Row, column: str) -> str | list[dict[str, Any]]:
    if column not in row.values and _HOLE.search(column):
        filled = _HOLE.sub(lambda hole: _part(row, hole[1]), column).strip()
        return _text(row, column, filled)
    value = value_at(row, column)
    if isinstance(value, str):
        return _text(row, column, value)
    if not isinstance(value, list):
        got = described(value)
        raise row_error(row, column, f"got {got}, wanted a text or a list of messages")
    if not value:
        raise row_error(row, column, "got an empty list of messages")
    messages = [_message(row, f"{column}[{i}]", message) for i, message in enumerate(value)]
    if set(messages[-1]) == {"role", "content"}:
        _text(row, f"{column}[-1].content", messages[-1]["content"])
    return messages


def _part(row: Row, column: str) -> str:
    """What stands for `{column}` in a prompt made of several: a text, a number, or a list."""
    value = value_at(row, column)
    if isinstance(value, list) and all(isinstance(v, str | int | float) for v in value):
        return "\n".join(map(str, value))
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        raise row_error(row, column, f"got {described(value)}, wanted a text, a number or a list")
    return "" if value is None else str(value)


def _message(row: Row, where: str, message: Any) -> dict[str, Any]:
    """A turn with all that it holds; ShareGPT's {from, value} is a role and a content."""
    if not isinstance(message, dict):
        raise row_error(row, where, f"got {described(message)}, wanted a role and a content")
    turn = {key: value for key, value in message.items() if value is not None}
    if "role" not in turn and "from" in turn:
        speaker = turn.pop("from")
        if speaker not in _SPEAKERS:
            raise row_error(row, f"{where}.from", f"got {speaker!r}, wanted {sorted(_SPEAKERS)}")
        turn |= {"role": _SPEAKERS[speaker], "content": turn.pop("value", None)}
    if not isinstance(turn.get("role"), str):
        got = described(turn.get("role"))
        raise row_error(row, f"{where}.role", f"got {got}, wanted a text")
    content = turn.get("content", "" if turn.get("tool_calls") else None)
    if isinstance(content, list):
        content = "".join(
            _text_part(row, f"{where}.content[{i}]", part) for i, part in enumerate(content)
        )
    if not isinstance(content, str):
        raise row_error(row, f"{where}.content", f"got {described(content)}, wanted a text")
    rest = {key: value for key, value in turn.items() if value not in ("", [], {})}
    return rest | {"role": turn["role"], "content": content}


def _text_part(row: Row, where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else described(part)
    raise row_error(row, where, f"got {kind!r}, wanted a text: the model sees nothing else")


def answer_of(row: Row, column: str) -> str:
    """The one answer in a column: what follows "####", or the last box, of a worked solution.

    Raises:
        DataError: the column is missing or holds no answer, or several.
    """
    value = value_at(row, column)
    if isinstance(value, str) and value.lstrip().startswith('["'):
        value = _list_in(value)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise row_error(
            row,
            column,
            f"got {described(value)}, wanted a text or a number; "
            "task.fields.answer=NAME takes another column",
        )
    if isinstance(value, float):
        if not isfinite(value):
            raise row_error(row, column, f"got {value}, wanted a finite number")
        return format(Decimal(repr(value)), "f")
    text = _text(row, column, str(value))
    if "####" in text:
        text = text.rpartition("####")[2].replace(",", "").strip()
    elif inside := boxed(text):
        text = inside
    return _text(row, column, text).strip()


def _list_in(text: str) -> Any:
    """The list of one text that is written out in JSON; another text as it is."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, list) and len(value) == 1 else text


def _is_one(value: Any) -> bool:
    """Whether this can be one answer; what is null or a wrong kind of scalar is told of later."""
    if isinstance(value, list):
        return len(value) == 1 and _is_one(value[0])
    return not isinstance(value, dict)


def _first(rows: Sequence[Row], column: str) -> Any:
    """The value in the first row that has one."""
    return next((value_at(row, column) for row in rows if _has(row.values, column)), None)


def _id(row: Row, column: str) -> str:
    value = value_at(row, column) if _has(row.values, column) else None
    if value is None:
        return _place(row)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise row_error(row, column, f"got {described(value)}, wanted a text or a whole number")
    return str(value)


def _place(row: Row) -> str:
    return Path(row.place).name


def _text(row: Row, column: str, text: str) -> str:
    """`text` as it is, if it says something and a tokenizer can take it."""
    if not text.strip():
        raise row_error(row, column, "got an empty text")
    if "\0" in text:
        raise row_error(row, column, "got a text with a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise row_error(row, column, "got half a surrogate pair, which is no character") from None
    return text


def value_at(row: Row, column: str) -> Any:
    """The value under a column's name, or under a dotted path into objects."""
    if column in row.values:
        return row.values[column]
    value: Any = row.values
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            raise row_error(row, column, f"missing; the row has {sorted(row.values)}")
        value = value[part]
    return value


def _has(values: Mapping[str, Any], column: str) -> bool:
    first, _, rest = column.partition(".")
    inside = values.get(first)
    return column in values or (isinstance(inside, dict) and rest in inside)

"""Problems from data of the user's own: files, or a Hugging Face dataset.

`rows` says how a row becomes a Problem. Its split is that of the source (the name of a file, a
directory or a split of the dataset, or the column "split"); where none is named, or "train" alone,
prompts are held out by their hash. All of a row's columns stay available to reward functions.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gspo_jax.answers.verify import MAX_ANSWER
from gspo_jax.batch import Problem
from gspo_jax.errors import DataError
from gspo_jax.tasks.math_verify import reward_of
from gspo_jax.tasks.rows import (
    ANSWER,
    beside_the_prompt,
    columns_of,
    instructed,
    problem_of,
    row_error,
    value_at,
    words_of,
)
from gspo_jax.tasks.sources import (
    SPLIT_NAMES,
    BadRows,
    Row,
    described,
    files_by_split,
    named_split,
    read_rows,
)
from gspo_jax.tasks.task import SPLITS, Task, fingerprint, fraction

BOX = "\\boxed"
HELD_OUT = 0.1  # share of the prompts that becomes "test" where the data names no splits
MIN_PROMPTS = 5  # with fewer different prompts nothing is held out


def user_data(
    path: str | Path,
    *,
    fields: dict[str, str] | None = None,
    max_bad_rows: int = 0,
    split: str | None = None,
    checker: str = "exact",
    instruction: str = "",
) -> Task:
    """The task in a data file, a dataset directory, or a dataset of the Hugging Face hub.

    Rows of a split that its source names stay in it: gsm8k_test.jsonl, test-00000-of-00001.parquet
    and a directory test/ hold test rows and nothing else. Where neither the data nor its source
    names splits, or "train" alone, every prompt whose hash falls into the lowest tenth is held out
    as "test", and at least one is; the same prompt is always on the same side. With fewer than 5
    different prompts all of them are for training.

    A gold answer that is a worked solution is cut down to what follows ``####`` (GSM8K) or to
    its last ``\\boxed{}``. A chat that ends with the assistant's turn is a prompt without that
    turn, which becomes the column "completion".

    Args:
        path: JSONL, JSON, CSV (also as .gz) or parquet file; directory; or "owner/name[:config]".
        fields: columns by the name they are wanted under, "prompt", "answer", "id", "split" or
            any other; a dotted name reaches into objects, and a prompt of several columns is
            written "{Body} {Question}". An empty name means there is none.
        max_bad_rows: rows with errors that may be left out; they are counted in a warning.
        split: "train", "val" or "test": what all rows are, whatever the data says.
        checker: "exact", or "math-verify" for answers that are formulas; see `math_verify`.
        instruction: what follows each question.

    Raises:
        ConfigError: an unknown checker, or one that is not installed.
        DataError: the first error beyond `max_bad_rows`, as file:line:column: what is wrong.
    """
    reward, fields = reward_of(checker), fields or {}
    if split is not None and split not in SPLITS:
        raise DataError(f"split={split}: wanted one of {list(SPLITS)}.")
    bad = BadRows(max_bad_rows)
    rows, warnings = list(read_rows(path, bad)), _left_out(path)
    if not rows:
        raise DataError(f"{path}: no rows.")
    columns = columns_of(rows, fields)
    if split is None:
        rows, split, doubts = _known_splits(rows, str(path), "split" in columns)
        warnings += doubts
    placed = _placed(rows, columns, fields, split, bad)
    if not placed:
        raise DataError(f"{path}: no good row is left; the first bad one is {bad.errors[0]}")
    if bad.errors:
        warnings.append(f"{path}: left out {len(bad.errors)} bad rows, first {bad.errors[0]}")
    warnings += _unasked(rows, columns, fields, str(path))
    content = fingerprint([(split, p.prompt, p.answer, p.columns) for split, p in placed])
    problems = _by_split(placed)
    warnings += _doubts(problems, str(path))
    asked = {s: [with_instruction(p, instruction) for _, p in problems[s]] for s in SPLITS}
    everything = [problem for split in SPLITS for problem in asked[split]]
    return Task(
        name=Path(path).stem,
        size={split: len(asked[split]) for split in SPLITS},
        problem=lambda split, index: asked[split][index],
        reward=reward,
        warnings=tuple(warnings),
        fingerprint=fingerprint([content, instruction]) if instruction else content,
        unscored="" if "answer" in columns else _unanswered(rows[0], str(path)),
        unboxed="" if any(BOX in words_of(p.prompt) for p in everything) else _unboxed(str(path)),
    )


def with_instruction(problem: Problem, instruction: str) -> Problem:
    """The problem as it is asked."""
    if not instruction:
        return problem
    return replace(problem, prompt=instructed(problem.prompt, instruction))


def _placed(
    rows: list[Row],
    columns: Mapping[str, str],
    fields: Mapping[str, str],
    split: str | None,
    bad: BadRows,
) -> list[tuple[str | None, Problem]]:
    """The good rows, each with its split, or None where it has none."""
    placed: list[tuple[str | None, Problem]] = []
    seen: dict[tuple[str | None, str], str] = {}
    for row in rows:
        try:
            place = split or _split(row, columns)
            problem = problem_of(row, columns, fields)
            first = seen.setdefault((place, problem.id), row.place)
            if first != row.place:
                raise row_error(row, columns["id"], f"{problem.id!r} is taken by {first}")
        except DataError as error:
            bad.add(error)
        else:
            placed.append((place, problem))
    return placed


def _left_out(path: str | Path) -> list[str]:
    """What stands beside the files that are called after splits, and is not read."""
    if not Path(path).is_dir():
        return []
    files, others = files_by_split(Path(path))
    if not files or not others:
        return []
    names = [file.name for file in others]
    return [f"{path}: {names} are not read, only {[file.name for _, file in files]}."]


def _known_splits(
    rows: list[Row], path: str, has_column: bool
) -> tuple[list[Row], str | None, list[str]]:
    """Rows with "train", "val", "test" or None for the name their source gives its splits; the one
    split that all of them belong to, if their file or directory is called so; and warnings.

    A source of nothing but "train" names no splits in effect, nor does one whose rows do.
    """
    names = {row.split for row in rows}
    if names <= {None, "train"}:
        split = None if has_column else named_split(path) or next(iter(names))
        rows = [row._replace(split=None) for row in rows]
        if split != "train":
            return rows, split, []
        told = f'{path}: "train" alone; some of its prompts are held out as "test". '
        return rows, None, [f"{told}task.options.split=train trains on all."]
    known = {name for name in names if name in SPLIT_NAMES}
    if not known:
        raise DataError(f"{path}: the splits {sorted(map(str, names))} are none of {list(SPLITS)}.")
    ours = [row._replace(split=SPLIT_NAMES[row.split]) for row in rows if row.split in known]
    left = sorted(map(str, names - known))
    return ours, None, [f"{path}: the splits {left} are not used."] if left else []


def _split(row: Row, columns: Mapping[str, str]) -> str | None:
    if row.split is not None or "split" not in columns:
        return row.split
    value = value_at(row, columns["split"])
    name = SPLIT_NAMES.get(value.lower()) if isinstance(value, str) else None
    if name is None:
        got = repr(value) if isinstance(value, str) else described(value)
        raise row_error(row, columns["split"], f"got {got}, wanted one of {list(SPLITS)}")
    return name


def _unasked(
    rows: list[Row], columns: Mapping[str, str], fields: Mapping[str, str], path: str
) -> list[str]:
    """Columns that belong to the question by their names, and are not in the prompt."""
    beside = beside_the_prompt(rows, fields)
    if not beside:
        return []
    together = " ".join(f"{{{name}}}" for name in [*beside, columns["prompt"]])
    return [
        f"{path}: {beside} look like parts of the question, and {columns['prompt']!r} alone is "
        f'asked; put them together with task.fields.prompt="{together}", or keep it with '
        f"task.fields.prompt={columns['prompt']}."
    ]


def _unanswered(row: Row, path: str) -> str:
    return (
        f"{path}: no column holds an answer that the built-in checker could compare: it looks for "
        f"{' | '.join(ANSWER)}, one text or number, and the rows have {sorted(row.values)}. Say "
        "which one it is with task.fields.answer=NAME (dots reach into objects), or score with "
        "functions of your own: task.rewards=[FILE.py:FUNCTION]."
    )


def _unboxed(path: str) -> str:
    return (
        f"{path}: no prompt asks for \\boxed{{}}, and the built-in checker reads nothing else; "
        'task.options.instruction="Put the final answer in \\boxed{}." follows each question.'
    )


Keyed = tuple[str, Problem]  # the same text for the same prompt


def _by_split(placed: list[tuple[str | None, Problem]]) -> dict[str, list[Keyed]]:
    problems: dict[str, list[Keyed]] = {split: [] for split in SPLITS}
    keyed = [(split, json.dumps(p.prompt, sort_keys=True), p) for split, p in placed]
    keys = sorted({key for split, key, _ in keyed if split is None}, key=fraction)
    held_out = {key for key in keys if fraction(key) < HELD_OUT} | set(keys[:1])
    if len(keys) < MIN_PROMPTS:
        held_out = set()
    for split, key, problem in keyed:
        problems[split or ("test" if key in held_out else "train")].append((key, problem))
    return problems


def _doubts(problems: dict[str, list[Keyed]], path: str) -> list[str]:
    """What is allowed, but probably not meant."""
    warnings = []
    if not problems["test"] and not problems["val"]:
        warnings.append(f"{path}: all {len(problems['train'])} rows are training rows.")
    keys = {split: Counter(key for key, _ in problems[split]) for split in SPLITS}
    for split in ("val", "test"):
        if shared := sum(n for key, n in keys[split].items() if key in keys["train"]):
            n = len(problems[split])
            warnings.append(f"{path}: {shared} of {n} {split} prompts are training prompts too.")
    if again := {s: n for s in SPLITS if (n := len(problems[s]) - len(keys[s]))}:
        counts = ", ".join(f"{n} of {len(problems[s])} {s}" for s, n in again.items())
        warnings.append(
            f"{path}: {counts} rows repeat an earlier prompt of their split; a problem counts as "
            "often as it stands there."
        )
    answers = [p.answer or "" for split in SPLITS for _, p in problems[split]]
    if long := sum(len(answer) > MAX_ANSWER for answer in answers):
        warnings.append(
            f"{path}: {long} answers are texts of more than {MAX_ANSWER} characters without a "
            "boxed value; no response can match them."
        )
    return warnings

"""Rows of data files, each with the place that an error message can point to."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from gspo_jax.errors import DataError

MAX_LINE = 8_000_000  # bytes of one JSONL row; more is a mistake, not a prompt
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_SUFFIXES = (".jsonl", ".json", ".parquet")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "eval", "evaluation"), "test"),
}


class Row(NamedTuple):
    """One row: where it stands ("data.jsonl:3"), the split its source says, and its columns."""

    place: str
    split: str | None
    values: dict[str, Any]


class BadRows:
    """Collects the errors of bad rows, up to `allowed`; the next one is raised."""

    def __init__(self, allowed: int = 0):
        self.allowed = allowed
        self.errors: list[DataError] = []

    def add(self, error: DataError) -> None:
        self.errors.append(error)
        if len(self.errors) > self.allowed:
            more = f" (after {self.allowed} bad rows that were allowed)" if self.allowed else ""
            raise DataError(f"{error}{more}") from None


def read_rows(path: str | Path, bad: BadRows) -> Iterator[Row]:
    """The rows of a JSONL, JSON or parquet file, a dataset directory, or a dataset of the hub.

    Args:
        path: a file; a directory of train.jsonl, test.jsonl or the like, or any that `datasets`
            can read; or "owner/name[:config]".
        bad: takes the errors of rows that cannot be read.

    Raises:
        DataError: nothing there, not readable, or more bad rows than `bad` allows.
    """
    file = Path(path)
    if file.is_dir() and (files := _files_by_split(file)):
        return (row._replace(split=f.stem) for f in files for row in _jsonl_rows(f, bad))
    if file.is_dir():
        return _dataset_rows(str(path), _load_directory(file))
    if not file.exists():
        if file.suffix in _SUFFIXES or not _HUB_ID.fullmatch(str(path)):
            raise DataError(f"{path}: no such file or directory.")
        return _dataset_rows(str(path), _load_hub(str(path)))
    if file.suffix == ".parquet":
        return _dataset_rows(str(path), _load_parquet(file))
    if file.suffix not in _SUFFIXES:
        raise DataError(f"{path}: got a {file.suffix or 'bare'} file, wanted {list(_SUFFIXES)}.")
    if file.suffix == ".json" and _starts_with_bracket(file):
        return _json_rows(file, bad)
    return _jsonl_rows(file, bad)


def _files_by_split(directory: Path) -> list[Path]:
    """Its JSONL files, if each of them has the name of a split, and there are no parquet files."""
    files = sorted(directory.glob("*.jsonl"))
    named = all(f.stem in SPLIT_NAMES for f in files)
    return files if named and not any(directory.rglob("*.parquet")) else []


def _starts_with_bracket(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _jsonl_rows(file: Path, bad: BadRows) -> Iterator[Row]:
    # Read as bytes: text mode would also break lines at other characters than a newline, and an
    # endless line must not be read whole before it is refused.
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE + 1):
            number += 1
            place = f"{file}:{number}"
            too_long = len(line) > MAX_LINE
            while too_long and not line.endswith(b"\n") and line:
                line = stream.readline(MAX_LINE)
            try:
                if too_long:
                    raise DataError(f"{place}: the row is longer than {MAX_LINE:,} bytes.")
                text = _decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, place)
                if text.strip():
                    yield Row(place, None, _object(_parse(text, place), place))
            except DataError as error:
                bad.add(error)


def _json_rows(file: Path, bad: BadRows) -> Iterator[Row]:
    rows = _parse(_decode(file.read_bytes().removeprefix(b"\xef\xbb\xbf"), str(file)), str(file))
    for index, values in enumerate(rows):
        place = f"{file}[{index}]"
        try:
            yield Row(place, None, _object(values, place))
        except DataError as error:
            bad.add(error)


def _decode(line: bytes, place: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text (byte {error.start + 1} of the row).") from None


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text, parse_constant=_not_json)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.rstrip() else ""
        raise DataError(
            f"{place}: not valid JSON: {error.msg} ({line}column {error.colno})."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON: {error}.") from None


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _object(values: Any, place: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise DataError(f"{place}: got {described(values)}, wanted an object with named columns.")
    return values


def described(value: Any) -> str:
    """What kind of JSON value this is, for an error message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    kinds = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _load_directory(path: Path) -> Any:
    import datasets

    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    load = datasets.load_from_disk if saved else datasets.load_dataset
    return _loaded(path, lambda: load(str(path)))


def _load_parquet(file: Path) -> Any:
    import datasets

    return _loaded(file, lambda: datasets.Dataset.from_parquet(str(file)))


def _load_hub(name: str) -> Any:
    import datasets

    repo, _, config = name.partition(":")
    return _loaded(name, lambda: datasets.load_dataset(repo, config or None))


def _loaded(name: str | Path, load: Any) -> Any:
    try:
        return load()
    except Exception as error:  # network, file formats: whatever the library may raise
        lines = str(error).strip().split("\n")
        reason = f"{type(error).__name__}: {lines[0]}"
        raise DataError(f"{name}: `datasets` cannot read this ({reason}).") from error


def _dataset_rows(name: str, dataset: Any) -> Iterator[Row]:
    parts: Iterable[tuple[str | None, Any]] = [(None, dataset)]
    if isinstance(dataset, dict):
        parts = dataset.items()
    for split, rows in parts:
        where = name if split is None else f"{name}[{split}]"
        for index, values in enumerate(rows):
            yield Row(f"{where}:{index}", split, values)

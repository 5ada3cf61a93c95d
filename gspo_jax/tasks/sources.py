"""Rows of data files, each with the place that an error message can point to."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from gspo_jax.errors import DataError
from gspo_jax.files.hub import cached_where_unreachable

MAX_LINE = 8_000_000  # bytes of one JSONL row; more is a mistake, not a prompt
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_SHARD = re.compile(r"-[0-9]{5}-of-[0-9]{5}$")
_DIRECTORIES = ("train", "val", "valid", "validation", "test")  # "dev" is where programs are made
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
    """The rows of a JSONL, JSON, CSV or parquet file, a dataset directory, or one of the hub.

    Args:
        path: a file, all but parquet also as .gz; a directory of train.jsonl, test.jsonl or the
            like, or any that `datasets` can read; or "owner/name[:config]".
        bad: takes the errors of rows that cannot be read.

    Raises:
        DataError: nothing there, not readable, or more bad rows than `bad` allows.
    """
    file = Path(path)
    if file.is_dir() and (files := files_by_split(file)[0]):
        return (row._replace(split=split) for split, f in files for row in _file_rows(f, bad))
    if file.is_dir():
        return _dataset_rows(str(path), _load_directory(file))
    if not file.exists():
        if kind(file) in _SUFFIXES or not _HUB_ID.fullmatch(str(path)):
            raise DataError(f"{path}: no such file or directory.")
        return _dataset_rows(str(path), _load_hub(str(path)))
    if kind(file) not in _SUFFIXES or file.suffixes[-2:] == [".parquet", ".gz"]:
        raise DataError(f"{path}: got a {file.suffix or 'bare'} file, wanted {list(_SUFFIXES)}.")
    return _file_rows(file, bad)


def _file_rows(file: Path, bad: BadRows) -> Iterator[Row]:
    if kind(file) == ".parquet":
        return _dataset_rows(str(file), _load_parquet(file))
    return _whole(file, _text_rows(file, bad))


def _text_rows(file: Path, bad: BadRows) -> Iterator[Row]:
    if kind(file) == ".csv":
        return _csv_rows(file, bad)
    if kind(file) == ".json" and _starts_with_bracket(file):
        return _json_rows(file, bad)
    return _jsonl_rows(file, bad)


def _whole(file: Path, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows; a compressed file that is cut off or damaged is named."""
    try:
        yield from rows
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file}: not a whole gzip file ({error}).") from None


def kind(file: Path) -> str:
    """Its suffix, without that of compression."""
    return (file.with_suffix("") if file.suffix == ".gz" else file).suffix


def _open(file: Path) -> Any:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")


def named_split(path: str | Path) -> str | None:
    """The one split that a file or directory, or else a file's directory, is called after.

    gsm8k_test.jsonl, test-00000-of-00001.parquet and test/rows.jsonl are "test"; a name of two
    splits, or a dataset of the hub, is none.
    """
    file = Path(path)
    if file.is_dir():
        return SPLIT_NAMES[file.name] if file.name in _DIRECTORIES else None
    if not file.is_file():
        return None
    splits = {SPLIT_NAMES[word] for word in _words(file) if word in SPLIT_NAMES}
    if not splits:
        return named_split(file.resolve().parent)
    return splits.pop() if len(splits) == 1 else None


def _stem(file: Path) -> str:
    """Its name without suffixes and the number of a shard."""
    return _SHARD.sub("", file.name.removesuffix(".gz").removesuffix(kind(file)))


def files_by_split(directory: Path) -> tuple[list[tuple[str, Path]], list[Path]]:
    """(split, file) for the files called after splits, and the other data files.

    Exact names win over look-alikes: beside test.jsonl, test_socratic.jsonl is another file. None
    of either in a dataset that `datasets` has saved.
    """
    if any((directory / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return [], []
    files = [f for f in sorted(directory.iterdir()) if f.is_file() and kind(f) in _SUFFIXES]
    exact = [(_stem(f), f) for f in files if _stem(f) in SPLIT_NAMES]
    alike = [(named_split(f), f) for f in files if _words(f) & SPLIT_NAMES.keys()]
    chosen = exact or [(split, f) for split, f in alike if split]
    read = {file for _, file in chosen}
    return chosen, [f for f in files if f not in read and kind(f) != ".json"]


def _words(file: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", _stem(file).lower()))


def _starts_with_bracket(file: Path) -> bool:
    with _open(file) as stream:
        return stream.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _jsonl_rows(file: Path, bad: BadRows) -> Iterator[Row]:
    # Read as bytes: text mode would also break lines at other characters than a newline, and an
    # endless line must not be read whole before it is refused.
    with _open(file) as stream:
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
    with _open(file) as stream:
        content = stream.read()
    rows = _parse(_decode(content.removeprefix(b"\xef\xbb\xbf"), str(file)), str(file))
    for index, values in enumerate(rows):
        place = f"{file}[{index}]"
        try:
            yield Row(place, None, _object(values, place))
        except DataError as error:
            bad.add(error)


def _csv_rows(file: Path, bad: BadRows) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE)
    with _open(file) as stream, TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        try:
            header = next(reader, [])
            begun = reader.line_num
            for cells in reader:
                place, begun = f"{file}:{begun + 1}", reader.line_num
                if len(cells) == len(header):
                    yield Row(place, None, dict(zip(header, cells, strict=True)))
                elif cells:
                    bad.add(
                        DataError(f"{place}: {len(cells)} cells under a header of {len(header)}.")
                    )
        except UnicodeDecodeError:
            raise DataError(f"{file}:{reader.line_num + 1}: not UTF-8 text.") from None
        except csv.Error as error:
            raise DataError(f"{file}:{reader.line_num + 1}: not valid CSV: {error}.") from None


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
    with cached_where_unreachable():
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

"""What may be read of a model directory, and how its tensors are read and written.

A model directory comes from strangers. A file is read only under its plain name, inside its
directory; what its header claims is checked against its size before anything is allocated.

Safetensors (https://github.com/huggingface/safetensors): 8 bytes of header length, a JSON header
{name: {dtype, shape, data_offsets}}, then the values without gaps. Read and written here and not
by that library, because here a tensor at a time is in memory (the library maps whole files and
wants whole files in memory to write them), and a name that is given twice is refused.
"""

import errno
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from gspo_jax.errors import DataError, StorageError
from gspo_jax.files.hub import cached_where_unreachable

SAFETENSORS_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
JSON_LIMIT = 16 * 2**20  # bytes; the largest Qwen index is about 4 MiB
TEXT_LIMIT = 2**20
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
HUB_FILES = [
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"),
    *("LICENSE*", "NOTICE*", "README.md"),
]


class Tensor(NamedTuple):
    """Where one tensor lies: nothing is read yet."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file


def resolve(path: str | os.PathLike) -> Path:
    """The local directory of a model: `path` itself, or the snapshot of a hub id `org/name`.

    Raises:
        DataError: there is no such directory, and no such model on the hub or in its cache.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        model = directory / "export"
        if (model / "config.json").is_file() and not (directory / "config.json").exists():
            raise DataError(f"{directory} is the directory of a run; its model is {model}.")
        return directory
    if directory.exists():
        raise DataError(f"{directory} is a file; wanted a model directory.")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)):
        raise DataError(f"there is no model directory {directory}.")
    from huggingface_hub import snapshot_download  # only here: everything else works offline

    try:
        with cached_where_unreachable():
            wanted = {"allow_patterns": HUB_FILES, "ignore_patterns": "*/*"}
            return Path(snapshot_download(str(path), **wanted))
    except Exception as error:  # of the hub's client, of httpx under it, of the disk
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"no space left for {path} in the hub's cache; set HF_HOME to another disk."
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise DataError(
            f"{reason[:300]} ({type(error).__name__}): {path} was not fetched from the hub; try "
            "again, or give a directory with the model (there is none of this name)."
        ) from None


def file_in(directory: Path, name: str) -> Path:
    """The regular file `name` of `directory`.

    Raises:
        DataError: the name is a path, the file is missing, or it is a link to elsewhere.
    """
    if name in ("", ".", "..") or re.search(r"[/\\:\0]", name):
        raise DataError(f"{directory}: {short(name)} is not a plain file name; it is not read.")
    path, root = directory / name, Path(os.path.realpath(directory))
    if not os.path.lexists(path):
        raise DataError(f"{directory} has no {name}.")
    target = Path(os.path.realpath(path))
    roots = [root]
    if root.parent.name == "snapshots":  # the hub's cache keeps files once, two levels up
        roots.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(r) for r in roots):
        raise DataError(
            f"{path} is a link out of its directory; it is not read. Where the links are yours: "
            f"cp -rL {directory} COPY, and give COPY."
        )
    if not target.is_file():
        raise DataError(f"{path} is not a regular file.")
    return path


def read_json(path: Path) -> Any:
    """A JSON file of at most 16 MiB in which no key is given twice."""
    with _open(path) as file:
        return _parse_json(path, file, os.fstat(file.fileno()).st_size)


def read_text(path: Path) -> str:
    """A text file in UTF-8, of at most 1 MiB."""
    content = read_start(path, TEXT_LIMIT + 1)
    if len(content) > TEXT_LIMIT:
        raise DataError(f"{path}: more than {TEXT_LIMIT} bytes of text, the most that is read.")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from None


def read_start(path: Path, count: int) -> bytes:
    """At most the first `count` bytes of a file."""
    with _open(path) as file:
        return file.read(count)


def find_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory by its name, from `model.safetensors` or through the index.

    Raises:
        DataError: there are no safetensors, or index and files contradict each other.
    """
    single = os.path.lexists(directory / SINGLE)
    if not os.path.lexists(directory / INDEX):
        if not single:
            raise DataError(_no_weights(directory))
        return read_header(file_in(directory, SINGLE))
    index = file_in(directory, INDEX)
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{index}: wanted an object with a weight_map.")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise DataError(f"{index}: the file of {short(tensor)} is {short(shard)}.")
    shards = sorted(set(weight_map.values()))
    if single and SINGLE not in shards:
        raise DataError(f"{directory} has {SINGLE} and {INDEX}; remove the one that is stale.")
    found: dict[str, Tensor] = {}
    for path in [file_in(directory, shard) for shard in shards]:
        for name, tensor in read_header(path).items():
            if weight_map.get(name) != path.name:
                where = weight_map.get(name, "nowhere")
                raise DataError(f"{path} has {short(name)}; the index puts it in {short(where)}.")
            found[name] = tensor
    absent = [name for name in weight_map if name not in found]
    if absent:
        raise DataError(f"{index}: {short(absent[0])} is not in {short(weight_map[absent[0]])}.")
    return found


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, after checking that they fill it exactly."""
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise DataError(f"{path}: {size} bytes cannot hold a header of {length} bytes.")
        header = _parse_json(path, file, length)
    if not isinstance(header, dict):
        raise DataError(f"{path}: the header is not an object.")
    header.pop("__metadata__", None)
    found, end = {}, 0
    spans = {name: _span(path, name, entry) for name, entry in header.items()}
    for name in sorted(spans, key=lambda name: spans[name][2:]):
        dtype, shape, begin, stop = spans[name]
        if begin != end:
            raise DataError(f"{path}: {short(name)} starts at byte {begin}, wanted {end}.")
        found[name] = Tensor(path, dtype, shape, 8 + length + begin)
        end = stop
    if 8 + length + end != size:
        raise DataError(f"{path} has {size} bytes; its header describes {8 + length + end}.")
    return found


def read_tensor(tensor: Tensor) -> np.ndarray:
    """The values, read into fresh memory."""
    with _open(tensor.file) as file:
        file.seek(tensor.offset)
        values = np.fromfile(file, tensor.dtype, math.prod(tensor.shape))
    if values.size != math.prod(tensor.shape):
        raise DataError(f"{tensor.file} became shorter while it was read.")
    return values.reshape(tensor.shape)


def write_tensors(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype, values: Iterable[np.ndarray]
) -> None:
    """Write one safetensors file, a tensor at a time: `values` come in the order of `shapes`."""
    code = next(code for code, known in SAFETENSORS_DTYPES.items() if known == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # values start on a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for (name, shape), value in zip(shapes.items(), values, strict=True):
            assert value.shape == shape and value.dtype == dtype, name
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


def short(value: Any) -> str:
    """`repr`, cut: escapes from a hostile file stay escaped, and the line stays a line."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _parse_json(path: Path, file: BinaryIO, length: int) -> Any:
    """The next `length` bytes of a file, as JSON in which no key is given twice."""
    if length > JSON_LIMIT:
        raise DataError(f"{path}: {length} bytes of JSON; at most {JSON_LIMIT} are read.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for name, value in pairs:
            if name in content:
                raise DataError(f"{path}: {short(name)} is there twice.")
            content[name] = value
        return content

    try:
        return json.loads(file.read(length).decode(), object_pairs_hook=unique)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from None


def _span(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """dtype, shape and byte range of one header entry, checked against each other."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise DataError(f"{path}: {short(name)} wants dtype, shape and data_offsets.")
    dtype = SAFETENSORS_DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise DataError(
            f"{path}: {short(name)} has dtype {short(entry['dtype'])}; wanted "
            f"{', '.join(SAFETENSORS_DTYPES)} (quantised weights are not supported)."
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(map(_is_count, numbers)):
            raise DataError(f"{path}: {short(name)} has a shape or an offset that is no count.")
    count = math.prod(shape[:8])  # of a million factors it would not end
    fits = len(shape) <= 8 and len(offsets) == 2
    if not fits or offsets[1] - offsets[0] != count * dtype.itemsize:
        raise DataError(
            f"{path}: {short(name)} has shape {_cut(shape)} and byte range {_cut(offsets)}, which "
            "contradict each other."
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _no_weights(directory: Path) -> str:
    names = sorted(os.listdir(directory))
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return (
            f"{directory} has its weights as pickles only ({', '.join(pickles[:3])}), and a pickle "
            "can run code when it is read; convert it to safetensors (from_pretrained and "
            "save_pretrained of transformers), or take a revision that has them."
        )
    found = ", ".join(names[:5]) or "nothing"
    return f"{directory} has neither {SINGLE} nor {INDEX}; found {found}."


def _is_count(n: Any) -> bool:
    return type(n) is int and 0 <= n < 2**63


def _cut(numbers: list[int]) -> str:
    text = str(numbers[:8])
    return text if len(numbers) <= 8 and len(text) <= 80 else f"{text[:80]}..."

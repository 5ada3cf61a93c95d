"""Model directories from strangers: what is read, what is refused, how a new one appears."""

import errno
import json
import os
import sys
import tracemalloc
from fnmatch import fnmatch

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gspo_jax.errors import DataError, StorageError
from gspo_jax.models.hf import files

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.array([1.5, -2.0], dtype=np.float32)


def raw_file(header, data=b"", length=None):
    """The bytes of a safetensors file with this header, whatever it says."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


LISTENERS: list[list[str]] = []
sys.addaudithook(
    lambda event, args: (
        [paths.append(str(args[0])) for paths in LISTENERS] if event == "open" else 0
    )
)


@pytest.fixture
def opened():
    """The paths of all files that Python opens during the test."""
    LISTENERS.append([])
    yield LISTENERS[-1]
    LISTENERS.pop()


@pytest.fixture
def sharded(tmp_path):
    """A directory of two shards with an index."""
    directory = tmp_path / "model"
    directory.mkdir()
    save_file({"a": A}, directory / "one.safetensors")
    save_file({"b": B}, directory / "two.safetensors")
    write_index(directory, {"a": "one.safetensors", "b": "two.safetensors"})
    return directory


def write_index(directory, weight_map):
    (directory / files.INDEX).write_text(json.dumps({"weight_map": weight_map}))


# Reading


def test_reads_what_the_reference_library_wrote(tmp_path):
    tensors = {
        "x": A,
        "half": A.astype(np.float16),
        "bf": A.astype(ml_dtypes.bfloat16),
        "empty": A[:0],
        "one": np.float32([3]),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = files.find_tensors(tmp_path)
    assert set(found) == set(tensors)
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape)
        np.testing.assert_array_equal(files.read_tensor(tensor), tensors[name])


def test_the_reference_library_reads_what_we_write(tmp_path):
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):  # headers of unequal length
        values = {"a": A.astype(dtype), "b": B.astype(dtype)}
        shapes = {name: value.shape for name, value in values.items()}
        files.write_tensors(tmp_path / "x", shapes, np.dtype(dtype), iter(values.values()))
        read = load_file(tmp_path / "x")
        header = int.from_bytes((tmp_path / "x").read_bytes()[:8], "little")
        assert header % 8 == 0  # so that values are aligned when a file is mapped
        assert list(read) == ["a", "b"]
        for name, value in values.items():
            assert read[name].dtype == dtype
            np.testing.assert_array_equal(read[name], value)


def test_an_index_joins_its_shards(sharded):
    found = files.find_tensors(sharded)
    np.testing.assert_array_equal(files.read_tensor(found["a"]), A)
    np.testing.assert_array_equal(files.read_tensor(found["b"]), B)


# Row by row: what must not be read


def test_pickles_are_refused_and_never_opened(tmp_path, opened):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    opened.clear()
    with pytest.raises(DataError, match=r"pickles only \(pytorch_model.bin\).*convert it"):
        files.find_tensors(tmp_path)
    assert not any("pytorch_model.bin" in path for path in opened)


def test_a_directory_without_weights_says_what_it_has(tmp_path):
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(DataError, match=r"neither model.safetensors nor .*found adapter_model"):
        files.find_tensors(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/{parent}/outside.safetensors",
        "..",
        "",
        "sub/inside.safetensors",
        "..\\outside.safetensors",
        "C:outside.safetensors",
        "outside.safetensors\0.safetensors",
    ],
)
def test_file_names_in_an_index_are_plain_names(sharded, opened, name):
    outside = sharded.parent / "outside.safetensors"
    save_file({"b": B}, outside)
    (sharded / "sub").mkdir()
    save_file({"b": B}, sharded / "sub" / "inside.safetensors")
    name = name.replace("/{parent}", str(sharded.parent))
    write_index(sharded, {"a": "one.safetensors", "b": name})
    opened.clear()
    with pytest.raises(DataError, match="is not a plain file name; it is not read") as refusal:
        files.find_tensors(sharded)
    assert "\n" not in str(refusal.value) and "\0" not in str(refusal.value)
    assert not any("outside" in path or "inside" in path for path in opened)


@pytest.mark.parametrize("name", [files.SINGLE, files.INDEX, "config.json"])
def test_links_out_of_the_directory_are_not_followed(tmp_path, opened, name):
    directory, outside = tmp_path / "model", tmp_path / "outside"
    directory.mkdir()
    save_file({"a": A}, outside)
    (directory / name).symlink_to(outside)
    opened.clear()
    with pytest.raises(DataError, match=f"{name} is a link out of its directory"):
        files.file_in(directory, name)
    assert str(outside) not in opened


def test_links_inside_the_directory_and_into_the_hub_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": A}, blobs / "cafe")
    (snapshot / "model.safetensors").symlink_to("../../blobs/cafe")
    (snapshot / "again.safetensors").symlink_to("model.safetensors")
    np.testing.assert_array_equal(files.read_tensor(files.find_tensors(snapshot)["a"]), A)
    assert files.file_in(snapshot, "again.safetensors")
    (snapshot.parents[1] / "secret").write_text("not a blob")
    (snapshot / "config.json").symlink_to("../../secret")
    with pytest.raises(DataError, match=r"config.json is a link out of its directory"):
        files.file_in(snapshot, "config.json")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")  # opening it would wait for ever
    with pytest.raises(DataError, match="is not a regular file"):
        files.find_tensors(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DataError, match="loop is not a regular file"):
        files.file_in(tmp_path, "loop")


SIXTEEN = b"\0" * 16
HOSTILE = {
    "empty": (b"", "0 bytes cannot hold a header"),
    "short": (b"\1\0\0", "3 bytes cannot hold a header of 1 bytes"),
    "header longer than the file": (raw_file({}, length=3), "cannot hold a header of 3 bytes"),
    "header of 2**63 bytes": (raw_file({}, length=2**63), "cannot hold a header of 9223372036854"),
    "no JSON": (raw_file(b"\xff\xfe"), "is not valid JSON"),
    "half JSON": (raw_file(b'{"a": '), "is not valid JSON"),
    "nested 20000 deep": (raw_file(b"[" * 20_000), "is not valid JSON"),
    "number of 5000 digits": (raw_file(b'{"a": ' + b"9" * 5000 + b"}"), "is not valid JSON"),
    "a list": (raw_file([]), "the header is not an object"),
    "entry without dtype": (raw_file({"a": {"shape": [1]}}), "'a' wants dtype, shape"),
    "entry with more": (
        raw_file({"a": entry(0, 8) | {"x": 1}}, bytes(8)),
        "'a' wants dtype, shape",
    ),
    "unknown dtype": (raw_file({"a": entry(0, 8, dtype="F8_E4M3")}), "dtype 'F8_E4M3'; wanted F32"),
    "dtype of a wrong type": (raw_file({"a": entry(0, 8, dtype=[])}), "dtype a list; wanted F32"),
    "integers": (raw_file({"a": entry(0, 8, dtype="I32")}, bytes(8)), "dtype 'I32'; wanted F32"),
    "truncated": (raw_file({"a": entry(0, 8)}, bytes(7)), "describes"),
    "trailing bytes": (raw_file({"a": entry(0, 8)}, bytes(9)), "its header describes"),
    "bytes without tensors": (raw_file({}, bytes(9)), "has 19 bytes; its header describes 10"),
    "hole": (
        raw_file({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
        "'b' starts at byte 12, wanted 8",
    ),
    "overlap": (
        raw_file({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        "'b' starts at byte 4, wanted 8",
    ),
    "same bytes twice": (
        raw_file({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
        "'b' starts at byte 0, wanted 8",
    ),
    "huge shape": (
        raw_file({"a": entry(0, 8, shape=[10**12, 10**12])}, bytes(8)),
        "contradict each other",
    ),
    "overflowing shape": (raw_file({"a": entry(0, 0, shape=[2**62, 4])}), "contradict each other"),
    "a shape of 100000 axes": (
        raw_file({"a": entry(0, 8, shape=[10**18] * 10**5)}, bytes(8)),
        "contradict each other",
    ),
    "negative": (raw_file({"a": entry(0, 8, shape=[-2])}, bytes(8)), "that is no count"),
    "begin after end": (raw_file({"a": entry(8, 0)}, bytes(8)), "contradict each other"),
    "fraction": (raw_file({"a": entry(0, 8, shape=[2.0])}, bytes(8)), "that is no count"),
    "true": (raw_file({"a": entry(0, 4, shape=[True])}, bytes(4)), "that is no count"),
    "one offset": (
        raw_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, bytes(8)),
        "contradict each other",
    ),
    "the same name twice": (
        raw_file(b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 8)).encode(),) * 2), bytes(8)),
        "'a' is there twice",
    ),
    "a name with escapes": (
        raw_file({"\x1b[2J" + "x" * 10_000: entry(0, 7)}, bytes(7)),
        r"'\\x1b\[2Jx+\.\.\. has shape",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_give_one_line_and_allocate_nothing(tmp_path, name):
    content, message = HOSTILE[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message) as refusal:
            files.find_tensors(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    line = str(refusal.value)
    assert str(path) in line and "\n" not in line and "\x1b" not in line and len(line) < 500
    assert peak < 200_000 + 20 * len(content)  # JSON in Python is wider than on disk


def test_damaged_files_give_a_data_error_or_tensors_inside_the_file(tmp_path):
    """400 files with one to three bytes changed, a quarter of them cut short as well."""
    path = tmp_path / "model.safetensors"
    save_file({"a": A, "b": B, "c": B.astype(ml_dtypes.bfloat16)}, path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for trial in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(damaged[: rng.integers(len(whole))] if trial % 4 == 0 else damaged)
        try:
            for tensor in files.find_tensors(tmp_path).values():
                assert files.read_tensor(tensor).shape == tensor.shape
        except DataError:
            refused += 1
    assert refused > 300  # the others are changed values, which only a checksum could tell


def test_a_header_beyond_16_mib_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write((200 * 2**20).to_bytes(8, "little"))
        file.truncate(300 * 2**20)  # sparse: it takes no room
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="209715200 bytes of JSON; at most 16777216 are read"):
            files.find_tensors(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors"}, "has 'b'; the index puts it in 'nowhere'"),
        (
            {"a": "two.safetensors", "b": "two.safetensors"},
            "'a' is not in 'two.safetensors'",
        ),
        (
            {"a": "one.safetensors", "b": "one.safetensors"},
            "'b' is not in 'one.safetensors'",
        ),
        ({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, "'c' is not in"),
        ({"a": "one.safetensors", "b": "three.safetensors"}, "has no three.safetensors"),
        ({"a": "one.safetensors", "b": 2}, "the file of 'b' is 2"),
        ({}, "wanted an object with a weight_map"),
    ],
)
def test_an_index_that_contradicts_its_files_is_refused(sharded, weight_map, message):
    if weight_map == {"a": "one.safetensors"}:
        save_file({"a": A, "b": B}, sharded / "one.safetensors")
    write_index(sharded, weight_map)
    with pytest.raises(DataError, match=message):
        files.find_tensors(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    save_file({"a": A, "b": B}, sharded / "two.safetensors")
    with pytest.raises(DataError, match=r"two.safetensors has 'a'; .* in 'one.safetensors'"):
        files.find_tensors(sharded)


def test_a_single_file_beside_an_index_of_others_is_refused(sharded):
    save_file({"a": A}, sharded / "model.safetensors")
    with pytest.raises(DataError, match="remove the one that is stale"):
        files.find_tensors(sharded)


def test_a_file_that_shrinks_under_the_reader_is_noticed(sharded):
    found = files.find_tensors(sharded)
    os.truncate(found["a"].file, found["a"].offset + 8)
    with pytest.raises(DataError, match=r"one.safetensors became shorter while it was read"):
        files.read_tensor(found["a"])


# Finding


def test_a_path_that_is_no_directory_is_named(tmp_path):
    with pytest.raises(DataError, match=f"there is no model directory {tmp_path}/none"):
        files.resolve(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file is a file; wanted a model directory"):
        files.resolve(tmp_path / "file")


def test_a_hub_id_that_cannot_be_fetched_gives_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"^Cannot find .*: some-org/some-model was not") as refusal:
        files.resolve("some-org/some-model")
    assert "\n" not in str(refusal.value)


class ConnectError(Exception):
    """As httpx has it: neither an OSError nor a ValueError."""


@pytest.mark.parametrize(
    ("error", "refused", "message"),
    [
        (ConnectError("[Errno 104] Connection reset\nmore"), DataError, "^.Errno 104. Connection"),
        (RuntimeError(), DataError, "^RuntimeError .RuntimeError.: a/b was not fetched"),
        (OSError(errno.ENOSPC, "No space left"), StorageError, "set HF_HOME to another disk"),
    ],
)
def test_whatever_the_hubs_client_raises_is_one_line_with_the_reason_first(
    tmp_path, monkeypatch, error, refused, message
):
    def fails(*_, **__):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(refused, match=message) as refusal:
        files.resolve("a/b")
    assert "\n" not in str(refusal.value)


def test_a_hub_id_asks_for_no_pickle_and_no_code(tmp_path, monkeypatch):
    asked = {}

    def fake(repo, **kwargs):
        asked.update(kwargs, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake)
    assert files.resolve("some-org/some-model") == tmp_path
    assert asked["repo"] == "some-org/some-model"
    wanted = ("model-00001-of-00002.safetensors", "config.json", "chat_template.jinja")
    wanted += ("README.md", "LICENSE")
    refused = ("pytorch_model.bin", "modeling.py", "model.pt", "weights.pkl")
    for names, expected in ((wanted, True), (refused, False)):
        for name in names:
            assert any(fnmatch(name, p) for p in asked["allow_patterns"]) is expected, name


def test_texts_are_read_up_to_a_limit_and_as_utf8(tmp_path):
    (tmp_path / "x").write_bytes(b"a" * files.TEXT_LIMIT)
    assert len(files.read_text(tmp_path / "x")) == files.TEXT_LIMIT
    (tmp_path / "x").write_bytes(b"a" * (files.TEXT_LIMIT + 1))
    with pytest.raises(DataError, match="x: more than 1048576 bytes of text"):
        files.read_text(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"ab\xff")
    with pytest.raises(DataError, match="x is not UTF-8: invalid start byte at byte 2"):
        files.read_text(tmp_path / "x")


def test_a_run_is_told_from_its_model(tmp_path):
    (tmp_path / "runs" / "a" / "export").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "export" / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"runs/a is the directory of a run; .* is .*runs/a/export"):
        files.resolve(tmp_path / "runs" / "a")
    assert files.resolve(tmp_path / "runs" / "a" / "export").name == "export"

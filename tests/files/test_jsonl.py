"""Lines of JSON: whole ones are written, and torn ones are no trouble to read."""

import io
import json
import tracemalloc

import pytest

from gspo_jax.files import jsonl

GARBAGE = [
    b"\n",
    b"not json\n",
    b"\xff\xfe\x00\n",
    b"\0" * 5000 + b"\n",
    b"[1]\n",
    b'"step"\n',
    b'{"reward": 1}\n',
    b'{"step": null}\n',
    b'{"step": "1"}\n',
    b'{"step": true}\n',
    b'{"step": 1.0}\n',
    b'{"step": ' + b"9" * 5000 + b"}\n",
    b"[" * 100_000 + b"\n",
    b'{"a":' * 100_000 + b"\n",
]


def read(path, content):
    path.write_bytes(content)
    with path.open("rb") as file:
        return [record["step"] for record in jsonl.records(file)]


def test_what_is_no_record_is_left_out_and_the_others_stay_in_order(tmp_path):
    text = b"".join(bad + b'{"step": %d}\n' % n for n, bad in enumerate(GARBAGE))
    found = read(tmp_path / "x", text + b'{"step": 99, "rew')
    assert found == list(range(len(GARBAGE)))
    assert read(tmp_path / "x", b'{"step": 3}') == [3]  # only the end of the line is missing


def test_a_line_without_an_end_is_never_held_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE", 100)
    long = b'{"step": 1, "x": "' + b"x" * 1000 + b'"}\n'
    text = b'{"step": 0}\n' + long + b'{"step": 2}\n' + b"\0" * 1000
    assert read(tmp_path / "x", text) == [0, 2]
    exact = b'{"step": 3, "x": "' + b"x" * 79 + b'"}\n'
    assert len(exact) == 100 and read(tmp_path / "x", exact) == [3]
    (tmp_path / "x").write_bytes(b"\0" * 1_000_000 + b"\n" + exact)
    with (tmp_path / "x").open("rb") as file:
        tracemalloc.start()
        assert len(list(jsonl.records(file))) == 1
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 50_000


class Full(io.FileIO):
    """A file on a disk with room for so many bytes more."""

    room = 0

    def write(self, data):
        data = bytes(data)[: self.room]
        self.room -= len(data)
        if not data:
            raise OSError(28, "No space left on device")
        return super().write(data)


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    with Full(tmp_path / "x", "ab") as file:
        file.room = 10**6
        jsonl.append(file, {"step": 1})
        for room in range(11):  # of the 12 bytes that a line has
            file.room = room
            with pytest.raises(OSError, match="No space"):
                jsonl.append(file, {"step": 2})
        file.room = 12
        jsonl.append(file, {"step": 3})
    lines = (tmp_path / "x").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]

"""Written tasks: read back as the same problems, with a manifest that remakes them."""

import json
from hashlib import sha256

import make_task

from gspo_jax.tasks import load_task

OPTIONS = {"sizes": {"train": 12, "val": 3, "test": 5}}


def test_written_problems_are_read_back_with_their_splits(tmp_path):
    make_task.write_task("reasoning", tmp_path, seed=4, options=OPTIONS)
    made, read = load_task("reasoning", seed=4, **OPTIONS), load_task(path=tmp_path)
    assert read.size == made.size
    for split, n in made.size.items():
        for i in range(n):
            one, two = made.problem(split, i), read.problem(split, i)
            assert (one.id, one.prompt, one.answer) == (two.id, two.prompt, two.answer)
            assert one.columns.items() - {"id"} <= two.columns.items() | {("id", one.id)}


def test_the_manifest_says_how_to_make_the_same_files_again(tmp_path):
    manifest = make_task.write_task("knights", tmp_path / "a", seed=4, options=OPTIONS)
    assert json.loads((tmp_path / "a" / "manifest.json").read_text()) == manifest
    assert {f: entry["rows"] for f, entry in manifest["files"].items()} == {
        "train.jsonl": 12,
        "val.jsonl": 3,
        "test.jsonl": 5,
    }
    for name, entry in manifest["files"].items():
        assert sha256((tmp_path / "a" / name).read_bytes()).hexdigest() == entry["sha256"]
        assert sum(entry["difficulty"].values()) == entry["rows"]
    remade = {key: manifest[key] for key in ("seed", "options")}
    assert make_task.write_task(manifest["name"], tmp_path / "b", **remade) == manifest
    other = make_task.write_task("knights", tmp_path / "c", seed=5, options=OPTIONS)
    assert other["files"]["train.jsonl"] != manifest["files"]["train.jsonl"]
    assert other["files"]["test.jsonl"] == manifest["files"]["test.jsonl"]


def test_written_puzzles_are_read_back_as_problems_of_their_own_form(tmp_path):
    """Rows of zebra-synth have ZebraLogic's columns, and are scored alike."""
    options = {"puzzles": ["2*2"], "sizes": {"train": 0, "val": 0, "test": 3}}
    make_task.write_task("zebra-synth", tmp_path, seed=0, options=options)
    made = load_task("zebra-synth", **options)
    read = load_task("zebralogic", path=tmp_path, example=False)
    assert read.size == {"train": 0, "val": 0, "test": 3}
    for i in range(3):
        one, two = made.problem("test", i), read.problem("test", i)
        assert (one.id, one.prompt, one.answer) == (two.id, two.prompt, two.answer)

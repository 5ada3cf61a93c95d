"""A sealed directory is what it was, or the first file that is not is named."""

import json

import pytest

from gspo_jax.errors import StorageError
from gspo_jax.files import integrity


@pytest.fixture
def sealed(tmp_path):
    (tmp_path / "inner" / "deep").mkdir(parents=True)
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "inner" / "deep" / "b").write_bytes(b"")
    integrity.seal(tmp_path)
    return tmp_path


def test_the_manifest_holds_sizes_and_checksums(sealed):
    # SHA-256 of "abc" and of nothing: FIPS 180-4's own examples.
    assert integrity.read_manifest(sealed) == {
        "a": {
            "bytes": 3,
            "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        },
        "inner/deep/b": {
            "bytes": 0,
            "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        },
    }
    integrity.verify(sealed)


def test_a_file_that_came_later_is_no_damage(sealed):
    (sealed / ".DS_Store").write_text("x")
    integrity.verify(sealed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abd", "a is not what was written"),
        (b"ab", "a has 2 bytes and had 3"),
        (None, "a is missing"),
    ],
)
def test_the_file_that_changed_is_named(sealed, content, message):
    (sealed / "a").unlink() if content is None else (sealed / "a").write_bytes(content)
    with pytest.raises(StorageError, match=message):
        integrity.verify(sealed)


def test_an_edited_manifest_is_found_by_its_own_checksum(sealed):
    path = sealed / "manifest.json"
    content = json.loads(path.read_text())
    (sealed / "a").write_bytes(b"abd")
    content["files"]["a"]["sha256"] = integrity.sha256(sealed / "a")
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    with pytest.raises(StorageError, match=r"manifest\.json is not what was written"):
        integrity.verify(sealed)


def test_a_file_that_cannot_be_read_is_named(sealed, monkeypatch):
    def fail(file, name):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(integrity.hashlib, "file_digest", fail)
    with pytest.raises(StorageError, match=r"/a: cannot be read \(Input/output error\)"):
        integrity.verify(sealed)

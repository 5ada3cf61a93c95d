"""The embedded model is the one that its manifest describes."""

import hashlib
import json
from pathlib import Path

import pytest

from gspo_jax.config.load import load_config, model_dir

ROOT = Path(__file__).parents[2]
DEMO = model_dir(load_config())
MANIFEST = json.loads((DEMO / "manifest.json").read_text())


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", sorted(MANIFEST["files_sha256"]))
def test_every_file_is_the_one_that_was_embedded(name):
    assert sha256(DEMO / name) == MANIFEST["files_sha256"][name]


def test_the_recipe_is_the_committed_one():
    assert sha256(ROOT / "configs" / "cold_start.yaml") == MANIFEST["recipe_sha256"]
    assert MANIFEST["recipe"] == "gspo-jax sft configs/cold_start.yaml"


def test_nothing_else_lies_beside_it_and_all_of_it_is_under_5_megabytes():
    files = {path.name for path in DEMO.iterdir()}
    assert files == {*MANIFEST["files_sha256"], "manifest.json"}
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 5e6


def test_it_starts_with_room_to_climb():
    """Sampled accuracy between 20 and 45 % on held-out problems, as the run measured it."""
    assert 0.20 <= MANIFEST["evaluation"]["eval/avg@8"] <= 0.45
    assert MANIFEST["evaluation"]["eval/n"] >= 512

"""Row 56: sizes that do not divide are filled up, kept whole, or explained before compiling."""

import json
import logging

import jax
import pytest
from mesh_cases import ODD, ODD_MOE, assert_as_on_one_device

from gspo_jax.cli.commands import main

EXPLAINED = [
    # setting(s), network, what the one line says
    (["mesh.data=3", "mesh.fsdp=3"], ODD, "mesh.data=3 x mesh.fsdp=3 needs 9 devices and 8 exist"),
    (["mesh.data=1", "mesh.tensor=16"], ODD, "needs 16 devices and 8 exist"),
    (["mesh.data=-1", "mesh.fsdp=-1"], ODD, "mesh.data and mesh.fsdp are both -1"),
    (["mesh.tensor=0"], ODD, "mesh.tensor=0: at least 1, or -1"),
    (["mesh.expert=-2"], ODD_MOE, "mesh.expert=-2: at least 1, or -1"),
    (["mesh.data=1", "mesh.tensor=4"], ODD, "num_attention_heads=6, which do not split into 4"),
    (["mesh.data=1", "mesh.tensor=3"], ODD, "num_key_value_heads=2, which do not split into 3"),
    (["mesh.data=1", "mesh.tensor=-1"], ODD, "mesh.tensor=8: the model has num_attention_heads=6"),
    (["mesh.data=1", "mesh.expert=2"], ODD, "mesh.expert=2: the model is qwen3, which has no"),
    (["mesh.data=1", "mesh.expert=4"], ODD_MOE, "num_experts=6, which do not split into 4"),
    (["rollout.prompts=6"], ODD, "rollout.prompts=6 do not split into algo.minibatches=4"),
]


@pytest.mark.parametrize("how", ["train --dry-run", "train", "plan", "plan --shardings"])
@pytest.mark.parametrize(("settings", "network", "message"), EXPLAINED, ids=lambda x: str(x)[:40])
def test_row_56_what_cannot_be_split_is_explained_before_anything_is_compiled(
    settings, network, message, how, tmp_path, capsys, caplog
):
    (tmp_path / "config.json").write_text(json.dumps(network))
    command, *options = how.split()
    where = [f"model.path={tmp_path}", f"run.dir={tmp_path / 'runs'}"]
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        assert main([command, *where, *settings, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert "Compiling" not in caplog.text
    assert not (tmp_path / "runs").exists()


# 13 rows of a minibatch, 15 responses to 3 prompts, 161 tokens, a width of 54, an MLP of 99.
MESHES = [
    ("odd", {"data": 2, "fsdp": 2, "tensor": 2}),
    ("odd_moe", {"data": 2, "expert": 2, "tensor": 2}),
    ("odd", {"data": 8}),
    ("odd", {"data": 5}),
    ("odd", {"data": 1, "fsdp": 7}),
    ("odd", {"data": 3, "tensor": 2}),
    ("odd_moe", {"data": 7}),
    ("odd_moe", {"data": 1, "fsdp": 2, "expert": 3}),
    ("odd_moe", {"data": 1, "expert": 6}),
]


@pytest.mark.faults
@pytest.mark.parametrize(("kind", "axes"), MESHES, ids=str)
def test_row_56_odd_sizes_are_filled_up_or_kept_whole_and_change_no_result(kind, axes):
    assert_as_on_one_device(kind, axes)

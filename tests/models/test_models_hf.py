"""Hugging Face directories in and out: exactly, and not otherwise."""

import json
import os
import shutil
import stat
import sys
import tracemalloc
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, safe_open, save_file

from gspo_jax.errors import ConfigError, DataError, NumericalError, StorageError
from gspo_jax.mesh.sharding import make_mesh
from gspo_jax.models import Qwen, QwenConfig, load_model, save_model
from gspo_jax.models.hf import files
from gspo_jax.models.hf.weights import NAMES

ROOT = Path(__file__).parents[1] / "fixtures"
FIXTURES = sorted(path.name for path in ROOT.iterdir() if (path / "config.json").exists())
DOWN = "model.layers.1.mlp.experts.down_proj"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.fixture
def source(tmp_path):
    """A copy of a tied Qwen3 to spoil."""
    return Path(shutil.copytree(ROOT / "qwen3_tied", tmp_path / "source"))


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, change):
    """Rewrite model.safetensors after `change(tensors)`."""
    tensors = dict(load_file(directory / "model.safetensors"))
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


def assert_same_tensors(directory, expected):
    """Names, dtypes, shapes and every bit of the weights in a directory, through their library."""
    read = {}
    for path in directory.glob("*.safetensors"):
        read |= load_file(path)
    assert set(read) == set(expected)
    for name, value in expected.items():
        assert (read[name].dtype, read[name].shape) == (value.dtype, value.shape), name
        np.testing.assert_array_equal(bits(read[name]), bits(value), err_msg=name)


def apart(tensors):
    """Fused experts [E, 2F, D] and [E, D, F] as the tensors of each expert, in numpy."""
    out = {}
    for name, value in tensors.items():
        stem, _, kind = name.rpartition(".experts.")
        if kind not in ("gate_up_proj", "down_proj"):
            out[name] = value
            continue
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
        for e, expert in enumerate(value):
            for part, half in zip(parts, np.split(expert, len(parts)), strict=True):
                out[f"{stem}.experts.{e}.{part}.weight"] = half
    return out


# In and out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FIXTURES)
def test_round_trip_returns_every_bit_in_the_dtype_of_the_files(tmp_path, name, dtype):
    tensors = {k: v.astype(DTYPES[dtype]) for k, v in load_file(ROOT / name / files.SINGLE).items()}
    directory = tmp_path / "source"
    directory.mkdir()
    save_file(tensors, directory / files.SINGLE)
    shutil.copy(ROOT / name / "config.json", directory)  # it says float32: the files know better
    model = load_model(directory)  # float32 holds float16 and bfloat16 exactly
    assert model.config.dtype == dtype
    save_model(model, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", apart(tensors))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == dtype
    assert QwenConfig.from_hf(written) == model.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"model.layers.1.mlp.experts.2.up_proj.weight": t[DOWN][0]}),
            "experts.2.up_proj.weight is there alone and within model.layers.1.mlp.experts.gate_up",
        ),
        (
            lambda t: t.update({DOWN: t[DOWN][:-1]}),
            r"model.layers.1.mlp.experts.5.down_proj.weight \[32, 12\] is missing",
        ),
        (
            lambda t: t.update({DOWN: t[DOWN][0]}),
            "'model.layers.1.mlp.experts.down_proj' has no place in it",
        ),
        (
            lambda t: t.update({DOWN: t[DOWN].swapaxes(1, 2).copy()}),
            r"experts.0.down_proj.weight has shape \[12, 32\], wanted \[32, 12\]",
        ),
    ],
)
def test_fused_experts_that_are_not_what_the_config_says_are_named(tmp_path, change, message):
    directory = Path(shutil.copytree(ROOT / "qwen3_moe_fused", tmp_path / "source"))
    edit_tensors(directory, change)
    with pytest.raises(DataError, match=message):
        load_model(directory)


def test_a_shard_can_end_between_two_experts(tmp_path):
    save_model(load_model(ROOT / "qwen3_moe"), tmp_path / "out", shard_bytes=9000)
    tensors = load_file(ROOT / "qwen3_moe" / files.SINGLE)
    assert_same_tensors(tmp_path / "out", tensors)
    index = json.loads((tmp_path / "out" / files.INDEX).read_text())["weight_map"]
    homes = [index[f"model.layers.1.mlp.experts.{e}.gate_proj.weight"] for e in range(7)]
    assert len(set(homes)) > 1
    again = nnx.state(load_model(tmp_path / "out"))
    first = nnx.state(load_model(ROOT / "qwen3_moe"))
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(first), strict=True):
        np.testing.assert_array_equal(a, b)


def test_matrices_are_transposed_and_nothing_else_is():
    model = load_model(ROOT / "qwen2_untied")
    theirs = load_file(ROOT / "qwen2_untied" / files.SINGLE)
    layer = model.layers[1]
    for ours, name in (
        (layer.q, "model.layers.1.self_attn.q_proj.weight"),
        (layer.down, "model.layers.1.mlp.down_proj.weight"),
        (model.head, "lm_head.weight"),
    ):
        np.testing.assert_array_equal(ours[...], theirs[name].T)
    for ours, name in (
        (model.embed, "model.embed_tokens.weight"),
        (layer.k_bias, "model.layers.1.self_attn.k_proj.bias"),
        (layer.post_norm, "model.layers.1.post_attention_layernorm.weight"),
    ):
        np.testing.assert_array_equal(ours[...], theirs[name])


def test_names_are_unique_in_both_directions():
    assert len({name for name, _ in NAMES.values()}) == len(NAMES)


def test_mixed_dtypes_are_saved_in_the_one_that_holds_them_all(source, tmp_path):
    def narrow(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)

    edit_tensors(source, narrow)
    model = load_model(source)
    assert model.config.dtype == "float32"
    save_model(model, tmp_path / "out")
    expected = {k: v.astype(np.float32) for k, v in load_file(source / files.SINGLE).items()}
    assert_same_tensors(tmp_path / "out", expected)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16])
def test_the_dtype_in_memory_is_the_one_asked_for(dtype):
    model = load_model(ROOT / "qwen3_untied", dtype=dtype)
    assert {p[...].dtype for _, p in nnx.to_flat_state(nnx.state(model))} == {
        np.dtype(jnp.bfloat16)
    }
    theirs = load_file(ROOT / "qwen3_untied" / files.SINGLE)["lm_head.weight"]
    np.testing.assert_array_equal(model.head[...], theirs.T.astype(ml_dtypes.bfloat16))
    assert model.config.dtype == "float32"  # of the files, for the way back


@pytest.mark.parametrize("dtype", ["float8", "int32", "double"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ConfigError, match=f"dtype='{dtype}': wanted one of float32, float16, bfl"):
        load_model(ROOT / "qwen3_untied", dtype=dtype)


def test_on_a_mesh_each_parameter_goes_to_its_own_sharding(tmp_path):
    mesh = make_mesh(data=2, fsdp=4)
    model = load_model(ROOT / "qwen2_untied", mesh=mesh)
    # "embed" is split over fsdp=4: q is [embed, heads], down is [mlp, embed].
    assert model.layers[0].q[...].sharding.spec == jax.P("fsdp", None)
    assert model.layers[0].down[...].sharding.spec == jax.P(None, "fsdp")
    assert model.layers[0].q[...].addressable_shards[0].data.shape == (32 // 4, 32)
    save_model(model, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", load_file(ROOT / "qwen2_untied" / files.SINGLE))


def test_reading_holds_one_raw_tensor_at_a_time(monkeypatch):
    """Were they collected first, the model would be twice in memory."""
    alive = []
    read_tensor = files.read_tensor

    def watched(tensor):
        assert not any(reference() is not None for reference in alive)
        values = read_tensor(tensor)
        alive.append(weakref.ref(values))
        return values

    monkeypatch.setattr(files, "read_tensor", watched)
    load_model(ROOT / "qwen3_untied", dtype="bfloat16")
    assert len(alive) == 2 * 11 + 3  # 11 tensors in each of 2 layers; embedding, norm, head


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    config = QwenConfig.from_hf(
        json.loads((ROOT / "qwen2_untied" / "config.json").read_text())
        | {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 12, "vocab_size": 512}
    )
    model = Qwen(config, rngs=nnx.Rngs(0))
    largest = 512 * 64 * 4
    total = sum(p.size * 4 for _, p in nnx.to_flat_state(nnx.state(model)))
    assert total > 20 * largest
    tracemalloc.start()
    try:
        save_model(model, tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * largest + 1_000_000  # the names and numbers of the index are in it


# The directory


def test_shards_have_an_index_that_adds_up(tmp_path):
    model = load_model(ROOT / "qwen2_untied")
    save_model(model, tmp_path / "out", shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / files.INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    count = len(shards)
    assert count > 3 and shards[0] == f"model-00001-of-{count:05d}.safetensors"
    assert not (tmp_path / "out" / files.SINGLE).exists()
    expected = load_file(ROOT / "qwen2_untied" / files.SINGLE)
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in expected.values())
    assert_same_tensors(tmp_path / "out", expected)
    for shard in shards:
        with safe_open(tmp_path / "out" / shard, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            assert {index["weight_map"][name] for name in file.keys()} == {shard}  # noqa: SIM118
            assert sum(file.get_tensor(name).nbytes for name in file.keys()) <= 20_000  # noqa: SIM118
    again = load_model(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


def test_a_tied_model_omits_its_head(tmp_path):
    save_model(load_model(ROOT / "qwen2_tied"), tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / files.SINGLE)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_lender_gives_its_tokenizer_byte_for_byte_and_its_token_ids(source, tmp_path):
    lent = {
        "tokenizer.json": b'{"odd":   "spacing"}\r\n',
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": "{{ 'ü' }}\n\n".encode(),
        "generation_config.json": b'{"eos_token_id": [7, 9], "temperature": 0.6}',
        "LICENSE": b"do what you like",
    }
    for name, content in lent.items():
        (source / name).write_bytes(content)
    (source / "modeling_evil.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    edit_config(source, eos_token_id=[7, 9], pad_token_id=3, auto_map={"AutoModel": "x.Y"})
    save_model(load_model(source), tmp_path / "out", like=source, card="# A card\n")
    for name, content in lent.items():
        assert (tmp_path / "out" / name).read_bytes() == content, name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == ([7, 9], 3)
    assert "auto_map" not in config
    assert (tmp_path / "out" / "README.md").read_text() == "# A card\n"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *lent,
        "config.json",
        "model.safetensors",
        "README.md",
    }


def test_without_generation_settings_the_token_ids_become_them(source, tmp_path):
    edit_config(source, eos_token_id=5, bos_token_id=4)
    save_model(load_model(source), tmp_path / "out", like=source)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (4, 5)


@pytest.mark.parametrize("lent", [False, True])
def test_known_token_ids_are_written_where_the_lender_says_nothing(source, tmp_path, lent):
    (source / "generation_config.json").unlink(missing_ok=True)
    edit_config(source, eos_token_id=None, bos_token_id=4)
    known = {"eos_token_id": [5, 6], "pad_token_id": 7, "bos_token_id": 8}
    like = source if lent else None
    save_model(load_model(source), tmp_path / "out", like=like, token_ids=known)
    expected = known | ({"bos_token_id": 4} if lent else {})  # null says nothing, 4 does
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == expected
    assert {key: config[key] for key in expected} == expected


def test_generation_settings_of_the_lender_come_through_unchanged(source, tmp_path):
    settings = b'{"eos_token_id": [1, 2],  "temperature": 0.6, "top_p": 0.95}'
    (source / "generation_config.json").write_bytes(settings)
    save_model(load_model(source), tmp_path / "out", like=source, token_ids={"eos_token_id": 5})
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == settings


def test_only_when_asked_an_existing_model_is_replaced(source, tmp_path):
    save_model(load_model(source), tmp_path / "out", card="first")
    save_model(load_model(source), tmp_path / "out", card="second", replace=True)
    assert (tmp_path / "out" / "README.md").read_text() == "second"


def test_a_lender_is_read_no_further_than_its_directory(source, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    model = load_model(source)
    with pytest.raises(DataError, match=r"tokenizer.json is a link out of its directory"):
        save_model(model, tmp_path / "out", like=source)
    assert {p.name for p in tmp_path.iterdir()} == {"secret", "source"}


def test_files_have_the_modes_of_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        save_model(load_model(ROOT / "qwen2_tied"), tmp_path / "out", like=ROOT / "qwen2_tied")
    finally:
        os.umask(old)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(modes, 0o644) and len(modes) == 3


def test_an_existing_model_is_not_overwritten(source):
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    with pytest.raises(DataError, match=f"{source} exists already"):
        save_model(load_model(source), source)
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


def test_a_full_disk_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    write_tensors, calls = files.write_tensors, []

    def third_fails(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write_tensors(*args)

    model = load_model(ROOT / "qwen2_untied")
    monkeypatch.setattr(files, "write_tensors", third_fails)
    with pytest.raises(StorageError, match="out cannot be written: No space left on device"):
        save_model(model, tmp_path / "out", shard_bytes=20_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dtype", "value"), [("float32", np.nan), ("float32", np.inf), ("float16", 1e5)]
)
def test_weights_that_their_files_cannot_hold_are_not_exported(tmp_path, dtype, value):
    model = load_model(ROOT / "qwen2_tied")
    config = json.loads((ROOT / "qwen2_tied" / "config.json").read_text())
    model.config = QwenConfig.from_hf(config | {"torch_dtype": dtype})
    model.final_norm[...] = model.final_norm[...].at[3].set(value)
    with pytest.raises(NumericalError, match=f"model.norm.weight in {dtype}: 1 of 32 values are n"):
        save_model(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# What does not fit


def swap_axes(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = np.ascontiguousarray(
        tensors["model.layers.1.mlp.up_proj.weight"].T
    )


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_axes, rf"{UP} has shape \[32, 48\], wanted \[48, 32\]"),
        (lambda t: t.pop(UP), rf"{UP} \[48, 32\] is missing"),
        (lambda t: t.update({"evil.weight": t[UP]}), "'evil.weight' has no place in it"),
        (
            lambda t: t.update({"../../etc/passwd\x1b[2J": t[UP]}),
            r"'../../etc/passwd\\x1b\[2J' has no place in it",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t["model.norm.weight"]}),
            "'model.layers.0.self_attn.q_proj.bias' has no place in it",  # Qwen3 has no biases
        ),
        (lambda t: t.update({UP: t[UP].astype(np.int8)}), f"'{UP}' has dtype 'I8'; wanted F32"),
        (lambda t: t.update({UP: t[UP].astype(np.float64)}), f"'{UP}' has dtype 'F64'; wanted"),
        (
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2}),
            "lm_head.weight differs from model.embed_tokens.weight.*tie_word_embeddings=true",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"][:-1]}),
            "lm_head.weight differs from model.embed_tokens.weight",
        ),
    ],
)
def test_tensors_that_the_config_does_not_describe_are_named(source, change, message):
    edit_tensors(source, change)
    with pytest.raises(DataError, match=message) as refusal:
        load_model(source)
    line = str(refusal.value)
    assert str(source) in line and "\n" not in line and "\x1b" not in line


def test_a_tied_head_that_is_the_embedding_is_accepted(source):
    plain = load_model(source)
    edit_tensors(
        source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()})
    )
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load_model(source)), nnx.state(plain))


def test_the_first_offenders_are_listed_and_the_rest_counted(source):
    edit_config(source, num_hidden_layers=4, layer_types=["full_attention"] * 4)
    with pytest.raises(DataError, match=r"layers.2.down|layers.2.mlp.down_proj") as refusal:
        load_model(source)
    # 11 tensors in each of the two layers that are not there; 4 are listed
    assert "; and 18 more" in str(refusal.value)
    assert str(refusal.value).count("is missing") == 4


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(source, value):
    def poison(tensors):
        tensors[UP][3, 5] = tensors[UP][4, 6] = value

    edit_tensors(source, poison)
    with pytest.raises(DataError, match=f"{UP}: 2 of 1536 values are not finite"):
        load_model(source)


def test_weights_beyond_float16_are_refused_in_float16_alone(source):
    edit_tensors(source, lambda t: t["model.norm.weight"].fill(1e5))
    load_model(source, dtype="bfloat16")
    with pytest.raises(DataError, match=r"model.norm.weight in float16: 32 of 32 values are not"):
        load_model(source, dtype="float16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 10**9, "layer_types": None},
            "num_hidden_layers=1000000000: wanted 1 to 1000",
        ),
        ({"hidden_size": "32"}, "hidden_size='32': wanted an integer"),
        ({"vocab_size": -1}, "vocab_size=-1: wanted 1 to"),
        ({"model_type": "llama"}, "model_type='llama': wanted one of"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={...} is not implemented"),
    ],
)
def test_a_config_that_lies_is_refused_before_the_weights_are_touched(
    source, monkeypatch, changes, message
):
    edit_config(source, **changes)
    monkeypatch.setattr(files, "find_tensors", lambda directory: pytest.fail("opened"))
    with pytest.raises(DataError, match=message) as refusal:
        load_model(source)
    assert str(refusal.value).startswith(f"{source}/config.json: ")


def test_large_sizes_that_the_files_do_not_have_allocate_nothing(source):
    """A layer of 130 GB that stays within the limits of config.json."""
    edit_config(source, hidden_size=2**17, intermediate_size=2**18, head_dim=None)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"has shape \[.*\], wanted \["):
            load_model(source)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_without_a_config_the_directory_is_refused(source):
    (source / "config.json").unlink()
    with pytest.raises(DataError, match=rf"{source} has no config.json"):
        load_model(source)


def test_code_in_the_directory_is_never_imported(source, tmp_path):
    """auto_map is what makes transformers run it, when it is trusted."""
    canary = tmp_path / "canary"
    (source / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')")
    edit_config(source, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    load_model(source)
    assert not canary.exists() and "modeling_evil" not in sys.modules


def test_the_dtype_of_config_json_does_not_matter_to_reading(source):
    edit_config(source, dtype="bfloat16")
    model = load_model(source)
    theirs = load_file(source / files.SINGLE)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(model.embed[...], theirs)
    assert model.config.dtype == "float32"

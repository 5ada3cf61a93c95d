"""Rows 34 to 41: model directories that are broken or hostile, at the command line.

Each test breaks one thing of a directory that works: one line on stderr, exit code 3, nothing
written. What the line must say is in the table: the file, and what was got and wanted. More hostile
headers (37) are in tests/models/test_models_files.py, more hostile templates (41) in
tests/prompt/test_chat_template.py.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gspo_jax.cli.commands import main
from gspo_jax.errors import DataError
from gspo_jax.models import load_model
from gspo_jax.models.hf import files
from gspo_jax.prompt import sandbox
from gspo_jax.prompt.tokenizer import load_tokenizer

NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
OPENED: list[list[str]] = []
sys.addaudithook(
    lambda event, args: [p.append(str(args[0])) for p in OPENED] if event == "open" else None
)


@pytest.fixture
def directory(tiny_dir, tmp_path):
    """A copy of a good model directory, to spoil."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


@pytest.fixture
def refused(directory, tmp_path, capsys, monkeypatch):
    """Trains on the spoilt directory: the one line on stderr, after all that must hold of it."""

    monkeypatch.setattr(sandbox, "MAX_STEPS", 5000)  # of 200,000, to be quick

    def train():
        outside = tmp_path / "outside"
        before = sorted(tmp_path.rglob("*"))
        OPENED.append([])
        try:
            code = main(["train", *settings(directory, tmp_path)])
        finally:
            opened = OPENED.pop()
        err = capsys.readouterr().err
        assert code == 3 and err.startswith("gspo-jax: "), (code, err)
        assert err.count("\n") == 1 and err.rstrip("\n").isprintable() and len(err) < 600, err
        assert str(outside) not in opened
        assert sorted(tmp_path.rglob("*")) == before  # nothing is written
        return err

    return train


def settings(directory, tmp_path):
    few = "task.options.sizes={train: 4, val: 1, test: 1}"
    return [f"model.path={directory}", few, f"run.dir={tmp_path / 'runs'}"]


def edit_json(path, **changes):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def edit_tensors(directory, change):
    tensors = dict(load_file(directory / files.SINGLE))
    change(tensors)
    save_file(tensors, directory / files.SINGLE)


def shard(directory, name):
    """The weights as one shard, which the index gives another name."""
    weights = load_file(directory / files.SINGLE)
    (directory / files.SINGLE).rename(directory.parent / "outside")
    index = {"weight_map": dict.fromkeys(weights, name.format(parent=directory.parent))}
    (directory / files.INDEX).write_text(json.dumps(index))


def header(directory, change):
    """The same values under a changed header."""
    raw = (directory / files.SINGLE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    content = json.loads(raw[8 : 8 + length])
    change(content)
    text = json.dumps(content).encode()
    (directory / files.SINGLE).write_bytes(
        len(text).to_bytes(8, "little") + text + raw[8 + length :]
    )


def pickle_only(directory):
    (directory / files.SINGLE).rename(directory / "pytorch_model.bin")


def config(**changes):
    return lambda directory: edit_json(directory / "config.json", **changes)


def tensors(change):
    return lambda directory: edit_tensors(directory, change)


def index(name):
    return lambda directory: shard(directory, name)


def link(name):
    def replace(directory):
        outside = directory.parent / "outside"
        if (directory / name).exists():
            (directory / name).rename(outside)
        else:
            outside.write_text("{}")
        (directory / name).symlink_to(outside)

    return replace


def text(name, content):
    return lambda directory: (directory / name).write_text(content)


def truncate(directory):
    whole = (directory / files.SINGLE).read_bytes()
    (directory / files.SINGLE).write_bytes(whole[:-100])


def poison(value):
    def change(found):
        found[UP] = found[UP].copy()
        found[UP][3, 5] = value

    return tensors(change)


def narrow(found):
    found[UP] = found[UP][:, :-1].copy()


def huge(content):
    content[UP]["shape"] = [2**40, 2**20]


def twice(directory):
    raw = (directory / files.SINGLE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].rstrip()
    text = text[:-1] + b',"' + NORM.encode() + b'":{}}'
    (directory / files.SINGLE).write_bytes(
        len(text).to_bytes(8, "little") + text + raw[8 + length :]
    )


def prefix(directory):
    """Longer than any token: the Rust library slices beyond their ends, and panics."""
    content = json.loads((directory / "tokenizer.json").read_text())
    content["model"]["continuing_subword_prefix"] = "x" * 1000
    (directory / "tokenizer.json").write_text(json.dumps(content))


TEMPLATE = "chat_template.jinja"
OUT = "is a link out of its directory; it is not read. Where the links are yours: cp -rL "
PLAIN = "is not a plain file name; it is not read"
FAULTS = {
    "34 pickles": (pickle_only, "weights as pickles only (pytorch_model.bin)"),
    "36 index up": (index("../outside"), f"'../outside' {PLAIN}"),
    "36 index absolute": (index("{parent}/outside"), PLAIN),
    "36 index subdirectory": (index("sub/outside"), PLAIN),
    "36 index windows": (index("..\\outside"), PLAIN),
    **{
        f"36 link {name}": (link(name), f"{name} {OUT}")
        for name in (
            "config.json",
            "model.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "generation_config.json",
            TEMPLATE,
            "LICENSE",
        )
    },
    "37 truncated": (truncate, "model.safetensors has"),
    "37 huge shape": (lambda d: header(d, huge), f"'{UP}' has shape [1099511627776, 1048576]"),
    "37 no header": (text(files.SINGLE, "hi"), "2 bytes cannot hold a header"),
    "38 shape": (tensors(narrow), f"{UP} has shape [48, 31], wanted [48, 32]"),
    "38 missing": (tensors(lambda t: t.pop(UP)), f"{UP} [48, 32] is missing"),
    "38 extra": (tensors(lambda t: t.update(x=t[NORM])), "'x' has no place in it"),
    "38 dtype": (tensors(lambda t: t.update({UP: t[UP].astype(np.int8)})), "dtype 'I8'; wanted"),
    "38 twice": (twice, f"'{NORM}' is there twice"),
    "38 tied": (
        tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2})),
        "lm_head.weight differs from model.embed_tokens.weight",
    ),
    "38 untied": (config(tie_word_embeddings=False), "lm_head.weight [296, 32] is missing"),
    "39 nan": (poison(np.nan), f"model.safetensors: {UP}: 1 of 1536 values are not finite"),
    "39 infinity": (poison(-np.inf), f"{UP}: 1 of 1536 values are not finite"),
    "40 layers": (config(num_hidden_layers=10**9), "num_hidden_layers=1000000000: wanted 1 to"),
    "40 negative": (config(hidden_size=-32), "hidden_size=-32: wanted 1 to"),
    "40 text": (config(vocab_size="296"), "vocab_size='296': wanted an integer"),
    "40 heads": (config(num_attention_heads=3), "config.json: "),
    "40 unknown": (config(model_type="\x1b[2Jgpt9"), r"model_type='\x1b[2Jgpt9': wanted one of"),
    "40 no object": (text("config.json", "[]"), "config.json: wanted an object, got a list"),
    "40 deep": (text("config.json", "[" * 100_000), "config.json is not valid JSON"),
    "40 not json": (text("config.json", "{"), "config.json is not valid JSON"),
    "40 eos": (
        lambda d: edit_json(d / "generation_config.json", eos_token_id=[295, 10**30]),
        "special token id 1000000000000000000000000000000, wanted 0 to 295",
    ),
    "41 internals": (text(TEMPLATE, "{{ ''.__class__.__mro__ }}"), "is unsafe"),
    "41 endless": (
        text(TEMPLATE, "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3),
        "the template takes more than",
    ),
    "41 gigabyte": (text(TEMPLATE, "{{ 'a' * 1000000000 }}"), "writes more than 10000000"),
    "41 error": (
        text(TEMPLATE, "{{ raise_exception('\\x1b[2J\\n\\nno') }}"),
        f"{TEMPLATE}: ?[2J no",
    ),
    "41 syntax": (text(TEMPLATE, "{% for"), f"{TEMPLATE}: not a chat template"),
    "41 long": (text(TEMPLATE, "x" * 300_000), f"{TEMPLATE}: 300000 characters; at most 262144"),
    "tokenizer": (text("tokenizer.json", "{}"), "tokenizer.json: not a tokenizer"),
    "tokenizer that panics": (prefix, "tokenizer.json: not a tokenizer"),
}


def faults(row):
    return pytest.mark.parametrize("fault", [name for name in FAULTS if name.startswith(str(row))])


@pytest.fixture
def names_the_fault(directory, refused):
    def inject(fault):
        change, message = FAULTS[fault]
        change(directory)
        line = refused()
        assert message in line and str(directory) in line, line

    return inject


@faults(34)
def test_row_34_weights_as_pickles_alone_are_refused_and_never_opened(
    directory, tmp_path, names_the_fault, fault
):
    names_the_fault(fault)
    canary = tmp_path / "canary"  # and a pickle that runs a command when it is read
    (directory / "pytorch_model.bin").write_bytes(
        b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    )
    OPENED.append([])
    try:
        with pytest.raises(DataError, match="a pickle can run code when it is read"):
            load_model(directory)
    finally:
        opened = OPENED.pop()
    assert not canary.exists() and not any("pytorch_model" in path for path in opened)


@faults(36)
def test_row_36_nothing_outside_the_directory_is_read(names_the_fault, fault):
    names_the_fault(fault)


@faults(37)
def test_row_37_a_header_that_lies_is_refused(names_the_fault, fault):
    names_the_fault(fault)


@faults(38)
def test_row_38_tensors_that_are_not_the_configs_are_named(names_the_fault, fault):
    names_the_fault(fault)


@faults(39)
def test_row_39_weights_that_are_not_finite_are_refused(names_the_fault, fault):
    names_the_fault(fault)


@faults(40)
def test_row_40_a_config_that_lies_is_refused(names_the_fault, fault):
    names_the_fault(fault)


@faults(41)
def test_row_41_a_hostile_template_is_refused(names_the_fault, fault):
    names_the_fault(fault)


@faults("tokenizer")
def test_a_tokenizer_that_is_none_is_named(names_the_fault, fault):
    names_the_fault(fault)


def test_the_directory_without_a_fault_is_accepted(directory, tmp_path, capsys):
    assert main(["train", *settings(directory, tmp_path), "--dry-run"]) == 0
    load_model(directory)


def test_the_cache_of_the_hub_is_read_through_its_links(directory, tmp_path, capsys):
    """models--org--name/snapshots/<commit>/<file> -> ../../blobs/<hash>, every single file."""
    root = tmp_path / "models--org--name"
    snapshot, blobs = root / "snapshots" / "0123abcd", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    assert main(["train", *settings(snapshot, tmp_path), "--dry-run"]) == 0
    assert load_tokenizer(snapshot).encode("12") and load_model(snapshot)


@pytest.mark.parametrize("older", [False, True])
def test_row_35_code_that_comes_with_a_model_is_not_run(directory, tmp_path, capsys, older):
    """auto_map in both configs; and where transformers has to convert older files as well."""
    canary = tmp_path / "canary"
    evil = f"open({str(canary)!r}, 'w')\nclass Evil: pass\n"
    for name in ("modeling_evil", "tokenization_evil", "configuration_evil", "setup", "__init__"):
        (directory / f"{name}.py").write_text(evil)
    models = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    edit_json(directory / "config.json", auto_map=models)
    slow_and_fast = ["tokenization_evil.Evil", "tokenization_evil.Evil"]
    edit_json(
        directory / "tokenizer_config.json",
        auto_map={"AutoTokenizer": slow_and_fast},
        tokenizer_class="Evil",
    )
    if older:
        content = json.loads((directory / "tokenizer.json").read_text())["model"]
        (directory / "tokenizer.json").unlink()
        (directory / "vocab.json").write_text(json.dumps(content["vocab"]))
        (directory / "merges.txt").write_text("#version: 0.2\n")
    code = main(["train", *settings(directory, tmp_path), "--dry-run"])
    err = capsys.readouterr().err
    assert (code, err.count("\n")) in ([(0, 0)] if not older else [(0, 0), (3, 1)]), err
    assert not canary.exists()
    assert not {"modeling_evil", "tokenization_evil", "configuration_evil"} & set(sys.modules)


def test_row_36_older_tokenizer_files_are_not_read_through_links_either(
    directory, tmp_path, refused
):
    (directory / "tokenizer.json").unlink()
    (tmp_path / "outside").write_text('{"a": 0}')
    (directory / "vocab.json").symlink_to(tmp_path / "outside")
    assert f"vocab.json {OUT}" in refused()
    (directory / "vocab.json").unlink()
    (directory / "vocab.json").write_text("{}")
    (directory / "merges.txt").symlink_to(tmp_path / "outside")
    assert f"merges.txt {OUT}" in refused()


MEASURE = """
import json, resource, sys
from gspo_jax.models import load_model
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
load_model(sys.argv[1])  # what the process needs anyway
for path in sys.argv[2:]:
    before = peak()
    try:
        said = f"nothing {load_model(path)}"
    except ValueError as error:
        said = str(error)
    print(json.dumps([said[:300], peak() - before]))
"""


def test_row_40_what_a_directory_claims_takes_no_memory(directory, tmp_path):
    """Resident memory of a process that meets claims of up to 10^18 bytes in files of 140 kB."""

    def claims(name, *changes):
        path = Path(shutil.copytree(directory, tmp_path / name))
        for change in changes:
            change(path)
        return path

    def length(path):
        raw = (path / files.SINGLE).read_bytes()
        (path / files.SINGLE).write_bytes((2**40).to_bytes(8, "little") + raw[8:])

    wide = config(hidden_size=2**17, intermediate_size=2**19, num_attention_heads=2**10)
    spoilt = {
        claims("header", lambda d: header(d, huge)): "contradict each other",
        claims("length", length): "cannot hold a header of 1099511627776 bytes",
        claims("layers", config(num_hidden_layers=10**9)): "num_hidden_layers=1000000000",
        claims("wide", wide, config(vocab_size=2**22)): "has shape [",
        claims("many", config(num_hidden_layers=1000)): "26 tensors cannot be 1000 layers",
    }
    command = [sys.executable, "-c", MEASURE, str(directory), *map(str, spoilt)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    for (said, grown), message in zip(told, spoilt.values(), strict=True):
        assert message in said, said
        assert grown < 40, (said, grown)  # MB

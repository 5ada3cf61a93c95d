"""Tokenizers in the form of Qwen2.5, Qwen3 and the R1 distillates, beside transformers' reading.

Each is trained here on a few lines and has a template of its own with the structure of the
published ones: a default system message; a switch for thinking; a beginning-of-sequence token and
an opened thought that the template itself writes.
"""

import json
import shutil

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from gspo_jax.cli.commands import main
from gspo_jax.config.load import load_config
from gspo_jax.errors import ConfigError
from gspo_jax.models import load_model, save_model
from gspo_jax.policy import load_policy
from gspo_jax.prompt.tokenizer import load_tokenizer
from gspo_jax.tasks import load_task

CORPUS = [
    "What is 17+25? Think, then answer in \\boxed{42}.",
    "one two three four",
    "é 🙂 12345",
] * 3
CHATS = [
    [{"role": "user", "content": "What is 17+25?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " é 🙂\n"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwo"},
        {"role": "user", "content": "three"},
    ],
]
TURNS = """\
{%- for m in messages if m.role != 'system' %}
    {%- set text = m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' \
else m.content %}
    {{- '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
"""
QWEN25 = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou answer questions.<|im_end|>\\n' }}
{%- endif %}
""" + TURNS + "{%- endif %}\n"  # fmt: skip
QWEN3 = TURNS + """\
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""  # fmt: skip
R1 = """\
{{ bos_token }}{% for m in messages %}
{%- if m['role'] == 'system' %}{{ m['content'] }}{% endif %}
{%- if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}{% endif %}
{%- if m['role'] == 'assistant' %}
{{- '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"""

# How all Qwen tokenizers cut text before merging: words, single digits, punctuation, white space.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = {
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "r1": ["<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"],
}
FAMILIES = {
    "qwen2.5": (
        SPECIALS["qwen"],
        QWEN25,
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "add_bos_token": False,
        },
        ["<|im_end|>", "<|endoftext|>"],
    ),
    "qwen3": (
        SPECIALS["qwen"],
        QWEN3,
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
        },
        ["<|im_end|>", "<|endoftext|>"],
    ),
    "r1": (
        SPECIALS["r1"],
        R1,
        {
            "tokenizer_class": "LlamaTokenizerFast",
            "bos_token": {"__type": "AddedToken", "content": "<|begin|>", "lstrip": False},
            "eos_token": {"__type": "AddedToken", "content": "<|end|>", "lstrip": False},
            "pad_token": {"__type": "AddedToken", "content": "<|end|>", "lstrip": False},
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": True,
        },
        ["<|end|>"],
    ),
}


NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def make(family, directory, shape):
    """A directory in the form of `family`, of a model with the config.json in `shape`."""
    specials, template, settings, eos = FAMILIES[family]
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(
        [AddedToken("<think>", special=False), AddedToken("</think>", special=False)]
    )
    ids = {name: backend.token_to_id(name) for name in specials}
    byte_level = processors.ByteLevel(trim_offsets=False)
    if family == "r1":
        bos = [("<|begin|>", ids["<|begin|>"])]
        one = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=bos)
        backend.post_processor = processors.Sequence([byte_level, one])
    else:
        backend.post_processor = byte_level
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    found = [ids[name] for name in eos]
    files = {
        "tokenizer_config.json": settings | {"chat_template": template},
        "generation_config.json": {"eos_token_id": found if len(found) > 1 else found[0]},
        # transformers looks here too before it decides what kind of tokenizer it has.
        "config.json": json.loads((shape / "config.json").read_text()) | NO_IDS,
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="module")
def directories(tmp_path_factory, tiny_dir):
    root = tmp_path_factory.mktemp("tokenizers")
    return {family: make(family, root / family, tiny_dir) for family in FAMILIES}


def theirs(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory))


def their_ids(tokenizer, chat, **arguments):
    out = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, **arguments
    )
    return list(out["input_ids"])


CASES = [("qwen2.5", {}), ("r1", {}), ("qwen3", {})]
CASES += [("qwen3", {"enable_thinking": on}) for on in (True, False)]


@pytest.mark.parametrize(("family", "arguments"), CASES)
def test_chats_have_the_ids_that_transformers_gives_them(directories, family, arguments):
    ours = load_tokenizer(directories[family], template_args=arguments)
    reference = theirs(directories[family])
    for chat in CHATS:
        ids = ours.encode_prompt(chat)
        assert ids == their_ids(reference, chat, **arguments)
        assert ours.backend.decode(ids, skip_special_tokens=False) == ours.render(chat)


def test_the_switch_for_thinking_changes_what_follows_the_prompt(directories):
    plain, on, off = (
        load_tokenizer(directories["qwen3"], template_args=arguments)
        for arguments in ({}, {"enable_thinking": True}, {"enable_thinking": False})
    )
    assert plain.render("one") == on.render("one")
    assert off.render("one") == on.render("one") + "<think>\n\n</think>\n\n"


def test_r1_begins_with_one_beginning_and_ends_in_a_thought(directories):
    """Its tokenizer adds the token to any text, and its template writes it as well."""
    ours = load_tokenizer(directories["r1"])
    begin = ours.backend.token_to_id("<|begin|>")
    ids = ours.encode_prompts(["one", *CHATS])
    assert [row.count(begin) for row in ids] == [1] * 4 and {row[0] for row in ids} == {begin}
    assert ours.render("one") == "<|begin|><|User|>one<|Assistant|><think>\n"
    assert ours.encode("one")[0] != begin  # a solution is appended to a prompt


def test_without_its_template_r1_begins_with_one_beginning_too(directories, tmp_path):
    path = shutil.copytree(directories["r1"], tmp_path / "base")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = load_tokenizer(path)
    assert ours.encode_prompt("one") == theirs(path)("one")["input_ids"]
    assert ours.encode_prompt("one").count(ours.backend.token_to_id("<|begin|>")) == 1


def test_ends_and_padding_are_those_of_the_family(directories):
    qwen, r1 = (load_tokenizer(directories[name]) for name in ("qwen2.5", "r1"))
    document, turn = (qwen.backend.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>"))
    assert (qwen.eos_ids, qwen.pad_id) == ((turn, document), document)
    end = r1.backend.token_to_id("<|end|>")
    assert (r1.eos_ids, r1.pad_id) == ((end,), end)


def test_a_variable_that_the_template_does_not_look_at_is_refused(directories, tmp_path):
    message = r"model.template_args.enable_thinkin: .* looks at \[.*'enable_thinking'"
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(directories["qwen3"], template_args={"enable_thinkin": False})
    with pytest.raises(ConfigError, match=r"model.template_args.x: the chat template .*not exist"):
        path = shutil.copytree(directories["r1"], tmp_path / "base")
        (path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
        load_tokenizer(path, template_args={"x": 1})


# In a whole model directory


@pytest.fixture
def qwen3_dir(directories, tiny_dir, tmp_path):
    path = tmp_path / "model"
    save_model(load_model(tiny_dir), path)
    for file in directories["qwen3"].iterdir():
        shutil.copy(file, path)
    return path


def settings(path, *more):
    return [f"model.path={path}", "task.options.sizes={train: 5, val: 5, test: 5}", *more]


@pytest.mark.parametrize("thinks", [True, False])
def test_the_setting_reaches_the_tokenizer_of_train_sft_and_eval(qwen3_dir, thinks):
    """All three start from `load_policy`."""
    given = f"model.template_args={{enable_thinking: {str(thinks).lower()}}}"
    policy = load_policy(load_config(None, settings(qwen3_dir, given)))
    assert ("<think>" in policy.tokenizer.render("one")) is not thinks


@pytest.mark.parametrize("command", ["train", "sft", "eval"])
def test_a_misspelt_variable_is_refused_by_a_dry_run(qwen3_dir, command, capsys):
    given = "model.template_args.enable_thinkin=false"
    assert main([command, *settings(qwen3_dir, given), "--dry-run"]) == 2
    assert "model.template_args.enable_thinkin: the chat template" in capsys.readouterr().err


def test_a_dry_run_counts_prompts_with_the_setting(qwen3_dir, capsys):
    """An empty thought adds tokens: at the limit without it, problems are left out."""
    task = load_task("arithmetic", sizes={"train": 5, "val": 5, "test": 5})
    prompts = [task.problem(split, i).prompt for split in task.size for i in range(5)]
    limit = (
        f"task.max_prompt_length={max(map(len, load_tokenizer(qwen3_dir).encode_prompts(prompts)))}"
    )
    for given, expected in (("true", False), ("false", True)):
        given = f"model.template_args.enable_thinking={given}"
        assert main(["train", *settings(qwen3_dir, limit, given), "--dry-run"]) in (0, 3)
        out, err = capsys.readouterr()
        assert ("left out" in out or "no training problem" in err) is expected


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_loads_in_transformers_with_the_same_template_and_ids(
    directories, tiny_dir, tmp_path, family
):
    save_model(load_model(tiny_dir), tmp_path / "out", like=directories[family])
    before, after = theirs(directories[family]), theirs(tmp_path / "out")
    assert type(after) is type(before) and len(after) == len(before)
    assert after.chat_template == before.chat_template == FAMILIES[family][1]
    assert (after.eos_token_id, after.pad_token_id) == (before.eos_token_id, before.pad_token_id)
    ours = load_tokenizer(tmp_path / "out")
    for chat in CHATS:
        assert their_ids(after, chat) == their_ids(before, chat) == ours.encode_prompt(chat)
    np.testing.assert_array_equal(ours.eos_ids, load_tokenizer(directories[family]).eos_ids)

"""Tokenizers: the demo's own, and whatever a Hugging Face directory may hold."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import make_tiny_model
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

import gspo_jax
from gspo_jax.errors import DataError
from gspo_jax.prompt.tokenizer import load_tokenizer
from gspo_jax.tasks import load_task

DEMO = Path(gspo_jax.__file__).parent / "assets" / "demo"
PAD, START, END = 293, 294, 295  # of the demo
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 47+25-18?"},
]
TEXTS = [
    "47+25=72\n72-18=54\n\\boxed{54}",
    "<|im_start|>user\nWhat is 47+25-18?<|im_end|>\n",
    "12--34 =+-  naïve\u0301 🙂\r\n\n\t the answer",
    "",
]


@pytest.fixture(scope="module")
def demo():
    return load_tokenizer(DEMO)


@pytest.fixture
def copy(tmp_path):
    """A directory with the demo's tokenizer.json and chat template, and the given JSON files."""

    def make(template=True, **files):
        shutil.copy(DEMO / "tokenizer.json", tmp_path)
        if template:
            shutil.copy(DEMO / "chat_template.jinja", tmp_path)
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return make


def test_the_demo_directory_is_consistent(demo):
    config = json.loads((DEMO / "config.json").read_text())
    assert config["vocab_size"] == demo.vocab_size == 296
    assert config["eos_token_id"] == END and config["pad_token_id"] == PAD
    assert demo.eos_ids == (END,) and demo.pad_id == PAD


def test_the_demo_tokenizer_is_what_its_recipe_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["", "demo", str(tmp_path)])
    make_tiny_model.main()
    made = json.loads((tmp_path / "tokenizer.json").read_text())
    ours = json.loads((DEMO / "tokenizer.json").read_text())
    for part in ("model", "added_tokens"):
        assert made[part] == ours[part]
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (DEMO / name).read_text()


def test_digits_and_signs_are_tokens_of_their_own(demo):
    task = load_task("arithmetic", sizes={"train": 200})
    for index in range(200):
        text = task.problem("train", index).columns["completion"]
        pieces = [demo.decode([i]) for i in demo.encode(text)]
        assert "".join(pieces) == text
        for piece in pieces:
            assert len(piece) == 1 or not set(piece) & set("0123456789+-=\n{}")


def test_prompts_and_solutions_are_short(demo):
    assert len(demo.encode_prompt("What is 47+25-18?")) == 20
    assert [demo.decode([i]) for i in demo.encode(TEXTS[0])][-5:] == [
        "\\boxed", "{", "5", "4", "}",
    ]  # fmt: skip
    assert len(demo.encode(TEXTS[0])) == 23


def test_a_string_prompt_is_one_user_message(demo):
    assert demo.render("Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert demo.render("Hi") == demo.render([{"role": "user", "content": "Hi"}])
    ids = demo.encode_prompt("Hi")
    assert ids[0] == START and ids.count(START) == 2 and ids.count(END) == 1
    assert demo.backend.decode(ids, skip_special_tokens=False) == demo.render("Hi")


def test_ids_equal_those_of_transformers(demo):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(DEMO))
    for text in TEXTS:
        assert demo.encode(text) == theirs(text)["input_ids"]
    for chat in (CHAT, CHAT[1:]):
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert demo.encode_prompt(chat) == list(ids)
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (END, PAD, 296)
    assert theirs.decode([*demo.encode(TEXTS[0]), END], skip_special_tokens=True) == TEXTS[0]


def test_decoding_leaves_out_special_and_unknown_ids(demo):
    ids = [START, *demo.encode("a b"), END, PAD, 9999]
    assert demo.decode(ids) == "a b"
    assert demo.decode_batch([ids, [], [END]]) == ["a b", "", ""]


def test_decoding_half_a_character_is_a_replacement_mark(demo):
    assert demo.decode(demo.encode("🙂")[:2]) == "\ufffd"


def test_batches_equal_single_calls(demo):
    assert demo.encode_batch(TEXTS) == [demo.encode(t) for t in TEXTS]
    prompts = [*TEXTS, CHAT]
    assert demo.encode_prompts(prompts) == [demo.encode_prompt(p) for p in prompts]


@pytest.mark.parametrize(
    "files, eos, pad",
    [
        # Qwen2.5-Instruct: two ends, the turn's and the document's; the pad is one of them.
        (
            {
                "generation_config": {"eos_token_id": [END, PAD], "pad_token_id": PAD},
                "tokenizer_config": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
            },
            (END, PAD),
            PAD,
        ),
        # A base model whose tokenizer names another end than its generation config.
        (
            {
                "generation_config": {"eos_token_id": PAD},
                "tokenizer_config": {"eos_token": {"content": "<|im_end|>", "lstrip": False}},
            },
            (PAD, END),
            PAD,
        ),
        ({"special_tokens_map": {"eos_token": {"content": "<|im_end|>"}}}, (END,), END),
        ({"config": {"eos_token_id": END, "pad_token_id": START}}, (END,), START),
        ({"generation_config": {"eos_token_id": END, "pad_token_id": None}}, (END,), END),
        # What the tokenizer names but does not have is not a token.
        (
            {"tokenizer_config": {"eos_token": "</s>"}, "config": {"eos_token_id": PAD}},
            (PAD,),
            PAD,
        ),
    ],
)
def test_every_end_of_sequence_and_the_padding_are_found(copy, files, eos, pad):
    tokenizer = load_tokenizer(copy(**files))
    assert tokenizer.eos_ids == eos
    assert tokenizer.pad_id == pad


def test_a_directory_without_an_end_of_sequence_is_refused(copy):
    with pytest.raises(DataError, match=r"no end-of-sequence token; set eos_token_id"):
        load_tokenizer(copy(config={"eos_token_id": None}))


EOS = {"eos_token": "<|im_end|>"}


def test_the_template_is_taken_from_where_it_is(copy):
    def rendered(**settings):
        return load_tokenizer(copy(template=False, tokenizer_config=EOS | settings)).render("Hi")

    assert rendered() == "Hi"  # none: the text as it is
    assert rendered(chat_template="A{{ messages[0].content }}") == "AHi"
    several = [{"name": "tool_use", "template": "B"}, {"name": "default", "template": "C"}]
    assert rendered(chat_template=several) == "C"
    both = load_tokenizer(copy(tokenizer_config=EOS | {"chat_template": "A"}))
    assert both.render("Hi").startswith("<|im_start|>")  # chat_template.jinja wins


def test_a_chat_needs_a_template(copy):
    tokenizer = load_tokenizer(copy(template=False, tokenizer_config=EOS))
    with pytest.raises(DataError, match=r"no chat template; use prompts that are strings"):
        tokenizer.encode_prompt(CHAT)


def test_special_tokens_and_arguments_reach_the_template(copy):
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ enable_thinking }}"
    settings = EOS | {"bos_token": "<|im_start|>", "chat_template": source}
    path = copy(template=False, tokenizer_config=settings)
    tokenizer = load_tokenizer(path, template_args={"enable_thinking": False})
    assert tokenizer.render("Hi") == "<|im_start|>Hi<|im_end|>False"


def test_a_beginning_of_sequence_is_added_once(copy):
    settings = EOS | {"bos_token": "<|im_start|>"}
    path = copy(template=False, tokenizer_config=settings)
    backend = Backend.from_file(str(path / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", START)]
    )
    backend.save(str(path / "tokenizer.json"))
    hi = load_tokenizer(DEMO).encode("Hi")
    plain = load_tokenizer(path)
    assert plain.encode_prompt("Hi") == [START, *hi]  # by the tokenizer
    assert plain.encode("Hi") == hi
    template = settings | {"chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    (path / "tokenizer_config.json").write_text(json.dumps(template))
    assert load_tokenizer(path).encode_prompt("Hi") == [START, *hi]  # by the template alone


def test_saved_padding_and_truncation_are_not_applied(copy):
    path = copy(tokenizer_config=EOS)
    backend = Backend.from_file(str(path / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(path / "tokenizer.json"))
    assert load_tokenizer(path).encode("abcdefgh") == load_tokenizer(DEMO).encode("abcdefgh")


def test_older_files_are_converted(tmp_path):
    model = json.loads((DEMO / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
    for name in ("tokenizer_config.json", "config.json"):
        shutil.copy(DEMO / name, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == load_tokenizer(DEMO).encode(text)
    assert tokenizer.eos_ids == (END,)


def test_what_is_no_tokenizer_is_one_line(copy, tmp_path):
    with pytest.raises(DataError, match=r"no such model directory\.$"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no tokenizer\.json in this directory\.$"):
        load_tokenizer(tmp_path / "empty")
    path = copy(template=False, tokenizer_config=EOS)
    (path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(path)
    (path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"got a JSON list, wanted an object"):
        load_tokenizer(path)
    for source in ([{"name": "default"}], 5, ["x"]):
        with pytest.raises(DataError, match=r"tokenizer_config\.json: chat_template .* wanted"):
            load_tokenizer(copy(template=False, tokenizer_config=EOS | {"chat_template": source}))
    path = copy(template=False, tokenizer_config=EOS)
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(path)


def test_loading_a_tokenizer_imports_neither_transformers_nor_torch():
    code = (
        "import sys; from gspo_jax.prompt.tokenizer import load_tokenizer; "
        f"load_tokenizer({str(DEMO)!r}).encode_prompt('Hi'); "
        "print(sorted({'transformers', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

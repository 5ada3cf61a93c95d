"""README.md of an export: what it claims, and what it takes from strangers."""

import ast
import json
import re

import pytest
import yaml

from gspo_jax.config.load import load_config
from gspo_jax.run.model_card import PLACE, how_to_use, model_card, stated

MEASURED = {
    "eval/greedy": 0.4,
    "eval/greedy_low": 0.36,
    "eval/greedy_high": 0.443,
    "eval/avg@4": 0.25,
    "eval/avg@4_low": 0.2,
    "eval/avg@4_high": 0.3,
    "eval/n": 1234,
    "eval/truncated": 0.125,
    "eval/mean_length": 20.0,
}
AFTER = MEASURED | {"eval/greedy": 0.75, "eval/greedy_low": 0.71, "eval/greedy_high": 0.787}


def card(*overrides, source=None, before=MEASURED, after=AFTER, supervised=False):
    config = load_config(None, overrides)
    return model_card(
        config, steps=1200, supervised=supervised, before=before, after=after, source=source
    )


def head(text):
    """The front matter, read as a hub would."""
    return yaml.safe_load(re.match(r"---\n(.*?)^---\n", text, re.S | re.M)[1])


def row(text, name):
    return re.search(rf"^\| {re.escape(name)} \| (.*) \|$", text, re.M)[1]


def test_the_front_matter_names_base_library_and_method():
    assert head(card("model.path=Qwen/Qwen3-0.6B")) == {
        "base_model": "Qwen/Qwen3-0.6B",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gspo_jax", "gspo", "reinforcement-learning", "rlvr"],
    }
    assert head(card("algo.loss=grpo"))["tags"][1] == "grpo"
    assert head(card(supervised=True))["tags"] == ["gspo_jax", "sft"]
    # Only the task's own reward is known to verify an answer.
    assert "rlvr" not in head(card("task.rewards=[mine:style]"))["tags"]


def test_random_weights_have_no_base_model():
    assert "base_model" not in head(card("model.path=Qwen/Qwen3-0.6B", "model.init=random"))


def test_the_licence_is_the_stated_one_or_none():
    own = {"license": "other", "license_name": "qwen-research", "license_link": "LICENSE"}
    text = card(source=own)
    assert {k: v for k, v in head(text).items() if k.startswith("license")} == own
    assert "The licence is the one that the source's card states." in text
    assert "license" not in head(card()) and "states no licence, so none is stated" in card()


def test_the_procedure_is_that_of_the_config():
    text = card(
        "algo.loss={name: gspo, clip_low: 3e-4}",
        "rollout.prompts=32",
        "rollout.group_size=6",
        "algo.minibatches=8",
        "algo.epochs=2",
        "optim.learning_rate=2e-6",
        "optim.schedule=cosine",
        "algo.kl.coef=0.01",
        "task.rewards=[/home/me/secret/mine.py:exact]",
        "model.template_args={enable_thinking: false}",
        "run.seed=7",
    )
    assert row(text, "loss") == "`gspo(clip_low=0.0003)` (https://arxiv.org/abs/2507.18071)"
    assert row(text, "advantage") == "`group_normalised`"
    assert (row(text, "steps"), row(text, "prompts per step")) == ("1,200", "32")
    assert (row(text, "responses per prompt"), row(text, "updates per step")) == ("6", "16")
    assert row(text, "learning rate") == "2e-06, cosine, 0 updates of warm-up"
    assert row(text, "KL penalty") == "0.01 (k3)" and row(text, "seed") == "7"
    assert row(text, "rewards") == "`mine.py:exact`" and "secret" not in text
    assert row(text, "template arguments") == "`{'enable_thinking': False}`"
    for package in ("gspo_jax", "jax", "flax", "transformers"):
        assert re.search(rf"\b{package} \d+\.\d+", row(text, "versions"))
    assert "arXiv:2507.18071" in text and "arXiv:2507.18071" not in card("algo.loss=grpo")


def test_a_local_directory_and_a_data_file_are_named_without_their_place(tmp_path):
    (tmp_path / "export").mkdir()
    text = card(f"model.path={tmp_path}/export", f"task.path={tmp_path}/rows.jsonl")
    assert str(tmp_path) not in text
    assert "the weights of `export`." in text and row(text, "task") == "`rows.jsonl`"
    assert "base_model" not in head(text)
    # An export of ours carries on what its own card states.
    text = card(f"model.path={tmp_path}/export", source={"base_model": "Qwen/Qwen3-0.6B"})
    assert head(text)["base_model"] == "Qwen/Qwen3-0.6B"
    assert "the weights of `export` (of `Qwen/Qwen3-0.6B`)." in text


def test_results_have_their_number_and_intervals():
    text = card()
    assert "On 1,234 held-out problems" in text
    assert row(text, "greedy") == "0.400 [0.360, 0.443] | 0.750 [0.710, 0.787]"
    assert row(text, "avg@4") == "0.250 [0.200, 0.300] | 0.250 [0.200, 0.300]"
    assert row(text, "truncated") == "0.125 | 0.125"
    assert "Nothing was measured" in card(before={}, after={})
    # One problem has no interval: metrics.jsonl has null for infinity.
    lone = MEASURED | {"eval/avg@4_low": None, "eval/avg@4_high": None}
    assert row(card(before=lone), "avg@4").startswith("0.250 | ")


@pytest.mark.parametrize(
    "licence",
    [
        "mit\n---\nowned: true",
        "a: b: c",
        "- x",
        "'",
        '"',
        "\x1b[2J",
        "!!python/object:x",
        "yes",
        "ü",
    ],
)
def test_text_from_the_source_cannot_leave_its_place(licence):
    text = card(source={"license": licence, "base_model": "../../x\n"})
    assert head(text)["license"] == licence
    assert set(head(text)) == {"library_name", "pipeline_tag", "license", "tags"}


def test_text_from_the_config_ends_no_table_and_no_code(tmp_path):
    text = card(f"task.path={tmp_path}/a`|<img src=x>\\n# b.jsonl")
    assert "<img" not in text and "\n# b" not in text
    assert row(text, "task").count("`") == 2 and "|" not in row(text, "task")


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# X", {"license": "apache-2.0"}),
        ("---\r\nlicense: m\r\nbase_model: b\r\n---\r\n", {"license": "m", "base_model": "b"}),
        ("---\nlicense: no\n---\n", {"license": "no"}),
        ("---\nlicense_name: 2001-01-01\n---\n", {"license_name": "2001-01-01"}),
        ("---\nlicense: [mit]\nbase_model: {a: b}\n---\n", {}),
        ("---\nlicense:\n---\n", {}),
        (f"---\nlicense: {'x' * 201}\n---\n", {}),
        ("# X\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("---\n- license\n---\n", {}),
        ("---\nlicense: {\n---\n", {}),
        ("---\nlicense: !!python/object/apply:os.system [exit]\n---\n", {}),
        ("---\n" + "[" * 5000 + "\n---\n", {}),
        ("---\nlicense: mit\nx: " + "y" * 70_000 + "\n---\n", {}),  # ends beyond what is read
        (b"---\nlicense: mit\n---\n\xff\xfe", {"license": "mit"}),
    ],
)
def test_what_the_source_states_is_read_as_text_or_not_at_all(tmp_path, readme, expected):
    (tmp_path / "README.md").write_bytes(readme if isinstance(readme, bytes) else readme.encode())
    assert stated(tmp_path) == expected


def test_a_card_outside_the_directory_is_not_read(tmp_path):
    (tmp_path / "outside").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "model").mkdir()
    assert stated(tmp_path / "model") == {}
    (tmp_path / "model" / "README.md").symlink_to(tmp_path / "outside")
    assert stated(tmp_path / "model") == {}


def test_the_card_and_the_terminal_say_the_same_of_its_use_three_lines_each(tmp_path):
    text = card("rollout.max_completion_length=77")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    out = tmp_path / 'a "new" model'
    out.mkdir()
    (out / "README.md").write_text(text)
    printed = how_to_use(out)
    assert re.findall(r"^With (\w+):$", printed, re.M) == ["transformers", "vLLM"]
    for block in blocks:
        ast.parse(block)
        assert block.count("\n") == 3 and "77" in block
        for line in block.replace(PLACE, json.dumps(str(out))).splitlines():
            assert f"  {line}" in printed.splitlines()
    assert "path/to" not in printed
    assert how_to_use(tmp_path / "nowhere") == ""

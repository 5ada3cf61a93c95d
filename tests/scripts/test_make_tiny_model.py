"""Model directories made for a task: its words are tokens, and the committed configs fit them."""

import sys
from pathlib import Path

import make_tiny_model
import pytest

from gspo_jax.config.load import load_config
from gspo_jax.models.hf.weights import read_model_config
from gspo_jax.policy import load_problems
from gspo_jax.prompt.tokenizer import load_tokenizer
from gspo_jax.sft import solutions

ROOT = Path(__file__).parents[2]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["", *map(str, arguments)])
    make_tiny_model.main()


@pytest.mark.long
@pytest.mark.parametrize(
    ("task", "extra", "words"),
    [
        ("zebra", ["--phrases", "0.35"], ["solution", '": {"Name": "', " Farid", "Farid", "roses"]),
        (
            "reasoning",
            ["--phrases", "0.1"],
            ["\\boxed", " differs", " Yusuf", " stickers", "assistant"],
        ),
    ],
)
def test_the_committed_configs_fit_the_directory_that_their_script_makes(
    tmp_path, monkeypatch, task, extra, words
):
    sizes = "task.options.sizes={train: 600, val: 20, test: 20}"
    overrides = [f"model.path={tmp_path}", sizes]
    cold, trained = ROOT / "configs" / f"{task}_cold_start.yaml", ROOT / "configs" / f"{task}.yaml"
    monkeypatch.setattr(make_tiny_model, "SOME", 80)
    run(monkeypatch, cold, *overrides, *extra)
    tokenizer, shape = load_tokenizer(tmp_path), read_model_config(tmp_path)
    assert all(len(tokenizer.encode(word)) == 1 for word in words)
    assert tokenizer.encode("47") == tokenizer.encode("4") + tokenizer.encode("7")
    assert tokenizer.vocab_size <= shape.vocab_size < tokenizer.vocab_size + 8
    assert shape.vocab_size % 8 == 0
    for file in (cold, trained):
        config = load_config(file, overrides)
        problems = load_problems(config, tokenizer)
        assert problems.too_long == 0
        limit = config.rollout.max_completion_length
        assert problems.longest + limit <= shape.max_position_embeddings
        width = problems.longest + limit
        solutions(problems.get("train", range(600)), tokenizer, config, width)  # all of them fit


def test_the_trained_config_starts_from_the_cold_starts_export_and_asks_other_problems():
    for task in ("zebra", "reasoning"):
        cold = load_config(ROOT / "configs" / f"{task}_cold_start.yaml")
        trained = load_config(ROOT / "configs" / f"{task}.yaml")
        assert trained.model.path == f"{cold.run.dir}/{cold.run.name}/export"
        assert trained.task.seed != cold.task.seed
        same = ("name", "max_prompt_length")
        assert all(getattr(trained.task, key) == getattr(cold.task, key) for key in same)
        assert cold.eval.split == "val"  # the test problems are looked at once, by the run itself


@pytest.mark.parametrize("override", ["model.path=demo", "model.init=pretrained"])
def test_a_directory_that_has_weights_is_not_written(tmp_path, monkeypatch, override):
    config = ROOT / "configs" / "zebra_cold_start.yaml"
    with pytest.raises(SystemExit, match="and init=random, for the weights that are not there"):
        run(monkeypatch, config, f"model.path={tmp_path}", override)
    assert not list(tmp_path.iterdir())

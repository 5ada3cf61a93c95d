"""Supervised rows by hand, and a model that learns what it is shown."""

import json

import numpy as np
import pytest

from gspo_jax.batch import Problem
from gspo_jax.config.load import load_config
from gspo_jax.errors import DataError
from gspo_jax.prompt.tokenizer import load_tokenizer
from gspo_jax.sft import sft, solutions


def make(tiny_dir, *overrides):
    return load_config(
        None,
        [
            f"model.path={tiny_dir}",
            "task.max_prompt_length=24",
            "rollout.max_completion_length=10",
            "mesh.data=1",
            *overrides,
        ],
    )


def test_a_row_is_prompt_then_solution_then_eos_and_only_the_latter_two_are_learned(tiny_dir):
    tokenizer = load_tokenizer(tiny_dir)
    problem = Problem("x", "Say 7", "7", {"completion": "77"})
    batch = solutions([problem], tokenizer, make(tiny_dir), 32)
    prompt = tokenizer.encode_prompt("Say 7")
    answer = [*tokenizer.encode("77"), tokenizer.eos_ids[0]]
    assert batch.tokens[0].tolist() == [*prompt, *answer] + [tokenizer.pad_id] * (
        32 - len(prompt) - len(answer)
    )
    assert batch.mask[0].tolist() == [True] * 3 + [False] * 7
    assert (batch.prompt_length[0], batch.adv[0]) == (len(prompt), 1.0)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, 'problem x: no "completion" to learn from, got None'),
        ({"completion": "7" * 12}, "has 13 tokens; raise rollout.max_completion_length=10"),
    ],
)
def test_a_problem_without_a_fitting_solution_is_named(tiny_dir, columns, message):
    tokenizer = load_tokenizer(tiny_dir)
    with pytest.raises(DataError, match=message):
        solutions([Problem("x", "Say 7", "7", columns)], tokenizer, make(tiny_dir), 32)


@pytest.mark.long
def test_the_loss_falls_to_what_the_data_leaves_open(tiny_dir, tmp_path):
    """Two answers to one prompt, 3 : 1. No model can do better than their entropy per token."""
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": "Say", "answer": "x", "completion": c, "split": "train"} for c in "1112"]
    data.write_text("".join(json.dumps({**row, "id": i}) + "\n" for i, row in enumerate(rows)))
    result = sft(
        make(
            tiny_dir,
            f"task.path={data}",
            "sft.batch_size=4",
            "optim.learning_rate=1e-2",
            f"run.dir={tmp_path}",
            "run.name=sft",
            "run.steps=60",
        )
    )
    losses = [
        json.loads(line)["loss"]
        for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    # Two tokens each: a digit with entropy 0.5623 nats, and an EOS that is certain.
    floor = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / 2
    assert losses[0] > 3
    assert floor - 1e-3 < losses[-1] < floor + 0.05

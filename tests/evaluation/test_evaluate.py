"""Scores carry n and an interval, and truncated or blank answers are counted."""

from functools import partial

import jax
import numpy as np
import pytest

from gspo_jax.batch import Problem
from gspo_jax.evaluation.evaluate import evaluate, responses
from gspo_jax.prompt.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def measure(tiny_dir):
    from flax import nnx

    from gspo_jax.models import load_model

    view, tokenizer = nnx.split(load_model(tiny_dir)), load_tokenizer(tiny_dir)
    problems = [Problem(str(i), f"Say {i}", str(i)) for i in range(5)]

    def by_length(problems, texts, ids):
        reward = np.array([len(i) % 2 if len(i) > 1 else np.nan for i in ids], np.float32)
        return {"odd": reward}, reward, {}

    def run(function=evaluate, problems=problems, **options):
        asked = partial(function, view, tokenizer, problems, by_length)
        return asked(temperature=1.0, max_new_tokens=6, key=jax.random.key(3), **options)

    return run


@pytest.mark.long
def test_the_result_does_not_depend_on_how_many_prompts_run_at_a_time(measure):
    assert measure(samples=3, batch=2) == measure(samples=3, batch=5)


def test_a_model_that_rambles_is_reported_as_truncated_and_without_answer(measure):
    result = measure(samples=2, batch=5)
    assert result["eval/n"] == 5
    assert result["eval/truncated"] > 0.5
    assert result["eval/no_answer"] == 1.0
    assert 0 < result["eval/mean_length"] <= 6
    for name in ("eval/greedy", "eval/avg@2", "eval/pass@2", "eval/maj@2"):
        assert result[f"{name}_low"] <= result[name] <= result[f"{name}_high"]
    assert result["eval/maj@2"] == 0  # nobody could vote
    assert result["eval/pass@2"] >= result["eval/avg@2"]


def test_without_samples_only_greedy_is_measured(measure):
    names = set(measure(samples=0, batch=5))
    shares = ("eval/truncated", "eval/no_answer", "eval/not_scored", "eval/mean_length")
    assert names == {"eval/n", "eval/greedy", "eval/greedy_low", "eval/greedy_high", *shares}


def test_without_answers_to_compare_with_nothing_is_said_of_answers(measure):
    asked = [Problem(str(i), f"Say {i}") for i in range(5)]
    names = set(measure(samples=2, batch=5, problems=asked))
    assert {"eval/avg@2", "eval/pass@2", "eval/truncated"} <= names
    assert not [name for name in names if "maj" in name or "answer" in name]


def test_a_record_says_what_was_answered_and_how_it_was_scored(measure):
    made = list(measure(responses, samples=2, batch=2, answer_in=lambda p, text: text[:1] or None))
    assert [len(rows) for rows in made] == [4, 4, 2]
    everything = [record for rows in made for record in rows]
    assert [(r["index"], r["sample"]) for r in everything] == [
        (i, s) for i in range(5) for s in (1, 2)
    ]
    for r in everything:
        assert r["id"] == str(r["index"]) and r["answer"] == (r["text"][:1] or None)
        assert r["score"] == (r["tokens"] % 2 if r["tokens"] > 1 else None)
        assert r["truncated"] <= (r["tokens"] == 6)
    (greedy,) = measure(responses, samples=0, batch=5)
    assert [r["sample"] for r in greedy] == [0] * 5
    result = measure(samples=2, batch=2)
    assert result["eval/avg@2"] == pytest.approx(np.mean([r["score"] or 0 for r in everything]))
    assert result["eval/not_scored"] == np.mean([r["score"] is None for r in everything])
    assert result["eval/mean_length"] == np.mean([r["tokens"] for r in everything])


def test_what_is_begun_later_is_the_rest_of_the_same(measure):
    whole, rest = (list(measure(responses, samples=2, batch=2, start=n)) for n in (0, 2))
    assert rest == whole[1:]

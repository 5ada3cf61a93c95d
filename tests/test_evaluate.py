"""Scores carry n and an interval, and truncated or blank answers are counted."""

import jax
import numpy as np
import pytest

from gspo_jax.batch import Problem
from gspo_jax.evaluate import evaluate, mean_interval, wilson
from gspo_jax.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Independent values: Newcombe (1998), Table I, and the closed form at 0 of n: z²/(n + z²).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)],
)
def test_wilson_interval_against_published_values(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_samples_of_one_problem_do_not_count_as_independent():
    """Four problems, each always right or always wrong: n is 4, however many samples."""
    once = np.array([[1.0], [0.0], [1.0], [1.0]])
    often = np.repeat(once, 100, axis=1)
    assert mean_interval(often) == pytest.approx(mean_interval(once))
    # mean 0.75, sample deviation 0.5, half width 1.96 * 0.5 / 2 = 0.49
    assert mean_interval(once) == pytest.approx((0.26, 1.24), abs=1e-3)


@pytest.fixture(scope="module")
def measure(tiny_dir):
    from flax import nnx

    from gspo_jax.models import load_model

    view, tokenizer = nnx.split(load_model(tiny_dir)), load_tokenizer(tiny_dir)
    problems = [Problem(str(i), f"Say {i}") for i in range(5)]

    def by_length(problems, texts, ids):
        reward = np.array([len(i) % 2 for i in ids], np.float32)
        return {"odd": reward}, reward, {}

    def run(**options):
        return evaluate(
            view,
            tokenizer,
            problems,
            by_length,
            temperature=1.0,
            max_new_tokens=6,
            key=jax.random.key(3),
            **options,
        )

    return run


def test_the_result_does_not_depend_on_how_many_prompts_run_at_a_time(measure):
    assert measure(samples=3, batch=2) == measure(samples=3, batch=5)


def test_a_model_that_rambles_is_reported_as_truncated_and_without_answer(measure):
    result = measure(samples=2, batch=5)
    assert result["eval/n"] == 5
    assert result["eval/truncated"] > 0.5
    assert result["eval/no_answer"] == 1.0
    assert 0 < result["eval/mean_length"] <= 6
    for name in ("eval/greedy", "eval/avg@2"):
        assert result[f"{name}_low"] <= result[name] <= result[f"{name}_high"]


def test_without_samples_only_greedy_is_measured(measure):
    assert not any("avg@" in name for name in measure(samples=0, batch=5))

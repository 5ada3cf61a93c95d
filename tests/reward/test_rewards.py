"""Reward functions: every usual signature is served, and every wrong return value is named."""

import asyncio
import json  # noqa: F401  # installed: a test looks what becomes of it
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from gspo_jax.answers.verify import accuracy
from gspo_jax.batch import Problem
from gspo_jax.errors import ConfigError, DataError
from gspo_jax.numbers.tally import Average, Count
from gspo_jax.reward.rewards import load_rewards, score

# Two problems, two responses to each: row b answers problem b // 2.
PROBLEMS = [
    Problem("p0", "1+1?", "2", {"level": 3, "answer": "raw 2", "completion": "worked"}),
    Problem("p1", "2+2?", "4", {"level": 5, "answer": "raw 4", "extra_info": {"index": 9}}),
]
TEXTS = [r"\boxed{2}", r"\boxed{3}", r"\boxed{4}", "four"]
IDS = [[7, 8], [7], [9], []]
NAN = math.nan


def run(*functions, weights=None, problems=PROBLEMS, texts=TEXTS, **options):
    named = {getattr(f, "__name__", "f"): f for f in functions}
    return score(named, weights, problems, texts, IDS[: len(texts)], **options)


def returning(value):
    def f(completions):
        return value

    return f


def test_the_built_in_reward_scores_each_response_against_its_own_problem():
    rewards, reward, log = run(accuracy)
    np.testing.assert_array_equal(rewards["accuracy"], [1, 0, 1, 0])
    np.testing.assert_array_equal(reward, [1, 0, 1, 0])
    assert reward.dtype == np.float32
    assert log == {}


def test_trl_functions_get_columns_ids_and_loggers():
    def f(prompts, completions, completion_ids, level, answer, trainer_state, log_metric, **rest):
        assert prompts == ["1+1?", "1+1?", "2+2?", "2+2?"]
        assert completions == TEXTS
        assert level == [3, 3, 5, 5]
        assert answer == ["2", "2", "4", "4"]  # the gold answer, not its raw column
        assert rest["extra_info"] == [None, None, {"index": 9}, {"index": 9}]
        assert "completion" not in rest and "prompt" not in rest
        assert trainer_state.global_step == 12
        log_metric("share", 0.25)
        log_metric("share", 0.75)
        rest["log_extra"]("words", [1, 2, 3, 6])
        rest["log_extra"]("notes", ["a", "b", "c", "d"])
        return [float(len(ids)) for ids in completion_ids]

    rewards, _, log = run(f, step=12)
    np.testing.assert_array_equal(rewards["f"], [2, 1, 1, 0])
    assert log == {"share": Average(0.5, 8), "words": Average(3.0, 4)}


def test_trl_functions_get_only_what_they_name():
    def f(completions, level):
        return level

    np.testing.assert_array_equal(run(f)[0]["f"], [3, 3, 5, 5])


def test_chat_prompts_get_chat_completions():
    chat = [{"role": "user", "content": "Hi"}]

    def f(prompts, completions):
        assert prompts == [chat]
        return [float(completions[0] == [{"role": "assistant", "content": "Hello"}])]

    assert run(f, problems=[Problem("p", chat)], texts=["Hello"])[1] == [1.0]


def test_none_means_not_scored_and_counts_in_no_sum():
    def some(completions):
        return [1.0, None, 4.0, None]

    def other(completions):
        return [2.0, 8.0, None, None]

    rewards, reward, _ = run(some, other, weights=[1.0, 0.5])
    np.testing.assert_array_equal(rewards["some"], [1, NAN, 4, NAN])
    np.testing.assert_array_equal(rewards["other"], [2, 8, NAN, NAN])
    # 1 + 0.5 * 2, then 0.5 * 8 alone, then 4 alone, then nothing
    np.testing.assert_array_equal(reward, [2, 4, 4, NAN])


def test_weights_are_one_each_by_default():
    def a(completions):
        return [1, 2, 3, 4]

    def b(completions):
        return [10, 20, 30, 40]

    np.testing.assert_array_equal(run(a, b)[1], [11, 22, 33, 44])


def test_async_functions_are_awaited():
    async def f(completions, **columns):
        return [1.0, 2.0, 3.0, 4.0]

    np.testing.assert_array_equal(run(f)[1], [1, 2, 3, 4])


def test_async_functions_work_where_a_loop_is_already_running():
    started = []

    async def f(completion, answer):
        started.append(completion)
        await asyncio.sleep(0)
        # By now every other response has been started too: they are awaited together.
        return float(len(started))

    async def notebook():
        return run(f)

    np.testing.assert_array_equal(asyncio.run(notebook())[1], [4, 4, 4, 4])


def test_verl_functions_are_called_once_per_response():
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        assert data_source is None
        assert extra_info == (None if ground_truth == "2" else {"index": 9})
        return {"score": float(ground_truth in solution_str), "acc": len(solution_str)}

    rewards, _, log = run(compute_score)
    np.testing.assert_array_equal(rewards["compute_score"], [1, 0, 1, 0])
    assert log == {"rewards/compute_score/acc": Average(7.75, 4)}  # (9 + 9 + 9 + 4) / 4


def test_verifiers_functions_are_called_once_per_response():
    def f(completion, answer, level):
        return level if answer in completion else None

    np.testing.assert_array_equal(run(f)[0]["f"], [3, NAN, 5, NAN])


def test_reasoning_gym_functions_get_the_extracted_answer():
    seen = []

    def score_answer(answer, entry):
        seen.append((answer, entry["question"], entry["answer"], entry["metadata"]))
        return float(answer == entry["answer"])

    texts = ["<answer>1</answer> no, <answer> 2 </answer>", r"\boxed{2}", "4", "<answer>4"]
    rewards, _, _ = run(score_answer, texts=texts)
    assert seen == [("2", "1+1?", "2", {}), ("2", "1+1?", "2", {})] + [(None, "2+2?", "4", {})] * 2
    np.testing.assert_array_equal(rewards["score_answer"], [1, 1, 0, 0])


@pytest.mark.parametrize(
    "values",
    [
        np.array([1.0, 2, 3, 4]),
        np.array([1, 2, 3, 4], np.int32),
        jnp.array([1.0, 2, 3, 4]),
        (1, 2.0, np.float32(3), np.int64(4)),
    ],
    ids=["float64", "int32", "jax", "mixed"],
)
def test_any_sequence_of_numbers_is_accepted(values):
    np.testing.assert_array_equal(run(returning(values))[1], [1, 2, 3, 4])


@pytest.mark.parametrize(
    "bad",
    [True, np.True_, "1.0", NAN, math.inf, -math.inf, np.float32("nan"), 1e39, [1.0], {}, 1j],
    ids=repr,
)
def test_a_value_that_is_no_finite_number_names_function_and_response(bad):
    with pytest.raises(DataError, match=r"^reward f returned .* for response 2 of 4 .*p1") as e:
        run(returning([1.0, None, bad, 0.0]))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("values", [None, 1.0, "1111", {"a": 1}, np.float32(1)], ids=repr)
def test_what_is_no_list_is_refused(values):
    with pytest.raises(DataError, match=r"^reward f returned .*, wanted a list of 4 numbers"):
        run(returning(values))


@pytest.mark.parametrize("n", [0, 2, 5])
def test_a_wrong_length_is_refused(n):
    with pytest.raises(DataError, match=f"^reward f returned {n} numbers for 4 responses"):
        run(returning([1.0] * n))


def test_verl_results_without_a_score_are_refused():
    def f(solution_str, ground_truth):
        return {"acc": 1.0}

    with pytest.raises(DataError, match="reward f returned \"no 'score'\""):
        run(f)


def batched(completions):
    return [1 / 0]


def single(completion):
    return 1.0 if "2" in completion else 1 / 0


async def waiting(completion):
    return single(completion)


@pytest.mark.parametrize("function, rows", [(batched, 4), (single, 3), (waiting, 3)])
def test_a_function_that_raises_is_named_with_its_error_and_count(function, rows):
    name = function.__name__
    message = rf"^reward {name} raised ZeroDivisionError: .* \(on {rows} of 4 responses\)\.$"
    with pytest.raises(DataError, match=message) as caught:
        run(function)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)  # for --debug
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "function, expected", [(batched, [0, 0, 0, 0]), (single, [1, 0, 0, 0]), (waiting, [1, 0, 0, 0])]
)
def test_unless_strict_an_error_scores_0_and_is_counted(function, expected, caplog):
    _, reward, log = run(function, errors="zero")
    np.testing.assert_array_equal(reward, expected)
    assert log == {f"rewards/{function.__name__}/errors": Count(4 - sum(expected))}
    assert "ZeroDivisionError" in caplog.text  # the first traceback


@pytest.mark.parametrize(
    "bad", [NAN, True, math.inf, "1.0", 10**400, {"acc": 1.0}, None, 0.5], ids=lambda x: repr(x)[:9]
)
def test_one_rule_for_every_value_that_is_no_score_and_none_for_those_that_are(bad):
    """Response 2 gets it; `other` scores all four, so that a sum without `f` would show."""
    fails = bad is not None and bad != 0.5

    def f(completion):
        return bad if completion == TEXTS[2] else 1.0

    def other(completions):
        return [2.0] * 4

    log = {"rewards/f/errors": Count(1)} if fails else {}
    if isinstance(bad, dict):
        log["rewards/f/acc"] = Average(1.0, 1)  # what it returned beside the score that is missing
    value = NAN if bad is None else 0.0 if fails else bad
    rewards, reward, logged = run(f, other, errors="zero")
    np.testing.assert_array_equal(rewards["f"], [1, 1, value, 1])
    np.testing.assert_array_equal(reward, [3, 3, np.nansum([value, 2.0]), 3])
    assert logged == log
    rewards, reward, logged = run(f, other, errors="unscored")
    np.testing.assert_array_equal(rewards["f"], [1, 1, NAN if fails else value, 1])
    np.testing.assert_array_equal(reward, [3, 3, NAN if fails else np.nansum([value, 2.0]), 3])
    assert logged == log
    if fails:
        with pytest.raises(DataError, match=r"^reward f returned .* \(on 1 of 4 responses\)\.$"):
            run(f, other, errors="stop")


def breaks_off():
    yield 1.0
    raise KeyError("gold")


def needs_another_column(completions, difficulty):
    raise AssertionError("the data has no such column")


@pytest.mark.parametrize(
    "function",
    [returning(1.0), returning([1.0] * 3), returning(breaks_off()), needs_another_column, batched],
    ids=["no list", "wrong length", "a generator that raises", "no such column", "raises"],
)
def test_the_same_rule_for_what_fails_as_a_whole(function):
    name = function.__name__
    _, reward, log = run(function, accuracy, errors="zero")
    np.testing.assert_array_equal(reward, [1, 0, 1, 0])  # accuracy's alone
    assert log == {f"rewards/{name}/errors": Count(4)}
    _, reward, log = run(function, accuracy, errors="unscored")
    np.testing.assert_array_equal(reward, [NAN] * 4)
    assert log == {f"rewards/{name}/errors": Count(4)}
    with pytest.raises(DataError, match=rf"^reward {name} .* \(on 4 of 4 responses\)\.$"):
        run(function, accuracy, errors="stop")


def test_a_weighted_sum_of_finite_rewards_is_finite():
    largest = float(np.finfo(np.float32).max)
    _, reward, _ = run(returning([largest, -largest, 1.0, 0.0]), weights=[4.0])
    np.testing.assert_array_equal(reward, np.float32([largest, -largest, 4.0, 0.0]))


def test_a_parameter_that_the_data_lacks_is_named():
    def f(completions, difficulty):
        return [1.0] * 4

    with pytest.raises(DataError, match=r"takes 'difficulty', .*\['answer', .*'level'\]"):
        run(f)


def test_a_signature_that_fits_no_convention_is_refused():
    def f(x, y):
        return 1.0

    with pytest.raises(DataError, match=r"reward f takes \['x', 'y'\]; it must take"):
        load_rewards([f])


def test_weights_must_match_and_be_finite():
    with pytest.raises(ConfigError, match="2 weights for 1 reward functions"):
        run(accuracy, weights=[1.0, 2.0])
    with pytest.raises(ConfigError, match="must be finite"):
        run(accuracy, weights=[NAN])
    with pytest.raises(ConfigError, match="0 reward functions"):
        score({}, None, PROBLEMS, TEXTS, IDS)


def test_functions_are_loaded_from_modules_and_files(tmp_path, monkeypatch):
    (tmp_path / "helper_of_rewards.py").write_text("BONUS = 0.5\n")
    (tmp_path / "mine.py").write_text(
        "from helper_of_rewards import BONUS\n"
        "def accuracy(completions, **kw):\n    return [BONUS for _ in completions]\n"
        "class Longer:\n    def __call__(self, completions):\n"
        "        return [len(c) for c in completions]\n"
        "longer = Longer()\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    functions = load_rewards(
        [
            "gspo_jax.answers.verify:accuracy",
            f"{tmp_path}/mine.py:accuracy",
            f"{tmp_path}/mine.py:longer",
        ]
    )
    assert list(functions) == ["accuracy", "accuracy_2", "Longer"]
    rewards, _, _ = score(functions, None, PROBLEMS, TEXTS, IDS)
    np.testing.assert_array_equal(rewards["accuracy_2"], [0.5] * 4)
    np.testing.assert_array_equal(rewards["Longer"], [9, 9, 9, 4])


def test_a_reward_file_named_like_an_installed_module_takes_nothings_place(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("def f(completions):\n    return [1.0] * 4\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    installed = sys.modules["json"]
    np.testing.assert_array_equal(
        run(*load_rewards([f"{tmp_path}/json.py:f"]).values())[1], [1] * 4
    )
    assert sys.modules["json"] is installed


def test_modules_of_the_current_directory_are_found(tmp_path, monkeypatch):
    (tmp_path / "rewards_lying_here.py").write_text("def f(completions):\n    return [0]\n")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.chdir(tmp_path)
    assert list(load_rewards(["rewards_lying_here:f"])) == ["f"]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("nothing.py:f", r"reward nothing\.py:f: no such file"),
        ("no_such_module_here:f", r"raised ModuleNotFoundError: No module named"),
        ("gspo_jax.answers.verify:acuracy", r"Did you mean gspo_jax\.answers\.verify:accuracy\?"),
        ("gspo_jax.answers.verify:MAX_TEXT", r"got int, wanted a function"),
        ("{dir}/broken.py:f", r"importing it raised SyntaxError"),
        ("{dir}/raising.py:f", r"importing it raised KeyError: 'x'"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(tmp_path, spec, message):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "raising.py").write_text("{}['x']\n")
    with pytest.raises(DataError, match=message) as caught:
        load_rewards([spec.format(dir=tmp_path)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["f", ":f", "file.py:", ""])
def test_a_spec_that_is_neither_form_is_refused(spec):
    with pytest.raises(ConfigError, match=r"wanted module:function or file\.py:function"):
        load_rewards([spec])

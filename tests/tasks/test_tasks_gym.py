"""reasoning-gym's problems: our comparison of answers, our splits, and only what is on the list."""

import importlib.util
import json
from fractions import Fraction

import numpy as np
import pytest

from gspo_jax.errors import ConfigError
from gspo_jax.reward.rewards import score
from gspo_jax.tasks import load_task
from gspo_jax.tasks.made import gym
from gspo_jax.tasks.made.gym import COMPARED, DATASETS, JUDGED, same, words

installed = importlib.util.find_spec("reasoning_gym") is not None
# Importing it takes seconds, and it is no package of `make test`.
needs_gym = [
    pytest.mark.parity,
    pytest.mark.skipif(not installed, reason="pip install 'gspo_jax[gym]'"),
]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("12", "12.0"),
        ("-1,234", "-1234"),
        (r"\frac{5}{18}", "5/18"),
        ("arnold.", "Arnold"),
        (r"\text{Yes}", "Yes"),
        ("[-69, 1.50, 7]", "['-69', '1.5', '7']"),
        ("1 2 3\n4 5 6", "1 2 3 \n4 5 6"),
        (r"A\# \#B", "A# #B"),
        ("3 days, 04:05", "3 days, 04:05"),
        ("apple,Pear, fig", "apple, pear, fig"),
        ("Zoe is a knave and Al is a knight", "Zoe is a knave, and Al is a knight."),
    ],
)
def test_answers_of_the_same_words_and_numbers_are_the_same(answer, gold):
    assert same(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1 23", "12 3"),
        ("1 2 3", "123"),
        ("4 5 6 1 2 3", "1 2 3 4 5 6"),
        ("15", "5"),
        ("the answer is 5", "5"),
        ("5 or 6", "5"),
        ("Yes No", "Yes"),
        ("nan", "5"),
        ("", ""),
        ("[]", "[]"),
        ("0.33", "1/3"),
        ("__import__('os').system('touch x')", "5"),
    ],
)
def test_other_answers_are_not(answer, gold):
    assert not same(answer, gold)


def test_words_are_fractions_where_they_are_numbers():
    assert words("[1,234, 0.5] 'Ab'") == [Fraction(1234), Fraction(1, 2), "ab"]


def test_the_list_has_no_dataset_whose_checker_evaluates_or_pays_for_parts():
    """Those of the probes: code in the answer, endless work, "nan", no answer to compare with."""
    refused = "n_queens binary_matrix spiral_matrix string_insertion countdown puzzle24 "
    refused += "simple_integration intermediate_integration polynomial_multiplication "
    refused += "complex_arithmetic game_of_life_halting boxnet graph_color propositional_logic "
    refused += "rubiks_cube rush_hour arc_agi rearc codeio composite acre gsm_symbolic"
    assert set(refused.split()).isdisjoint(DATASETS)
    assert set(COMPARED).isdisjoint(JUDGED) and len(DATASETS) == 38


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(gym, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"reasoning-gym: pip install 'gspo_jax\[gym\]'\.$"):
        load_task("gym")


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ("n_queens", r"datasets=\{'n_queens': 1\}: wanted some of \['ab', 'base_conversion'"),
        ({"lcm": -1}, "weights must be numbers"),
        ([], "wanted some of"),
    ],
)
def test_other_datasets_are_refused_with_the_list(datasets, message, monkeypatch):
    monkeypatch.setattr(gym, "find_spec", lambda name: True)
    with pytest.raises(ConfigError, match=message):
        load_task("gym", datasets=datasets)


class TestInstalled:
    """With the package itself."""

    pytestmark = needs_gym

    def test_reference_answers_score_1_and_nothing_else_does(self):
        sizes = {"train": 2, "val": 0, "test": 0}
        for name in DATASETS:
            given = {name: {"weight": 1, **SMALL.get(name, {})}}
            task = load_task("gym", datasets=given, sizes=sizes)
            for i in range(2):
                problem = task.problem("train", i)
                gold, question = problem.answer, problem.prompt
                assert question.endswith("Give the final answer in \\boxed{}.")
                right = problem.columns["completion"]
                texts = [right, f"So {right}.", question, gold, "", r"\boxed{}", r"\boxed{nan}"]
                texts += [r"\boxed{5, 6, 7, 8}", rf"\boxed{{{gold} {gold}}}"]
                texts += [rf"{right} \boxed{{nothing}}", rf"\boxed{{I think it is {gold} or not}}"]
                found = score({"gym": task.reward}, None, [problem], texts, [[1]] * len(texts))[1]
                assert found.tolist() == [1, 1] + [0] * (len(texts) - 2), (name, question, gold)

    def test_splits_are_disjoint_whatever_the_seed_and_made_again_the_same(self):
        sizes = {"train": 60, "val": 10, "test": 20}
        given = {"leg_counting": 1, "lcm": {"weight": 2, "max_value": 30}}
        before = np.random.get_state()[1].copy()
        tasks = [load_task("gym", seed=s, datasets=given, sizes=sizes) for s in (0, 0, 1)]
        assert (np.random.get_state()[1] == before).all()
        prompts = [
            {split: [t.problem(split, i).prompt for i in range(n)] for split, n in sizes.items()}
            for t in tasks
        ]
        assert prompts[0] == prompts[1] and tasks[0].fingerprint == tasks[1].fingerprint
        assert prompts[0]["train"] != prompts[2]["train"]
        assert prompts[0]["test"] == prompts[2]["test"]
        train = set(prompts[0]["train"]) | set(prompts[2]["train"])
        assert train.isdisjoint(prompts[0]["val"] + prompts[0]["test"])
        names = [tasks[0].problem("train", i).columns["dataset"] for i in range(60)]
        assert 25 <= names.count("lcm") <= 55  # two thirds

    def test_another_right_answer_is_found_by_the_judge(self):
        sizes = {"train": 3, "val": 0, "test": 0}
        task = load_task("gym", datasets="palindrome_partitioning", sizes=sizes)
        for i in range(3):
            problem = task.problem("train", i)
            parts = json.loads(problem.answer)
            answers = [parts[::-1], parts[1:], [*parts, ["x"]], []]
            texts = [rf"\boxed{{{json.dumps(answer)}}}" for answer in answers]
            found = score({"gym": task.reward}, None, [problem], texts, [[1]] * 4)[1]
            assert found.tolist() == [1, 0, 0, 0], (problem.answer, answers)

    def test_settings_of_a_dataset_are_checked(self):
        with pytest.raises(ConfigError, match=r"task\.options\.datasets\.lcm: .*max_valu"):
            load_task("gym", datasets={"lcm": {"max_valu": 30}})
        with pytest.raises(ConfigError, match=r"datasets\.lcm\.seed: is the task's own"):
            load_task("gym", datasets={"lcm": {"seed": 30}})


SMALL = {
    "zebra_puzzles": {"num_people": 3, "num_characteristics": 2},
    "futoshiki": {"max_board_size": 4},
}

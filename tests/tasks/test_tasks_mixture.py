"""Mixtures: the shares asked for, in every stretch, and each response scored by its own task."""

import json
from collections import Counter

import pytest

from gspo_jax.batch import Problem
from gspo_jax.config.load import load_config, model_dir, packaged_config
from gspo_jax.errors import ConfigError
from gspo_jax.policy import load_problems
from gspo_jax.prompt.tokenizer import load_tokenizer
from gspo_jax.reward import rewards
from gspo_jax.tasks import Task, load_task, order
from gspo_jax.tasks.mixture import Part, mix, parsed_parts


def part(name, weight, train, test=0, warnings=()):
    """A task whose reward is 1 for its own name, with a column that only it has."""

    def reward(completions, **columns):
        assert set(columns[f"only_{name}"]) == {name}
        return [float(text == name) for text in completions]

    def problem(split, i):
        return Problem(f"{i}", f"{name} {split} {i}", name, {f"only_{name}": name})

    size = {"train": train, "val": 0, "test": test}
    read = lambda problem, text: f"{name} reads {text}"  # noqa: E731
    return Part(Task(name, size, problem, reward, tuple(warnings), name, read), weight)


def names(task, split="train"):
    return [task.problem(split, i).columns["task"] for i in range(task.size[split])]


def test_shares_are_kept_until_one_part_runs_out():
    # 1 : 3 of 10 and 12 problems: the second one is used up after 12, the first after 4.
    task = mix({"a": part("a", 1, 10), "b": part("b", 3, 12)})
    assert Counter(names(task)) == {"a": 4, "b": 12}
    # In every stretch of 4, one of a and three of b.
    assert all(names(task)[i : i + 4].count("a") == 1 for i in range(0, 16, 4))
    prompts = [task.problem("train", i).prompt for i in range(16)]
    assert sorted(prompts) == sorted(
        [f"a train {i}" for i in range(4)] + [f"b train {i}" for i in range(12)]
    )


def test_equal_parts_alternate_and_thirds_do_not_round_down():
    task = mix({"a": part("a", 1, 3), "b": part("b", 1, 9), "c": part("c", 1, 3)})
    assert names(task) == ["a", "b", "c"] * 3


def test_a_part_without_problems_in_a_split_has_no_share_in_it():
    task = mix({"a": part("a", 1, 5, test=4), "b": part("b", 1, 5)})
    assert task.size == {"train": 10, "val": 0, "test": 4}
    assert names(task, "test") == ["a"] * 4


def test_sizes_cut_a_mixture_short_in_the_same_shares():
    task = mix({"a": part("a", 1, 100), "b": part("b", 3, 300)}, sizes={"train": 8})
    assert Counter(names(task)) == {"a": 2, "b": 6}


def test_ids_say_which_task_and_are_unique():
    task = mix({"a": part("a", 1, 3), "b": part("b", 1, 3)})
    ids = [task.problem("train", i).id for i in range(6)]
    assert sorted(ids) == ["a/0", "a/1", "a/2", "b/0", "b/1", "b/2"]


def test_every_response_is_scored_by_its_own_task_with_its_own_columns():
    task = mix({"a": part("a", 1, 3), "b": part("b", 2, 6)})
    problems = [task.problem("train", i) for i in range(9)]
    texts = [text for problem in problems for text in (problem.answer, "a", "b", "")]
    functions = rewards.load_rewards([task.reward])
    _, reward, _ = rewards.score(functions, None, problems, texts, [[]] * len(texts))
    wanted = [[1, p.answer == "a", p.answer == "b", 0] for p in problems]
    assert reward.reshape(9, 4).tolist() == wanted
    assert task.answer_in(problems[0], "x") == f"{problems[0].answer} reads x"


def test_warnings_name_the_part_and_the_fingerprint_sees_the_shares():
    parts = {"a": part("a", 1, 4, warnings=["careful"]), "b": part("b", 1, 4)}
    task = mix(parts)
    assert task.warnings == ("a: careful",)
    assert task.fingerprint == mix(parts).fingerprint
    assert task.fingerprint != mix(parts | {"b": part("b", 2, 4)}).fingerprint
    assert task.fingerprint != mix(parts | {"b": part("c", 1, 4)}).fingerprint


def test_tasks_of_the_library_and_data_are_mixed_by_name(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"q{i}", "answer": i, "split": "train"} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    small = {"sizes": {"train": 20, "val": 5, "test": 5}}
    task = load_task(
        "mixture",
        seed=3,
        tasks={
            "knights": {"weight": 2, "options": small},
            "sums": {"name": "arithmetic", "options": small},
            "mine": {"path": str(path), "weight": 1},
        },
    )
    assert task.size == {"train": 40, "val": 7, "test": 7}
    assert Counter(names(task)) == {"knights": 20, "sums": 10, "mine": 10}
    alone = load_task("knights", seed=3, **small)
    mine = [p for p in map(lambda i: task.problem("train", i), range(40)) if "knights/" in p.id]
    assert [p.prompt for p in mine] == [alone.problem("train", i).prompt for i in range(20)]


@pytest.mark.parametrize(
    "tasks, message",
    [
        (None, "wanted {name: weight}"),
        ({}, "wanted {name: weight}"),
        ({"arithmetic": 0}, "weight=0: wanted a number above 0"),
        ({"arithmetic": "1"}, "weight=1: wanted a number above 0"),
        ({"arithmetic": {"wieght": 1}}, r"got \['wieght'\], wanted some of weight"),
        ({"no_such": 1}, r"task\.options\.tasks\.no_such\.name=no_such: no such task"),
        ({"mixture": 1}, "cannot hold another one"),
        (
            {"arithmetic": {"options": {"slipp": 1}}},
            r"tasks\.arithmetic\.options\.slipp: arithmetic has no such option\. Did you mean slip",
        ),
        ({"knights": {"path": "x.jsonl", "name": "knights"}}, "one of the two"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(tasks, message):
    with pytest.raises(ConfigError, match=message):
        load_task("mixture", tasks=tasks)


def test_a_name_alone_is_the_task_of_that_name():
    assert parsed_parts({"arithmetic": 2}) == {"arithmetic": {"weight": 2, "name": "arithmetic"}}


@pytest.fixture
def problems(tmp_path):
    """Of the demo's model, with overrides; two files of sums, one of them by hard ones."""
    for level in ("easy", "hard"):
        rows = [
            {
                "prompt": f"What is {a}+11-10?",
                "answer": a + 1,
                "difficulty": level,
                "split": "train",
            }
            for a in (range(10, 20) if level == "easy" else range(80, 90))
        ]
        (tmp_path / f"{level}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def problems(*overrides):
        text = f"{{easy: {{path: {tmp_path}/easy.jsonl}}, hard: {{path: {tmp_path}/hard.jsonl}}}}"
        given = ["task.name=mixture", f"task.options.tasks={text}", *overrides]
        config = load_config(packaged_config("demo.yaml"), given)
        return load_problems(config, load_tokenizer(model_dir(config)))

    return problems


def test_a_mixture_and_a_curriculum_are_set_in_the_config(problems):
    found = problems("task.curriculum={easy: 0, hard: 0.5}")
    assert found.task.size["train"] == 20

    def levels(start, count):
        visited = found.visit(start, count, total=40, seed=1)
        return [p.columns["difficulty"] for p in found.get("train", visited)]

    assert levels(0, 20) == ["easy"] * 20
    assert Counter(levels(20, 20)) == {"easy": 10, "hard": 10}
    assert found.visit(5, 30, total=40, seed=1)[10:20] == found.visit(15, 10, total=40, seed=1)
    assert problems().visit(3, 9, total=40, seed=1) == order(20, 3, 9, seed=1)


def test_a_curriculum_that_cannot_be_is_refused_at_the_start(problems):
    for overrides, message in [
        ("task.curriculum={easy: 0.1}", "some level must start at 0"),
        ("task.curriculum={easy: 0, hard: 1}", r"task\.curriculum\.hard=1: the share of the run"),
        ("task.curriculum={easy: 0, hrad: 0.5}", r"task\.curriculum\.hrad: no such level"),
    ]:
        with pytest.raises(ConfigError, match=message):
            problems(overrides)

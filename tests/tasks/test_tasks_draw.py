"""Made-up problems: draws that no version changes, splits that cannot overlap, honest ends."""

from collections import Counter
from random import Random

import pytest

from gspo_jax.answers.verify import accuracy
from gspo_jax.batch import Problem
from gspo_jax.errors import ConfigError
from gspo_jax.tasks import draw, load_task
from gspo_jax.tasks.draw import (
    Drawn,
    between,
    chosen_weights,
    made_up,
    pick,
    shuffled,
    split_of,
    weighted,
)

SMALL = {"train": 40, "val": 8, "test": 12}


class FromRandomAlone(Random):
    """Refuses every method whose numbers Python may change between versions."""

    def _refuse(self, *args, **kwargs):
        raise AssertionError("only random() is the same in every version of Python")

    randrange = randint = choice = choices = shuffle = sample = uniform = _refuse
    getrandbits = randbytes = betavariate = gauss = _refuse


def test_draws_are_the_same_in_every_version():
    rng = FromRandomAlone("a text")
    drawn = [between(rng, 1, 6) for _ in range(6)], pick(rng, "abcdef"), shuffled(rng, range(6))
    # Random.random() is specified; were these numbers to change, so would every task.
    assert drawn == ([3, 3, 3, 2, 3, 2], "f", [3, 1, 5, 2, 4, 0])


@pytest.mark.parametrize("name", ["zebra-synth", "reasoning", "countdown", "knights"])
def test_tasks_draw_from_nothing_else(name, monkeypatch):
    expected = load_task(name, sizes=SMALL)
    monkeypatch.setattr(draw, "Random", FromRandomAlone)
    assert load_task(name, sizes=SMALL).fingerprint == expected.fingerprint


def test_between_and_pick_reach_both_ends_and_shuffled_every_order():
    rng = Random(0)
    assert {between(rng, -1, 1) for _ in range(100)} == {-1, 0, 1}
    assert {pick(rng, "ab") for _ in range(50)} == {"a", "b"}
    orders = Counter(tuple(shuffled(rng, "abc")) for _ in range(6000))
    # Six orders of 1000 each; 5 standard errors are 5 * sqrt(6000 * 1/6 * 5/6) = 144.
    assert len(orders) == 6 and all(abs(n - 1000) < 144 for n in orders.values())
    assert len(shuffled(rng, "abcdef", 2)) == 2


def test_weights_are_shares():
    rng = Random(0)
    drawn = Counter(weighted(rng, {"a": 1, "never": 0, "b": 3}) for _ in range(4000))
    # 5 standard errors of 1000 in 4000: 5 * sqrt(4000 * 1/4 * 3/4) = 137.
    assert abs(drawn["a"] - 1000) < 137 and drawn["never"] == 0


@pytest.mark.parametrize(
    "given",
    [[], "easy", ["hard", "harder"], {"easy": -1}, {"easy": 0}, {"easy": "1"}, {"hard": True}],
)
def test_weights_that_are_none_are_refused(given):
    with pytest.raises(ConfigError, match="levels="):
        chosen_weights("levels", given, ["easy", "hard"])


def coin(rng, split):
    """Ten problems in all."""
    n = str(between(rng, 0, 9))
    return Drawn(n, n, Problem(n, f"What is {n}?", n))


def test_a_split_with_too_few_problems_says_how_many_there_are(monkeypatch):
    monkeypatch.setattr(draw, "PATIENCE", 300)
    train = sum(split_of(str(n)) == "train" for n in range(10))
    size = {"train": train, "val": 0, "test": 0}
    assert made_up("coin", size, coin, accuracy, seed=0).size == size
    with pytest.raises(
        ConfigError, match=rf"sizes\.train={train + 1}: coin .* no more than {train}"
    ):
        made_up("coin", size | {"train": train + 1}, coin, accuracy, seed=0)


MADE_UP = ["reasoning", "countdown", pytest.param("knights", marks=pytest.mark.long)]


@pytest.mark.parametrize("name", MADE_UP)
def test_splits_are_disjoint_and_hold_no_problem_twice(name):
    task = load_task(name, sizes={"train": 400, "val": 60, "test": 90})
    prompts = {s: [task.problem(s, i).prompt for i in range(n)] for s, n in task.size.items()}
    everything = [prompt for some in prompts.values() for prompt in some]
    assert len(set(everything)) == len(everything) == 550
    ids = [task.problem(s, i).id for s, n in task.size.items() for i in range(n)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", MADE_UP)
def test_no_seed_can_train_on_a_held_out_problem(name, monkeypatch):
    structures = []
    real = draw.split_of
    monkeypatch.setattr(
        draw, "split_of", lambda key: structures.append((key, real(key))) or real(key)
    )
    one = load_task(name, seed=1, sizes=SMALL)
    two = load_task(name, seed=2, sizes=SMALL)
    sides = dict(structures)
    assert all(real(key) == side for key, side in sides.items())

    def every(task, split):
        return [task.problem(split, i) for i in range(SMALL[split])]

    assert every(one, "test") == every(two, "test") and every(one, "val") == every(two, "val")
    assert every(one, "train") != every(two, "train")
    larger = load_task(name, seed=1, sizes=SMALL | {"train": 50})
    assert [larger.problem("train", i) for i in range(40)] == every(one, "train")


@pytest.mark.parametrize("name", MADE_UP)
def test_every_level_is_in_every_split_and_can_be_asked_for_alone(name):
    task = load_task(name, sizes={"train": 60, "val": 60, "test": 60})
    for split, n in task.size.items():
        levels = {task.problem(split, i).columns["difficulty"] for i in range(n)}
        assert levels == {"easy", "medium", "hard"}
    task = load_task(name, levels=["hard"], sizes={"train": 20, "val": 5, "test": 5})
    assert {task.problem("train", i).columns["difficulty"] for i in range(20)} == {"hard"}
    with pytest.raises(ConfigError, match=r"levels=\['impossible'\]: wanted some of"):
        load_task(name, levels=["impossible"])


@pytest.mark.parametrize("name", MADE_UP)
def test_reference_answers_earn_the_reward_and_nothing_else_does(name):
    """Blank, echo, the answer out of its box, all that is on offer, cue words: 0."""
    task = load_task(name, sizes={"train": 0, "val": 0, "test": 90})
    for i in range(90):
        p = task.problem("test", i)
        texts = {
            p.columns["completion"]: 1.0,
            rf"\boxed{{{p.answer}}}": 1.0,
            "": 0.0,
            p.prompt: 0.0,
            p.answer: 0.0,
            f"The final answer is {p.answer}.": 0.0,
            rf"<think>\boxed{{{p.answer}}}": 0.0,
            rf"\boxed{{{p.answer}}} or \boxed{{{p.answer} or something else}}": 0.0,
            r"\boxed{}": 0.0,
            r"\boxed{nan}": 0.0,
            r"\boxed{None}": 0.0,
            rf"\boxed{{{p.prompt.replace('{', '').replace('}', '')}}}": 0.0,
            r"Let me think step by step. Therefore, the answer is \boxed{the answer}": 0.0,
            r"\boxed{knight, knave, knight, knave, 1, 2, 3, red, blue, green}": 0.0,
        }
        columns = {k: [v] * len(texts) for k, v in p.columns.items()}
        columns["answer"] = [p.answer] * len(texts)
        given = {"prompts": [p.prompt] * len(texts), "completions": list(texts)}
        assert task.reward(**given, **columns) == list(texts.values()), p
        assert task.answer_in(p, p.columns["completion"]) is not None
        assert task.answer_in(p, p.prompt) is None

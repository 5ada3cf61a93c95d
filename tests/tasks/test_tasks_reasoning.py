"""The four types: worked out again from the English alone, and exactly one answer each."""

import re
from fractions import Fraction
from itertools import pairwise, permutations
from random import Random

import pytest

from gspo_jax.answers.verify import check_list
from gspo_jax.errors import ConfigError
from gspo_jax.tasks.made.reasoning import MIX, TYPES, reasoning_mix

COUNT = 150  # problems of each type and level


def some(kind, level):
    return [TYPES[kind][level](Random(f"{kind} {level} {i}")) for i in range(COUNT)]


def numbers(text):
    return [int(n) for n in re.findall(r"-?\d+", text)]


@pytest.mark.parametrize("level", MIX)
def test_chains_are_worth_what_they_say(level):
    for item in some("arithmetic_chain", level):
        expression = re.fullmatch(r"What is ([-+*/() \d]+)\?", item.query)[1]
        exact = re.sub(r"\d+", lambda n: f"Fraction({n[0]})", expression)
        assert eval(exact) == int(item.answer)


@pytest.mark.parametrize("level", MIX)
def test_sequences_go_on_in_one_way_under_their_rule(level):
    """Every way to read the rule, over all whole numbers, leads to the same next number."""
    for item in some("pattern_completion", level):
        terms = numbers(item.query)
        steps = {y - x for x, y in pairwise(terms)}
        if level == "easy":
            (step,) = steps
            assert int(item.answer) == terms[-1] + step
        elif level == "medium":
            (ratio,) = {Fraction(y, x) for x, y in pairwise(terms)}
            assert int(item.answer) == terms[-1] * ratio and ratio != 1
        else:
            found = set()
            for factor in range(-6, 7):
                for addend in range(-40, 41):
                    for turn in (0, 1):
                        made = terms[:1]
                        for i in range(5):
                            times = i % 2 == turn
                            made.append(made[-1] * factor if times else made[-1] + addend)
                        if made[:5] == terms:
                            found.add(made[5])
            assert found == {int(item.answer)}


def color_worlds(query):
    """All ways to hand out the colors that fit every sentence, from the words alone."""
    people = re.match(r"([A-Z]\w+)(?:, ([A-Z]\w+))? and ([A-Z]\w+) each", query).groups()
    people = [p for p in people if p]
    listed = re.search(r"(?:One of the two is|The \w+ are) (.*?)\.", query)[1]
    colors = re.findall(r"(?!the|other|and|is)\b[a-z]+", listed)
    assert len(colors) == len(people)
    worlds = [dict(zip(people, p, strict=True)) for p in permutations(colors)]
    for who, negated, color in re.findall(r"(\w+)'s \w+ is (not )?(\w+)\.", query):
        worlds = [w for w in worlds if (w[who] == color) != bool(negated)]
    for a, b, color in re.findall(r"Either (\w+) or (\w+) has the (\w+) ", query):
        worlds = [w for w in worlds if color in (w[a], w[b])]
    return worlds


def test_colors_follow_from_the_words():
    for item in some("logical_reasoning", "easy"):
        (world,) = color_worlds(item.query)
        assert world[re.search(r"What color is (\w+)'s", item.query)[1]] == item.answer
    for item in some("logical_reasoning", "medium"):
        (world,) = color_worlds(item.query)
        asked = re.search(r"of (\w+), (\w+) and (\w+), in this order", item.query).groups()
        assert ", ".join(world[name] for name in asked) == item.answer


def test_finishing_orders_follow_from_the_words():
    for item in some("logical_reasoning", "hard"):
        names = re.match(r"(\w+), (\w+), (\w+) and (\w+) ran", item.query).groups()
        at = {"first": 0, "second": 1, "third": 2, "last": 3}
        worlds = [{n: i for i, n in enumerate(p)} for p in permutations(names)]
        seen = 0
        for clue in re.split(r"(?<=\.) ", item.query)[1:-1]:
            seen += 1
            if m := re.fullmatch(r"(\w+) did not finish (\w+)\.", clue):
                worlds = [w for w in worlds if w[m[1]] != at[m[2]]]
            elif m := re.fullmatch(r"(\w+) finished before (\w+)\.", clue):
                worlds = [w for w in worlds if w[m[1]] < w[m[2]]]
            elif m := re.fullmatch(r"(\w+) finished immediately after (\w+)\.", clue):
                worlds = [w for w in worlds if w[m[1]] == w[m[2]] + 1]
            elif m := re.fullmatch(r"Exactly one runner finished between (\w+) and (\w+)\.", clue):
                worlds = [w for w in worlds if abs(w[m[1]] - w[m[2]]) == 2]
            elif m := re.fullmatch(r"(\w+) finished (\w+)\.", clue):
                worlds = [w for w in worlds if w[m[1]] == at[m[2]]]
            else:
                raise AssertionError(clue)
        (world,) = worlds
        assert ", ".join(sorted(world, key=world.get)) == item.answer and seen > 1


def test_word_problems_are_worth_what_they_say():
    for level in MIX:
        for item in some("word_problems", level):
            n = numbers(item.query)
            if level == "easy":
                sign = -1 if "gives away" in item.query else 1
                value = n[0] + sign * n[1]
            elif level == "medium":
                value = n[0] + n[1] - n[2]
            else:
                value = (n[0] + n[1] - n[2]) * n[3]
            assert value == int(item.answer) > 0
            assert min(n) >= 2  # nothing of which there is one: "1 apples"


@pytest.mark.parametrize("kind", TYPES)
def test_worked_steps_are_true_and_end_in_the_answer(kind):
    for level in MIX:
        for item in some(kind, level):
            for left, right in re.findall(r"^([-+*/() \d]+) = (-?\d+)$", item.steps, re.M):
                assert eval(left) == int(right)
            if kind != "logical_reasoning":
                assert item.steps.endswith(f"= {item.answer}")


def test_the_same_problem_in_other_words_has_the_same_key():
    chains = {}
    for i in range(12_000):
        item = TYPES["arithmetic_chain"]["easy"](Random(i))
        a, s, b, t, c = re.findall(r"\d+|[+-]", item.query)
        added = tuple(sorted(n for n, sign in ((a, "+"), (b, s), (c, t)) if sign == "+"))
        taken = tuple(sorted(n for n, sign in ((b, s), (c, t)) if sign == "-"))
        assert chains.setdefault((added, taken), item.key) == item.key
    assert len(set(chains.values())) == len(chains) < 12_000
    stories = [TYPES["word_problems"]["medium"](Random(i)) for i in range(2000)]
    assert len({tuple(numbers(s.query)) for s in stories}) == len({s.key for s in stories})


def test_races_that_differ_in_names_have_one_structure():
    """Names are replaced by places, so that a test race is no training race in disguise."""
    races = some("logical_reasoning", "hard")
    assert all(re.search("#[0-3]", race.structure) for race in races)
    names = {name for race in races for name in race.answer.split(", ")}
    assert not any(name in race.structure for race in races for name in names)


def test_problems_have_the_six_columns():
    task = reasoning_mix(sizes={"train": 40, "val": 0, "test": 0})
    for i in range(40):
        p = task.problem("train", i)
        c = p.columns
        assert list(c)[:6] == [
            "query",
            "reference_answer",
            "type",
            "difficulty",
            "target_answer",
            "id",
        ]
        assert p.prompt.startswith(c["query"]) and "\\boxed{}" in p.prompt
        assert p.id == c["id"] and p.answer == c["target_answer"]
        assert check_list(c["reference_answer"], c["target_answer"]).score == 1
        assert c["type"] in TYPES and c["difficulty"] in MIX


def test_types_and_levels_come_in_the_shares_asked_for():
    task = reasoning_mix(
        types={"word_problems": 3, "arithmetic_chain": 1}, sizes={"train": 800, "val": 0, "test": 0}
    )
    problems = [task.problem("train", i) for i in range(800)]
    words = sum(p.columns["type"] == "word_problems" for p in problems)
    easy = sum(p.columns["difficulty"] == "easy" for p in problems)
    # 5 standard errors: 5 * sqrt(800 * 3/4 * 1/4) = 61, and 5 * sqrt(800 / 4) = 71.
    assert abs(words - 600) < 61 and abs(easy - 400) < 71
    with pytest.raises(ConfigError, match=r"types=\['riddles'\]: wanted some of"):
        reasoning_mix(types=["riddles"])

"""Knights and knaves: one assignment fits, by trying all of them on the English text."""

import re
from itertools import product
from random import Random

import pytest

from gspo_jax.tasks.made.knights import (
    KINDS,
    NAMES,
    PEOPLE,
    Statement,
    fitting,
    knights_and_knaves,
    knights_reward,
    make_knights,
    puzzle_text,
    read_roles,
    structure,
)


def solutions(text):
    """Assignments (name -> is a knight) that fit what everyone says, read from the words."""
    said = re.findall(r'^(\w+) says: "(.*)"$', text, re.M)
    names = [name for name, _ in said]
    out = []
    for roles in product((False, True), repeat=len(names)):
        world = dict(zip(names, roles, strict=True))
        if all(is_true(words, speaker, world) == world[speaker] for speaker, words in said):
            out.append(world)
    return out


def is_true(words, speaker, world):
    words = re.sub(r"\b(I|me)\b", speaker, words)
    if m := re.fullmatch(r"(\w+) is a (knight|knave)\.", words):
        return world[m[1]] == (m[2] == "knight")
    if m := re.fullmatch(r"(\w+) and (\w+) are both (knight|knave)s\.", words):
        return world[m[1]] == world[m[2]] == (m[3] == "knight")
    if m := re.fullmatch(r"(\w+) and (\w+) are both knights, or both knaves\.", words):
        return world[m[1]] == world[m[2]]
    if m := re.fullmatch(r"Exactly one of (\w+) and (\w+) is a knight\.", words):
        return world[m[1]] + world[m[2]] == 1
    m = re.fullmatch(r"At least one of (\w+) and (\w+) is a (knight|knave)\.", words)
    return (m[3] == "knight") in (world[m[1]], world[m[2]])


def test_exactly_one_assignment_fits_and_it_is_the_answer():
    task = knights_and_knaves(sizes={"train": 300, "val": 0, "test": 0})
    kinds = set()
    for i in range(300):
        p = task.problem("train", i)
        (world,) = solutions(p.prompt)
        asked = re.search(r"Give the roles of (.*), in this order", p.prompt)[1]
        order = re.split(", | and ", asked)
        assert order == list(world) == p.columns["names"]
        assert p.answer == ", ".join("knight" if world[n] else "knave" for n in order)
        kinds |= {re.sub(r"\b(I|me|[A-Z]\w+)\b", "_", s) for s in re.findall('"(.*)"', p.prompt)}
    assert len(kinds) == len(KINDS)


def test_fitting_finds_none_one_or_many():
    # "You are a knave", both of each other: either may be the liar.
    assert len(fitting([Statement("knave", (1,)), Statement("knave", (0,))])) == 2
    # "We are both knaves": only a knave can say it, so it is false, so the other is a knight.
    both = Statement("neither", (1, 0))
    assert fitting([both, Statement("knave", (0,))]) == [(False, True)]
    assert fitting([both, Statement("knight", (0,))]) == []


def test_structure_ignores_who_is_who_alone():
    for i in range(30):
        said, _ = make_knights(Random(i), 4)
        place = [2, 0, 3, 1]
        moved = [said[0]] * 4
        for speaker, (kind, people) in enumerate(said):
            moved[place[speaker]] = Statement(kind, tuple(place[p] for p in people))
        assert structure(moved) == structure(said)
        changed = [
            said[0]._replace(kind="knaves" if len(said[0].people) > 1 else "other"),
            *said[1:],
        ]
        if changed[0].kind != said[0].kind:
            assert structure(changed) != structure(said)


@pytest.mark.long
def test_puzzles_of_three_and_more_share_no_structure_across_splits():
    """Read back from the text: who speaks of whom, in which words, without the names."""

    def skeleton(p):
        said = re.findall(r'^(\w+) says: "(.*)"$', p.prompt, re.M)
        names = [name for name, _ in said]
        forms = []
        for order in product(range(len(names)), repeat=len(names)):
            if len(set(order)) == len(names):
                number = dict(zip(names, map(str, order), strict=True))
                lines = []
                for speaker, words in said:
                    words = re.sub(r"\b(I|me)\b", speaker, words)
                    who = sorted(number[w] for w in re.findall(r"\w+", words) if w in number)
                    kind = " ".join(w for w in re.findall(r"\w+", words) if w not in number)
                    lines.append(f"{number[speaker]}: {kind} {who}")
                forms.append(sorted(lines))
        return str(min(forms))

    task = knights_and_knaves(sizes={"train": 250, "val": 40, "test": 60}, levels=["medium"])
    found = {s: {skeleton(task.problem(s, i)) for i in range(n)} for s, n in task.size.items()}
    assert not found["train"] & found["test"] and not found["train"] & found["val"]
    assert not found["val"] & found["test"] and len(found["test"]) > 30


@pytest.mark.parametrize("level", PEOPLE)
def test_statements_are_never_of_the_speaker_alone(level):
    for i in range(50):
        said, roles = make_knights(Random(f"{level}{i}"), PEOPLE[level])
        assert len(said) == len(roles) == PEOPLE[level]
        for speaker, statement in enumerate(said):
            people = statement.people
            assert people != (speaker,) and len(set(people)) == len(people)
        text = puzzle_text(NAMES[: len(said)], said)
        assert not re.search(r"\bI is\b|\bI and\b|of I\b|me are", text)


PEOPLE_3 = ["Abel", "Dora", "Igor"]


@pytest.mark.parametrize(
    "answer",
    [
        "knight, knave, knight",
        "Knight,Knave,Knight",
        r"\text{knight, knave, knight}",
        "knight, knave and knight.",
        "knight, knave, and knight",
        "Abel: knight, Dora: knave, Igor: knight",
        "Abel is a knight, Dora is a knave, and Igor is a knight",
        "Igor = knight, Abel = knight, Dora = knave",
    ],
)
def test_roles_may_be_given_in_order_or_by_name(answer):
    assert read_roles(answer, PEOPLE_3) == "knight, knave, knight"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "knight",
        "knight, knave",
        "knight, knave, knight, knave",
        "knight or knave, knave, knight",
        "knight knave, knave, knight",
        "Abel: knight, Dora: knave",
        "Abel: knight, Abel: knave, Igor: knight",
        "Abel: knight, Dora: knave, Carla: knight",
        "Abel: knight, knave, Igor: knight",
        "Abel is not a knight, Dora is a knave, Igor is a knight",
        "Abel and Igor are knights",
        "nan",
        "is, a, is",
    ],
)
def test_what_does_not_name_one_role_each_is_no_answer(answer):
    assert read_roles(answer, PEOPLE_3) is None


def test_two_boxes_that_differ_score_0():
    one, two = r"\boxed{knight, knave, knight}", r"\boxed{knave, knave, knight}"
    given = {"answer": ["knight, knave, knight"] * 3, "names": [PEOPLE_3] * 3}
    assert knights_reward([one, one + two, two + one], **given) == [1.0, 0.0, 0.0]

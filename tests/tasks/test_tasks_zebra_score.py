"""The grid that a response gives: the published rules, every trap, and what cannot be gamed."""

import json
import sys

import pytest

from gspo_jax.answers.verify import MAX_TEXT
from gspo_jax.batch import Problem
from gspo_jax.tasks.zebra.score import (
    GridScore,
    as_solution,
    grid_prompt,
    grid_reward,
    last_object,
    letter_in,
    mc_prompt,
    mc_reward,
    score_grid,
    solution_in,
)

ROW = {
    "puzzle": "A puzzle.",
    "solution": {
        "header": ["House", "Name", "Pet"],
        "rows": [["1", "Ada", "cat"], ["2", "Boris", "dog"], ["3", "Chloe", "horse"]],
    },
}
GOLD = as_solution(ROW["solution"])  # 6 cells


def reply(**changes):
    """The right response, with cells replaced: House_2_Pet="cat"."""
    grid = {house: dict(row) for house, row in GOLD.items()}
    for place, value in changes.items():
        house, column = place.rsplit("_", 1)
        grid[house.replace("_", " ")][column] = value
    return json.dumps({"reasoning": "so", "solution": grid})


RIGHT = reply()


def test_the_table_of_a_row_becomes_an_object_per_house():
    assert GOLD == {
        "House 1": {"Name": "Ada", "Pet": "cat"},
        "House 2": {"Name": "Boris", "Pet": "dog"},
        "House 3": {"Name": "Chloe", "Pet": "horse"},
    }


@pytest.mark.parametrize(
    "text",
    [
        RIGHT,
        json.dumps(json.loads(RIGHT), indent=4),
        f"```json\n{RIGHT}\n```",
        f"<think>{reply(House_1_Pet='dog')}</think>{RIGHT}",  # reasoning does not count
        f"{reply(House_1_Pet='dog')} No: {RIGHT}",  # the last one counts
        RIGHT + r" So \boxed{}",  # a trailing brace pair does not hide it,
        RIGHT + r" So \boxed{see above} {1, 2} {'a': 1} {" + '"answer": "B"}',  # nor do others
        f"Let S = {{Ada, Boris. {RIGHT}",  # a brace that never closes
        f"}}}} {RIGHT} }}",
        RIGHT.replace("Boris", "  bORIS "),  # case and space
        reply(House_2_Pet=["dog", "cat"]),  # a list stands for its first element
        RIGHT.replace('"so"', '"first\nthen\tthis"'),  # raw line breaks inside of a string
        RIGHT.replace('"so"', '"Ада \\u00e9 \\ud83d"'),  # half a surrogate pair is no cell
        RIGHT.replace('"House 1"', '"House 9": {"Name": "Zoe"}, "House 1"'),  # more than asked
    ],
)
def test_right_grids_score_1(text):
    assert score_grid(text, GOLD) == GridScore(True, 6, 6, True, True)


@pytest.mark.parametrize(
    "text, right",
    [
        (reply(House_2_Pet="cat"), 5),
        (reply(House_2_Pet="a dog"), 5),
        (reply(House_2_Pet="dog, cat, horse"), 5),  # all that is on offer
        (reply(House_2_Pet=["cat", "dog"]), 5),
        (reply(House_2_Pet=[]), 5),
        (reply(House_2_Pet=[["dog"]]), 5),
        (reply(House_2_Pet={"dog": 1}), 5),
        (reply(House_2_Pet=None), 5),
        (reply(House_2_Pet=True), 5),
        (reply(House_2_Pet=2.5), 5),
        (reply(House_2_Pet=float("nan")), 5),
        (reply(House_2_Pet=10**4000), 5),
        (reply(House_2_Pet="nan"), 5),
        (reply(House_2_Pet="___"), 5),
        (reply(House_2_Pet=""), 5),
        (RIGHT.replace('"Pet": "dog"', '"pet": "dog"'), 5),  # a column by its own name
        (RIGHT.replace('"House 2"', '"2"'), 4),  # a house too
        (RIGHT.replace('{"Name": "Boris", "Pet": "dog"}', '"Boris"'), 4),
        (RIGHT.replace('{"Name": "Boris", "Pet": "dog"}', "null"), 4),
        (f"{RIGHT} or {reply(House_1_Pet='dog')}", 5),
        ('{"solution": {}}', 0),
    ],
)
def test_cells_that_are_not_the_same_text_are_wrong(text, right):
    score = score_grid(text, GOLD)
    assert (score.answered, score.right, score.cells, score.solved) == (True, right, 6, False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Ada lives in House 1 with a cat.",
        json.dumps(GOLD),  # without "solution"
        RIGHT[:-1],  # cut off
        RIGHT.replace('"so",', '"so"'),  # not JSON
        RIGHT.replace('"', "'"),
        '{"solution": "Ada, Boris, Chloe"}',
        '{"solution": [["Ada", "cat"]]}',
        '{"solution": null}',
        f"<think>{RIGHT}",
        f"<think>{RIGHT}</think> done",
        r"\boxed{Ada}",
        "nan",
    ],
)
def test_no_object_with_a_solution_is_no_answer(text):
    assert score_grid(text, GOLD) == GridScore(False, 0, 6, False, False)


def test_cells_pay_only_where_columns_are_permutations():
    swapped = reply(House_1_Pet="dog", House_2_Pet="cat")  # 4 of 6
    same_name = reply(**{f"House_{h}_Name": "Ada" for h in (1, 2, 3)})  # 4 of 6 as well
    listing = reply(House_1_Pet=["cat", "dog"])  # complete, and right
    texts = [RIGHT, swapped, same_name, listing, "", reply(House_1_Name=None)]
    given = {"completions": texts, "answer": [json.dumps(GOLD)] * len(texts)}
    assert grid_reward("puzzle")(**given) == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert grid_reward("cells")(**given) == [1.0, pytest.approx(4 / 6), 0.0, 1.0, 0.0, 0.0]
    chat = [[{"role": "assistant", "content": swapped}]]
    assert grid_reward("cells")(chat, [json.dumps(GOLD)]) == [pytest.approx(4 / 6)]


def test_constant_guesses_earn_nothing():
    """One value everywhere is right in a third of the cells, but is no grid."""
    for pet in ("cat", "dog", "horse"):
        same = {house: {"Name": "Ada", "Pet": pet} for house in GOLD}
        assert score_grid(json.dumps({"solution": same}), GOLD).right == 2
        text = json.dumps({"solution": same})
        assert grid_reward("cells")([text], [json.dumps(GOLD)]) == [0.0]


def test_repeating_the_question_earns_nothing():
    example = {"puzzle": "Another.", "solution": ROW["solution"]}
    prompt = grid_prompt(ROW, example)  # it even shows a solution, which happens to be this one's
    assert "Chloe" in prompt
    assert score_grid(prompt, GOLD).right == 0


def test_answers_that_are_the_same_grid_are_the_same_text():
    problem = Problem("p", "?", json.dumps(GOLD))
    spaced = RIGHT.replace("Boris", " boris ").replace('"reasoning": "so", ', "")
    assert solution_in(problem, RIGHT) == solution_in(problem, spaced) is not None
    assert solution_in(problem, reply(House_1_Pet="dog")) != solution_in(problem, RIGHT)
    assert solution_in(problem, json.dumps(GOLD)) is None


CHOICES = ["cat", "dog", "Horse"]


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("b", "B"),
        (" (B) ", "B"),
        ("B.", "B"),
        ("dog", "B"),
        ("HORSE", "C"),
        ("D", None),
        ("A, B", None),
        ("A B C", None),
        ("B) dog", None),
        ("cat or dog", None),
        ("", None),
        (2, None),
        (["B"], None),
        (None, None),
    ],
)
def test_a_choice_is_one_letter_or_its_own_words(answer, letter):
    text = json.dumps({"reasoning": "cat, dog or horse", "answer": answer})
    assert letter_in(text, CHOICES) == letter
    assert mc_reward([text], ["B"], [CHOICES]) == [float(letter == "B")]


def test_a_choice_that_looks_like_a_letter_is_meant_by_its_words():
    assert letter_in('{"answer": "a"}', ["b", "a"]) == "B"
    assert letter_in('{"answer": "same"}', ["same", "Same"]) is None


def test_repeating_a_multiple_choice_question_answers_nothing():
    row = {"puzzle": "A puzzle.", "question": "Which?", "choices": CHOICES}
    prompt = mc_prompt(row)
    assert "A) cat\nB) dog\nC) Horse" in prompt
    assert letter_in(prompt, CHOICES) is None
    assert letter_in("B", CHOICES) is None


HOSTILE = [
    "{" * 1_000_000,
    "}" * 1_000_000,
    "{}" * 500_000,
    '{"solution":' * 100_000,
    '{"solution":' * 20_000 + "1" + "}" * 20_000,
    "{" * 100_000 + "}" * 100_000,
    '{"solution": "' + "\\" * 500_000,
    '{"solution": ' + "9" * 150_000 + "}",
    '{"solution": {"House 1": {"Name": ' + "[" * 50_000 + "]" * 50_000 + "}}}",
    "<think>" * 100_000,
    '{"a": {"solution": 5}}' * 5000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_no_answer_with_work_linear_in_its_length(text):
    lines = 0

    def count(frame, event, _):
        nonlocal lines
        lines += event == "line"
        return count

    sys.settrace(count)
    try:
        assert last_object(text, "solution") is None or not score_grid(text, GOLD).right
    finally:
        sys.settrace(None)
    assert lines < 40 * min(len(text), MAX_TEXT) + 5000


def test_nothing_in_a_grid_is_executed(tmp_path):
    canary = tmp_path / "canary"
    code = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    assert not score_grid(reply(House_1_Name=code), GOLD).solved
    assert score_grid(f'{{"solution": {code}}}', GOLD).answered is False
    assert not canary.exists()

"""Logic grids: one solution each by two independent proofs, no superfluous clue, no leak."""

import json
import time
from collections import Counter
from random import Random

import pytest
from zebra_brute_force import solutions

from gspo_jax.errors import ConfigError
from gspo_jax.tasks import load_task
from gspo_jax.tasks.draw import shuffled, split_of
from gspo_jax.tasks.zebra.puzzles import (
    SIZES,
    Puzzle,
    grid_row,
    group_of,
    make_puzzle,
    mc_rows,
    puzzle_text,
    structure,
    true_clues,
    zebra_synth,
)
from gspo_jax.tasks.zebra.solve import Clue, count_solutions
from gspo_jax.tasks.zebra.words import ATTRIBUTES

BY_HAND = ("4*2", "4*3", "5*2")  # sizes of more than 3 houses that can be tried out as well
FEW = {"train": 30, "val": 6, "test": 12}


def some_puzzles(sizes, count, name="tests"):
    for i in range(count):
        size = sizes[i % len(sizes)]
        yield make_puzzle(Random(f"{name} {i}"), *map(int, size.split("*")))


def table(row):
    """The row's solution in the form in which the brute force gives it."""
    header, rows = row["solution"]["header"], row["solution"]["rows"]
    return [dict(zip(header[1:], cells[1:], strict=True)) for cells in rows]


def every(task, split):
    return [task.problem(split, i) for i in range(task.size[split])]


def check_unique(puzzles):
    """How many puzzles were proven by the solver, and how many by trying everything as well."""
    proven = Counter()
    for puzzle in puzzles:
        found = count_solutions(puzzle.houses, len(puzzle.columns), puzzle.clues)
        assert (found.solutions, found.first) == (1, puzzle.solution)
        proven["solver"] += 1
        row = grid_row(puzzle)
        if puzzle.houses <= 3 or row["size"] in BY_HAND:
            assert solutions(row["puzzle"]) == [table(row)]
            proven["brute force"] += 1
    return proven


def test_every_puzzle_has_one_solution_which_is_the_stated_one():
    assert check_unique(some_puzzles(SIZES, 200)) == {"solver": 200, "brute force": 104}


@pytest.mark.long
def test_ten_thousand_puzzles_have_one_solution_each(capsys):
    start = time.process_time()
    proven = check_unique(some_puzzles(SIZES, 10_000))
    assert proven == {"solver": 10_000, "brute force": 5200}
    with capsys.disabled():
        print(f"\n{dict(proven)} in {time.process_time() - start:.0f} s of one core")


def test_the_solver_counts_what_trying_everything_counts():
    """On puzzles that lost clues, so that there are several solutions, or hundreds."""
    counts = set()
    for i, puzzle in enumerate(some_puzzles(["3*3", "2*4", "4*2", "3*2"], 40, "fewer clues")):
        kept = shuffled(Random(i), puzzle.clues, len(puzzle.clues) * (i % 3) // 3)
        fewer = puzzle._replace(clues=kept)
        by_hand = len(solutions(puzzle_text(fewer)))
        found = count_solutions(puzzle.houses, len(puzzle.columns), kept, limit=10**6)
        assert found.solutions == by_hand
        counts.add(by_hand)
        assert count_solutions(puzzle.houses, len(puzzle.columns), kept).solutions == min(
            2, by_hand
        )
    assert max(counts) == 24**2 and len(counts) > 10


def test_contradicting_clues_have_no_solution():
    # Value 0 is left of value 1, and the other way round; each in the first house.
    for clues in (
        [Clue("left", 0, 1), Clue("left", 1, 0)],
        [Clue("found", 0, 0), Clue("found", 1, 0)],
        [Clue("found", 0, 0), Clue("not", 0, 0)],
        [Clue("not", v, 2) for v in range(3)],
    ):
        assert count_solutions(3, 2, clues) == (0, 1, ())


def test_no_clue_can_be_left_out():
    for puzzle in some_puzzles(["2*3", "3*3", "4*2"], 12):
        for clue in puzzle.clues:
            rest = [other for other in puzzle.clues if other != clue]
            assert len(solutions(puzzle_text(puzzle._replace(clues=rest)))) > 1


def test_true_clues_are_all_of_them():
    """Two houses, Ada and tea in the first, Boris and milk in the second: a/A=0, B=1, t=2, m=3."""
    assert set(true_clues(2, (0, 1, 0, 1))) == {
        *(Clue("found", v, v % 2) for v in range(4)),
        *(Clue("not", v, 1 - v % 2) for v in range(4)),
        Clue("same", 0, 2),
        Clue("same", 1, 3),
        *(Clue("beside", *pair) for pair in [(0, 1), (0, 3), (1, 2), (2, 3)]),
        *(Clue("next", *pair) for pair in [(0, 1), (0, 3), (2, 1), (2, 3)]),
        *(Clue("left", *pair) for pair in [(0, 1), (0, 3), (2, 1), (2, 3)]),
    }
    assert len(true_clues(5, (0, 1, 2, 3, 4) * 5)) > 600


def test_all_kinds_of_clue_occur_and_few_give_a_house_away():
    kinds = Counter(c.kind for p in some_puzzles(["4*4", "5*5"], 60) for c in p.clues)
    assert set(kinds) == {"found", "not", "same", "next", "beside", "left", "gap1", "gap2"}
    assert kinds["found"] < 0.1 * kinds.total()


def test_structure_ignores_words_and_order_and_sees_everything_else():
    puzzle = make_puzzle(Random(7), 3, 4)
    clues = list(reversed(puzzle.clues))
    other_words = dict(zip(["Name", "Pet", "Job", "Food"], puzzle.columns.values(), strict=True))
    same = Puzzle(other_words, puzzle.solution, clues, puzzle.nodes)
    assert structure(same) == structure(puzzle)

    # Attributes in another order, and the values of each of them too.
    move = {a * 3 + v: (3 - a) * 3 + (v + a) % 3 for a in range(4) for v in range(3)}
    solution = [0] * 12
    for old, new in move.items():
        solution[new] = puzzle.solution[old]
    moved = [Clue(k, move[x], y if k in ("found", "not") else move[y]) for k, x, y in puzzle.clues]
    assert structure(puzzle._replace(solution=tuple(solution), clues=moved)) == structure(puzzle)

    for i, clue in enumerate(puzzle.clues):
        less = puzzle._replace(clues=puzzle.clues[:i] + puzzle.clues[i + 1 :])
        assert structure(less) != structure(puzzle)
        if clue.kind == "same":
            changed = [*puzzle.clues[:i], Clue("beside", *clue[1:]), *puzzle.clues[i + 1 :]]
            assert structure(puzzle._replace(clues=changed)) != structure(puzzle)


def test_structure_of_mirrored_arguments_of_a_symmetric_clue_is_the_same():
    puzzle = Puzzle({"Name": ["Ada", "Boris"], "Pet": ["cat", "dog"]}, (0, 1, 1, 0), [], 1)
    one, two, other = ([Clue(*c)] for c in (("beside", 0, 2), ("beside", 2, 0), ("next", 0, 2)))
    assert structure(puzzle._replace(clues=one)) == structure(puzzle._replace(clues=two))
    assert structure(puzzle._replace(clues=one)) != structure(puzzle._replace(clues=other))


@pytest.fixture(scope="module")
def task():
    return zebra_synth(puzzles=["2*2", "2*3", "3*3"], sizes=FEW)


def test_splits_share_no_puzzle_and_no_structure(task, monkeypatch):
    structures = {}

    def noted(puzzle):
        structures[grid_row(puzzle)["id"]] = structure(puzzle)
        return structures[grid_row(puzzle)["id"]]

    monkeypatch.setattr("gspo_jax.tasks.zebra.puzzles.structure", noted)
    again = zebra_synth(puzzles=["2*2", "2*3", "3*3"], sizes=FEW)
    monkeypatch.undo()
    ids = {split: [p.id for p in every(again, split)] for split in FEW}
    assert ids == {split: [p.id for p in every(task, split)] for split in FEW}
    assert all(len(set(some)) == len(some) == FEW[split] for split, some in ids.items())
    for split, some in ids.items():
        assert {split_of(structures[i]) for i in some} == {split}


def test_held_out_puzzles_do_not_depend_on_the_seed_but_training_ones_do(task):
    other = zebra_synth(seed=1, puzzles=["2*2", "2*3", "3*3"], sizes=FEW)
    assert every(other, "test") == every(task, "test")
    assert every(other, "train") != every(task, "train")
    assert other.fingerprint != task.fingerprint


def test_problems_are_the_same_in_every_version():
    # Ids hash the whole text; resuming a run depends on them.
    two = zebra_synth(puzzles=["3*3"], sizes={"train": 2, "val": 0, "test": 0})
    marks = [p.id.rpartition("-")[2] for p in every(two, "train")]
    assert marks == ["a960e4531f5b", "e3b45d368428"]


def test_rows_have_the_published_fields():
    puzzle = make_puzzle(Random(3), 3, 4)
    row = grid_row(puzzle)
    assert list(row) == ["id", "size", "puzzle", "solution", "created_at"]
    assert row["size"] == "3*4" and row["id"].startswith("zebra-synth-3x4-")
    assert row["solution"]["header"] == ["House", *puzzle.columns]
    assert [cells[0] for cells in row["solution"]["rows"]] == ["1", "2", "3"]
    rows = list(mc_rows(puzzle))
    assert len(rows) == 12 == len({r["id"] for r in rows})
    for cell, mc in enumerate(rows):
        house, column = cell // 4, list(puzzle.columns)[cell % 4]
        wanted = {"id", "size", "puzzle", "question", "choices", "answer", "created_at"}
        assert set(mc) == wanted and mc["id"] == f"{row['id']}#mc-{cell}"
        assert (
            mc["question"] == f"What is the {column} of the person who lives in House {house + 1}?"
        )
        assert mc["answer"] == table(row)[house][column] and mc["answer"] in mc["choices"]


def test_no_value_belongs_to_two_attributes():
    """Else a clue about one could be read as a clue about the other."""
    values = [v.lower() for a in ATTRIBUTES.values() for v in a.values]
    assert len(set(values)) == len(values) == 8 * len(ATTRIBUTES)


def test_the_25_sizes_fall_into_the_published_groups():
    groups = Counter(group_of(size) for size in SIZES)
    assert groups == {"small": 8, "medium": 7, "large": 5, "xl": 5}
    assert [s for s in SIZES if group_of(s) == "small"][-3:] == ["3*2", "3*3", "4*2"]


def test_worked_solutions_earn_the_reward_and_prompts_do_not(task):
    for mode in ("grid", "mc"):
        task = zebra_synth(puzzles=["2*2", "3*2"], mode=mode, example=True, sizes=FEW)
        for p in every(task, "test"):
            assert "# Example" in p.prompt and p.columns["puzzle"] in p.prompt
            columns = {k: [v] for k, v in p.columns.items()} | {"answer": [p.answer]}
            texts = [p.columns["completion"], p.prompt, "", p.answer, p.columns["puzzle"]]
            scores = [task.reward(prompts=[p.prompt], completions=[t], **columns) for t in texts]
            assert scores == [[1.0], [0.0], [0.0], [0.0], [0.0]]
            assert task.answer_in(p, texts[0]) == p.answer or mode == "grid"
            assert task.answer_in(p, "no") is None


def test_columns_tell_the_difficulty(task):
    for p in every(task, "val"):
        assert p.columns["difficulty"] == "small"
        assert p.columns["clues"] >= 1 and p.columns["nodes"] >= 1
        # 2*2: (2!)^2 = 4 grids; 2*3: 8; 3*3: 216.
        states = {"2*2": 0.6, "2*3": 0.9, "3*3": 2.33}
        assert p.columns["log10_states"] == states[p.columns["size"]]


def test_what_cannot_be_made_is_refused():
    none = dict.fromkeys(FEW, 0)
    assert load_task("zebra-synth", sizes=none).name == "zebra-synth"
    for options, message in [
        ({"puzzles": ["7*2"]}, r"wanted sizes from 2\*2 to 6\*6"),
        ({"puzzles": []}, r"wanted sizes"),
        ({"mode": "grids"}, r"mode=grids: wanted one of"),
        ({"reward": "cell"}, r"reward=cell: wanted one of"),
        ({"sizes": {"tests": 1}}, r"\['tests'\]; the splits are"),
        ({"sizes": {"test": -1}}, r"sizes\.test=-1: wanted a whole number"),
    ]:
        with pytest.raises(ConfigError, match=message):
            zebra_synth(**options)


def test_grids_are_asked_for_and_answered_in_the_same_form(task):
    p = every(task, "val")[0]
    form = json.loads(p.prompt[p.prompt.rindex("\n{\n") :])
    gold = json.loads(p.answer)
    assert {h: list(row) for h, row in form["solution"].items()} == {
        h: list(row) for h, row in gold.items()
    }

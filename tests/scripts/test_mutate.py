"""scripts/mutants.txt, the code that it breaks and the tests that guard it change apart."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture
def mutate(monkeypatch):
    monkeypatch.syspath_prepend(TESTS.parent / "scripts")
    import mutate

    return mutate


def test_every_mutant_is_in_todays_code_once(mutate):
    mutants = mutate.read_mutants()
    assert [m for m in mutants if mutate.source(m).count(m.old) != 1] == []
    assert len(set(mutants)) == len(mutants)
    assert {m.module for m in mutants} == set(mutate.GUARDS)


def test_every_guard_is_a_test_of_the_short_suite(mutate):
    """In a file that is there, and not marked as one of the long half."""
    for guard in {guard for guards in mutate.GUARDS.values() for guard in guards}:
        file, _, name = guard.partition("::")
        tree = ast.parse((TESTS / file).read_text())
        found = [x for x in tree.body if isinstance(x, ast.FunctionDef)]
        chosen = [x for x in found if x.name.startswith("test_") and name in ("", x.name)]
        assert chosen, guard
        marks = {"pytest.mark.long", "pytest.mark.faults"}
        short = [x for x in chosen if marks.isdisjoint(map(ast.unparse, x.decorator_list))]
        assert short and (short == chosen or not name), guard

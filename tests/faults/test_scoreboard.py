"""docs/reliability.md names every fault once, and tests that exist."""

import ast
import re
from pathlib import Path

import pytest
from models.test_models_files import HOSTILE as HEADERS
from tasks.test_tasks_data import BAD

from faults import test_checker, test_logs
from faults.bombs import BOMBS, CODE, HACKS, LONG

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
LINES = re.findall(r"^\| *(\d+) \|(.*)\|$", PAGE, re.MULTILINE)
ROWS = {int(number): [cell.strip() for cell in cells.split("|")] for number, cells in LINES}
STATES = ("passed", "partly", "open")


def found_by_row():
    """Row -> {(file, test, whether it is a long one)}, from the names of the tests."""
    found = {}
    for path in sorted((ROOT / "tests" / "faults").glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            numbers = re.match(r"test_row(_\d\d(?:_and_\d\d)*)", getattr(node, "name", ""))
            for number in re.findall(r"\d\d", numbers[1]) if numbers else ():
                marks = " ".join(ast.unparse(mark) for mark in node.decorator_list)
                found.setdefault(int(number), set()).add(
                    (path.name, node.name, "mark.faults" in marks)
                )
    return found


TESTS = found_by_row()


def test_every_fault_has_one_row_in_order():
    assert [int(number) for number, _ in LINES] == list(range(1, 82))
    assert all(len(cells) == 4 and all(cells) for cells in ROWS.values())
    assert {state for *_, state in ROWS.values()} <= set(STATES)


def test_the_total_is_that_of_the_rows():
    (stated,) = re.findall(r"\*\*(\d+) of 81 pass\.\*\*", PAGE)
    assert int(stated) == sum(state == "passed" for *_, state in ROWS.values())


@pytest.mark.parametrize("row", range(57, 82))
def test_a_later_row_names_a_test_that_is_there(row):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", ROWS[row][2])
    assert named
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(), test


@pytest.mark.parametrize("row", range(1, 57))
def test_a_row_names_the_files_of_its_tests_and_whether_some_are_long(row):
    _, _, named, state = ROWS[row]
    files = set(re.findall(r"`(test_\w+\.py)`", named))
    if state == "open":
        return
    assert files == {file for file, _, _ in TESTS[row]}, TESTS[row]
    assert ("long" in named) == any(is_long for _, _, is_long in TESTS[row]), TESTS[row]
    for path, test in re.findall(r"`(tests/\w+\.py)::(\w+)`", named):
        assert f"def {test}(" in (ROOT / path).read_text(), test


@pytest.mark.parametrize(
    ("row", "count"),
    [
        (29, len(BOMBS)),
        (29, len(test_checker.SCORERS)),
        (30, len(CODE)),
        (31, len(LONG)),
        (32, len(HACKS)),
        (37, len(HEADERS)),
        (42, len(BAD)),
        (49, len(test_logs.HOSTILE)),
    ],
)
def test_counts_on_the_page_are_those_of_the_tests(row, count):
    assert count in [int(n) for n in re.findall(r"\d+", ROWS[row][1])]


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", PAGE)
    assert targets and all((ROOT / "docs" / target).exists() for target in targets)

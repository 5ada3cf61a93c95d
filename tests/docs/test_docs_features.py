"""docs/features.md names files, commands, settings, functions and tests that exist."""

import ast
import re
from pathlib import Path

import pytest

from gspo_jax.algo import losses
from gspo_jax.cli.commands import main
from gspo_jax.config.names import SETTINGS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
LINES = re.findall(r"^\| (?!expected|-)(.*) \|$", PAGE, re.MULTILINE)
ROWS = [[cell.strip() for cell in line.split(" |")] for line in LINES]


def test_every_row_has_its_four_cells_and_at_least_one_test_unless_it_is_not_yet():
    assert len(ROWS) == 23
    for expected, meaning, here, tests in ROWS:
        assert expected and meaning and here
        assert tests or here.startswith("not yet"), expected


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_tests_that_guard_a_row_exist(row):
    named = re.findall(r"`([^`]+)`", row[3])
    for path, test in (name.split("::") for name in named):
        body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        assert test in {getattr(node, "name", None) for node in body}, f"{path}::{test}"


def test_commands_settings_and_functions_exist(capsys):
    here = "\n".join(row[2] for row in ROWS)
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = set(re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE))
    assert {"train", "demo"} <= commands
    assert set(re.findall(r"`gspo-jax (\w+)", PAGE)) <= commands
    here = re.sub(r"\[[^]]*\]\([^)]*\)", "", here)  # without links to files
    named = set(re.findall(r"`((?:algo|model|optim|rollout|run|task)\.[\w.]+)`", here))
    known = lambda n: any(n == s or n.startswith(f"{s}.") for s in SETTINGS)  # noqa: E731
    assert len(named) > 5 and [n for n in named if not known(n)] == []
    for name in re.findall(r"`(?:losses\.)?(gspo\w*|grpo|ppo)\b", here):
        assert name in losses.LOSSES or name == "gspo_jax"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make (\w+)`", PAGE)) <= set(targets)

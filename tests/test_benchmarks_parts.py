"""`make gpu-check` where there is no GPU: every part runs, and the full forms fit one."""

import importlib
import shlex
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def check():
    """`gpu_check`, with its directory on the path as it is where a script is run."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("gpu_check")
    sys.path.remove(str(BENCHMARKS))


NAMES = ["step", "decode", "update", "head", "memory", "optimizer"]


@pytest.mark.parametrize("name", NAMES)
def test_a_part_in_its_quick_form_finds_what_its_goals_read(
    check, name, capsys, monkeypatch, tmp_path
):
    part = next(p for p in check.PARTS if p.name == name)
    command = check.command_of(part, True, tmp_path)
    monkeypatch.setattr(sys, "argv", command[1:])
    importlib.import_module(part.script.removesuffix(".py")).main()
    result = check.result_of(capsys.readouterr().out.strip().splitlines()[-1])
    for goal in check.GOALS:
        if goal.part != name or name == "decode":  # whose goals are for other batches
            continue
        if name == "memory":  # a CPU keeps no peak
            assert result["device_peak_gb"] is None
        else:
            assert goal.read(result) > 0
    # What was asked for is what was run, and is written down.
    asked = shlex.split(part.quick)
    if "--remat" in asked:
        ran = result.get("options", result)["remat"]
        assert ran == asked[asked.index("--remat") + 1]


def test_every_part_is_tried(check):
    assert [p.name for p in check.PARTS] == NAMES


def test_the_limits_of_the_parts_are_together_that_of_the_whole(check):
    assert check.TESTS_LIMIT + sum(p.limit for p in check.PARTS) == 60 * check.MINUTES
    makefile = (BENCHMARKS.parent / "Makefile").read_text()
    assert f"at most {check.MINUTES} minutes" in makefile

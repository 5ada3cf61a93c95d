"""docs/benchmarks.md: its commands are accepted, its snippet runs, its tables are the code's."""

import re
import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import benchmark as script
import pytest

from gspo_jax.cli.commands import main
from gspo_jax.evaluation import benchmark
from gspo_jax.numbers import summary
from gspo_jax.tasks import TASKS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)
    for line in block.splitlines()
]
TABLES = [
    [[cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines()]
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.M)
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_accepted_as_written(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("DIR", "runs/demo-seed0/export"):
        Path(name).mkdir(parents=True)
    called = []
    monkeypatch.setattr(
        benchmark, "run", lambda *args: called.append(args) or {"scores": {}, "missing": {}}
    )
    program, *arguments = shlex.split(line)
    if program == "python":
        assert arguments.pop(0) == "scripts/benchmark.py"
        arguments = script.command(arguments)
    assert main(arguments) == 0
    assert called


def test_the_snippet_prints_what_stands_below_it():
    ((code, output),) = re.findall(
        r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", PAGE, re.M | re.S
    )
    printed = StringIO()
    with redirect_stdout(printed):
        exec(compile(code, "benchmarks.md", "exec"), {})
    assert printed.getvalue() == output


def test_every_benchmark_has_its_row():
    table = next(t for t in TABLES if t[0][0] == "benchmark" and t[0][1] == "what it asks")
    named = {name for row in table[2:] for name in re.findall(r"`([\w-]+)`", row[0])}
    assert named == {*benchmark.SHORT, *TASKS} - {"mixture"}


def test_metrics_are_defined_as_the_results_define_them():
    table = next(t for t in TABLES if t[0] == ["metric", "what it is"])
    assert {row[0].strip("`"): row[1] for row in table[2:]} == summary.DEFINITIONS


def test_every_score_of_the_actual_run_has_n_and_an_interval():
    table = next(t for t in TABLES if t[0][:3] == ["benchmark", "metric", "n"])
    scores = [row for row in table[2:] if "tokens" not in row[1]]
    assert len(scores) > 10
    for row in scores:
        assert row[2].isdigit()
        assert all(re.fullmatch(r"[+-]?[\d.]+%? \[[+-]?[\d.]+, [+-]?[\d.]+\]", c) for c in row[3:])

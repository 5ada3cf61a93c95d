"""docs/tasks.md shows problems as they are, and names every task and only options that exist."""

import inspect
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import yaml

from gspo_jax.answers.verify import check
from gspo_jax.config.load import load_config
from gspo_jax.tasks import TASKS
from gspo_jax.tasks.published import PUBLISHED

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```", "", PAGE, flags=re.M | re.S)  # without examples
SHOWN = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", PAGE, re.M | re.S)


@pytest.mark.parametrize("code, output", SHOWN)
def test_examples_print_what_stands_below_them(code, output):
    printed = StringIO()
    with redirect_stdout(printed):
        exec(compile(code, "tasks.md", "exec"), {})
    assert printed.getvalue() == output


def test_every_task_has_its_row_and_every_made_up_one_its_example():
    table = PAGE.split("\n\n")[2]
    assert table.startswith("| `task.name`")
    assert set(re.findall(r"`([a-z0-9-]+)`[,\]]", table)) == set(TASKS)
    assert len(SHOWN) == len(set(TASKS) - set(PUBLISHED) - {"mixture", "gym"})
    for name, spec in PUBLISHED.items():
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
        assert spec.hub in row and all(hub.partition(":")[0] in row for hub in spec.also)


def test_options_on_the_page_exist():
    for name in ("zebra-synth", "reasoning", "countdown", "knights", "arithmetic"):
        prose = PROSE.split(f"## {name}\n")[1].split("\n## ")[0]
        named = {n for n in re.findall(r"`(\w+)`", prose) + re.findall(r"`(\w+): ", prose)}
        taken = set(inspect.signature(TASKS[name]).parameters)
        columns = {"size", "clues", "nodes", "log10_states", "structure", "cells", "query", "type"}
        columns |= {"reference_answer", "difficulty", "target_answer", "id"}
        assert named <= taken | columns


def test_the_tasks_in_yaml_on_the_page_are_configs(tmp_path):
    texts = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
    assert [yaml.safe_load(text)["task"]["name"] for text in texts] == ["gym", "mixture"]
    for text in texts:
        path = tmp_path / "task.yaml"
        path.write_text(text)
        assert load_config(path).task.options == yaml.safe_load(text)["task"]["options"]


def test_the_curriculum_and_the_checker_on_the_page_are_settings():
    assert load_config(None, ["task.curriculum={easy: 0, medium: 0.3, hard: 0.6}"]).task.curriculum
    checker = "task.options.checker=math-verify"
    assert checker in PAGE
    for where in ("task.name=math500", "task.path=rows.jsonl"):
        assert load_config(None, [where, checker]).task.options == {"checker": "math-verify"}


def test_the_forms_of_an_answer_on_the_page_score_as_it_says():
    table = PAGE.split("| the gold answer |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) == 9
    for row in table:
        (gold,), right, wrong = (re.findall("`([^`]+)`", c) for c in row[1:-1].split("|"))
        for answers, worth in ((right, 1.0), (wrong, 0.0)):
            assert [a for a in answers if check(rf"\boxed{{{a}}}", gold).score != worth] == [], gold

"""docs/architecture.md: its drawing is that of the imports, and what it names is there."""

import importlib
import re
from pathlib import Path

import draw_house as house
from test_architecture import RANK

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_drawing_is_that_of_the_imports():
    told = "python scripts/draw_house.py draws it again"
    assert (
        ROOT / "docs" / "images" / "architecture" / "house.svg"
    ).read_text() == house.drawing(), told


def test_a_box_stands_above_all_that_it_uses_and_no_line_says_what_a_path_says():
    """Worked out by hand: c uses b and a, b uses a; the line from c to a is left out."""
    uses = {"a": set(), "b": {"a"}, "c": {"a", "b"}}
    assert house.rows(uses) == [["a"], ["b"], ["c"]]
    assert house.lines(uses) == [("b", "a"), ("c", "b")]


def test_the_drawing_has_every_place_of_the_order():
    assert house.uses().keys() == RANK.keys() - {"__main__"}


def test_what_the_page_names_is_where_it_says():
    for name, path, attribute in re.findall(
        r"\[`([\w.]+)`\]\(\.\./(gspo_jax/[\w/]+\.py)\)(?:`\.(\w+)`)?", PAGE
    ):
        dotted = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        module = importlib.import_module(dotted)
        end = name.removeprefix(dotted.removeprefix("gspo_jax.")).lstrip(".")
        assert not end or hasattr(module, end), f"{path} has no {end}"
        assert not attribute or hasattr(module, attribute), f"{path} has no {attribute}"

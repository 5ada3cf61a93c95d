"""Blocks become HTML that loads and obeys nothing, and Markdown that says the same."""

import base64
import hashlib
import math
import re

import pytest
from page_cases import HOSTILE, Parsed, check_inert

from gspo_jax.errors import StorageError
from gspo_jax.view.drawing import Curve, overlay, svg
from gspo_jax.view.page import (
    NONE,
    STYLE,
    Code,
    Details,
    Heading,
    Items,
    Picture,
    Table,
    Text,
    html,
    inline,
    markdown,
    number,
    percent,
    points,
    shown,
    write,
)
from gspo_jax.view.run_files import Interval


@pytest.fixture(scope="module")
def picture():
    curves = {HOSTILE: Curve([0, 1, 2], [1, 2, 4], [0, 1, 3], [2, 3, 5]), "b": Curve([0], [1])}
    return svg(overlay(HOSTILE, "unit", curves))


@pytest.fixture(scope="module")
def blocks(picture):
    return [
        Heading(HOSTILE),
        Text(HOSTILE),
        Text(HOSTILE, "answer"),
        Items([HOSTILE, "two"]),
        Code(f"{HOSTILE}\nsecond line ````"),
        Table(["a", HOSTILE], [[HOSTILE, "1"], ["x", "2"]]),
        Table([], [["a", "b"]], left=2),
        Picture("curves", HOSTILE, [picture, picture], HOSTILE),
        Details(HOSTILE, [Heading("inside", 3), Code(HOSTILE)]),
    ]


def test_hostile_text_is_shown_and_never_obeyed(blocks):
    page = check_inert(html(HOSTILE, blocks))
    assert page.text.count("<img src=x onerror=alert(1)>") >= 10  # as text, once per place
    assert "second line ````" in page.text


def test_the_policy_allows_the_pages_own_style_and_nothing_else(blocks):
    text = html("t", blocks)
    (policy,) = (
        a["content"] for tag, a in Parsed(text).tags if a.get("http-equiv") and tag == "meta"
    )
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert text.index("Content-Security-Policy") < text.index("<title>")


def test_the_page_adapts_to_the_screen_and_to_the_dark():
    text = html("t", [])
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in text
    assert "prefers-color-scheme: dark" in STYLE
    # Colours are known by their light form: what a figure uses has one for the dark.
    colors = set(re.findall(r"#[0-9a-f]{6}", svg(overlay("t", "u", {"a": Curve([0, 1], [0, 1])}))))
    assert colors
    for color in colors:
        assert f'[stroke="{color}"]' in STYLE and f'[fill="{color}"]' in STYLE


def test_figures_of_one_page_keep_their_own_ids(picture):
    text = html("t", [Picture("a", "alt", [picture, picture]), Picture("b", "alt", [picture])])
    ids = re.findall(r' id="([^"]+)"', text)
    assert ids and len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text)
    assert targets and set(targets) <= set(ids)


def test_styles_of_a_figure_become_attributes():
    text = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="9pt" height="9pt" viewBox="0 0 9 9">'
        "<style>*{x: y}</style><metadata>m</metadata>"
        "<text style=\"font: bold 11.5px 'A b', sans-serif; text-anchor: middle\">t</text>"
        '<path style="fill: none; stroke: #112233; stroke-width: 0.8"/></svg>'
    )
    assert inline(text, 'a "b"', "n") == (
        '<svg viewBox="0 0 9 9" role="img" aria-label="a &quot;b&quot;" stroke-linejoin="round">'
        '<text font-size="11.5" font-weight="bold" text-anchor="middle">t</text>'
        '<path fill="none" stroke="#112233" stroke-width="0.8" /></svg>'
    )


def test_markdown_says_the_same_with_its_marks_escaped(blocks):
    text = markdown(HOSTILE, blocks)
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside.replace("\\<script", "")
    # Up to the next empty line <details> begins HTML, in which Markdown is not read.
    outside = re.sub(r"<summary>.*</summary>", "<summary></summary>", outside)
    unescaped = re.sub(r"\\.", "", outside)
    assert set(re.findall(r"<[^>]*>", unescaped)) == {
        "<details>", "</details>", "<summary>", "</summary>"
    }  # fmt: skip
    # The only link is our picture's.
    assert re.findall(r"\]\(([^)]*)\)", unescaped) == ["curves.svg"]
    # A fence is longer than any in what it holds, so that it ends where it should.
    assert "\n`````text\n" in text and "\x1b" not in text


def test_markdown_tables_have_a_rule_and_one_line_per_row():
    table = Table(["loss", "n"], [["a|b\nc", "1"], ["d", "2"]])
    assert markdown("t", [table]) == (
        "# t\n\n| loss | n |\n| --- | ---: |\n| a\\|b⏎c | 1 |\n| d | 2 |\n"
    )


def test_a_text_of_a_megabyte_is_cut_and_says_so():
    assert shown("x" * 10**6, most=10) == "xxxxxxxxxx … (999,990 more characters)"
    assert len(html("t", [Code("<" * 10**6)])) < 2 * len(html("t", [])) + 10**5


def test_credentials_are_removed(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "abcdefgh12345")
    assert "abcdefgh12345" not in html("t", [Code("a abcdefgh12345 b"), Text("abcdefgh12345")])


def test_numbers_are_short_and_missing_ones_a_dash():
    assert [number(v) for v in (3, 1234567, 0.0213499, 12.3456, 98765.4, 0.0)] == [
        "3", "1,234,567", "0.02135", "12.35", "98,765", "0"
    ]  # fmt: skip
    assert [number(v) for v in (None, math.nan, math.inf, "5", True)] == [NONE] * 5


def test_accuracies_are_written_with_their_intervals():
    assert percent(Interval(0.3926, 0.3512, 0.4356)) == "39.3 % [35.1, 43.6]"
    assert points(Interval(0.031, -0.012, 0.05)) == "+3.1 [-1.2, +5.0]"
    assert percent(None) == points(None) == percent(Interval(math.nan, 0, 1)) == NONE


def test_a_page_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write(tmp_path / "file" / "x.html", "text")

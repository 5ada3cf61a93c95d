"""The documentation builds without a warning into pages that lead somewhere and load nothing.

Sphinx runs in a process of its own; a machine without it can still collect this file.
"""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(importlib.util.find_spec("furo") is None, reason="pip install .[docs]"),
]

LOADING = ("src", "srcset", "data", "poster", "action")


class Page(HTMLParser):
    """Where one page leads, what it loads, and the places in it that can be named."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.leads, self.loads, self.text = {""}, [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[key] for key in ("id", "name") if given.get(key)}
        if given.get("href"):
            (self.leads if tag == "a" else self.loads).append(given["href"])
        self.loads += [given[key] for key in LOADING if given.get(key)]

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-W",
            "--keep-going",
            "-q",
            "-d",
            out / ".tree",
            "docs",
            out,
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return out


@pytest.fixture(scope="module")
def pages(site):
    found = {path: Page(path) for path in site.rglob("*.html")}
    assert len(found) > 40
    return found


def test_every_internal_link_leads_to_a_file_and_a_place_in_it(site, pages):
    lost = []
    for path, page in pages.items():
        for link in (*page.leads, *page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            place = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if place.is_dir():
                place /= "index.html"
            known = pages[place].ids if place in pages else {unquote(parts.fragment)}
            if (
                not place.is_relative_to(site)
                or not place.exists()
                or unquote(parts.fragment) not in known
            ):
                lost.append((path.relative_to(site).as_posix(), link))
    assert lost == []


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for path, page in pages.items():
        away = [link for link in page.loads if urlsplit(link).netloc]
        assert away == [], path
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"""(url\(|@import)\s*["']?(https?:)?//""", text), style


def test_links_to_the_source_lead_to_its_lines(site, pages):
    """`gspo` in the reference, and a link of a page to a file outside of docs/."""
    (line,) = [
        i
        for i, text in enumerate((ROOT / "gspo_jax/algo/losses.py").read_text().splitlines(), 1)
        if text.startswith("def gspo(")
    ]
    assert f"files/gspo_jax/algo/losses.py.html#L-{line}" in pages[site / "api.html"].leads
    assert "../files/tests/faults/index.html" not in pages[site / "reliability.html"].leads
    assert "files/tests/faults/index.html" in pages[site / "reliability.html"].leads
    assert "../../files/benchmarks/results/clip_fraction.json.html" not in page_links(pages, site)
    assert "../files/benchmarks/results/clip_fraction.json.html" in page_links(pages, site)


def page_links(pages, site):
    return pages[site / "results/clip_fraction.html"].leads


def test_formulas_are_pictures_with_their_text(site):
    text = (site / "equations.html").read_text(encoding="utf-8")
    formulas = len(re.findall(r'<(?:span|div) class="math">', text))
    assert formulas == text.count('role="img" aria-label="') > 60


def test_the_page_of_a_comparison_lies_where_it_is_linked(site, pages):
    assert "results/losses/index.html" in pages[site / "index.html"].leads
    made = (site / "results/losses/index.html").read_bytes()
    assert made == (ROOT / "docs/results/losses/index.html").read_bytes()


def test_signatures_have_the_names_of_the_source(pages, site):
    text = "".join(pages[site / "api.html"].text)
    assert "old_logp: PerToken | None" in text and "clip_low: float = 3e-4" in text
    assert "jaxlib._jax" not in text and "<class" not in text

"""What tests of figures and pages share: a run's rows, hostile text, pages read by a parser."""

import re
from html.parser import HTMLParser

from gspo_jax.view.page import STYLE


def row(step, **more):
    return {
        "step": step,
        "updates": 4 * step,
        "reward": 0.3 + 0.01 * step,
        "loss": 0.001,
        "clip_frac": 0.25,
        "clip_frac_low": 0.1,
        "clip_frac_high": 0.15,
        "ratio_q05": 0.99,
        "ratio_q50": 1.0,
        "ratio_q95": 1.02,
        "entropy": 0.5,
        "completions/mean_length": 18.0,
        "completions/min_length": 12,
        "completions/max_length": 30,
        "completions/clipped_ratio": 0.02,
        "frac_reward_zero_std": 0.25,
        "grad_norm": 0.8,
        "tokens_per_second": 12_000.0,
        **more,
    }


def measured(greedy):
    return {
        "eval/n": 64,
        "eval/greedy": greedy,
        "eval/greedy_low": greedy - 0.03,
        "eval/greedy_high": greedy + 0.05,
        "eval/avg@8": greedy - 0.1,
        "eval/avg@8_low": greedy - 0.12,
        "eval/avg@8_high": greedy - 0.09,
    }


ROWS = [{"step": 0, **measured(0.4)}, *map(row, range(1, 10)), row(10, **measured(0.7))]


HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    "</pre></td></svg><a href='javascript:alert(1)'>x</a>\" onload=\"alert(1)"
    "\x1b]0;title\x07\x1b[31mred\u202ertl\x00 [x](javascript:alert(1)) ![i](https://evil.example/i.png)"
    " <!-- ]]> `code` | cell **bold** $math$ {{template}}"
)
TAGS = """
html head meta link title style body main h1 h2 h3 p ul li pre div table thead tbody tr th td
figure figcaption details summary svg g path text defs clippath rect use tspan
"""


class Parsed(HTMLParser):
    """Every tag with its attributes, and all text, as a browser would read them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check_inert(text):
    """Nothing in it runs, loads, links or styles but by the page's own rules."""
    page = Parsed(text)
    assert page.open == []
    assert {tag for tag, _ in page.tags} <= set(TAGS.split())
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), attributes
        assert "src" not in attributes and "style" not in attributes, (tag, attributes)
        if tag == "link":
            assert attributes == {"rel": "icon", "href": "data:,"}
        else:
            assert attributes.get("href", "#").startswith("#")
        for value in attributes.values():
            assert "url(" not in (value or "") or value.startswith("url(#")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    assert "@import" not in STYLE and "url(" not in STYLE
    return page


class Tables(HTMLParser):
    """Every table of a page, as lists of the texts in its cells."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.cell = [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self.cell)
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data

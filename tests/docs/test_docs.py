"""docs/equations.md says what the code does: defaults, figures, numbers, and snippets that run."""

import ast
import inspect
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import plot_losses
import pytest

from gspo_jax.algo import advantages, losses
from gspo_jax.algo.losses import LOSSES
from gspo_jax.config.load import load_config, packaged_config
from gspo_jax.config.names import SETTINGS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGE = (DOCS / "equations.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL)  # without the snippets
SECTIONS = {
    title: body for title, body in re.findall(r"^### (\S+)\n(.*?)(?=^##|\Z)", PROSE, re.M | re.S)
}


def rows(text):
    """First cell -> the other cells of every table row; formulas may hold no bare bar."""
    lines = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def stated(text):
    """`name=value` in code spans, as Python values."""
    return {k: ast.literal_eval(v) for k, v in re.findall(r"`(\w+)=([^`]+)`", text)}


def defaults(function):
    return {
        p.name: p.default
        for p in inspect.signature(function).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.default is not p.empty
    }


# ---------------------------------------------------------------------------------- the page


def test_every_loss_has_its_section_in_the_order_of_the_table():
    assert list(SECTIONS) == list(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_a_section_has_formula_source_defaults_names_elsewhere_use_and_figure(name):
    table = rows(SECTIONS[name])
    assert f"`losses.{name}`" in table
    assert all(table[row][0] for row in ("source", "defaults", "TRL", "verl", "when"))
    assert SECTIONS[name].count("\n$$\n") == 2
    assert f"](images/{name}.svg)" in SECTIONS[name]


@pytest.mark.parametrize("name", LOSSES)
def test_stated_defaults_of_a_loss_are_those_of_its_signature(name):
    expected = defaults(LOSSES[name])
    assert expected.pop("weight") is None
    assert stated(rows(SECTIONS[name])["defaults"][0]) == expected


@pytest.mark.parametrize("name", LOSSES)
def test_the_source_on_the_page_is_the_source_in_the_docstring(name):
    source = re.findall(r"\((https://[^)]+)\)", rows(SECTIONS[name])["source"][0])
    if name != "gspo_token":  # which cites by name what gspo gives in full
        assert set(source) <= set(re.findall(r"https://[\w./-]+\w", LOSSES[name].__doc__))
    assert source


def test_stated_defaults_of_advantages_are_those_of_their_signatures():
    table = rows(PROSE.split("## Advantages")[1].split("\n## ")[0])
    named = {
        name: table[f"`{name}`"]
        for name in re.findall(r"^\| `(\w+)` \|", PROSE, re.MULTILINE)
        if f"`{name}`" in table
    }
    assert set(advantages.ADVANTAGES) <= set(named)
    for name, cells in named.items():
        expected = {k: v for k, v in defaults(getattr(advantages, name)).items() if k != "groups"}
        assert stated(cells[1]) == expected, name


def test_names_of_the_library_on_the_page_exist():
    for module, name in re.findall(r"`(losses|advantages)\.(\w+)", PROSE):
        assert hasattr({"losses": losses, "advantages": advantages}[module], name), name


def test_settings_on_the_page_exist():
    named = set(re.findall(r"`(\w+(?:\.\w+)+)(?==|`)", PROSE))
    named = {name for name in named if name.partition(".")[0] in ("algo", "optim", "rollout")}
    assert len(named) > 5
    assert {n for n in named if not any(n == s or n.startswith(f"{s}.") for s in SETTINGS)} == set()


def test_the_band_drawn_as_the_demos_is_the_demos():
    loss = load_config(packaged_config("demo.yaml")).algo.loss
    (drawn,) = [band[1:4] for band in plot_losses.BANDS if "demo" in band[0]]
    assert drawn == (loss["name"], loss["clip_low"], loss["clip_high"])


def test_figures_are_those_that_the_page_shows_and_small():
    shown = re.findall(r"\]\(images/(\w+\.svg)\)", PROSE)
    drawn = {path.name for path in (DOCS / "images").glob("*.svg")}
    assert drawn == set(shown)
    assert max((DOCS / "images" / name).stat().st_size for name in drawn) < 60_000


def test_formulas_hold_nothing_that_github_takes_for_markdown():
    """A backslash before punctuation is an escape there, and never reaches the formula."""
    inline = re.findall(r"(?<!\$)\$([^$\n]+)\$(?!\$)", PROSE)
    display = re.findall(r"^\$\$\n(.*?)^\$\$", PROSE, re.MULTILINE | re.DOTALL)
    assert len(inline) > 20 and len(display) > len(LOSSES)
    assert [f for f in inline + display if re.search(r"\\[^A-Za-z]|\|", f)] == []


@pytest.mark.long
def test_snippets_run_in_order_and_print_what_the_page_shows():
    code = re.findall(r"^```python\n(.*?)^```\n+```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(code) == PAGE.count("```python\n") == 3
    namespace = {}
    for snippet, shown in code:
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile(snippet, "equations.md", "exec"), namespace)
        assert printed.getvalue() == shown


# -------------------------------------------------------------------------------- the figures


def test_every_loss_has_a_range_to_be_drawn_over():
    assert set(plot_losses.RANGES) == set(LOSSES)


@pytest.mark.parametrize(
    ("name", "ratio", "good", "bad"),
    [
        # Inside the range s Â; a good response above it and a bad one below it weigh nothing.
        ("gspo", [0.9996, 1.0, 1.0005], [0.9996, 1, 0], [0, -1, -1.0005]),
        ("gspo_token", [0.9996, 1.0, 1.0005], [0.9996, 1, 0], [0, -1, -1.0005]),
        ("grpo", [0.5, 1.1, 3.0], [0.5, 1.1, 0], [0, -1.1, -3]),
        ("cispo", [0.5, 4.0, 7.0], [0.5, 4, 5], [-0.5, -4, -5]),
        ("reinforce", [0.5, 1.0, 7.0], [1, 1, 1], [-1, -1, -1]),
    ],
)
def test_weights_in_the_figures(name, ratio, good, bad):
    drawn = plot_losses.gradient_weights(name, np.array(ratio))
    np.testing.assert_allclose(drawn, [good, bad], rtol=1e-5)


@pytest.mark.parametrize(("name", "slope"), [("gspo", -1), ("grpo", -1), ("dapo", 0), ("luspo", 0)])
def test_weights_against_the_length_fall_as_one_over_it_or_stay(name, slope):
    weight = plot_losses.length_weights(name, np.array([1, 4, 16]))
    np.testing.assert_allclose(weight / weight[0], np.array([1.0, 4, 16]) ** slope, rtol=1e-5)


@pytest.mark.long
def test_clip_fractions_in_the_figure_are_those_of_random_responses():
    noise = 0.02 * jax.random.normal(jax.random.key(1), (20_000, 64))
    adv = jnp.where(jnp.arange(20_000) % 2 == 0, 1.0, -1.0)
    inputs = jnp.zeros(noise.shape), adv, jnp.ones(noise.shape, bool)
    _, metrics = LOSSES["gspo"](noise, *inputs, clip_low=2e-3, clip_high=2.5e-3)
    drawn = plot_losses.clip_fraction("gspo", np.array([0.02 / 8]), 2e-3, 2.5e-3)
    # The standard error of a share of 0.2 among 20,000 is 0.003.
    np.testing.assert_allclose(drawn, metrics["clip_frac"], atol=0.01)


def test_shares_of_the_section_on_short_responses():
    section = PROSE.split("## A clip range for short responses")[1].split("\n## ")[0]
    sigma = 0.021  # per token, at which 3e-4 and 4e-4 clip 15 % of 4096 tokens
    std = np.array([3.3e-4, sigma / np.sqrt(4096), sigma / np.sqrt(24)])
    share = plot_losses.clip_fraction("gspo", std, 3e-4, 4e-4)
    np.testing.assert_allclose(share, [0.15, 0.15, 0.47], atol=0.005)
    assert "15 %" in section and "3.3e-4" in section and "47 %" in section
    assert plot_losses.clip_fraction("grpo", np.array([sigma]), 0.2, 0.2)[0] == 0
    # ε at once, half and twice the spread.
    for epsilon, percent in ((1e-3, 16), (0.5e-3, 31), (2e-3, 2)):
        share = plot_losses.clip_fraction("gspo", np.array([1e-3]), epsilon, epsilon)
        assert round(100 * float(share[0])) == percent
        assert f"{percent} %" in section


def test_a_figure_is_written_with_the_same_bytes_every_time(tmp_path):
    with plot_losses.plt.rc_context(plot_losses.SVG):
        for name in ("a", "b"):
            plot_losses.draw_loss("gspo", tmp_path / f"{name}.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()

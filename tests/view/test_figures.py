"""Figures of runs: what each panel shows, and that any numbers can be drawn."""

import math

import matplotlib
import pytest
from matplotlib.figure import Figure
from page_cases import ROWS, measured, row
from PIL import Image

from gspo_jax.view.drawing import STYLE, Curve, differences, overlay, short, svg, write
from gspo_jax.view.figures import overlaid_panels, run_panels, smooth
from gspo_jax.view.run_files import Interval


def drawn(panel):
    with matplotlib.rc_context(STYLE):
        axis = Figure().subplots()
        panel.draw(axis)
    return axis


def panels(rows, **kwargs):
    return {panel.title: panel for panel in run_panels(rows, **kwargs)}


def line(axis, label):
    (found,) = (x for x in axis.get_lines() if x.get_label() == label)
    return list(found.get_xdata()), list(found.get_ydata())


def test_a_run_has_a_panel_for_all_that_it_records():
    assert list(panels(ROWS)) == [
        "Reward",
        "Held-out accuracy",
        "Clipped",
        "Importance ratio",
        "Entropy",
        "Response length",
        "Gradient norm",
        "Groups without spread",
        "Throughput",
    ]
    assert "Divergence from the reference" in panels([row(1, kl=0.01)])
    # Supervised training has no reward, but a loss that says something.
    assert list(panels([{"step": 1, "loss": 2.0, "grad_norm": 1.0}])) == ["Loss", "Gradient norm"]
    assert all(panel.unit and panel.x for panel in run_panels(ROWS))


def test_curves_lie_at_their_number_of_updates():
    x, y = line(drawn(panels(ROWS)["Clipped"]), "above 1 + ε_high")
    assert x == [4 * step for step in range(1, 11)]
    assert y == pytest.approx([0.15] * 10)
    assert line(drawn(panels(ROWS)["Importance ratio"]), "median")[1] == [1.0] * 10


def test_a_run_without_updates_recorded_is_drawn_against_its_steps():
    rows = [{"step": s, "entropy": 0.5, "grad_norm": 1.0} for s in range(1, 6)]
    assert list(drawn(panels(rows)["Gradient norm"]).get_lines()[0].get_xdata()) == [1, 2, 3, 4, 5]


def test_evaluations_are_points_with_their_intervals_and_n():
    panel = panels(ROWS)["Held-out accuracy"]
    assert panel.unit == "accuracy ± 95 %, n = 64"
    by_label = {container.get_label(): container for container in drawn(panel).containers}
    assert set(by_label) == {"avg@8", "greedy"}
    points, _, (bars,) = by_label["greedy"]
    assert list(points.get_xdata()) == [0, 40] and list(points.get_ydata()) == [0.4, 0.7]
    # from greedy - 0.03 to greedy + 0.05
    assert bars.get_segments()[1][:, 1] == pytest.approx([0.67, 0.75])


def test_an_evaluation_without_interval_is_not_drawn():
    rows = [row(1, **{"eval/greedy": 0.5, "eval/n": 64}), row(2)]
    assert "Held-out accuracy" not in panels(rows)


def test_the_reward_has_the_interval_of_its_window():
    # Ten steps, a window of 5 in the middle; rewards 0, 1, 0, 1, ...: about the 5th (of 0, 1, 0,
    # 1, 0) mean 0.4, sd 0.5477, interval 0.4 ± 2.776 * 0.5477 / sqrt(5) = ± 0.680
    found = smooth([0, 1] * 5)
    assert found[4] == pytest.approx((0.4, -0.280, 1.080), abs=1e-3)
    assert found[0].value == pytest.approx(1 / 3)  # 0, 1, 0
    axis = drawn(panels([row(k, reward=k % 2) for k in range(1, 11)])["Reward"])
    assert len(axis.collections) == 1  # the band


def test_a_short_run_has_no_window_and_no_band():
    assert [v.value for v in smooth([1, 2, 9])] == [1, 2, 9]
    axis = drawn(panels(ROWS[:4])["Reward"])
    assert not axis.collections


def test_a_long_run_is_thinned_and_keeps_every_evaluation():
    rows = [row(s, **(measured(0.5) if s % 333 == 0 else {})) for s in range(1, 1001)]
    found = panels(rows, points=100)
    assert len(drawn(found["Entropy"]).get_lines()[0].get_xdata()) == 100
    assert len(drawn(found["Held-out accuracy"]).containers[0][0].get_xdata()) == 3


def test_several_runs_are_a_curve_each_in_every_panel():
    found = overlaid_panels({"a": ROWS, "b_$x$": [row(k, entropy=0.7) for k in range(1, 7)]})
    by_title = {panel.title: panel for panel in found}
    assert list(by_title) == [
        "Training reward",
        "Clipped",
        "Entropy",
        "Response length",
        "Gradient norm",
        "Throughput",
    ]
    axis = drawn(by_title["Entropy"])
    assert line(axis, "a")[1] == pytest.approx([0.5] * 10)
    assert line(axis, "b_$x$") == ([4, 8, 12, 16, 20, 24], pytest.approx([0.7] * 6))


def test_curves_of_one_colour_differ_in_their_dashes():
    curves = {str(k): Curve([0, 1], [k, k]) for k in range(12)}
    lines = drawn(overlay("", "", curves)).get_lines()
    assert len({(x.get_color(), x.get_linestyle()) for x in lines}) == 12


def test_differences_are_bars_coloured_by_what_they_show():
    rows = {
        "up": Interval(2, 1, 3),
        "down": Interval(-2, -3, -1),
        "open": Interval(0.5, -1, 2),
        "one seed": Interval(1, -math.inf, math.inf),
    }
    axis = drawn(differences(rows, {"up": [1.5, math.nan, 2.5]}, unit="points"))
    assert [text.get_text() for text in axis.get_yticklabels()] == list(rows)
    bars = {
        int(x.get_ydata()[0]): (tuple(x.get_xdata()), x.get_color())
        for x in axis.get_lines()[1:]
        if len(x.get_xdata()) == 2 and x.get_linestyle() == "-"
    }
    assert {k: ends for k, (ends, _) in bars.items()} == {0: (1, 3), 1: (-3, -1), 2: (-1, 2)}
    assert len({color for _, color in bars.values()}) == 3
    assert axis.yaxis_inverted()  # the first on top
    ticks = [x for x in axis.get_lines() if x.get_marker() == "|"]
    assert list(ticks[0].get_xdata()) == [1.5, 2.5]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The dynamics as PNG and SVG; hostile labels in the title."""
    home = tmp_path_factory.mktemp("pictures") / "new"
    found = run_panels([row(1), row(2, ratio_q95=None, grad_norm=math.inf), row(3)])[2:4]
    for ending in ("png", "svg"):
        write(found, home / f"x.{ending}", title="$\\frac{$ <script> \x1b[31m\x00\u202e")
    return home


def test_pictures_are_whole(pictures):
    assert sorted(path.name for path in pictures.iterdir()) == ["x.png", "x.svg"]
    with Image.open(pictures / "x.png") as image:
        assert image.width > image.height > 300


def test_an_svg_is_the_same_each_time_and_its_text_is_text(pictures):
    text = (pictures / "x.svg").read_text()
    assert ">Importance ratio</text>" in text
    assert "$\\frac{$ &lt;script&gt;" in text and "\x1b" not in text and "\u202e" not in text
    assert "dc:date" not in text
    panel = overlay("A", "b", {"<c>": Curve([0, 1, 2], [0.5, math.nan, 0.7], [0, 0, 0], [1, 1, 1])})
    assert svg(panel) == svg(panel)
    assert "&lt;c&gt;" in svg(panel)


def test_nothing_to_draw_is_said_to_be_nothing(tmp_path):
    rows = [{"step": 1, "unknown": 2}]
    assert run_panels(rows) == overlaid_panels({"a": rows})
    assert "not recorded" in svg(run_panels(rows)[0])


def test_large_numbers_are_written_short():
    assert [short(v) for v in (0, 12.5, 586_282, 1_500_000, -2e9)] == [
        "0", "12.5", "586k", "1.5M", "-2G"
    ]  # fmt: skip

"""The picture of a run, from its metrics.jsonl."""

import json
import subprocess
import sys

import pytest
from matplotlib import pyplot as plt
from PIL import Image

from gspo_jax import report
from gspo_jax.errors import DataError
from gspo_jax.report import draw, dynamics, read_metrics


def row(step, **more):
    return {
        "step": step,
        "updates": 4 * step,
        "reward": 0.3 + 0.01 * step,
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
        "grad_norm": 0.8,
        **more,
    }


def measured(greedy):
    return {
        "eval/greedy": greedy,
        "eval/greedy_low": greedy - 0.03,
        "eval/greedy_high": greedy + 0.05,
        "eval/avg@8": greedy - 0.1,
        "eval/avg@8_low": greedy - 0.12,
        "eval/avg@8_high": greedy - 0.09,
    }


ROWS = [{"step": 0, **measured(0.4)}, *map(row, range(1, 10)), row(10, **measured(0.7))]


def write(run, rows, tail=""):
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)
    return run


@pytest.fixture
def panels(monkeypatch):
    """Draws rows and returns the axes by their titles."""
    drawn = []
    monkeypatch.setattr(report.plt, "close", drawn.append)

    def of(rows, tmp_path):
        draw(rows, tmp_path / "x.png")
        return {axis.get_title("left"): axis for axis in drawn[-1].axes}

    yield of
    monkeypatch.undo()
    plt.close("all")


def line(axis, label):
    (found,) = (x for x in axis.get_lines() if x.get_label() == label)
    return list(found.get_xdata()), list(found.get_ydata())


def test_a_run_becomes_a_picture_of_six_labelled_panels(tmp_path, panels):
    axes = panels(ROWS, tmp_path)
    titles = {"Reward", "Clipped", "Importance ratio", "Entropy", "Response length"}
    assert set(axes) - {""} == titles | {"Gradient norm"}  # "" is the second scale of a panel
    for title in set(axes) - {""}:
        assert axes[title].get_xlabel() == "optimizer updates"
        assert axes[title].get_ylabel()


def test_curves_lie_at_their_number_of_updates(tmp_path, panels):
    axes = panels(ROWS, tmp_path)
    x, y = line(axes["Clipped"], "above 1 + ε_high")
    assert x == [4 * step for step in range(1, 11)]
    assert y == pytest.approx([0.15] * 10)
    assert line(axes["Importance ratio"], "median")[1] == [1.0] * 10


def test_evaluations_are_points_with_their_intervals(tmp_path, panels):
    axis = panels(ROWS, tmp_path)["Reward"]
    by_label = {container.get_label(): container for container in axis.containers}
    assert set(by_label) == {"held-out avg@8", "held-out greedy"}
    points, _, (bars,) = by_label["held-out greedy"]
    assert list(points.get_xdata()) == [0, 40] and list(points.get_ydata()) == [0.4, 0.7]
    # from greedy - 0.03 to greedy + 0.05
    assert bars.get_segments()[1][:, 1] == pytest.approx([0.67, 0.75])


def test_a_run_without_updates_recorded_is_drawn_against_its_steps(tmp_path, panels):
    rows = [{"step": s, "loss": 1.0 / s, "entropy": 0.5, "grad_norm": 1.0} for s in range(1, 6)]
    axes = panels(rows, tmp_path)
    assert list(axes["Gradient norm"].get_lines()[0].get_xdata()) == [1, 2, 3, 4, 5]
    assert [text.get_text() for text in axes["Clipped"].texts] == ["not recorded"]


def test_torn_lines_and_foreign_ones_are_left_out(tmp_path):
    run = write(tmp_path / "run", ROWS, tail='[1]\n{"no": "step"}\n\x00\n{"step": 11, "rew')
    assert [r["step"] for r in read_metrics(run)] == list(range(11))


def test_a_step_that_stands_twice_counts_once_with_its_last_line(tmp_path):
    run = write(tmp_path / "run", [row(1, reward=0.5), row(2), row(1, reward=0.75)])
    assert [(r["step"], r["reward"]) for r in read_metrics(run)] == [(1, 0.75), (2, 0.32)]


def test_null_values_leave_gaps_and_no_error(tmp_path):
    run = write(tmp_path / "run", [row(1), row(2, ratio_q95=None, grad_norm=None), row(3)])
    assert dynamics(run).is_file()


def test_the_picture_is_replaced_whole_and_large_enough_to_read(tmp_path):
    run = write(tmp_path / "run", ROWS)
    path = dynamics(run)
    assert path == run / "plots" / "dynamics.png"
    assert dynamics(run / "metrics.jsonl") == path  # either may be named
    assert [p.name for p in path.parent.iterdir()] == ["dynamics.png"]
    with Image.open(path) as image:
        assert image.width >= 1200 and image.height >= 600


def test_a_long_run_is_thinned_and_keeps_every_evaluation(tmp_path, panels, monkeypatch):
    monkeypatch.setattr(report, "MOST_POINTS", 100)
    rows = [row(s, **(measured(0.5) if s % 333 == 0 else {})) for s in range(1, 1001)]
    axes = panels(rows, tmp_path)
    assert len(axes["Entropy"].get_lines()[0].get_xdata()) == 100
    assert len(axes["Reward"].containers[0][0].get_xdata()) == 3


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "re'])
def test_a_run_without_metrics_is_told_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(
        DataError, match=r"metrics\.jsonl: (holds no step yet|No such file)"
    ) as error:
        dynamics(tmp_path)
    assert "\n" not in str(error.value)


def test_drawing_never_imports_jax(tmp_path):
    run = write(tmp_path / "run", ROWS)
    code = (
        "import sys; from gspo_jax.cli import main; code = main(['report', sys.argv[1]])\n"
        "sys.exit(code or ('jax' in sys.modules) * 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run / "plots" / "dynamics.png")

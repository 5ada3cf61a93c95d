"""The terminal's view says what the page says, in plain text."""

import io

import pytest
from monitor_cases import make_run, measured, row
from rich.console import Console

from gspo_jax.view import terminal
from gspo_jax.view.terminal import show, sparkline


@pytest.fixture
def run(tmp_path):
    rows = [row(k, **{"completions/clipped_ratio": 0.5}) for k in range(1, 30)]
    samples = [
        {"step": 30, "prompt": "2+2?", "completion": "\x1b]0;owned\x07[bold]4\u202e", "answer": "4"}
    ]
    return make_run(tmp_path / "demo", [*rows, row(30, **measured(0.5))], samples=samples)


def printed(run, terminal=False):
    console = Console(file=io.StringIO(), width=140, height=50, force_terminal=terminal)
    show([run], console)
    return console.file.getvalue()


def test_without_a_terminal_it_is_printed_once(run):
    out = printed(run)
    assert "demo" in out and "30/100" in out and "2:20" in out  # 70 steps of 2 s
    assert "50.0 % [37.5, 56.2] greedy, n = 64, step 30" in out
    assert "▁" in out and "0.251 → 0.28" in out
    assert "rollout.max_completion_length" not in out.split("curves")[0]
    assert "2+2?" in out and "[bold]4" in out
    assert "\x1b" not in out and "owned" not in out and "\u202e" not in out


def test_on_a_terminal_it_lives_until_interrupted(run, monkeypatch):
    waited = []

    def wait(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(terminal.time, "sleep", wait)
    out = printed(run, terminal=True)
    assert len(waited) == 2 and "\x1b[?1049l" in out  # the former screen is back
    assert "30/100" in out.split("\x1b[?1049l")[1]  # and the last view stays


def test_nothing_yet_is_said(tmp_path):
    assert "No run is here yet." in printed(tmp_path)


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([0, 0, 7, 7], 2, "▁█"),
        ([1, 1, 1], 8, "▁▁▁"),
        ([3], 8, "▁"),
        ([-1, 0, 1], 2, "▁█"),  # stretches of one and of two: -1 and 0.5
    ],
)
def test_a_sparkline_has_the_means_of_equal_stretches(values, width, line):
    assert sparkline(values, width) == line

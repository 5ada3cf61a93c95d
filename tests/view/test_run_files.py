"""What is read from a run directory: whole lines, plain values, and no more than is needed."""

import json
import math

import pytest

from gspo_jax.errors import DataError
from gspo_jax.view import run_files
from gspo_jax.view.run_files import (
    accuracies,
    read_metrics,
    read_run,
    series,
    settings,
)

ROWS = [{"step": step, "reward": 0.3 + 0.01 * step} for step in range(11)]


def write(run, rows, tail=""):
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)
    return run


def test_torn_lines_and_foreign_ones_are_left_out(tmp_path):
    run = write(tmp_path / "run", ROWS, tail='[1]\n{"no": "step"}\n\x00\n{"step": 11, "rew')
    assert [r["step"] for r in read_metrics(run)] == list(range(11))


def test_a_step_that_stands_twice_counts_once_with_its_last_line(tmp_path):
    rows = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.32}, {"step": 1, "reward": 0.75}]
    run = write(tmp_path / "run", rows)
    assert [(r["step"], r["reward"]) for r in read_metrics(run)] == [(1, 0.75), (2, 0.32)]


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "re'])
def test_a_run_without_metrics_is_told_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(
        DataError, match=r"metrics\.jsonl: (holds no step yet|No such file)"
    ) as error:
        read_run(tmp_path)
    assert "\n" not in str(error.value)


def test_a_run_of_metrics_alone_is_read_with_all_else_empty(tmp_path):
    run = read_run(write(tmp_path / "a", ROWS))
    assert (run.name, run.rows) == ("a", ROWS)
    assert (run.status, run.env, run.config, run.config_text) == ({}, {}, {}, "")
    assert run.warnings == [] and run.samples == []


GARBAGE = {
    "status.json": '["no object"]',
    "env.json": "[" * 100_000,
    "config.yaml": "a: &a [x, x]\nb: [*a, *a]\n",
    "samples.jsonl": '{"step": 1, "prompt": "whole"}\n{"step": 2, "pro',
    "warnings.log": "\x00\xff\n\n  \nlast\n",
}


def test_garbage_beside_the_metrics_is_left_out(tmp_path):
    run = write(tmp_path / "a", ROWS)
    for name, text in GARBAGE.items():
        (run / name).write_bytes(text.encode("latin-1"))
    read = read_run(run)
    assert (read.status, read.env, read.config) == ({}, {}, {})
    assert [row["prompt"] for row in read.samples] == ["whole"]
    assert read.warnings[-1] == "last" and len(read.warnings) == 2


def test_the_newest_samples_of_a_long_file_are_read_from_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(run_files, "TAIL", 1000)
    run = write(tmp_path / "a", ROWS)
    lines = [json.dumps({"step": k, "completion": "x" * 80}) for k in range(500)]
    (run / "samples.jsonl").write_text("\n".join(lines) + "\n")
    assert [row["step"] for row in read_run(run, samples=3).samples] == [497, 498, 499]
    # 1000 bytes hold 8 whole lines of 112.
    assert len(read_run(run, samples=100).samples) == 8


def test_settings_are_dotted_names_and_texts():
    text = "algo:\n  loss: {name: gspo, clip_low: 3.0e-4}\n  kl: {}\nrun:\n  seed: 3\n  x: null\n"
    assert settings(text) == {
        "algo.loss.name": "gspo",
        "algo.loss.clip_low": "0.0003",
        "algo.kl": "{}",
        "run.seed": "3",
        "run.x": "null",
    }


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x]\nb: *a",  # what a billion laughs are made of
        "a: &a\n  b: *a",  # a tree without end
        "!!python/object/apply:os.system ['touch /tmp/canary']",
        "a: " + "[" * 5000,
        "a: b: c",
        "- a list",
        "",
    ],
)
def test_settings_of_hostile_yaml_are_none(text):
    assert settings(text) == {}


def test_a_series_is_taken_where_both_numbers_are():
    rows = [
        {"step": 0, "y": 1.0},
        {"step": 1, "y": 2.0, "tokens": 50, "updates": 4},
        {"step": 2, "y": math.nan, "tokens": 90, "updates": 8},
        {"step": 3, "y": 4.0, "tokens": None, "updates": 12},
        {"step": 4, "y": 5.0, "updates": 16},
    ]
    assert series(rows, "y") == ([0, 4, 12, 16], [1.0, 2.0, 4.0, 5.0])
    assert series(rows, "y", x="tokens") == ([0, 50], [1.0, 2.0])  # before training: no tokens


def test_an_accuracy_needs_n_and_both_ends_of_its_interval():
    row = {
        "eval/n": 50,
        "eval/greedy": 0.5,
        "eval/greedy_low": 0.4,
        "eval/greedy_high": 0.7,
        "eval/avg@8": 0.5,
        "eval/avg@8_low": None,
        "eval/avg@8_high": 0.7,
        "eval/truncated": 0.1,
    }
    assert accuracies(row) == {"eval/greedy": (0.5, 0.4, 0.7)}
    assert accuracies({**row, "eval/n": None}) == {}

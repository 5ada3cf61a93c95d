"""A run is read on while it is written, whatever happens to its files."""

import os
import time

import pytest
from monitor_cases import append, lines, make_run, measured, row

from gspo_jax.errors import DataError
from gspo_jax.view.follow import MOST_LINE, MOST_RECENT, NEWEST_RUNS, Follower, Watch, find_runs


def follow(follower, seconds=10.0):
    follower.advance(time.monotonic() + seconds)
    return [r["step"] for r in follower.rows]


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", [row(k) for k in range(1, 6)])


def test_what_is_appended_is_read_once(run, monkeypatch):
    follower = Follower(run)
    assert follow(follower) == [1, 2, 3, 4, 5]
    append(run, row(6, reward=0.75))
    taken = []
    monkeypatch.setattr(follower, "_take", taken.append)
    follower.advance(time.monotonic() + 1.0)
    follower.advance(time.monotonic() + 1.0)
    assert [r["step"] for r in taken] == [6] and taken[0]["reward"] == 0.75


def test_a_line_that_is_still_being_written_waits_for_its_end(run):
    follower = Follower(run)
    text = lines([row(6)])
    path = run / "metrics.jsonl"
    before = path.read_text()
    path.write_text(before + text[:20])
    assert follow(follower) == [1, 2, 3, 4, 5]
    path.write_text(before + text)
    assert follow(follower) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "garbage",
    [b"{torn", b"\0" * 5000, b"[1]", b'{"step": "7"}', b'{"step": -1}', b"x" * (MOST_LINE + 5)],
)
def test_garbage_is_skipped(run, garbage):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(garbage + b"\n" + lines([row(6)]).encode())
    assert follow(Follower(run)) == [1, 2, 3, 4, 5, 6]


def test_a_step_that_is_written_again_replaces_its_line(run):
    """As a run does when its evaluation comes later: the file is a new one."""
    follower = Follower(run)
    follow(follower)
    new = run / "new"
    new.write_text(lines([*(row(k) for k in range(1, 5)), row(5, **measured(0.5)), row(6)]))
    os.replace(new, run / "metrics.jsonl")
    assert follow(follower) == [1, 2, 3, 4, 5, 6]
    assert follower.last_eval["step"] == 5 and follower.last_eval["eval/greedy"] == 0.5
    assert [r["step"] for r in follower.recent] == [1, 2, 3, 4, 5, 6]
    # Six steps of 2 s each: what step 5 took is not counted twice.
    assert follower.recent[-1]["seconds"] == 12.0


def test_a_run_that_goes_back_to_its_checkpoint_takes_its_later_steps_with_it(run):
    append(run, row(6, **measured(0.5)))
    follower = Follower(run)
    follow(follower)
    (run / "metrics.jsonl").write_text(lines([row(1), row(2), row(3)]))
    assert follow(follower) == [1, 2, 3] and follower.last_eval is None
    append(run, row(4, reward=0.125))
    assert follow(follower) == [1, 2, 3, 4] and follower.recent[-1]["reward"] == 0.125


@pytest.mark.parametrize("longer", [False, True])
def test_another_file_in_its_place_begins_anew(run, longer):
    follower = Follower(run)
    follow(follower)
    count = 40 if longer else 2
    (run / "metrics.jsonl").write_text(lines(row(k, reward=0.5) for k in range(11, 11 + count)))
    assert follow(follower) == list(range(11, 11 + count))
    assert follower.first["step"] == 11


def test_a_file_that_is_deleted_leaves_nothing_and_may_come_back(run):
    follower = Follower(run)
    follow(follower)
    (run / "metrics.jsonl").unlink()
    assert follow(follower) == [] and follower.is_there
    append(run, row(6))
    assert follow(follower) == [6]


def test_a_directory_that_is_gone_is_said_to_be(run):
    follower = Follower(run)
    follow(follower)
    for path in run.iterdir():
        path.unlink()
    run.rmdir()
    assert follow(follower) == [] and not follower.is_there


def test_a_long_file_is_read_bit_by_bit_and_says_how_far(tmp_path):
    run = make_run(tmp_path / "run", [row(k) for k in range(1, 1001)])
    follower = Follower(run)
    follower.advance(until=0.0)  # it is past: no more than one stretch of lines
    assert 0 < follower.behind < 1 and follower.recent[-1]["step"] == 256
    follow(follower)
    assert follower.behind == 0 and follower.recent[-1]["step"] == 1000


def test_curves_are_thinned_but_keep_their_ends_and_evaluations(tmp_path):
    rows = [row(k, **(measured(0.5) if k == 333 else {})) for k in range(1, 1001)]
    follower = Follower(make_run(tmp_path / "run", rows), most=100)
    steps = follow(follower)
    assert {1, 333, 1000} <= set(steps) and 50 <= len(steps) <= 103
    assert len(follower.recent) == MOST_RECENT and follower.begun["step"] == 1


def test_only_numbers_are_kept_and_few_names(run):
    evals = {f"eval/{k}": 1.0 for k in range(1000)}
    append(run, row(6, reward="high", entropy=float("inf"), other=1.0, kl=[1], **evals))
    follower = Follower(run)
    follow(follower)
    last = follower.recent[-1]
    assert not {"reward", "entropy", "other", "kl"} & set(last) and len(last) < 50


# ------------------------------------------------------------------------- several runs


def test_of_a_directory_of_runs_the_newest_are_followed_as_they_come_and_go(tmp_path):
    for k in range(NEWEST_RUNS + 2):
        path = make_run(tmp_path / f"run{k:02}", [row(1)])
        for file in path.iterdir():
            os.utime(file, (1000 + k, 1000 + k))
    (tmp_path / "no run").mkdir()
    watch = Watch([tmp_path])
    assert [f.path.name for f in watch.look()] == [f"run{k:02}" for k in range(2, NEWEST_RUNS + 2)]
    make_run(tmp_path / "another", [row(1)])
    found = [f.path.name for f in watch.look()]
    assert found[0] == "another" and "run02" not in found and len(found) == NEWEST_RUNS


def test_a_run_its_metrics_and_both_are_one_run(run):
    assert find_runs([run, run / "metrics.jsonl", run.parent / "." / "run"]) == [run]


def test_an_empty_directory_waits_and_a_missing_one_is_refused(tmp_path):
    assert Watch([tmp_path]).look() == []
    with pytest.raises(DataError, match=r"missing: no such run; give run directories"):
        Watch([tmp_path / "missing"])


def test_what_stands_beside_the_metrics_is_read_again_when_it_changes(run):
    follower = Follower(run)
    follow(follower)
    assert follower.rest.status["state"] == "running"
    (run / "status.json").write_text('{"state": "finished", "step": 5}')
    follow(follower)
    assert follower.rest.status["state"] == "finished"

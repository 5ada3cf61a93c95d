"""The snapshot is plain JSON that says what the files say."""

import json
import time

import pytest
from monitor_cases import RATIOS, make_run, measured, row

from gspo_jax.view.follow import Watch
from gspo_jax.view.snapshot import MOST_TEXT, snapshot


def of(*paths, now=None):
    found = snapshot(Watch(list(paths)).look(seconds=10.0), time.time() if now is None else now)
    return json.loads(json.dumps(found, allow_nan=False))["runs"]


def test_a_run_stands_as_its_files_say(tmp_path):
    rows = [
        {"step": 0, **measured(0.25)},
        *(row(k) for k in range(1, 10)),
        row(10, **measured(0.5)),
    ]
    (run,) = of(make_run(tmp_path / "run", rows, of=40))
    assert (run["name"], run["state"], run["step"], run["of"]) == ("run", "running", 10, 40)
    assert run["eta"] == 60.0  # 30 steps of 2 s
    assert run["elapsed"] == 20.0
    assert run["accuracies"] == [
        {"name": "greedy", "value": 0.5, "low": 0.375, "high": 0.5625, "n": 64, "step": 10}
    ]
    assert run["phases"] == [["sampling", 0.5], ["updates: gradients", 1.5]]
    assert run["by_update"] == {"clipped": [0.0, 0.25], "ratio": RATIOS}


def test_curves_have_three_axes_and_null_where_there_is_no_number(tmp_path):
    rows = [{"step": 0, **measured(0.25)}, row(1), row(2, **measured(0.5))]
    (run,) = of(make_run(tmp_path / "run", rows))
    assert run["x"] == {
        "updates": [0, 4, 8],
        "tokens": [0, 1000, 2000],
        "time": [0, 2.0, 4.0],
        "step": [0, 1, 2],
    }
    assert run["y"]["reward"] == [None, 0.251, 0.252]
    assert run["y"]["eval/greedy_low"] == [0.125, None, 0.375] and run["y"]["eval/n"] == [
        64,
        None,
        64,
    ]


@pytest.mark.parametrize(
    ("state", "age", "shown"),
    [("running", 0, "running"), ("running", 4000, "quiet"), ("failed", 4000, "failed")],
)
def test_a_run_that_has_gone_quiet_is_no_longer_called_running(tmp_path, state, age, shown):
    (run,) = of(make_run(tmp_path / "run", [row(1)], state=state, age=age))
    assert run["state"] == shown and (run["eta"] is None) == (shown != "running")
    assert [a["kind"] for a in run["advice"]] == (["quiet"] if shown == "quiet" else [])


def test_what_is_missing_or_foreign_is_left_out(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("[")
    odd = make_run(tmp_path / "odd", [row(3)])
    (odd / "status.json").write_text('{"state": ["x"], "step": "3", "of": 1e300, "updated": 7}')
    (odd / "samples.jsonl").write_text('{"step": 3}\n{"step": 3, "prompt": 5, "reward": "x"}\n[')
    waiting, strange = of(empty, odd)
    assert (waiting["state"], waiting["step"], waiting["y"]) == ("waiting", None, {})
    assert (strange["state"], strange["step"], strange["of"]) == ("unknown", 3, None)
    assert strange["samples"][0]["prompt"] == "5" and strange["samples"][0]["reward"] is None


def test_samples_are_newest_first_cut_and_inert(tmp_path):
    chat = [{"role": "system", "content": "be\x1b[2J brief"}, {"role": "user", "content": "2+2?"}]
    samples = [
        {"step": 1, "prompt": chat, "completion": "a\u202eb\n<b>", "answer": "4", "reward": 1.0},
        {"step": 2, "prompt": "p", "completion": "A" * 1_000_000, "reward": 0.0, "advantage": -0.5},
    ]
    (run,) = of(make_run(tmp_path / "run", [row(2)], samples=samples))
    newest, oldest = run["samples"]
    assert len(newest["completion"]) < MOST_TEXT + 50
    assert newest["completion"].endswith("A … (996,000 more characters)")
    assert newest["advantage"] == -0.5 and newest["answer"] is None
    assert oldest["prompt"] == "system: be brief\nuser: 2+2?" and oldest["completion"] == "ab\n<b>"


def test_runs_of_one_name_are_told_apart_and_what_differs_is_named(tmp_path):
    one = make_run(tmp_path / "a" / "run", [row(1)], config="run: {seed: 0, dir: a}\neval: {n: 3}")
    two = make_run(tmp_path / "b" / "run", [row(1)], config="run: {seed: 1, dir: b}\neval: {n: 3}")
    first, second = of(one, two)
    assert (first["name"], second["name"]) == (str(one), str(two))
    assert (first["settings"], second["settings"]) == ({"run.seed": "0"}, {"run.seed": "1"})
    assert of(one)[0]["settings"] == {}


def test_secrets_in_files_are_not_shown(tmp_path):
    token = "hf_" + "Ab3" * 11
    samples = [{"step": 1, "prompt": token, "completion": token}]
    run = make_run(tmp_path / "run", [row(1)], samples=samples, warnings=f"login with {token}\n")
    assert token not in json.dumps(of(run))


def test_many_points_of_many_runs_stay_a_page(tmp_path):
    """4000 points together, but 250 of each run at least: of 20 runs that many, thinned evenly."""
    rows = [row(k) for k in range(1, 601)]
    followers = Watch([make_run(tmp_path / "run", rows)]).look(seconds=10.0)
    run = snapshot(followers * 20, time.time())["runs"][0]
    assert run["x"]["step"] == [*range(1, 600, 3), 600]
    assert len(snapshot(followers, time.time())["runs"][0]["x"]["step"]) == 600

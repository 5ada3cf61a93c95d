"""The page of a run says what its files say, whatever they say."""

import json
import subprocess
import sys

import pytest
from page_cases import HOSTILE, ROWS, Tables, check_inert, measured
from PIL import Image

from gspo_jax.errors import DataError, StorageError
from gspo_jax.view import drawing, figures
from gspo_jax.view.report import dynamics, report

CONFIG = """
model: {{path: {model}}}
task: {{name: arithmetic, path: null}}
rollout: {{prompts: 16, group_size: 8}}
algo:
  loss: {{name: {loss}, clip_low: 0.003}}
  minibatches: 4
run: {{steps: 10, seed: {seed}}}
"""
TIMES = {"step_time": 2.0, "time/generate": 0.5, "time/update": 1.5, "compile_time": 3.0}


def write_run(home, *, loss="gspo", seed=0, model="demo", last=0.7, tail=""):
    home.mkdir(parents=True)
    rows = [*ROWS[:-1], {**ROWS[-1], **measured(last), "num_tokens": 586_282}]
    rows = [{**r, **TIMES} if r["step"] else r for r in rows]
    (home / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)
    config = CONFIG.format(loss=loss, seed=seed, model=json.dumps(model))
    (home / "config.yaml").write_text(config)
    status = {"state": "finished", "step": 10, "of": 10, "updated": "2026-11-23T02:09:51+00:00"}
    (home / "status.json").write_text(json.dumps(status))
    env = {
        "command": ["gspo-jax", "train", model],
        "started": "2026-11-23T02:08:32+00:00",
        "versions": {"jax": "0.10.2", "flax": "0.12.8"},
        "commit": "608e4aa2",
        "devices": ["cpu:0", "cpu:1"],
    }
    (home / "env.json").write_text(json.dumps(env))
    samples = [
        {"step": 9, "prompt": "old", "completion": "old", "reward": 0.0},
        *(
            {
                "step": 10,
                "prompt": [{"role": "user", "content": f"{k}: {model}"}],
                "completion": model,
                "answer": model,
                "reward": None if k else 0.25,
                "advantage": -1.5,
            }
            for k in range(6)
        ),
    ]
    (home / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples) + tail)
    (home / "warnings.log").write_text(f"2026-11-23 a reward failed\n{model}\n")
    return home


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def hostile_run(home):
    return write_run(home / "a<b>'\"&", model=HOSTILE, tail='{"step": 11, "rew')


@pytest.fixture(scope="module")
def page(hostile_run):
    """As the command writes it, which needs no JAX."""
    code = (
        "import sys; from gspo_jax.cli.commands import main\n"
        "code = main(['report', sys.argv[1]])\n"
        "import gspo_jax.view.comparison\n"
        "sys.exit(code or ('jax' in sys.modules) * 9)"
    )
    call = [sys.executable, "-c", code, str(hostile_run)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    path = hostile_run / "plots" / "report.html"
    assert done.stdout.strip() == str(path)
    return path.read_text()


@pytest.fixture(scope="module")
def of_two(home):
    runs = [write_run(home / "gspo"), write_run(home / "grpo", loss="grpo", seed=1, last=0.5)]
    with pytest.MonkeyPatch.context() as patch:  # that takes a second, and is tested elsewhere
        patch.setattr(drawing, "write", lambda panels, path, title: path)
        path = report(runs)
    assert path == home / "report" / "report.html"
    return path.read_text()


def test_everything_that_came_from_a_model_or_a_path_is_inert(page):
    found = check_inert(page)
    # config, command, samples (prompt, response, gold answer), warnings: as text.
    assert found.text.count("<img src=x onerror=alert(1)>") >= 10
    assert "a<b>'\"&" in found.text


def test_the_result_has_n_and_intervals_and_the_numbers_of_the_file(page):
    table = next(t for t in Tables(page).tables if t[0][0] == "held-out")
    assert table[0] == ["held-out", "step 0, n = 64", "step 10, n = 64", "change, points"]
    rows = {cells[0]: cells[1:] for cells in table}
    # ROWS: greedy 0.4 then 0.7, from 0.03 below to 0.05 above
    # low: 30 - √(3² + 5²) = 24.2; high: 30 + √(5² + 3²) = 35.8
    assert rows["greedy accuracy"] == [
        "40.0 % [37.0, 45.0]",
        "70.0 % [67.0, 75.0]",
        "+30.0 [+24.2, +35.8]",
    ]
    assert set(rows) == {"held-out", "greedy accuracy", "avg@8 accuracy"}


def test_the_page_says_what_was_run_and_how_it_ended(page):
    text = check_inert(page).text
    assert "finished, step 10 of 10, 1:19 after its last start on 2026-11-23 at 02:08 UTC." in text
    (what,) = (dict(t) for t in Tables(page).tables if t[0][0] == "loss")
    assert what["loss"] == "gspo, clip_low 0.003"
    assert what["task"] == "arithmetic"
    assert what["each step"] == "16 prompts, 8 responses to each, 4 minibatches"
    assert what["tokens"] == "586,282" and what["seed"] == "0"
    assert what["devices"] == "2: cpu:0, cpu:1"
    assert what["versions"] == "jax 0.10.2, flax 0.12.8" and what["commit"] == "608e4aa2"


def test_the_page_says_where_the_time_went(page):
    (table,) = (t for t in Tables(page).tables if t[0][1] == "seconds, median")
    assert table[1:] == [
        ["a step", "2.0000", "100.0 %"],
        ["sampling", "0.5000", "25.0 %"],
        ["updates: gradients", "1.5000", "75.0 %"],
    ]
    assert "it took 30.0 s" in page  # ten steps of 3 s


def test_the_newest_samples_stand_with_reward_and_advantage(page):
    text = check_inert(page).text
    assert "Step 10: reward 0.25, advantage -1.5" in text
    assert "Step 10: reward –, advantage -1.5" in text  # not scored
    assert "user: 3: </script>" in text and "Step 9" not in text


def test_the_figure_has_every_panel_inline_and_as_files(page, hostile_run):
    assert page.count('role="img"') == 9
    assert sorted(p.name for p in (hostile_run / "plots").iterdir()) == [
        "dynamics.png",
        "dynamics.svg",
        "report.html",
    ]
    with Image.open(hostile_run / "plots" / "dynamics.png") as image:
        assert image.width >= 1200 and image.height >= 600


def test_a_run_of_metrics_alone_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "reward": NaN, "eval/greedy": 0.5, "step_time": NaN, "clip_frac": "x"}\n'
    )
    text = report([tmp_path / "metrics.jsonl"], tmp_path / "out").read_text()
    assert "state unknown, step 1." in text
    # An accuracy without n and interval is not shown.
    assert "No held-out evaluation with an interval" in text and "50.0" not in text
    assert sorted(p.name for p in (tmp_path / "out").iterdir())[0] == "dynamics.png"


def test_several_runs_stand_in_one_table_with_n_and_intervals(of_two):
    check_inert(of_two)
    table = next(t for t in Tables(of_two).tables if t[0][0] == "run")
    assert table[0][:5] == ["run", "state", "steps", "tokens", "n"]
    at = table[0].index("greedy")
    cells = {row[0]: row[at : at + 2] for row in table[1:]}
    assert cells == {
        "gspo": ["70.0 % [67.0, 75.0]", "+30.0 [+24.2, +35.8]"],
        "grpo": ["50.0 % [47.0, 55.0]", "+10.0 [+4.2, +15.8]"],
    }
    assert [row[4] for row in table[1:]] == ["64", "64"]


def test_several_runs_are_told_apart_by_their_settings(of_two):
    table = next(t for t in Tables(of_two).tables if t[0][0] == "setting")
    assert table == [
        ["setting", "gspo", "grpo"],
        ["algo.loss.name", "gspo", "grpo"],
        ["run.seed", "0", "1"],
    ]


def test_runs_of_one_name_are_told_apart_by_their_paths(home, of_two, monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "svg", lambda panel: "<svg/>")
    monkeypatch.setattr(drawing, "write", lambda panels, path, title: path)
    other = write_run(tmp_path / "gspo")
    text = report([home / "gspo", other, home / "gspo"], tmp_path / "out").read_text()
    table = next(t for t in Tables(text).tables if t[0][0] == "run")
    assert [cells[0] for cells in table[1:]] == [str(home / "gspo"), str(other)]


def test_the_picture_is_replaced_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    path = dynamics(tmp_path)
    assert path == tmp_path / "plots" / "dynamics.png"
    assert dynamics(tmp_path / "metrics.jsonl") == path  # either may be named
    assert [p.name for p in path.parent.iterdir()] == ["dynamics.png"]


def test_a_run_that_cannot_be_drawn_is_an_error_or_a_warning(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        dynamics(tmp_path)
    said = []
    dynamics(tmp_path, said.append)
    assert len(said) == 1 and said[0].startswith("warning: ")


def test_a_place_that_cannot_be_written_is_told_in_one_line(tmp_path, hostile_run):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        report([hostile_run], tmp_path / "file" / "out")

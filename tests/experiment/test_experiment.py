"""Which runs an experiment has, that they are run once, and what they leave."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_jax.config.load import load_config
from gspo_jax.config.recorded import to_yaml
from gspo_jax.errors import ConfigError
from gspo_jax.experiment import trials as experiment
from gspo_jax.experiment.trials import (
    as_overrides,
    combinations,
    exit_code,
    expand,
    outcome,
    read_experiment,
    run_trials,
)

FILES = sorted((Path(__file__).parents[2] / "configs" / "experiments").glob("*.yaml"))

# Leaves what a run leaves; the fourth seed fails, as a run does.
STAND_IN = """
import json, os, sys, pathlib
settings = dict(text.split("=", 1) for text in sys.argv[1:])
run = pathlib.Path(settings["run.dir"]) / settings["run.name"]
run.mkdir(parents=True, exist_ok=True)
with (run / "starts").open("a") as file:
    file.write(".")
if settings["run.seed"] == "3":
    print("a line\\ngspo-jax: the disk is full.", file=sys.stderr)
    sys.exit(6)
from gspo_jax.config.load import load_config
from gspo_jax.config.recorded import to_yaml
(run / "config.yaml").write_text(to_yaml(load_config(None, sys.argv[1:])))
time = "2026-01-01T00:00:{:02}+00:00".format
(run / "env.json").write_text(json.dumps({"started": time(5)}))
(run / "status.json").write_text(json.dumps({"state": "finished", "updated": time(47)}))
rows = [
    {"step": 0, "eval/avg@8": 0.25},
    {"step": 1, "completions/mean_length": 10.5, "updates": 4},
    {"step": 2, "completions/mean_length": 12.0, "updates": 8, "eval/avg@8": 0.75, "eval/n": 64,
     "eval/avg@8_low": 0.7, "eval/avg@8_high": 0.8},
]
(run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows) + '{"torn')
"""


@pytest.fixture
def stand_in(monkeypatch):
    def start(made, directory, trial, cores):
        command = [sys.executable, "-c", STAND_IN, *trial.overrides, f"run.dir={directory}"]
        log = (directory / "logs" / f"{trial.name}.log").open("wb")
        return subprocess.Popen(command, stdout=log, stderr=log)

    monkeypatch.setattr(experiment, "_start", start)


def small(tmp_path, text="") -> Path:
    path = tmp_path / "few.yaml"
    path.write_text(text or "seeds: [1, 3]\nsettings: {rollout: {prompts: 4, group_size: 3}}\n")
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_experiments_that_we_ship_can_be_run(path):
    made = read_experiment(path)
    names = [trial.name for trial in made.trials]
    assert len(set(names)) == len(names) > 1
    assert made.against in {trial.variant for trial in made.trials}


def test_a_grid_is_every_combination_the_last_setting_fastest():
    grid = {"a": [1, 2], "b": ["x", {"c": 3}]}
    assert list(combinations(grid)) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": {"c": 3}},
        {"a": 2, "b": "x"},
        {"a": 2, "b": {"c": 3}},
    ]
    assert list(combinations({})) == [{}]
    with pytest.raises(ConfigError, match=r"grid\.a=3: wanted a list"):
        list(combinations({"a": 3}))


def test_trials_are_every_seed_of_every_choice_of_every_variant():
    variants = {
        "wide": {"algo.loss.clip_high": 0.01},
        "grpo": {
            "algo": {"loss": {"name": "grpo"}},
            "grid": {"algo.loss": [{"clip_high": 0.2}, {"clip_high": 0.28}]},
        },
    }
    grid = {"optim.learning_rate": [1e-5, 3e-5]}
    trials = expand(None, variants, seeds=[7, 8], grid=grid, overrides=["rollout.prompts=32"])
    assert len(trials) == 2 * (2 + 4)
    assert [t.seed for t in trials] == [7] * 6 + [8] * 6
    assert trials[5].name == "grpo-learning_rate=3e-05-clip_high=0.28-seed7"
    config = load_config(None, trials[5].overrides)
    assert config.algo.loss == {"name": "grpo", "clip_high": 0.28}
    assert (config.optim.learning_rate, config.rollout.prompts) == (3e-5, 32)
    assert (config.run.seed, config.run.name) == (7, trials[5].name)


def test_what_is_wrong_is_told_before_anything_runs(tmp_path):
    for text, told in {
        "variant: {a: {}}": r"variant is no field\. Did you mean variants\?",
        "variants: {a: {algo.loss: grpoo}}": r"a: algo\.loss\.name=grpoo: no such loss\. Did you",
        "variants: [a]": "variants=.'a'.: wanted {name: {setting: value}}",
        "variants: {a: {}}\nagainst: b": "against=b: the variants are .'a'.",
        "grid: {rollout.prompts: 4}": r"grid\.rollout\.prompts=4: wanted a list",
    }.items():
        with pytest.raises(ConfigError, match=told):
            read_experiment(small(tmp_path, text))


def test_settings_become_what_the_command_line_takes():
    given = {
        "algo": {"loss": {"name": "gspo"}},
        "run.steps": 3,
        "task.path": "a b",
        "task.name": None,
    }
    assert as_overrides(given) == [
        "algo.loss.name=gspo",
        "run.steps=3",
        "task.path=a b",
        "task.name=null",
    ]


def test_one_that_fails_costs_itself_alone_and_only_it_is_run_again(stand_in, tmp_path):
    made, said = read_experiment(small(tmp_path)), []
    first, failed = run_trials(made, tmp_path / "out", jobs=2, say=said.append)
    # Steps 1 and 2 have 4 * 3 responses of 10.5 and 12 tokens on average.
    assert (first.tokens, first.updates, first.seconds) == (12 * 22.5, 8, 42)
    assert first.before == {"eval/avg@8": 0.25} and first.after["eval/avg@8"] == 0.75
    assert failed.trouble == "gspo-jax: the disk is full." and failed.after == {}
    assert exit_code([first, failed]) == 1 and exit_code([first]) == 0
    assert any("eval/avg@8 0.750 [0.700, 0.800], n 64" in text for text in said)
    again = run_trials(made, tmp_path / "out", say=said.append)
    assert again == [first, failed]
    starts = [(tmp_path / "out" / t.name / "starts").read_text() for t in made.trials]
    assert starts == [".", ".."]


def test_a_run_with_other_settings_is_not_taken_for_this_one(stand_in, tmp_path):
    run_trials(read_experiment(small(tmp_path)), tmp_path / "out", say=lambda _: None)
    longer = read_experiment(small(tmp_path), ["run.steps=7"])
    run_trials(longer, tmp_path / "out", say=lambda _: None)
    assert (tmp_path / "out" / "run-seed1" / "starts").read_text() == ".."


def test_a_trial_that_was_never_started_says_so(tmp_path):
    trial = read_experiment(small(tmp_path)).trials[0]
    assert outcome(tmp_path, trial).trouble == "not started"


def test_cores_are_dealt_out_and_none_is_left_without(monkeypatch):
    monkeypatch.setattr(
        experiment.os, "sched_getaffinity", lambda _: {4, 5, 6, 7, 8}, raising=False
    )
    assert experiment._dealt(2) == [{4, 5}, {6, 7}]
    assert experiment._dealt(6) == [{4, 5, 6, 7, 8}] * 6


def test_a_finished_run_is_known_by_its_saved_config(tmp_path):
    made = read_experiment(small(tmp_path))
    trial, run = made.trials[0], tmp_path / made.trials[0].name
    run.mkdir()
    (run / "status.json").write_text(json.dumps({"state": "finished"}))
    config = load_config(None, [*trial.overrides, f"run.dir={tmp_path}"])
    (run / "config.yaml").write_text(to_yaml(config))
    assert experiment.is_finished(made, tmp_path, trial)
    (run / "status.json").write_text(json.dumps({"state": "preempted"}))
    assert not experiment.is_finished(made, tmp_path, trial)

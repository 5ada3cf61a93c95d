"""Configuration: layers, names, types, and what must hold between settings."""

import inspect
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import get_args

import pytest
import yaml

from gspo_jax.algo.advantages import ADVANTAGES, BY_FUNCTION
from gspo_jax.algo.losses import LOSSES
from gspo_jax.config import load as module
from gspo_jax.config import settings
from gspo_jax.config.load import Config, load_config, model_dir, packaged_config, run_dir, warnings
from gspo_jax.config.names import ON_RESUME, SETTINGS
from gspo_jax.config.recorded import changes, to_yaml
from gspo_jax.config.settings import RolloutConfig, TaskConfig
from gspo_jax.errors import ConfigError
from gspo_jax.text.spelling import ELSEWHERE

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def write(path, text):
    path.write_text(text)
    return path


# -------------------------------------------------------------------------------- layers


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = write(tmp_path / "x.yaml", "rollout: {prompts: 32, group_size: 4}\n")
    config = load_config(file, ["rollout.group_size=6"])
    assert (config.rollout.prompts, config.rollout.group_size) == (32, 6)
    assert config.rollout.temperature == 1.0


def test_an_empty_file_and_empty_sections_are_the_defaults(tmp_path):
    named = ["run.name=a"]
    assert load_config(write(tmp_path / "a.yaml", ""), named) == load_config(None, named)
    assert load_config(write(tmp_path / "b.yaml", "algo:\noptim: {}\n"), named) == load_config(
        None, named
    )


def test_numbers_may_be_written_with_an_exponent():
    config = load_config(None, ["optim.learning_rate=3e-5", "algo.loss.clip_low=3e-3"])
    assert config.optim.learning_rate == 3e-5
    assert config.algo.loss == {"name": "gspo", "clip_low": 3e-3}


def test_text_stays_as_typed_though_yaml_would_read_a_number():
    config = load_config(None, ["run.name=007", "task.path=1e5"])
    assert (config.run.name, config.task.path) == ("007", "1e5")


def test_shorthands_for_a_loss_by_name_and_for_a_single_reward():
    config = load_config(None, ["algo.loss=grpo", "task.rewards=my.py:f", "run.report_to=wandb"])
    assert config.algo.loss == {"name": "grpo"}
    assert config.task.rewards == ["my.py:f"]
    assert config.run.report_to == ["wandb"]


def test_null_gives_a_loss_its_own_default_back(tmp_path):
    file = write(tmp_path / "x.yaml", "algo: {loss: {clip_low: 3e-3, clip_high: 4e-3}}\n")
    config = load_config(file, ["algo.loss.name=grpo", "algo.loss.clip_low=null"])
    assert config.algo.loss == {"name": "grpo", "clip_high": 4e-3}


def test_num_generations_is_group_size(tmp_path):
    file = write(tmp_path / "x.yaml", "rollout: {num_generations: 6}\n")
    assert load_config(file).rollout.group_size == 6
    assert load_config(None, ["num_generations=4"]).rollout.group_size == 4


def test_one_setting_under_two_names_is_refused():
    with pytest.raises(ConfigError, match=r"group_size is given twice, as 4 and as 6"):
        load_config(None, ["rollout.group_size=4", "num_generations=6"])


def test_a_data_path_replaces_the_built_in_task_and_the_reverse(tmp_path):
    file = write(tmp_path / "x.yaml", "task: {name: arithmetic}\n")
    task = load_config(file, ["task.path=rows.jsonl"]).task
    assert (task.name, task.path) == (None, "rows.jsonl")
    file = write(tmp_path / "y.yaml", "task: {path: rows.jsonl}\n")
    task = load_config(file, ["task.name=arithmetic"]).task
    assert (task.name, task.path) == ("arithmetic", None)


def test_another_task_does_not_inherit_the_options_of_the_former(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("task: {name: arithmetic, options: {slip: 0.5}}")
    data = tmp_path / "rows.jsonl"
    data.write_text("")
    assert load_config(file, [f"task.path={data}"]).task.options == {}
    assert load_config(file, ["task.name=arithmetic"]).task.options == {"slip": 0.5}
    both = load_config(file, [f"task.path={data}", "task.options={max_bad_rows: 3}"])
    assert both.task.options == {"max_bad_rows": 3}


def test_a_run_is_named_after_its_file_and_seed(tmp_path):
    file = write(tmp_path / "chains.yaml", "run: {seed: 2}\n")
    assert load_config(file).run.name == "chains-seed2"
    assert load_config(file, ["run.seed=3"]).run.name == "chains-seed3"
    assert load_config(file, ["run.name=mine"]).run.name == "mine"
    assert run_dir(load_config(file, ["run.dir=out"])) == Path("out/chains-seed2")


def test_a_config_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        load_config().run.steps = 3  # pyright: ignore


# --------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("rollout.group_sze", "rollout.group_size"),
        ("rolout.group_size", "rollout.group_size"),
        ("group_size", "rollout.group_size"),
        ("optim.lr", "optim.learning_rate"),
        ("beta", "algo.kl.coef"),
        ("algo.num_iterations", "algo.epochs"),
        ("algo.kl.ceof", "algo.kl.coef"),
        ("seed", "task.seed or run.seed"),
    ],
)
def test_a_typo_is_refused_with_the_name_that_was_meant(typed, meant):
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"{typed}=1"])
    assert str(error.value) == f"unknown setting {typed}. Did you mean {meant}?"


def test_a_typo_in_a_file_names_the_file(tmp_path):
    file = write(tmp_path / "x.yaml", "rollout: {group_sze: 8}\n")
    with pytest.raises(ConfigError, match=r"x\.yaml: unknown setting rollout\.group_sze\. Did"):
        load_config(file)


def test_a_name_like_no_other_is_answered_with_what_there_is():
    with pytest.raises(ConfigError, match=r"unknown setting mesh\.wings\. mesh takes \['data'"):
        load_config(None, ["mesh.wings=2"])
    with pytest.raises(ConfigError, match=r"unknown setting wings\. The sections are \['model'"):
        load_config(None, ["wings=2"])


def test_names_of_elsewhere_point_at_settings_that_exist():
    options = {"algo.loss.name", "algo.loss.clip_low", "algo.loss.clip_high", "algo.advantage.name"}
    assert set(ELSEWHERE.values()) <= set(SETTINGS) | options
    assert not set(ELSEWHERE) & {name.rpartition(".")[2] for name in SETTINGS}


# ----------------------------------------------------------------------------------- checks


def test_the_tables_of_losses_and_advantages_are_what_the_functions_take():
    def keywords(function, *arrays):
        parameters = inspect.signature(function).parameters.values()
        found = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        return {name: value for name, value in found.items() if name not in arrays}

    assert {n: keywords(f, "weight") for n, f in LOSSES.items()} == settings.LOSS_OPTIONS
    found = {n: keywords(f, "groups") for n, f in (ADVANTAGES | BY_FUNCTION).items()}
    assert found | {"gae": settings.GAE} == settings.ADVANTAGE_OPTIONS


def test_the_sections_are_those_of_the_config():
    assert [f.name for f in fields(Config)] == [*settings.SECTIONS, "written"]


@pytest.mark.parametrize("option", ["aggregation", "loss_agg_mode", "mean", "reduction"])
def test_a_loss_with_another_mean_is_refused_naming_luspo(option):
    with pytest.raises(ConfigError, match=f"algo.loss.{option}: .*luspo is the one that weighs"):
        load_config(None, [f"algo.loss.{option}=token"])
    with pytest.raises(ConfigError, match=r"each loss has one mean, grpo that of its paper\.$"):
        load_config(None, ["algo.loss=grpo", f"algo.loss.{option}=token"])


def test_a_config_built_by_hand_is_checked_too():
    with pytest.raises(ConfigError, match=r"rollout\.group_size=1"):
        Config(rollout=RolloutConfig(group_size=1))
    with pytest.raises(ConfigError, match=r"task\.name=arithmetic with task\.path=x: give one"):
        Config(task=TaskConfig(path="x"))


def test_an_endless_gradient_norm_means_no_clipping():
    assert load_config(None, ["optim.max_grad_norm=inf"]).optim.max_grad_norm == float("inf")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["algo.loss.clip_low=0.2"], "algo.loss.clip_low=0.2: far from gspo's own 0.0003"),
        (["algo.loss={name: grpo, clip_high: 4e-4}"], "clip_high=0.0004: far from grpo's own 0.2"),
        (["algo.minibatches=1"], "clipping can never act"),
        (["rollout.top_p=0.9", "rollout.top_k=5"], "rollout.top_p=0.9 and rollout.top_k=5"),
    ],
)
def test_what_is_probably_not_meant_is_warned_of(overrides, text):
    (warning,) = warnings(load_config(None, overrides))
    assert text in warning


def test_usual_settings_raise_no_warning():
    for overrides in ([], ["algo.loss={name: grpo, clip_low: 0.2}"], ["algo.loss=reinforce"]):
        assert warnings(load_config(None, overrides)) == []


# ------------------------------------------------------------------------------ what it says


def test_what_is_saved_loads_as_the_same_config(tmp_path):
    overrides = ["algo.loss={name: gspo, clip_low: 1e-3}", "optim.learning_rate=1e-6"]
    config = load_config(None, [*overrides, "task.path=a.jsonl", "task.rewards=[x:y]"])
    assert load_config(write(tmp_path / "config.yaml", to_yaml(config))) == config


def test_what_the_environment_holds_is_used_but_never_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("MODELS", "/secret/models")
    text = "model: {path: '${oc.env:MODELS}/qwen'}\ntask: {rewards: ['${oc.env:MODELS}/r.py:f']}\n"
    file = write(tmp_path / "x.yaml", text + "sft: {batch_size: '${rollout.prompts}'}\n")
    config = load_config(file)
    assert config.model.path == "/secret/models/qwen"
    assert config.task.rewards == ["/secret/models/r.py:f"]
    assert config.sft.batch_size == 16
    saved = to_yaml(config)
    assert "secret" not in saved and "${oc.env:MODELS}/qwen" in saved
    assert load_config(write(tmp_path / "y.yaml", saved)) == config


def test_a_value_replaced_after_loading_is_saved_as_it_is(monkeypatch):
    monkeypatch.setenv("MODELS", "/models")
    config = load_config(None, ["model.path=${oc.env:MODELS}/a"])
    changed = replace(config, model=replace(config.model, path="/other"))
    assert "path: /other" in to_yaml(changed)


def test_changes_are_told_as_they_were_written_and_a_new_setting_is_none(monkeypatch):
    monkeypatch.setenv("MODELS", "/secret/models")
    a = load_config(None, ["model.path=${oc.env:MODELS}/qwen", "algo.loss.clip_low=1e-3"])
    b = load_config(None, ["model.path=/elsewhere", "rollout.group_size=4"])
    saved = to_yaml(a)
    assert changes(saved, a) == {}
    assert changes(saved, b) == {
        "model.path": ("${oc.env:MODELS}/qwen", "/elsewhere"),
        "rollout.group_size": (8, 4),
        "algo.loss.clip_low": (1e-3, None),
    }
    older = "".join(line for line in saved.splitlines(True) if "keep_every" not in line)
    assert changes(older, a) == {}
    c = replace(a, run=replace(a.run, keep_every=5))
    assert changes(older, c) == {"run.keep_every": (None, 5)}


def test_demo_means_the_model_inside_the_package(tmp_path):
    assert (model_dir(load_config()) / "config.json").is_file()
    assert model_dir(load_config(None, [f"model.path={tmp_path}"])) == tmp_path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_committed_config_loads_without_a_warning(path):
    assert warnings(load_config(path)) == []


def test_the_demo_config_is_found_beside_a_checkout_and_inside_a_wheel(tmp_path, monkeypatch):
    assert packaged_config("demo.yaml").is_file()
    (tmp_path / "configs").mkdir()
    inside = write(tmp_path / "configs" / "demo.yaml", "")
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    assert packaged_config("demo.yaml") == inside


def test_every_setting_says_what_it_means():
    """A string under each field, and few enough fields to read."""
    source = Path(settings.__file__).read_text().partition("\nclass ")[2].splitlines()
    declared = [i for i, line in enumerate(source) if line.startswith("    ") and ": " in line]
    declared = [i for i in declared if source[i].lstrip().split(":")[0].isidentifier()]
    documented = [i for i in declared if source[i + 1].lstrip().startswith('"""')]
    assert len(declared) == len(documented) == len(SETTINGS) + 2  # + algo.kl, algo.critic: groups
    assert len(SETTINGS) <= 81


def test_every_setting_has_one_rule_for_a_run_that_continues():
    assert set(ON_RESUME) == set(SETTINGS)
    rules: dict[str, set[str]] = {rule: set() for rule in get_args(settings.Resume)}
    for name, rule in ON_RESUME.items():
        rules[rule].add(name)
    assert {"run.name", "run.dir", "run.resume", "run.allow_data_change"} == rules["silent"]
    assert {"algo.loss", "rollout.group_size", "run.seed", "model.path"} <= rules["same"]
    assert {"task.path", "task.options", "task.max_prompt_length"} <= rules["data"]
    assert {"optim.learning_rate", "algo.kl.coef", "run.spike_sigmas"} <= rules["learning"]
    assert {"run.steps", "mesh.fsdp", "eval.every", "algo.microbatch"} <= rules["free"]


def test_credentials_do_not_reach_saved_text_which_still_loads(monkeypatch, tmp_path):
    monkeypatch.setenv("JUDGE_API_KEY", "0f1e2d3c4b5a6978")
    told = {"a": "https://me:hunter2@host/x", "b": "hf_" + "x" * 30, "c": "0f1e2d3c4b5a6978"}
    listed = ", ".join(f"{key}: '{value}'" for key, value in told.items())
    text = to_yaml(load_config(None, [f"model.template_args={{{listed}}}"]))
    assert "hunter2" not in text and "hf_x" not in text and "0f1e" not in text
    arguments = yaml.safe_load(text)["model"]["template_args"]
    c = "${oc.env:JUDGE_API_KEY}"  # reads as the same where the variable is set
    assert arguments == {"a": "https://(removed)@host/x", "b": "(removed)", "c": c}
    (saved := tmp_path / "config.yaml").write_text(text)
    assert load_config(saved).model.template_args["c"] == "0f1e2d3c4b5a6978"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MODEL_S3_KEY", "models/Qwen3-0.6B"),  # an object's key in a store
        ("RUN_TOKEN", "Qwen3-0.6B"),  # a part of the path: never replaced inside of it
    ],
)
def test_a_setting_that_contains_a_variables_value_is_saved_as_it_is(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    for path in (
        "/mnt/models/Qwen3-0.6B",
        "/data/hf_models_and_datasets/x",
        "runs/sk-learn-base-1",
    ):
        text = to_yaml(load_config(None, [f"model.path={path}"]))
        assert yaml.safe_load(text)["model"]["path"] == path


def test_off_is_a_text_where_it_is_a_choice_although_yaml_reads_false(tmp_path):
    path = tmp_path / "off.yaml"
    path.write_text("algo: {routing_replay: off}")
    for config in (load_config(path), load_config(None, ["algo.routing_replay=off"])):
        assert config.algo.routing_replay == "off"
    with pytest.raises(ConfigError, match=r"model\.remat=false: expected one of"):
        load_config(None, ["model.remat=false"])

"""The command line: what is parsed, what is printed, and with which exit code it ends."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import benchmark
import pytest

import gspo_jax.evaluation.benchmark
import gspo_jax.evaluation.evaluate
import gspo_jax.run.export
import gspo_jax.sft
import gspo_jax.train
from gspo_jax.cli import story
from gspo_jax.cli.arguments import parsed
from gspo_jax.cli.commands import COMMANDS, explain, main
from gspo_jax.config.load import load_config
from gspo_jax.errors import ConfigError, DataError, NumericalError, StorageError
from gspo_jax.run.lifecycle import Result
from gspo_jax.run.metrics import RunLog
from gspo_jax.run.model_card import how_to_use, model_card

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs" / "demo.yaml")
SIZES = "{train: 60, val: 5, test: 7}"

BEFORE = {
    "eval/greedy": 0.4,
    "eval/greedy_low": 0.36,
    "eval/greedy_high": 0.44,
    "eval/avg@8": 0.3,
    "eval/avg@8_low": 0.28,
    "eval/avg@8_high": 0.32,
    "eval/n": 512,
    "eval/truncated": 0.05,
    "eval/no_answer": 0.02,
    "eval/mean_length": 20.0,
}
AFTER = BEFORE | {"eval/avg@8": 0.725, "eval/greedy": 0.75, "eval/mean_length": 18.5}
AFTER |= {"eval/avg@8_low": 0.70, "eval/avg@8_high": 0.748}


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Puts a stand-in for `train` in place, and collects the configs that it is called with."""
    seen = SimpleNamespace(configs=[], outcome="finished")

    def train(config):
        seen.configs.append(config)
        if isinstance(seen.outcome, BaseException):
            raise seen.outcome
        return Result(tmp_path / "run", config.run.steps, seen.outcome, BEFORE, AFTER)

    monkeypatch.setattr(gspo_jax.train, "train", train)
    monkeypatch.setattr(gspo_jax.sft, "sft", train)
    return seen


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# ---------------------------------------------------------------------------------- usage


@pytest.mark.parametrize(
    "line",
    [
        [DEMO, "run.steps=7", "rollout.prompts=32"],
        ["--config", DEMO, "run.steps=7", "rollout.prompts=32"],
        ["run.steps=7", "--debug", DEMO, "rollout.prompts=32"],
        ["--debug", "run.steps=7", f"--config={DEMO}", "rollout.prompts=32"],
    ],
)
def test_config_file_overrides_and_options_come_in_any_order(trained, line):
    assert main(["train", *line]) == 0
    assert trained.configs == [load_config(DEMO, ["run.steps=7", "rollout.prompts=32"])]


def test_without_a_file_the_defaults_are_trained(trained):
    assert main(["train"]) == 0
    assert trained.configs == [load_config()]


def test_sft_takes_the_same_settings(trained):
    assert main(["sft", str(ROOT / "configs" / "cold_start.yaml"), "run.steps=3"]) == 0
    assert trained.configs[0].model.init == "random" and trained.configs[0].run.steps == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["train", "--fast"], "unknown argument --fast"),
        (["train", "a.yaml", "b.yaml"], "one config file at most, not a.yaml and b.yaml"),
        (["trian"], "unknown command trian. Did you mean train? The commands are demo, train, sft"),
        ([], "required: COMMAND"),
        (["report"], "required: RUN"),
        (["export", "a", "b", "c"], "unknown argument c"),
    ],
)
def test_a_wrong_usage_is_one_line_and_exit_code_2(line, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(line)
    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("gspo-jax: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["rollout.group_sze=8"], "unknown setting rollout.group_sze. Did you mean rollout.group_"),
        (["rollout.group_size=1"], "rollout.group_size=1: a group-relative advantage needs"),
        (["nope.yaml"], "nope.yaml: no such config file"),
        (["rollout.group_size=x"], "rollout.group_size=x: expected a whole number"),
    ],
)
def test_a_config_error_is_one_line_code_2_and_nothing_is_touched(
    trained, line, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *line]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"gspo-jax: {message}") and err.count("\n") == 1
    assert trained.configs == [] and tree(tmp_path) == []


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for command in (
        "demo",
        "train",
        "sft",
        "eval",
        "plan",
        "export",
        "report",
        "monitor",
        "doctor",
    ):
        assert f"    {command} " in out


@pytest.mark.parametrize("name", ["train.py", "export_hf.py", "monitor.py"])
def test_scripts_are_the_commands(name):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / name), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    command = {"train.py": "train", "export_hf.py": "export", "monitor.py": "monitor"}[name]
    assert done.returncode == 0 and done.stdout.startswith(f"usage: gspo-jax {command} ")


# ----------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("a=1: no."), 2, "a=1: no."),
        (DataError("x.jsonl:3: no."), 3, "x.jsonl:3: no."),
        (NumericalError("nan."), 4, "nan."),
        (MemoryError(), 5, "out of memory; lower algo.microbatch"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123456 bytes.\nat 0x1\n"),
            5,
            "out of memory (allocating 123456 bytes); lower algo.microbatch",
        ),
        (StorageError("runs/x is in use."), 6, "runs/x is in use."),
        (OSError(28, "No space left on device"), 6, "no space left"),
        (ValueError("RESOURCE_EXHAUSTED: write: No space left on device"), 6, "no space left"),
        (KeyboardInterrupt(), 130, "interrupted."),
        (ZeroDivisionError("division by zero\nand more"), 1, "unexpected ZeroDivisionError: divis"),
    ],
)
def test_every_error_has_its_code_and_one_line(trained, error, code, text, capsys):
    trained.outcome = error
    assert main(["train", DEMO]) == code
    err = capsys.readouterr().err
    assert err.startswith(f"gspo-jax: {text}") and err.count("\n") == 1


def test_out_of_memory_names_two_settings_to_lower():
    text = explain(MemoryError())[1]
    assert "algo.microbatch" in text and "rollout.max_completion_length" in text


@pytest.mark.parametrize(
    ("state", "code"), [("finished", 0), ("preempted", 75), ("interrupted", 130)]
)
def test_how_a_run_ended_is_the_exit_code(trained, state, code, capsys):
    trained.outcome = state
    assert main(["train", DEMO]) == code
    assert ("export" in capsys.readouterr().out) == (state == "finished")


def test_the_traceback_needs_debug(trained, capsys):
    trained.outcome = ZeroDivisionError("x")
    assert main(["train", DEMO]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert main(["train", DEMO, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_what_is_probably_not_meant_is_warned_of_on_stderr(trained, capsys):
    assert main(["train", DEMO, "algo.minibatches=1"]) == 0
    assert "gspo-jax: warning: algo.minibatches=1" in capsys.readouterr().err


# --------------------------------------------------------------- print-config and dry-run


def test_print_config_prints_what_loads_as_the_same_config(trained, capsys, tmp_path):
    assert main(["train", DEMO, "optim.learning_rate=3e-5", "--print-config"]) == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert load_config(file) == load_config(DEMO, ["optim.learning_rate=3e-5"])
    assert trained.configs == []


def dry_run(*settings):
    few = [] if any("task.path" in s for s in settings) else [f"task.options.sizes={SIZES}"]
    return main(["train", DEMO, "model.init=random", *few, *settings, "--dry-run"])


def test_a_dry_run_says_what_would_happen_and_touches_nothing(
    trained, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert dry_run() == 0
    out = capsys.readouterr().out
    stages = ["model", "task", "rewards", "step", "run", "eval", "writes", "memory"]
    assert [line.split()[0] for line in out.splitlines()] == stages
    assert "arithmetic: 60 train, 5 val, 7 test" in out
    assert "16 prompts x 8 responses of at most 32 tokens; gspo, 4 updates of 32 responses" in out
    assert "runs/demo-seed0 (new)" in out
    assert trained.configs == [] and tree(tmp_path) == []


def test_a_dry_run_finds_bad_input_and_touches_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2+2", "answer": "4"}\n{"prompt": 3\n')
    (tmp_path / "reward.py").write_text("def f(completions, **kwargs):\n    return [0.0]\n")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    before = tree(tmp_path)
    for settings, code, text in [
        (["model.path=nowhere"], 3, "there is no model directory nowhere"),
        (["model.path=pickled"], 3, "pickled"),
        (["task.path=rows.jsonl"], 3, "rows.jsonl:2"),
        (["task.rewards=reward.py:g"], 3, "has no 'g'"),
        (["run.dir=rows.jsonl"], 6, "cannot be written"),
    ]:
        assert dry_run(*settings) == code, settings
        err = capsys.readouterr().err
        assert text in err and err.count("\n") == 1, err
    assert [p for p in tree(tmp_path) if "__pycache__" not in p] == before


def test_a_directory_in_use_is_refused_before_anything_is_done(capsys, tmp_path):
    log = RunLog(tmp_path / "busy", of=1)
    before = tree(tmp_path)
    assert dry_run(f"run.dir={tmp_path}", "run.name=busy") == 6
    assert "in use by another run (process" in capsys.readouterr().err
    assert tree(tmp_path) == before
    log.close()


# -------------------------------------------------------------------------------- commands


def test_the_demo_is_its_config_with_a_story_around_it(trained, capsys):
    assert main(["demo", "run.seed=2"]) == 0
    assert trained.configs == [load_config(DEMO, ["run.seed=2"])]
    out = " ".join(capsys.readouterr().out.split())
    assert "The loss reads about 0 all the while" in out
    assert "is wider than the paper's 0.0003/0.0004" in out
    # 72.5 - 30 = 42.5 points, intervals beside the values; for the change the ends' distances from
    # the values add in squares: hypot(2, 2.5) below, hypot(2.3, 2) above
    assert "avg@8 accuracy 30.0% [28.0, 32.0] 72.5% [70.0, 74.8] +42.5 [+39.3, +45.5]" in out
    assert "512 held out before after change" in out
    assert "length in tokens 20.0 18.5 -1.5" in out
    assert out.count(" gspo-jax ") == 4  # what to try next


def test_the_demo_promises_nothing_when_it_was_stopped(trained, capsys):
    trained.outcome = "interrupted"
    assert main(["demo"]) == 130
    assert "Next:" not in capsys.readouterr().out


def test_the_demo_takes_no_config_of_its_own(trained, capsys):
    assert main(["demo", "mine.yaml"]) == 2
    assert "gspo-jax train mine.yaml" in capsys.readouterr().err


def test_the_commands_the_demo_suggests_parse(trained, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("runs/demo-seed0/export").mkdir(parents=True)
    monkeypatch.setattr(gspo_jax.evaluation.evaluate, "evaluate_path", lambda config: AFTER)
    story.after_demo(load_config(DEMO), Result(Path("runs/demo-seed0"), 100, "finished"))
    lines = [x.strip() for x in capsys.readouterr().out.splitlines() if "  gspo-jax " in x]
    watch, measure, compare, own = (line.split()[1:] for line in lines)
    assert parsed(watch, COMMANDS).runs == ["runs/demo-seed0"]
    assert main(measure) == main([*compare, "--dry-run"]) == 0
    told = capsys.readouterr()
    assert told.err == "" and "4 runs" in told.out  # no warning either
    assert load_config(None, [word for word in own if "=" in word])


def test_a_config_of_the_package_is_found_by_its_name(trained, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "demo.yaml", "run.seed=5"]) == 0
    Path("demo.yaml").write_text("run: {steps: 3}\n")
    assert main(["train", "demo.yaml"]) == 0  # one that is here comes first
    packaged, mine = trained.configs
    assert packaged == load_config(DEMO, ["run.seed=5"]) and mine.run.steps == 3


def test_eval_measures_an_export_as_its_run_did(monkeypatch, capsys, tmp_path):
    seen = []
    monkeypatch.setattr(
        gspo_jax.evaluation.evaluate, "evaluate_path", lambda config: seen.append(config) or AFTER
    )
    export = tmp_path / "run" / "export"
    export.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(
        "model: {init: random}\nrollout: {max_completion_length: 32}\n"
    )
    assert main(["eval", str(export), "eval.samples=4"]) == 0
    (config,) = seen
    assert (config.model.path, config.model.init) == (str(export), "pretrained")
    assert (config.rollout.max_completion_length, config.eval.samples) == (32, 4)
    assert "72.5% [70.0, 74.8]" in capsys.readouterr().out


def test_eval_of_a_plain_directory_takes_the_defaults(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        gspo_jax.evaluation.evaluate, "evaluate_path", lambda config: seen.append(config) or AFTER
    )
    assert main(["eval", str(tmp_path)]) == 0
    assert seen == [load_config(None, [f"model.path={tmp_path}"])]
    assert main(["eval", str(tmp_path / "nope")]) == 3


@pytest.fixture
def measured(monkeypatch):
    """Puts a stand-in for `benchmark.run` in place, and collects what it is called with."""
    calls = []

    def run(config, models, asked, out, say):
        calls.append((config, models, asked, str(out)))
        return {"scores": {}, "missing": {}}

    monkeypatch.setattr(gspo_jax.evaluation.benchmark, "run", run)
    return calls


def test_eval_of_several_models_asks_them_the_task_of_the_last_run(measured, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "export").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(f"task: {{max_prompt_length: 3{ord(name)}}}\n")
    models = ["demo", str(tmp_path / "a" / "export"), str(tmp_path / "b" / "export")]
    assert main(["eval", *models, "eval.samples=2"]) == 0
    ((config, names, asked, out),) = measured
    assert (names, asked, out) == (models, None, "runs/eval")
    assert (config.task.max_prompt_length, config.eval.samples) == (398, 2)


def test_eval_on_benchmarks_asks_all_problems_of_any_length_or_as_many_as_set(measured):
    line = ["eval", "demo", "--benchmarks", "custom,math", "--out", "x"]
    assert main(line) == 0 and main([*line, "eval.problems=9", "task.max_prompt_length=99"]) == 0
    (all_of_them, _, asked, out), (few, *_) = measured
    assert (list(asked), out) == (["custom", "math"], "x")
    assert (all_of_them.eval.problems, few.eval.problems) == (gspo_jax.evaluation.benchmark.ALL, 9)
    assert (all_of_them.task.max_prompt_length, few.task.max_prompt_length) == (10**9, 99)
    assert main(["eval", "demo", "--benchmarks", "math,zebar"]) == 2


def test_the_benchmark_script_is_eval_with_short_names(measured, tmp_path):
    line = ["--model_path", str(tmp_path), "--base", "demo", "--samples", "0", "--limit", "7"]
    line += ["mesh.data=1", "--max_new_tokens", "9", "--out", "y"]
    assert main(benchmark.command(line)) == 0
    ((config, names, asked, out),) = measured
    assert (names, list(asked), out) == (["demo", str(tmp_path)], ["zebra", "math", "custom"], "y")
    assert (config.eval.samples, config.eval.problems, config.mesh.data) == (0, 7, 1)
    assert config.rollout.max_completion_length == 9


def test_export_goes_beside_the_run_or_where_it_is_told(monkeypatch, capsys):
    calls = []

    def export(run, out, like):
        calls.append((str(run), str(out), like))
        return out

    monkeypatch.setattr(gspo_jax.run.export, "export", export)
    assert main(["export", "runs/x"]) == 0
    assert main(["export", "runs/x", "out", "--like", "base"]) == 0
    assert calls == [("runs/x", "runs/x/export", None), ("runs/x", "out", "base")]
    assert capsys.readouterr().out.split() == ["runs/x/export", "out"]


def test_an_export_and_the_end_of_a_run_say_how_the_model_is_used(
    trained, monkeypatch, capsys, tmp_path
):
    out = tmp_path / "run" / "export"
    out.mkdir(parents=True)
    text = model_card(load_config(), steps=1, supervised=False, before={}, after={})
    (out / "README.md").write_text(text)
    monkeypatch.setattr(gspo_jax.run.export, "export", lambda run, out, like: out)
    assert main(["export", str(tmp_path / "run")]) == 0
    assert main(["train", DEMO]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{out}\n") and told.count(how_to_use(out)) == 2
    assert f'  chat = pipeline("text-generation", "{out}")\n' in told


def test_report_writes_one_page_of_all_runs_that_it_is_given(capsys, tmp_path):
    runs = [tmp_path / name for name in ("a", "b")]
    for run in runs:
        run.mkdir()
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 0.5}) + "\n")
    assert main(["report", *map(str, runs)]) == 0
    assert main(["report", str(runs[0]), "--out", str(tmp_path / "x")]) == 0
    pages = [tmp_path / "report" / "report.html", tmp_path / "x" / "report.html"]
    assert capsys.readouterr().out.split() == [str(p) for p in pages]
    assert all(p.is_file() for p in pages)
    assert main(["report", str(tmp_path / "nope")]) == 3

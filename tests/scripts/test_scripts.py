"""The commands of scripts/ with the flags of other trainers, typed as those have them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_jax.cli import commands as cli
from gspo_jax.run.checkpoint import names

ROOT = Path(__file__).parents[2]
SMALL = ["task.options={sizes: {train: 4, val: 0, test: 2}, levels: [easy]}", "eval.samples=0"]
SMALL += ["rollout.group_size=2", "rollout.max_completion_length=4", "mesh.data=1"]
TRAIN = ["--model_name", "demo", "--num_epochs", "8", "--batch_size", "2"]
TRAIN += ["--learning_rate", "1e-7", "--output_dir"]
COMPARE = ["--algorithms", "PPO,GRPO,GSPO", "--num_epochs", "3", "--output_dir"]


@pytest.fixture
def flags(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import flags

    return flags


@pytest.fixture
def translated(flags):
    """(command, words) -> what gspo-jax is given, and what was said."""

    def translate(command, words):
        said = []
        return flags.in_our_words(command, words, said.append), said

    return translate


@pytest.fixture
def sized(flags, monkeypatch):
    """A training split of so many problems, whatever the task; the configs that were asked for."""
    asked = []

    def steps(count):
        def load(config, tokenizer):
            asked.append(config)
            return type("Some", (), {"indices": {"train": list(range(count))}})

        monkeypatch.setattr("gspo_jax.policy.load_problems", load)
        return asked

    return steps


@pytest.mark.long
def test_a_run_by_other_flags_goes_to_its_end_and_says_what_each_became(
    flags, tmp_path, monkeypatch, capsys
):
    """8 passes over 4 problems, 2 a step: 16 steps, in the directory that was named."""
    monkeypatch.chdir(tmp_path)
    assert flags.main("train", [*TRAIN, "out/D", *SMALL, "eval.split=val"]) == 0
    said = [line.removeprefix("gspo-jax: ") for line in capsys.readouterr().err.splitlines()]
    for line in (
        "--model_name demo: model.path=demo",
        "--learning_rate 1e-7: optim.learning_rate=1e-7",
        "--output_dir out/D: run.dir=out run.name=D",
        "--batch_size 2: rollout.prompts=2 algo.minibatches=2",
        "--num_epochs 8: run.steps=16 (8 passes over 4 problems, 2 a step)",
    ):
        assert said.count(line) == 1, said
    run = tmp_path / "out" / "D"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert "16" in names(run / "checkpoints") and (run / "export" / "config.json").is_file()


@pytest.mark.long
def test_a_comparison_by_other_flags_goes_to_its_end(tmp_path):
    """3 passes over 4 problems, 16 a step: one step, of three losses and one seed."""
    script = str(ROOT / "scripts" / "compare_baselines.py")
    words = [*COMPARE, "D", "--seeds", "1", *SMALL, "eval.samples=1", "algo.minibatches=1"]
    done = subprocess.run([sys.executable, script, *words], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads((tmp_path / "D" / "compare.json").read_text())
    assert set(found["variants"]) == {"ppo", "grpo", "gspo"}
    for name in found["variants"]:
        status = json.loads((tmp_path / "D" / f"{name}-seed0" / "status.json").read_text())
        assert (status["state"], status["step"]) == ("finished", 1)


def test_passes_over_the_data_are_steps_and_never_passes_over_a_rollout(translated, sized):
    sized(79)
    words, _ = translated("compare", [*COMPARE, "D"])
    assert words[-4:] == ["--losses", "ppo,grpo,gspo", "--out", "D"]
    assert "run.steps=15" in words  # ceil(3 * 79 / 16)
    assert not any(word.startswith("algo.epochs") for word in words)


def test_a_batch_keeps_the_updates_per_step_that_divide_it(translated):
    cases = {"2": "2", "3": "3", "4": "4", "6": "3", "7": "1", "16": "4"}
    for size, parts in cases.items():
        words, _ = translated("train", ["--batch-size", size])
        assert words[-2:] == [f"rollout.prompts={size}", f"algo.minibatches={parts}"]
    words, _ = translated("train", ["--batch_size=6", "algo.minibatches=2"])
    assert words[-2:] == ["rollout.prompts=6", "algo.minibatches=2"]


def test_a_config_file_and_settings_go_before_what_flags_mean_by_default(translated, sized):
    asked = sized(10)
    demo = str(ROOT / "configs" / "demo.yaml")
    words, said = translated("train", [demo, "--num_epochs", "2", "--use_wandb", "run.seed=3"])
    assert words == ["run.report_to=[wandb]", "run.steps=2", demo, "run.seed=3"]
    assert said[0] == "--use_wandb: run.report_to=[wandb]" and len(said) == 2
    assert asked[0].task.name == "arithmetic" and asked[0].run.seed == 3
    words, _ = translated("train", ["--dataset", "rows.jsonl", "--model_name", "a/b"])
    assert words == ["task.path=rows.jsonl", "model.path=a/b"]
    words, _ = translated("train", ["--dataset", "knights", "--model_name", "a/b"])
    assert words == ["task.name=knights", "model.path=a/b"]


@pytest.mark.parametrize(
    ("command", "words", "text"),
    [
        ("train", ["--num_epochs", "three"], "--num_epochs three: wanted a whole number from 1"),
        ("train", ["--batch_size", "0"], "--batch_size 0: wanted a whole number from 1"),
        ("train", ["--model_name"], "--model_name needs a value, as model.path"),
        ("train", ["--warm_up", "3"], "unknown argument --warm_up. A setting is written without"),
        ("train", ["--algorithms", "ppo"], "unknown argument --algorithms"),
        ("compare", ["--seed", "1"], "unknown argument --seed. "),
        ("train", ["--learning_rate", "fast"], "optim.learning_rate=fast: expected a number"),
        (
            "compare",
            [str(ROOT / "configs/experiments/losses.yaml"), "--num_epochs", "3"],
            "losses.yaml is an experiment",
        ),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(flags, command, words, text, capsys):
    try:
        code = flags.main(command, words)
    except SystemExit as left:
        code = left.code
    lines = [x for x in capsys.readouterr().err.splitlines() if " unknown " in x or text in x]
    assert code == 2 and len(lines) == 1 and text in lines[0], lines


def test_benchmarks_of_a_run_are_those_of_its_export(tmp_path, monkeypatch):
    """D is what --output_dir was; what needs the network is missing, and the rest is measured."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import benchmark as script

    run, asked = tmp_path / "D", ["--benchmarks", "zebralogic,math,custom"]
    (run / "export").mkdir(parents=True)
    (run / "export" / "config.json").write_text("{}")
    words = script.command(["--model_path", str(run), *asked, "--output_dir", "R"])
    assert words == ["eval", str(run / "export"), *asked, "--out", "R"]
    (run / "config.json").write_text("{}")
    assert script.command(["--model_path", str(run), *asked])[1] == str(run)


@pytest.mark.long
def test_benchmarks_without_network_are_named_and_the_others_measured(
    tiny_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import benchmark as script

    monkeypatch.chdir(tmp_path)
    words = ["--model_path", str(tiny_dir), "--benchmarks", "zebralogic,math,custom"]
    small = ["--limit", "2", "--samples", "1", "--max_new_tokens", "4", "mesh.data=1"]
    assert cli.main(script.command([*words, *small])) == 3
    results = json.loads(Path("runs/eval/results.json").read_text())
    assert list(results["missing"]) == ["zebralogic", "math"]
    assert list(results["scores"]) == ["custom"]
    said = [x for x in capsys.readouterr().err.splitlines() if "is left out" in x]
    assert len(said) == 2

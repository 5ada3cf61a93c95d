"""A recorded step computed again is the same to the last bit, and the run is not touched."""

import json
import shutil

import pytest

from gspo_jax.cli.commands import main
from gspo_jax.config.load import load_config
from gspo_jax.replay import compared
from gspo_jax.train import train


@pytest.fixture(scope="module")
def run(tiny_dir, tmp_path_factory):
    """Three steps with a KL term and an evaluation in the second; a checkpoint after each."""
    place = tmp_path_factory.mktemp("replay")
    rows = [{"prompt": f"Say {w}", "answer": w, "split": "train"} for w in "abcdef"]
    rows += [{"prompt": "Say z", "answer": "z", "split": "test"}]
    data = place / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = [
        f"model.path={tiny_dir}",
        f"task.path={data}",
        "task.rewards=[reward_functions:short_words]",
        "task.max_prompt_length=32",
        "rollout.prompts=4",
        "rollout.group_size=4",
        "rollout.max_completion_length=12",
        "algo.minibatches=2",
        "algo.kl.coef=0.01",
        "optim.learning_rate=3e-3",
        "eval.every=2",
        "eval.samples=2",
        "mesh.data=1",
        f"run.dir={place}",
        "run.name=run",
        "run.steps=3",
        "run.save_every=1",
        "run.keep=9",
    ]
    return train(load_config(None, config)).run_dir


def files(run):
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


@pytest.mark.long
@pytest.mark.parametrize(
    ("step", "start"), [(1, "the initial weights"), (2, "checkpoints/1"), (3, "checkpoints/2")]
)
def test_a_step_is_bitwise_what_was_recorded_and_nothing_is_written(run, capsys, step, start):
    before = files(run)
    assert main(["replay", str(run), "--step", str(step)]) == 0
    out = capsys.readouterr().out
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[step])
    assert len(row["completions/digest"]) == 64
    assert f"Computing step {step} from" in out and start in out
    assert f"step {step}: " in out and "metrics equal to the last bit" in out
    assert files(run) == before


@pytest.mark.long
def test_from_an_older_checkpoint_it_runs_forward_and_what_differs_is_a_table(
    run, tmp_path, capsys
):
    other = shutil.copytree(run, tmp_path / "other")
    shutil.rmtree(other / "checkpoints" / "2")
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    lines[3] |= {"loss": lines[3]["loss"] + 1e-12, "completions/digest": "0" * 64}
    (other / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert main(["replay", str(other), "--step", "3"]) == 4
    out = capsys.readouterr().out
    assert "checkpoints/1" in out and "metrics equal, 2 not" in out
    assert "completions/digest" in out and "0" * 20 in out


@pytest.mark.long
@pytest.mark.parametrize(
    ("step", "code", "text"), [("9", 6, "has no step 9"), ("0", 6, "--step takes 1 or more")]
)
def test_a_step_that_is_not_recorded_is_refused(run, capsys, step, code, text):
    assert main(["replay", str(run), "--step", step]) == code
    assert text in capsys.readouterr().err


@pytest.mark.long
def test_other_data_and_no_run_are_refused(run, tmp_path, capsys):
    assert main(["replay", str(tmp_path), "--step", "1"]) == 6
    assert "no run; give the directory of one" in capsys.readouterr().err
    data = run.parent / "prompts.jsonl"
    kept = data.read_text()
    data.write_text(kept.replace("Say a", "Say A"))
    try:
        assert main(["replay", str(run), "--step", "2"]) == 3
    finally:
        data.write_text(kept)
    assert "not the data of the run" in capsys.readouterr().err


def test_times_do_not_count_and_what_is_absent_differs():
    recorded = {"step": 2, "loss": 0.5, "time/update": 1.0, "step_time": 3.0, "old": 1, "nan": None}
    computed = {"loss": 0.5, "time/update": 2.0, "nan": None, "new": [1.0]}
    done = compared(2, 1, recorded, computed)
    assert done.same == ["loss", "nan"]
    assert done.differs == {"old": (1, None), "new": (None, [1.0])}
    assert done.exit_code == 4

"""What a run keeps and measures, whoever stops it and whenever."""

import inspect
import json
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from gspo_jax.config.load import load_config
from gspo_jax.errors import ConfigError, DataError
from gspo_jax.replay import TIMED, replay
from gspo_jax.run import checkpoint
from gspo_jax.run import lifecycle as module
from gspo_jax.run.export import export
from gspo_jax.sft import sft
from gspo_jax.train import train


@pytest.fixture
def settings(tiny_dir, tmp_path):
    """Six problems with worked solutions to learn from, and one held out."""
    rows = [{"prompt": f"Say {w}", "answer": w, "split": "train"} for w in "abcdef"]
    rows += [{"prompt": "Say z", "answer": "z", "split": "test"}]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row | {"completion": row["answer"]}) + "\n" for row in rows))

    def make(name, *overrides):
        return load_config(
            None,
            [
                f"model.path={tiny_dir}",
                f"task.path={data}",
                "task.rewards=[reward_functions:short_words]",
                "task.max_prompt_length=32",
                "rollout.prompts=4",
                "rollout.group_size=4",
                "rollout.max_completion_length=12",
                "algo.minibatches=2",
                "optim.learning_rate=3e-3",
                "eval.samples=2",
                "sft.batch_size=4",
                "mesh.data=1",
                f"run.dir={tmp_path}",
                f"run.name={name}",
                "run.steps=4",
                *overrides,
            ],
        )

    return make


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in rows]


@pytest.mark.long
def test_the_best_by_evaluation_is_saved_when_it_is_measured_and_kept(settings, monkeypatch):
    """avg@2 of each step as given; no checkpoint falls due but the last."""
    values = {0: 0.9, 1: 0.25, 2: 0.75, 3: 0.5, 4: 0.5}

    def evaluate(run, state):
        value = values[int(state.step)]
        return {"eval/greedy": 1 - value, "eval/avg@2": value}

    monkeypatch.setattr(module.Run, "evaluate", evaluate)
    run = train(settings("best", "eval.every=1", "run.keep=1")).run_dir
    root = run / "checkpoints"
    assert checkpoint.names(root) == ["2", "4"]
    assert checkpoint.best(root) == (2, 0.75)
    assert checkpoint.read_meta(root / "4")["measured"] == 0.5
    values |= {5: 0.7, 6: 0.8}
    train(settings("best", "eval.every=1", "run.keep=1", "run.steps=6"))
    assert checkpoint.names(root) == ["6"]


@pytest.mark.long
def test_an_evaluation_that_a_stop_left_out_is_made_up_for(settings, monkeypatch):
    """Stopped at the end of step 2, before it was measured: the same lines as without a stop."""
    straight = train(settings("straight", "eval.every=2")).run_dir
    record = module.Run.record

    def stop_in_second(run, state, metrics, **kwargs):
        if int(state.step) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        record(run, state, metrics, **kwargs)

    monkeypatch.setattr(module.Run, "record", stop_in_second)
    config = settings("stopped", "eval.every=2")
    assert train(config).exit_code == 75
    monkeypatch.setattr(module.Run, "record", record)
    stopped = straight.parent / "stopped"
    assert "eval/greedy" not in rows_of(stopped)[-1]
    assert train(config).state == "finished"
    assert [row["step"] for row in rows_of(stopped)] == [0, 1, 2, 3, 4]
    assert rows_of(stopped) == rows_of(straight)


@pytest.mark.long
def test_a_run_without_settings_for_it_saves_as_time_passes_and_compares_what_it_trained(settings):
    """All but a few responses reach the limit and are left out: no difference is taken of those.

    So many minutes as a nanosecond have passed after every step; keep=2.
    """
    config = settings("timed", "run.save_minutes=1e-12", "algo.mask_truncated=true", "run.steps=3")
    run = train(config).run_dir
    assert checkpoint.names(run / "checkpoints") == ["2", "3"]
    rows = [row for row in rows_of(run) if row["step"]]
    assert all(row["completions/clipped_ratio"] > 0.3 for row in rows)
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-4


@pytest.mark.long
def test_a_run_is_read_elsewhere_than_where_it_was_trained(
    settings, tiny_dir, tmp_path, monkeypatch
):
    """Paths were relative, the mesh was larger than this machine, and the model has moved."""
    shutil.copytree(tiny_dir, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    moved = ["model.path=model", "task.path=prompts.jsonl", "eval.samples=0", "run.steps=2"]
    run = train(settings("moved", *moved, "run.save_every=1")).run_dir.resolve()
    assert train(settings("moved", *moved)).steps == 2  # the same settings, so the same run
    text = (run / "config.yaml").read_text()
    assert f"path: {tmp_path / 'model'}" in text and "data: 1" in text
    (run / "config.yaml").write_text(text.replace("data: 1", "data: 64"))
    monkeypatch.chdir("/")
    here = export(run, tmp_path / "here")
    again = replay(run, 2, say=lambda text: None)  # on all devices: other last bits, the same step
    assert {"completions/digest", "reward", "updates"} <= set(again.same)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    export(run, tmp_path / "lent", like=str(tmp_path / "elsewhere"))
    export(run, tmp_path / "kept")  # by what the run itself has of its model
    files = {file.name: file.read_bytes() for file in here.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= files.keys()
    for other in ("lent", "kept"):
        got = {file.name: file.read_bytes() for file in (tmp_path / other).iterdir()}
        assert got == files, other
    shutil.rmtree(run / "model")  # as of a run of an earlier version
    with pytest.raises(DataError):
        export(run, tmp_path / "none")


@pytest.mark.long
def test_every_nth_checkpoint_is_saved_and_stays(settings):
    run = train(settings("many", "run.keep_every=2", "run.keep=1", "run.steps=5")).run_dir
    assert checkpoint.names(run / "checkpoints") == ["2", "4", "5"]


@pytest.mark.long
def test_supervised_training_resumes_bit_for_bit_and_is_not_mixed_up(settings):
    options = ["eval.samples=0"]
    straight = sft(settings("straight", *options)).run_dir
    sft(settings("parts", *options, "run.steps=2"))
    parts = sft(settings("parts", *options)).run_dir
    lines = [[row for row in rows_of(run) if row["step"]] for run in (straight, parts)]
    assert [row["loss"] for row in lines[0]] == [row["loss"] for row in lines[1]]
    assert [row["grad_norm"] for row in lines[0]] == [row["grad_norm"] for row in lines[1]]
    with pytest.raises(ConfigError, match="is a run of gspo-jax sft, not of train"):
        train(settings("parts", *options, "run.steps=5"))
    fork = [f"run.resume={parts / 'checkpoints' / '4'}", "run.steps=5", *options]
    assert train(settings("after", *fork)).steps == 5


@pytest.mark.parametrize(("writer", "tracked"), [(True, ["wandb"]), (False, ())])
def test_of_several_processes_the_one_that_writes_tracks(monkeypatch, writer, tracked):
    class Asked(Exception):
        pass

    def log(*_, report_to, **__):
        raise Asked(report_to)

    monkeypatch.setattr(module, "is_writer", lambda: writer)
    monkeypatch.setattr(module, "RunLog", log)
    policy = SimpleNamespace(mesh=SimpleNamespace(devices=np.array([0])))
    config = load_config(None, ["run.report_to=wandb"])
    with pytest.raises(Asked) as asked:
        next(inspect.unwrap(module.open_run)(config, policy, None))
    assert asked.value.args == (tracked,)

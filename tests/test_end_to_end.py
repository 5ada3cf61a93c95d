"""Whole runs on a tiny model: they learn, resume bit for bit, and stop when asked."""

import json
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from gspo_jax.cli.commands import main
from gspo_jax.config.load import load_config
from gspo_jax.errors import ConfigError
from gspo_jax.files.whole import lock, unlock
from gspo_jax.models import Qwen, QwenConfig, load_model, save_model
from gspo_jax.prompt.tokenizer import load_tokenizer
from gspo_jax.train import train

HERE = Path(__file__).parent
REWARDS = HERE / "reward_functions.py"
TIMED = ("step_time", "compile_time", "compiles", "tokens_per_second")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six prompts: with four to a step, an epoch ends in the middle of every second step."""
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": f"Say {word}", "answer": word, "split": "train"} for word in "abcdef"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(tiny_dir, data, tmp_path):
    def make(name, *overrides, reward="short_words"):
        return load_config(
            None,
            [
                f"model.path={tiny_dir}",
                f"task.path={data}",
                f"task.rewards=[{REWARDS}:{reward}]",
                "task.max_prompt_length=32",
                "rollout.prompts=4",
                "rollout.group_size=4",
                "rollout.max_completion_length=12",
                "algo.minibatches=2",
                "algo.loss={name: gspo, clip_low: 0.02, clip_high: 0.03}",
                "optim.learning_rate=3e-3",
                "mesh.data=1",
                f"run.dir={tmp_path}",
                f"run.name={name}",
                "run.steps=4",
                *overrides,
            ],
        )

    return make


def metrics(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in TIMED and not k.startswith(("time/", "speed/"))}
        for line in lines
    ]


def stored(run_dir, step):
    """Every array of a checkpoint by name, as orbax finds it."""
    path = (run_dir / "checkpoints" / str(step)).resolve()
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return checkpointer.restore(path, args=args).state


def test_a_run_raises_its_reward_and_leaves_what_it_promises(config):
    result = train(config("learns", "run.steps=25", "rollout.prompts=6", "rollout.group_size=8"))
    rows = metrics(result.run_dir)
    assert [row["step"] for row in rows] == list(range(1, 26))
    first, last = (np.mean([r["reward"] for r in part]) for part in (rows[:5], rows[-5:]))
    assert last > first + 0.1
    assert all(row["clip_frac_by_update"][0] == 0 for row in rows)
    assert all(row["clip_ratio/region_mean"] == row["clip_frac_seq"] for row in rows)
    assert max(row["sampling/sampling_logp_difference/max"] for row in rows) < 1e-3
    assert result.state == "finished" and result.exit_code == 0
    left = {path.name for path in result.run_dir.iterdir()}
    assert {"config.yaml", "env.json", "metrics.jsonl", "samples.jsonl", "status.json"} <= left
    assert (result.run_dir / "plots" / "dynamics.png").stat().st_size > 10_000
    status = json.loads((result.run_dir / "status.json").read_text())
    assert (status["state"], status["step"], status["of"]) == ("finished", 25, 25)


@pytest.mark.long
def test_every_second_of_a_step_has_a_name_and_a_step_can_be_traced(config):
    run_dir = train(config("timed", "run.steps=2", "run.profile_steps=[2]")).run_dir
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    names = {name for name in row if name.startswith("time/")}
    assert names == {
        f"time/{n}"
        for n in ("generate", "reward", "advantage", "old_logp", "update", "optimizer", "host")
    }
    assert sum(row[name] for name in names) == pytest.approx(row["step_time"], rel=1e-6)
    assert 0 < row["speed/mfu"] < 1 and 0 < row["speed/generate_of_floor"] < 1
    assert list((run_dir / "profile").rglob("*.xplane.pb"))


def test_the_export_is_the_trained_model_in_the_dtype_of_its_source(config):
    result = train(config("exports", "run.steps=1"))
    exported = load_model(result.run_dir / "export")
    weights = {
        k.removeprefix("params."): v
        for k, v in stored(result.run_dir, 1).items()
        if k.startswith("params.")
    }
    ours = dict(nnx.to_flat_state(nnx.state(exported)))
    assert len(ours) == len(weights) > 20
    for path, param in ours.items():
        name = ".".join(map(str, path)) + ".value"
        wanted = np.asarray(weights[name]).astype(exported.config.dtype).astype(np.float32)
        np.testing.assert_array_equal(np.asarray(param[...]), wanted)


@pytest.mark.long
def test_the_export_says_what_it_is_and_takes_the_place_of_the_former(config, tiny_dir):
    """Of the run, and of `gspo-jax export`, which has only the run's files to go by."""
    overrides = ["run.steps=1", "eval.split=train", "eval.samples=0"]
    run_dir = train(config("cards", *overrides)).run_dir
    card = (run_dir / "export" / "README.md").read_text()
    assert "- gspo\n" in card and "| steps | 1 |" in card and str(tiny_dir) not in card
    assert "On 6 held-out problems" in card and card.count("\n| greedy | ") == 1
    (run_dir / "export" / "README.md").write_text("stale")
    assert main(["export", str(run_dir)]) == 0
    assert (run_dir / "export" / "README.md").read_text() == card
    lent = json.loads((tiny_dir / "generation_config.json").read_text())
    assert json.loads((run_dir / "export" / "generation_config.json").read_text()) == lent
    assert not list(run_dir.glob(".export*"))
    assert main(["export", str(run_dir), str(run_dir / "export")]) == 0  # its own, by name
    assert main(["export", str(run_dir), str(tiny_dir)]) == 3  # and no other


# In the middle of an epoch, and at the end of the second.
@pytest.mark.long
@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(config, stop):
    straight = train(config("straight", "optim.schedule=linear")).run_dir
    # The schedule needs the length of the whole run, so the stop is a checkpoint in its middle.
    stopped = train(config("stopped", "optim.schedule=linear", "run.save_every=1", "run.keep=9"))
    from_there = stopped.run_dir / "checkpoints" / str(stop)
    again = train(
        config("again", "optim.schedule=linear", f"run.resume={from_there}", "run.name=again")
    ).run_dir
    wanted, got = stored(straight, 4), stored(again, 4)
    assert wanted.keys() == got.keys() and len(got) > 60
    for name in wanted:
        np.testing.assert_array_equal(wanted[name], got[name], err_msg=name)
    assert metrics(again) == [row for row in metrics(straight) if row["step"] > stop]


@pytest.fixture(scope="module")
def experts_dir(tiny_dir, tmp_path_factory):
    """A tiny Qwen3-MoE directory with the demo's tokenizer."""
    shape = {
        "model_type": "qwen3_moe",
        "vocab_size": 296,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mlp_only_layers": [0],
        "tie_word_embeddings": True,
    }
    model = Qwen(QwenConfig.from_hf(shape), rngs=nnx.Rngs(1))
    model.embed[...] = model.embed[...] * 10
    path = tmp_path_factory.mktemp("models") / "experts"
    save_model(model, path, like=tiny_dir)
    return path


@pytest.mark.long
@pytest.mark.parametrize("replay", ["R3", "R2"])
def test_a_mixture_of_experts_trains_with_replay_resumes_and_comes_out(config, experts_dir, replay):
    options = [f"model.path={experts_dir}", f"algo.routing_replay={replay}", "run.save_every=1"]
    options += ["algo.router_aux_coef=0.01", "run.steps=2"]
    whole = train(config(f"{replay}-whole", *options)).run_dir
    parts = config(f"{replay}-parts", *options)
    train(config(f"{replay}-parts", *options[:-1], "run.steps=1"))
    resumed = train(parts).run_dir
    assert metrics(whole)[-1] == metrics(resumed)[-1]
    for row in metrics(whole)[1:]:
        # Recorded at the first minibatch; by the sampler also for the first.
        assert len(row["router/changed_by_update"]) == (2 if replay == "R3" else 1)
        assert row["router/load_max"] >= 1 and row["clip_frac_by_update"][0] == 0
    before, after = (nnx.state(load_model(d)) for d in (experts_dir, whole / "export"))
    router = [np.abs(s["layers"][1]["moe"]["router"][...]) for s in (before, after)]
    assert np.abs(router[0] - router[1]).max() > 0


def test_replay_without_experts_is_refused(config):
    with pytest.raises(ConfigError, match="routing_replay=R2: the model is qwen2, which has no"):
        train(config("none", "algo.routing_replay=R2"))


@pytest.mark.long
def test_padding_with_the_end_of_sequence_changes_nothing(config, tiny_dir, tmp_path):
    """What tells padding from a response is a mask, and never the token."""
    same = Path(shutil.copytree(tiny_dir, tmp_path / "same"))
    for name, pad in (
        ("config.json", {"pad_token_id": 295}),
        ("generation_config.json", {"pad_token_id": 295}),
        ("tokenizer_config.json", {"pad_token": "<|im_end|>"}),
    ):
        content = json.loads((same / name).read_text())
        assert content.keys() >= pad.keys()
        (same / name).write_text(json.dumps(content | pad))
    tokenizers = [load_tokenizer(path) for path in (tiny_dir, same)]
    assert [(t.pad_id, t.eos_ids) for t in tokenizers] == [(293, (295,)), (295, (295,))]
    runs = [
        train(config(name, "run.steps=2", f"model.path={path}")).run_dir
        for name, path in (("other", tiny_dir), ("same", same))
    ]
    first, second = map(metrics, runs)
    assert first == second
    assert min(row["completions/clipped_ratio"] for row in first) < 1  # some ended by themselves
    wanted, got = stored(runs[0], 2), stored(runs[1], 2)
    for name in wanted:
        np.testing.assert_array_equal(wanted[name], got[name], err_msg=name)


@pytest.mark.parametrize(
    ("policy", "code", "text"),
    [
        ("drop", 0, "3 train, 0 val, 0 test; 1 left out, longer than 24"),
        ("refuse", 3, "train problem 2 ('mid.jsonl:3') has a prompt of"),
    ],
)
def test_prompts_that_are_too_long_are_left_out_or_refused(
    config, tiny_dir, tmp_path, capsys, policy, code, text
):
    rows = ["a", "b", "three words and more than twenty-four tokens", "d"]
    path = tmp_path / "mid.jsonl"
    path.write_text("".join(json.dumps({"prompt": r, "answer": "a", "split": "train"}) + "\n"
                            for r in rows))  # fmt: skip
    settings = [f"model.path={tiny_dir}", f"task.path={path}", "task.max_prompt_length=24"]
    got = main(["train", *settings, f"task.long_prompts={policy}", "--dry-run"])
    out, err = capsys.readouterr()
    assert (got, text in out + err) == (code, True), out + err
    if code:
        assert "task.max_prompt_length=24; 1 of 4 are like that" in err and err.count("\n") == 1


@pytest.mark.long
def test_a_run_says_how_many_problems_it_leaves_out(config, tmp_path, capsys):
    path = tmp_path / "mid.jsonl"
    rows = [{"prompt": "b " * n, "answer": "a", "split": "train"} for n in (1, 1, 1, 1, 60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(config("fewer", f"task.path={path}", "run.steps=1"))
    said = " ".join(capsys.readouterr().out.split())
    assert "1 problems have prompts of more than 32 tokens and are left out." in said


def refused(capsys, *line):
    """The exit code and the only line on stderr of one command."""
    code = main(["train", *line])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return code, lines[0].removeprefix("gspo-jax: ")


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("rollout.group_sze=4", 2, "unknown setting rollout.group_sze. Did you mean"),
        ("rollout.group_size=1", 2, "rollout.group_size=1: a group-relative advantage needs"),
        ("model.path=/nowhere/model", 3, "/nowhere/model"),
        ("model.path={pickles}", 3, "pytorch_model.bin"),
        ("task.path={broken}", 3, "broken.jsonl:2"),
        (f"task.rewards=[{REWARDS}:raises]", 3, "RuntimeError"),
        (f"task.rewards=[{REWARDS}:one_too_few]", 3, "one_too_few"),
        ("run.name=used", 6, "in use by another run"),
    ],
    ids=lambda x: str(x).split("/")[-1][:30] if isinstance(x, str) else None,
)
def test_bad_input_is_one_line_with_its_exit_code_and_touches_nothing(
    config, tiny_dir, data, tmp_path, capsys, override, code, message
):
    elsewhere = tmp_path / "inputs"
    elsewhere.mkdir()
    pickles = shutil.copytree(tiny_dir, elsewhere / "pickles")
    (pickles / "model.safetensors").rename(pickles / "pytorch_model.bin")
    broken = elsewhere / "broken.jsonl"
    broken.write_text('{"prompt": "Say a", "answer": "a"}\n{"prompt": "Say b", "answer"\n')
    runs = tmp_path / "runs"
    held = lock(runs / "used")
    before = sorted(runs.rglob("*"))
    settings = [
        f"model.path={tiny_dir}",
        f"task.path={data}",
        f"run.dir={runs}",
        "rollout.max_completion_length=12",
        "mesh.data=1",
        override.format(pickles=pickles, broken=broken),
    ]
    got, line = refused(capsys, *settings)
    unlock(held)
    assert got == code
    assert message in line and len(line) < 400
    assert sorted(runs.rglob("*")) == before

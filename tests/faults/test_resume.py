"""Rows 10 to 15: a run that was stopped goes on as if it had not been, or says why it cannot."""

import importlib
import json
import os
import re
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from faults.tools import metrics, one_line, tiny_run, write_rows
from gspo_jax.cli.commands import main
from gspo_jax.config.load import load_config
from gspo_jax.errors import StorageError
from gspo_jax.files import integrity
from gspo_jax.models import Qwen, QwenConfig, save_model
from gspo_jax.replay import TIMED
from gspo_jax.run import checkpoint
from gspo_jax.train import train
from gspo_jax.update.optim import make_optimizer
from gspo_jax.update.state import init_state

GOLDEN = Path(__file__).parents[1] / "fixtures" / "checkpoints_format_1"


def stored(run, name):
    """Every array of a checkpoint by name, as orbax finds it."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return checkpointer.restore((run / "checkpoints" / name).resolve(), args=args).state


def untimed(run):
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in metrics(run)]


def assert_same_run(run, other):
    """Metrics, token ids by their digests, and every leaf of the last state: to the last bit."""
    assert untimed(run) == untimed(other)
    last = checkpoint.names(run / "checkpoints")[-1]
    wanted, got = stored(run, last), stored(other, last)
    assert wanted.keys() == got.keys() and len(got) > 60
    for name in wanted:
        np.testing.assert_array_equal(wanted[name], got[name], err_msg=name)


# ------------------------------------------------------------ row 10: anywhere, bit for bit


@pytest.fixture
def stop_at(monkeypatch):
    """Send this process a SIGTERM at the n-th time that the updates ask whether to stop."""
    loop = importlib.import_module("gspo_jax.train")
    updates = loop.continue_updates

    def arm(number):
        count = [0]

        def watched(*args, stop, **options):
            def asked():
                count[0] += 1
                if count[0] == number:
                    os.kill(os.getpid(), signal.SIGTERM)
                return stop()

            return updates(*args, stop=asked, **options)

        monkeypatch.setattr(loop, "continue_updates", watched)

    return arm


def experts(tiny_dir, path):
    shape = json.loads((tiny_dir / "config.json").read_text()) | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "moe_intermediate_size": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [0],
    }
    model = Qwen(QwenConfig.from_hf(shape), rngs=nnx.Rngs(1))
    model.embed[...] = model.embed[...] * 10
    save_model(model, path, like=tiny_dir)
    return path


KINDS = {
    "kl": ["algo.kl.coef=0.02", "algo.epochs=2", "optim.schedule=linear"],
    "steered": ["algo.kl.coef=0.02", "algo.kl.placement=reward", "algo.kl.target=1e-4"],
    "critic": ["algo.loss=ppo", "algo.advantage=gae", "algo.critic.kind=separate"],
    "experts": ["algo.routing_replay=R2", "algo.epochs=2"],
    "resample": ["rollout.resample=1", "optim.state=float32"],
}


def settings_of(kind, tiny_dir, place, *overrides):
    model = tiny_dir
    if kind == "experts":
        model = place / "experts"
        model = model if model.is_dir() else experts(tiny_dir, model)
    return tiny_run(model, place, *KINDS[kind], "run.steps=3", "run.log_completions=1", *overrides)


def stop_and_go_on(kind, tiny_dir, place, stop_at, number, name, *overrides):
    """The names of the checkpoints at the stop; the run is then finished by the same command."""
    config = load_config(None, settings_of(kind, tiny_dir, place, f"run.name={name}", *overrides))
    stop_at(number)
    assert train(config).exit_code == 75
    names = checkpoint.names(place / name / "checkpoints")
    stop_at(0)
    assert train(config).state == "finished"
    return names


@pytest.fixture(scope="module")
def straight(tiny_dir, tmp_path_factory):
    """The run that nobody stops."""
    place = tmp_path_factory.mktemp("straight")
    return train(load_config(None, settings_of("kl", tiny_dir, place))).run_dir


# Four updates a step with two epochs, two with one; asked once more where the rollout is there.
# 1: before anything is scored; 2: scored, no update; 5: before the last update; 8: in step 2.
@pytest.mark.faults
@pytest.mark.parametrize(("number", "name"), [(2, "0+0"), (8, "1+1")])
def test_row_10_a_stop_between_two_updates_changes_nothing(
    straight, tiny_dir, tmp_path, stop_at, number, name
):
    run = f"stop{number}"
    assert stop_and_go_on("kl", tiny_dir, tmp_path, stop_at, number, run) == [name]
    assert_same_run(straight, tmp_path / run)
    samples = [(d / "samples.jsonl").read_text() for d in (straight, tmp_path / run)]
    assert samples[0] == samples[1] != ""


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_row_10_every_place_between_two_updates(tiny_dir, tmp_path, stop_at, kind):
    steps = "run.steps=2"
    straight = train(load_config(None, settings_of(kind, tiny_dir, tmp_path, steps))).run_dir
    asked = 5 if "algo.epochs=2" in KINDS[kind] else 3  # in a step: before it, before each update
    places = range(1 if kind == "kl" else asked + 1, 2 * asked + 1)  # of both steps, or the second
    for number in places:
        name = f"stop{number}"
        stop_and_go_on(kind, tiny_dir, tmp_path, stop_at, number, name, steps)
        assert_same_run(straight, tmp_path / name)
    print(f"{kind}: {len(places)} stops between updates, as many runs bitwise equal")


# The first; the last before an epoch ends in a step.
@pytest.mark.faults
@pytest.mark.parametrize("step", [1, 2])
def test_row_10_a_stop_between_two_steps_changes_nothing(tiny_dir, tmp_path, step):
    """Killed, not asked: the steps after the last checkpoint are done again."""
    settings = tiny_run(tiny_dir, tmp_path, "run.save_every=1", "run.keep=9", "run.steps=3")
    straight = train(load_config(None, settings)).run_dir
    other = shutil.copytree(straight, tmp_path / "other")
    for later in range(step + 1, 4):
        shutil.rmtree(other / "checkpoints" / str(later))
    again = train(load_config(None, [*settings, "run.name=other"])).run_dir
    assert_same_run(straight, again)


@pytest.mark.faults
def test_row_11_at_the_end_of_an_epoch_the_rest_is_still_done(tiny_dir, tmp_path):
    """Six problems, three to a step: a checkpoint at each epoch's end, and one epoch to go."""
    options = ["rollout.prompts=3", "rollout.group_size=4", "algo.minibatches=3"]
    settings = tiny_run(tiny_dir, tmp_path, *options, "run.save_every=2")
    straight = train(load_config(None, [*settings, "run.name=straight"])).run_dir
    train(load_config(None, [*settings, "run.steps=2"]))
    result = train(load_config(None, settings))
    assert (result.state, result.steps) == ("finished", 4)
    assert [row["step"] for row in metrics(result.run_dir)] == [1, 2, 3, 4]
    assert_same_run(straight, result.run_dir)


# --------------------------------------------------------- rows 12 and 13: what has changed


HERE = ["task.path=prompts.jsonl", "run.dir=."]


@pytest.fixture(scope="module")
def one_step(tiny_dir, tmp_path_factory):
    """A run of one step, to be copied."""
    place = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train(load_config(None, tiny_run(tiny_dir, place, *HERE, "run.steps=1")))
    return place


@pytest.fixture
def copied(one_step, tmp_path, monkeypatch):
    """The settings that continue a copy of it, data file included."""
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def settings(tiny_dir, *overrides):
        return tiny_run(tiny_dir, tmp_path, *HERE, "run.steps=2", *overrides)

    return settings


def command(capsys, settings):
    code = main(["train", *settings])
    out, err = capsys.readouterr()
    return code, " ".join(out.split()), err


ROWS = [{"prompt": f"Say {word}", "answer": word, "split": "train"} for word in "abcdef"]
CHANGES = {
    "edited": [*ROWS[:2], ROWS[2] | {"answer": "x"}, *ROWS[3:]],
    "moved": [ROWS[1], ROWS[0], *ROWS[2:]],
    "cut": ROWS[:5],
    "longer": [*ROWS, {"prompt": "Say g", "answer": "g", "split": "train"}],
    "column": [row | {"completion": "x"} for row in ROWS],
}


@pytest.mark.long
@pytest.mark.parametrize("change", CHANGES)
def test_row_12_other_data_is_refused(tiny_dir, tmp_path, copied, capsys, change):
    write_rows(tmp_path / "prompts.jsonl", CHANGES[change])
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    code, _, err = command(capsys, copied(tiny_dir))
    assert code == 3 and "not the data that" in err and "run.allow_data_change=true" in err
    one_line(err)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.faults
def test_row_12_other_data_is_waved_through_on_request_and_a_moved_file_is_no_change(
    tiny_dir, tmp_path, copied, capsys
):
    shutil.copy("prompts.jsonl", "moved.jsonl")
    code, out, _ = command(capsys, copied(tiny_dir, "task.path=moved.jsonl"))
    assert code == 0 and "going on" not in out
    assert re.search(r"prompts\.jsonl -> \S*moved\.jsonl", out)
    write_rows(tmp_path / "prompts.jsonl", CHANGES["edited"])
    code, out, _ = command(capsys, copied(tiny_dir, "run.allow_data_change=true", "run.steps=3"))
    assert code == 0 and "the data is not what it was; going on" in out
    code, _, err = command(capsys, copied(tiny_dir, "task.max_prompt_length=30", "run.steps=4"))
    assert code == 0, err  # the same problems fit, and the checkpoint knows the new data


@pytest.mark.long
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rollout.group_size=2", "rollout.group_size (4 -> 2)"),
        ("rollout.prompts=2", "rollout.prompts (4 -> 2)"),
        ("algo.loss={name: grpo}", "algo.loss.name (gspo -> grpo)"),
        ("optim.state=float32", "optim.state (8bit -> float32)"),
        ("run.seed=1", "run.seed (0 -> 1)"),
        ("model.path={other}", "model.path ("),
    ],
)
def test_row_13_a_setting_that_makes_it_another_run_is_refused_by_name(
    tiny_dir, tmp_path, copied, capsys, override, named
):
    other = shutil.copytree(tiny_dir, tmp_path / "other")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.*") if p.is_file()}
    code, _, err = command(capsys, copied(tiny_dir, override.replace("{other}", str(other))))
    line = one_line(err)
    assert code == 2 and named in line and "run.name=NEW run.resume=" in line
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.faults
def test_row_13_the_difference_is_printed_and_says_what_it_means(tiny_dir, copied, capsys):
    code, out, _ = command(
        capsys, copied(tiny_dir, "optim.learning_rate=1e-3", "run.keep=5", "eval.problems=4")
    )
    assert code == 0 and "Settings that differ from those of" in out
    assert "optim.learning_rate: 0.003 -> 0.001 (changes what is learned from here)" in out
    for harmless in ("run.keep: 2 -> 5", "eval.problems: 512 -> 4", "run.steps: 1 -> 2"):
        assert harmless in out and f"{harmless} (" not in out
    assert "rollout.prompts" not in out and "run.name" not in out


@pytest.mark.faults
def test_row_13_another_run_may_start_from_the_checkpoint_with_any_settings_that_fit(
    tiny_dir, copied, capsys
):
    there = Path("run") / "checkpoints" / "1"
    fork = ["run.name=fork", f"run.resume={there}"]
    code, out, _ = command(capsys, copied(tiny_dir, *fork, "rollout.group_size=2"))
    assert code == 0 and "rollout.group_size: 4 -> 2 (changes what is learned" in out
    assert [row["step"] for row in metrics(Path("fork"))] == [2]
    # Preempted and started again with the same command, it continues itself.
    again = copied(tiny_dir, *fork, "rollout.group_size=2", "run.steps=3")
    code, out, _ = command(capsys, again)
    assert code == 0 and "has checkpoints of its own" in out and "after step 2 of 3" in out
    code, _, err = command(capsys, copied(tiny_dir, "run.name=b", fork[1], "optim.state=float32"))
    assert code == 6 and "does not fit this model and optimizer" in one_line(err)


# ---------------------------------------------------------- row 14: other numbers of devices


@pytest.mark.faults
@pytest.mark.parametrize("axis", ["fsdp", "data"])
def test_row_14_a_run_continues_on_8_then_4_then_1_devices(tiny_dir, tmp_path, axis):
    """Rows that divide by 8: eight prompts of four. The learning rate keeps rounding small."""
    settings = tiny_run(
        tiny_dir, tmp_path, "rollout.prompts=8", "optim.learning_rate=1e-4", "optim.state=float32"
    )
    alone = train(load_config(None, [*settings, "run.steps=3", "run.name=alone"])).run_dir
    for step, count in ((1, 8), (2, 4), (3, 1)):
        mesh = [f"mesh.{name}={count if name == axis else 1}" for name in ("data", "fsdp")]
        moved = train(load_config(None, [*settings, *mesh, f"run.steps={step}"])).run_dir
    wanted, got = metrics(alone), metrics(moved)
    assert [row["completions/digest"] for row in got] == [
        row["completions/digest"] for row in wanted
    ]
    for name in ("loss_by_update", "grad_norm", "entropy", "reward"):
        for a, b in zip(wanted, got, strict=True):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-6, err_msg=name)
    a, b = stored(alone, "3"), stored(moved, "3")
    for name in a:
        if name.startswith("params."):
            np.testing.assert_allclose(a[name], b[name], atol=1e-5, err_msg=name)


# ------------------------------------------------------------- row 15: from another version


def golden_state():
    """What tests/fixtures/checkpoints_format_1 was made of: numbers that can be told by hand."""
    w = jnp.asarray((np.arange(512) - 256).reshape(16, 32) / 64, jnp.float32)
    params = {"w": w, "half": jnp.arange(8, dtype=jnp.bfloat16) / 4}
    optimizer = make_optimizer(optax.constant_schedule(1e-3), state="8bit")
    with jax.numpy_dtype_promotion("standard"):
        state = init_state(params, optimizer)
    return state._replace(step=jnp.int32(3), updates=jnp.int32(12))


def write_golden():
    """Made once, by `python -c "from faults.test_resume import write_golden; write_golden()"`."""
    arrays = {"batch.tokens": np.arange(6, dtype=np.int32).reshape(2, 3)}
    pending = checkpoint.Pending(1, arrays, {"stats": [{"loss": 0.25}]})
    checkpoint.save(GOLDEN, 3, golden_state(), {"step": 3, "num_tokens": 99})
    checkpoint.save(GOLDEN, 3, golden_state(), {"step": 3, "num_tokens": 99}, pending=pending)


def test_row_15_a_checkpoint_of_an_earlier_version_loads():
    files = [path for path in GOLDEN.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 100_000
    assert checkpoint.names(GOLDEN) == ["3", "3+1"]
    wanted = golden_state()
    for name in checkpoint.names(GOLDEN):
        state, meta = checkpoint.restore(GOLDEN, name, jax.tree.map(jnp.zeros_like, wanted))
        assert (meta["step"], meta["num_tokens"]) == (3, 99)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    pending = checkpoint.read_pending(GOLDEN / "3+1")
    assert pending.updates == 1 and pending.record["stats"] == [{"loss": 0.25}]
    np.testing.assert_array_equal(pending.arrays["batch.tokens"], [[0, 1, 2], [3, 4, 5]])


def test_row_15_a_checkpoint_of_a_later_version_or_without_a_manifest_is_explained(tmp_path):
    path = Path(shutil.copytree(GOLDEN / "3", tmp_path / "3"))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(StorageError, match=r"in format 2 by a later version .* reads format 1"):
        integrity.verify(path)
    (path / "manifest.json").unlink()
    with pytest.raises(StorageError, match=r"manifest\.json is missing"):
        integrity.verify(path)

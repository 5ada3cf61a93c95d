"""What a run would need, against figures from elsewhere and against what a run does."""

import json
import logging
import math
import re
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import gspo_jax.plan.report
from gspo_jax.cli.commands import main
from gspo_jax.config.load import load_config
from gspo_jax.config.settings import AlgoConfig, RolloutConfig
from gspo_jax.errors import ConfigError
from gspo_jax.evaluation.evaluate import evaluate_path
from gspo_jax.mesh.sharding import make_mesh
from gspo_jax.models.config import QwenConfig
from gspo_jax.models.hf.weights import read_model_config
from gspo_jax.models.qwen import Qwen
from gspo_jax.models.remat import POLICIES
from gspo_jax.plan import costs, memory
from gspo_jax.plan.programs import programs, sketch
from gspo_jax.plan.report import report
from gspo_jax.policy import load_policy, load_problems
from gspo_jax.prompt.tokenizer import load_tokenizer
from gspo_jax.sft import sft
from gspo_jax.start import make_state
from gspo_jax.train import assemble, train

HERE = Path(__file__).parents[1]

# Of conftest's TINY with 296 words: D 32, F 48, 4 query and 2 key heads of 8, 2 layers.
# embedding 296 * 32; a layer: q, o 32 * 32; k, v 32 * 16; biases 32 + 16 + 16; MLP 3 * 32 * 48;
# two norms of 32; and one norm at the end.
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 64 + 3 * 32 * 48 + 2 * 32
PARAMETERS = 296 * 32 + 2 * LAYER + 32


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [
        {"prompt": f"Say {word}", "answer": word, "split": split}
        for word, split in zip("abcdefgh", ["train"] * 6 + ["test"] * 2, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(tiny_dir, data, tmp_path):
    def make(*overrides):
        settings = {
            "model.path": tiny_dir,
            "task.path": data,
            "task.rewards": f"[{HERE / 'reward_functions.py'}:short_words]",
            "task.max_prompt_length": 32,
            "rollout.prompts": 4,
            "rollout.group_size": 4,
            "rollout.max_completion_length": 40,
            "algo.minibatches": 2,
            "algo.microbatch": 2,
            "eval.samples": 2,
            "mesh.data": 1,
            "run.dir": tmp_path,
            "run.name": "planned",
            "run.steps": 3,
        }
        return load_config(None, [*(f"{k}={v}" for k, v in settings.items()), *overrides])

    return make


def sketched(config):
    directory = Path(config.model.path)
    problems = load_problems(config, load_tokenizer(directory))
    return sketch(config, read_model_config(directory), problems, make_mesh(**vars(config.mesh)))


def test_what_is_held_is_what_a_hand_counts(config):
    held = sketched(config("optim.state=float32", "algo.kl.coef=0.1")).held
    assert held.masters == held.gradients == held.reference == 4 * PARAMETERS
    assert held.moments == 8 * PARAMETERS + 2 * 4  # and the counters of Adam and the schedule
    assert held.weights == 0  # the sampler computes with the masters
    assert sketched(config("model.dtype=bfloat16")).held.weights == 2 * PARAMETERS


def test_8_bit_moments_take_about_two_bytes_each_where_they_are_large(config):
    run = sketched(config("algo.kl.coef=0"))
    # Of at least 4096 elements is the embedding alone: codes, and a scale for each row of 32;
    # the other leaves stay in float32.
    large = 296 * 32
    assert run.held.moments == 2 * (large + 296 * 4 + 4 * (PARAMETERS - large)) + 2 * 4
    assert run.held.reference == 0


def test_devices_that_share_the_weights_hold_less_of_each(config):
    one, two = sketched(config()), sketched(config("mesh.fsdp=2"))
    assert one.held.masters / 2 < two.held.masters < one.held.masters * 0.55
    assert memory.cache_bytes_of(two) == memory.cache_bytes_of(one) / 2


def test_the_cache_is_keys_and_values_of_every_layer(config):
    run = sketched(config())
    slots = run.problems.longest + 40
    assert (
        memory.cache_bytes_of(run) == 2 * 2 * 16 * 2 * slots * 8 * 4
    )  # k, v; layers; rows; heads; float32


def test_the_operations_of_a_forward_pass_are_those_that_xla_counts(tiny):
    c = tiny.config
    graphdef, params = nnx.split(tiny)
    run = jax.jit(lambda params, tokens: nnx.merge(graphdef, params).logits(tokens))
    tokens = jax.ShapeDtypeStruct((3, 24), jnp.int32)
    counted = run.lower(params, tokens).compile().cost_analysis()["flops"]
    # XLA also counts norms, softmax and rotations, which are not small in a model of width 32
    assert counted * 0.75 < costs.forward(c, 3, 24, 24) < counted


def test_a_step_is_about_six_operations_per_parameter_and_trained_token(config):
    c = config().rollout
    shape = QwenConfig.from_hf(
        {
            "model_type": "qwen3",
            "vocab_size": 1000,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 512,
        }
    )
    model = nnx.eval_shape(lambda: Qwen(shape, rngs=nnx.Rngs(0)))
    N = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model)))
    rollout = RolloutConfig(prompts=4, group_size=4, max_completion_length=112)
    work = costs.step_work(shape, rollout, AlgoConfig(minibatches=1), 16)
    assert c.prompts * c.group_size * 128 == work.tokens == 2048
    # 6 N of training, 2 N of sampling the 7/8 that are responses
    assert work.total == pytest.approx((6 + 2 * 7 / 8) * N * 2048, rel=0.15)


def test_planning_reads_no_weights_and_writes_nothing(config, tiny_dir, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(Path(tiny_dir) / "config.json", bare)
    shown = []
    report(config(f"model.path={bare}"), compile=False, show=shown.append)
    (text,) = shown
    assert f"{PARAMETERS / 1e6:.2f} M parameters" in text
    assert "prompts     1 to 32 tokens (assumed: " in text
    assert [p.name for p in tmp_path.iterdir()] == ["bare"]


def test_what_does_not_fit_is_refused_with_settings_that_help(config, capsys, monkeypatch):
    few = ["rollout.group_size=2", "eval.problems=1"]
    large = config("optim.state=float32", "model.remat=none", *few)
    with pytest.raises(ConfigError, match=r"needs [\d.]+ of 0.0001 GB per device") as error:
        report(large, compile=False, limit=100_000)
    table = capsys.readouterr().out  # stands there too, with what is largest
    assert "masters" in table and re.search(r"peak .* of 0\.1 MB per device \(\d+%\)", table)
    for setting in ("model.remat=full", "optim.state=8bit", "algo.microbatch=1", "mesh.fsdp=2"):
        assert setting in str(error.value)
    monkeypatch.setattr(gspo_jax.plan.report, "capacity", lambda: 50_000)
    many = config("rollout.prompts=512", "algo.microbatch=1")
    with pytest.raises(ConfigError, match=r"of the rollout\): set rollout.prompts=256 or"):
        report(many, compile=False)


def test_the_command_refuses_with_exit_code_2(config, data, tiny_dir, capsys):
    line = ["plan", f"model.path={tiny_dir}", f"task.path={data}", "--no-compile"]
    line += ["task.max_prompt_length=32", "mesh.data=1", "rollout.max_completion_length=64"]
    assert main([*line, "--memory", "80"]) == 0
    assert "of 80.00 GB per device (0%)" in capsys.readouterr().out
    assert main([*line, "--memory", "0.001"]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("gspo-jax: needs ") and "of 1.0 MB per device" in told.out


@pytest.mark.long
def test_texts_beyond_the_models_positions_are_refused_before_anything_runs(
    config, tiny_dir, tmp_path
):
    """The model was made for 1024; stretched eight times from 256, there are 2048."""
    longest = sketched(config()).problems.longest
    settings = [f"rollout.max_completion_length={n - longest}" for n in (1024, 1025, 2048, 2049)]
    fits, too_many, told, too_many_for_any = settings
    advice = f"has 1,024 positions: set {fits} or lower"
    for action in (
        gspo_jax.plan.report.plan,
        partial(report, compile=False),
        train,
        sft,
        evaluate_path,
    ):
        with pytest.raises(ConfigError, match=f"texts of up to 1,025 tokens .*{advice}"):
            action(config(too_many))
    gspo_jax.plan.report.plan(config(fits))
    stretched = tmp_path / "stretched"
    shutil.copytree(tiny_dir, stretched)
    file = stretched / "config.json"
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256}
    changed = json.loads(file.read_text()) | {"rope_scaling": scaling}
    changed.pop("rope_parameters", None)
    file.write_text(json.dumps(changed))
    here = f"model.path={stretched}"
    text = gspo_jax.plan.report.plan(config(here, told))
    assert "max_position_embeddings=1024; the model's rope_scaling reaches 2,048." in text
    with pytest.raises(ConfigError, match="has 2,048 positions"):
        gspo_jax.plan.report.plan(config(here, too_many_for_any))


def compiled_by(action, caplog):
    """{(function, shapes)} of everything that is compiled."""
    caplog.clear()
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        action()
    text = r"Compiling (?:jit\()?(\w+)\)? with global shapes and types (.*?)\. Argument mapping"
    found = [re.search(text, record.getMessage()) for record in caplog.records]
    caplog.clear()
    return {(m[1], m[2]) for m in found if m}


def elements(shapes):
    sizes = re.findall(r"\[([\d,]+)\]", shapes)
    return sum(math.prod(map(int, size.split(","))) for size in sizes)


@pytest.mark.long
def test_a_run_compiles_no_large_program_that_is_not_planned(config, caplog):
    c = config("algo.kl.coef=0.1")
    planned = programs(sketched(c), every_length=True)
    listed = compiled_by(lambda: [p.lower().compile() for p in planned], caplog)
    ran = compiled_by(lambda: train(c), caplog)
    names = {p.name for p in planned}
    assert {"_prefill", "_decode", "_fit", "add_logps", "add_grads", "apply"} <= {
        name for name, _ in ran
    }
    unforeseen = {x for x in ran - listed if x[0] in names}
    assert {(name, elements(shapes)) for name, shapes in unforeseen} == set()
    # what is not planned works on numbers per row, but for the reference's beginning, the cast
    # that changes nothing in float32, the look at the parameters before they are saved, and the two
    # that measure the machine
    large = {name for name, shapes in ran - listed if elements(shapes) > 4096}
    assert large - {"_square", "_copy"} == {"copy", "to_sample", "all_finite"}


def test_the_state_takes_over_the_buffers_of_the_policy(config):
    c = config()
    policy = load_policy(c)
    _, _, state = make_state(c, policy, 4)
    for mine, its in zip(*map(jax.tree.leaves, (policy.params, state.params)), strict=True):
        assert mine.unsafe_buffer_pointer() == its.unsafe_buffer_pointer()


@pytest.mark.long
def test_steps_after_the_first_compile_nothing(config):
    result = train(config("rollout.max_completion_length=12", "eval.problems=2"))
    lines = (result.run_dir / "metrics.jsonl").read_text().splitlines()
    compiles = [row["compiles"] for row in map(json.loads, lines) if row["step"]]
    assert compiles[0] > 0 and compiles[1:] == [0, 0]


def test_a_plan_is_of_the_passes_that_a_run_takes(config, monkeypatch):
    """On a device with little memory both recompute; the formulas' figures follow."""
    c = config("algo.kl.coef=0.1")
    seen = set()
    for limit in (1 << 34, 2_250_000, 1):
        monkeypatch.setattr(memory, "_of_device", lambda _, limit=limit: (limit, 0))
        goal = sketched(c).goal
        loop, _ = assemble(c)
        assert (goal.remat, goal.attention) == (loop.goal.remat, loop.goal.attention)
        same = {"loss": None, "kl": None}  # functions with keywords, which compare by identity
        assert goal._replace(**same) == loop.goal._replace(**same)
        seen.add(goal.remat)
    assert seen == set(POLICIES)


def test_a_plan_says_which_passes_it_is_of(config):
    shown = []
    report(config(), compile=False, limit=1 << 40, show=shown.append)
    with pytest.raises(ConfigError):
        report(config(), compile=False, limit=1, show=shown.append)
    generous, tight = shown
    assert "attention xla, remat none (attention and remat decided here)" in generous
    assert "attention xla, remat full" in tight


def test_a_critic_and_its_values_are_planned_too(config):
    ppo = ["algo.critic.kind=separate", "algo.advantage=gae", "algo.loss=ppo"]
    run = sketched(config(*ppo))
    assert run.held.critic > 4 * PARAMETERS and run.held.gradients > 2 * 4 * PARAMETERS
    alone = [p for p in programs(sketched(config())) if p.name == "add_logps"]
    both = [p for p in programs(run) if p.name in ("add_logps", "add_values")]
    assert len(both) == 2 * len(alone)
    both[0].lower()  # the arguments fit

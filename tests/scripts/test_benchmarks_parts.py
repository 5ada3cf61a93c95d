"""`make gpu-check` where there is no GPU: every part runs, and the full forms fit one."""

import importlib
import shlex
import sys
from pathlib import Path

import jax
import optax
import pytest
from flax import nnx

from gspo_jax.mesh.sharding import make_mesh
from gspo_jax.models.qwen import Qwen
from gspo_jax.plan.memory import activation_need, held_by, logit_need, working
from gspo_jax.policy import Passes, TextSizes
from gspo_jax.update.optim import make_optimizer
from gspo_jax.update.state import init_state

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def check():
    """`gpu_check`, with its directory on the path as it is where a script is run."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("gpu_check")
    sys.path.remove(str(BENCHMARKS))


NAMES = ["step", "clip", "decode", "update", "head", "memory", "optimizer"]


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_part_in_its_quick_form_finds_what_its_goals_read(
    check, name, capsys, monkeypatch, tmp_path
):
    part = next(p for p in check.PARTS if p.name == name)
    command = check.command_of(part, True, tmp_path)
    monkeypatch.setattr(sys, "argv", command[1:])
    importlib.import_module(part.script.removesuffix(".py")).main()
    result = check.result_of(capsys.readouterr().out.strip().splitlines()[-1])
    for goal in check.GOALS:
        if goal.part != name or name == "decode":  # whose goals are for other batches
            continue
        if name == "memory":  # a CPU keeps no peak
            assert result["device_peak_gb"] is None
        elif name == "clip":
            assert goal.read(result) == 0  # float32, one CPU: two programs round alike
        else:
            assert goal.read(result) > 0
    # What was asked for is what was run, and is written down.
    asked = shlex.split(part.quick)
    if "--remat" in asked:
        ran = result.get("options", result)["remat"]
        assert ran == asked[asked.index("--remat") + 1]


def test_every_part_is_tried(check):
    assert [p.name for p in check.PARTS] == NAMES


def test_the_limits_of_the_parts_are_together_that_of_the_whole(check):
    assert check.TESTS_LIMIT + sum(p.limit for p in check.PARTS) == 60 * check.MINUTES
    makefile = (BENCHMARKS.parent / "Makefile").read_text()
    assert f"at most {check.MINUTES} minutes" in makefile


def needed(check, name):
    """GB by `plan`'s own figures, of a part that trains: the update, or the rollout if larger."""
    part = next(p for p in check.PARTS if p.name == name)
    o = dict(zip(*[iter(x for x in shlex.split(part.full) if x != "--json")] * 2, strict=True))
    shape = importlib.import_module("decode").qwen2(o["--model"])
    optimizer = make_optimizer(optax.constant_schedule(1e-6), state=o.get("--state", "8bit"))
    params = nnx.split(nnx.eval_shape(lambda: Qwen(shape, rngs=nnx.Rngs(0))))[1]
    held = held_by(
        jax.eval_shape(lambda p: init_state(p, optimizer), params),
        dtype="bfloat16",
        reference=False,
    )
    longest = int(o.get("--widths") or int(o["--prompt-length"]) + int(o["--new-tokens"]))
    tokens = int(o.get("--microbatches") or o.get("--microbatch") or 16384)
    sizes, mesh = TextSizes(tokens, longest, 256), make_mesh(data=1)
    how = Passes(o["--attention"], o["--remat"])
    update = held.always + held.gradients + working(held, "bfloat16", "gpu")
    update += activation_need(shape, mesh, sizes, "bfloat16", how)
    update += logit_need(shape, mesh, sizes, "bfloat16", "gpu")
    rows = int(o.get("--prompts", 0)) * int(o.get("--group-size", 0))
    cache = 2 * shape.num_layers * rows * shape.num_kv_heads * shape.head_dim * longest * 2
    return max(update, held.always + held.weights + cache) / 1e9


@pytest.mark.long
@pytest.mark.parametrize("name", ["step", "clip", "update", "memory"])
def test_the_parts_that_train_need_what_is_written_beside_them(check, name):
    part = next(p for p in check.PARTS if p.name == name)
    assert needed(check, name) == pytest.approx(part.needs, abs=1)


def test_every_part_fits_an_h200(check):
    assert max(p.needs for p in check.PARTS) < 0.93 * 140

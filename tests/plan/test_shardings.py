"""gspo-jax plan --shardings: every array of a step, where it lives, and how much of it."""

import json
import re

import pytest
from mesh_cases import MOE

from gspo_jax.cli.commands import main
from gspo_jax.config.load import load_config
from gspo_jax.plan.layout import largest_layer, page
from gspo_jax.plan.memory import per_device
from gspo_jax.plan.report import sketched

SETTINGS = [
    "model.dtype=bfloat16",
    "task.max_prompt_length=32",
    "rollout.prompts=8",
    "rollout.group_size=4",
    "rollout.max_completion_length=32",
    "algo.microbatch=8",
    "eval.problems=1",
    "mesh.data=1",
    "mesh.fsdp=2",
    "mesh.expert=2",
    "mesh.tensor=2",
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    directory = tmp_path_factory.mktemp("moe")
    (directory / "config.json").write_text(json.dumps(MOE | {"vocab_size": 161}))
    return [f"model.path={directory}", *SETTINGS]


@pytest.fixture(scope="module")
def run(settings):
    return sketched(load_config(None, settings))[0]


@pytest.fixture(scope="module")
def lines(run):
    """First cell -> line."""
    rows = [line for line in page(run).splitlines() if "  " in line]
    return {re.split(r"  +", line.strip())[0]: line for line in rows}


def test_every_parameter_is_there_once_with_its_axes_and_those_of_the_mesh(lines):
    assert re.search(r"x 2 +\[64, 192\] +embed heads +fsdp tensor", lines["layers 0-1: q"])
    assert "[8, 40, 64]" in lines["layers 0-1: moe.down"]
    assert "experts mlp embed  expert tensor fsdp" in lines["layers 0-1: moe.down"]
    # 161 words on two devices: whole, and it says so.
    assert re.search(r"\[161, 64\] +vocab embed +\(tensor\) fsdp", lines["embed"])


def test_the_bytes_are_those_of_one_device_and_add_up(run, lines):
    # down: 2 layers of 8 x 40 x 64 float32 over 2 x 2 x 2; the sampler's is whole along fsdp.
    masters, gradients, _, sampler = re.findall(r"[\d,.]+ [kM]B", lines["layers 0-1: moe.down"])
    assert masters == gradients == f"{2 * 8 * 40 * 64 * 4 / 8 / 1e3:.1f} kB"
    assert sampler == f"{2 * 8 * 40 * 64 * 2 / 4 / 1e3:.1f} kB"
    together = re.findall(r"([\d,.]+) ([kM])B", lines["together"])
    held = [run.held.masters, run.held.gradients, run.held.moments, run.held.weights]
    unit = {"k": 1e3, "M": 1e6}
    for (number, prefix), count in zip(together, held, strict=True):
        assert float(number) * unit[prefix] == pytest.approx(count, abs=0.05 * unit[prefix])


def test_activations_cache_and_logits_are_there_as_the_programs_split_them(run, lines):
    assert "fsdp+expert tensor - -" in lines["queries"]
    assert re.search(r"x 4 +\[32, 8, 64, 24\]", lines["keys, values 0-1"])
    # The vocabulary does not divide; rows are over four devices: 8 x 32 positions, 161 ids.
    assert "[256, 161]" in lines["logits (after the last)"]
    assert "fsdp+expert (tensor)" in lines["logits (after the last)"]


def test_no_line_is_wider_than_a_screen(run):
    assert max(map(len, page(run).splitlines())) <= 125


def test_the_largest_layer_is_counted_whole_along_fsdp_alone(run):
    # Per layer: q, k, v, o of 64 x 192 over tensor; router of 64 x 8; 3 x 8 x 64 x 40 over 4.
    layer = 4 * 64 * 192 // 2 + 64 * 8 + 3 * 8 * 64 * 40 // 4
    assert largest_layer(run) == 2 * layer
    assert per_device(run.policy.params) == run.held.masters


def test_the_command_prints_the_page(settings, capsys):
    assert main(["plan", *settings, "--shardings"]) == 0
    assert capsys.readouterr().out.startswith("8 devices: data 1, fsdp 2, expert 2, tensor 2.")

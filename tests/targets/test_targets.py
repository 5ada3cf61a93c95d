"""Programs compiled for GPUs and TPUs: they say what a run there would meet.

Each is that of `train`, for a network of two layers, taken from the plan. A module is compiled once
for all claims, so cases of one mesh stay with one worker.
"""

import math
import re
from itertools import product

import jax
import pytest
from target_cases import S, account_of, described

from gspo_jax.errors import ConfigError
from gspo_jax.mesh.sharding import MESH_AXES, leaves_of, make_mesh
from gspo_jax.plan import hlo
from gspo_jax.plan.memory import per_device
from gspo_jax.plan.target import target_of

CUDA = [
    ("dense", "h200:1", {}),
    ("dense", "h200:4", {"fsdp": 4}),
    ("dense", "h200:4", {"tensor": 4}),
    ("dense", "h200:4", {"data": 2, "fsdp": 2}),
    ("moe", "h200:4", {"fsdp": 2, "expert": 2}),
]
TPU = [
    ("dense", "v5p:2x2x1", {"fsdp": 4}),
    ("moe", "v6e:2x4", {"data": 2, "fsdp": 2, "expert": 2}),
]
PROGRAMS = ("to_sample", "_prefill", "_fit", "_decode", "add_logps", "add_grads", "apply")
LOOPS = ("_decode", "add_logps", "add_grads")  # programs that fill in what they are given


def name(case):
    kind, target, axes = case
    return "-".join([kind, target, *(f"{axis}{n}" for axis, n in axes.items())])


def on(cases):
    each = [pytest.param(c, id=name(c), marks=pytest.mark.xdist_group(name(c))) for c in cases]
    return pytest.mark.parametrize("case", each)


pytestmark = pytest.mark.targets


def compiled(case, program):
    kind, target, axes = case
    return account_of(program, kind, target, tuple(axes.items()))


def arrays(text):
    return [(x, shape) for x in hlo.instructions(text) for shape in x.shapes]


@on(CUDA + TPU)
def test_every_program_compiles_and_what_is_donated_is_taken_over(case):
    run = described(*case[:2], tuple(case[2].items()))
    for program in PROGRAMS:
        account = compiled(case, program)
        own = account.output - account.aliased  # what is new
        if program in LOOPS:
            assert account.aliased and own < 0.05 * account.aliased, (program, own)
    state = per_device(run.state)
    assert compiled(case, "apply").aliased >= state
    assert compiled(case, "add_grads").aliased >= run.held.gradients


@on(CUDA)
def test_decoding_copies_no_layers_cache(case):
    account = compiled(case, "_decode")
    text = account.text
    given = [s for x, s in arrays(text) if (x.computation, x.code) == ("ENTRY", "parameter")]
    cache = max(s.bytes for s in given if len(s.dims) == 4)  # keys, or values, of a layer
    copied = [x for x, s in arrays(text) if x.code in ("copy", "transpose") and s.bytes >= cache]
    assert not copied
    assert account.temporary < cache


@on(CUDA)
def test_where_cudnn_attends_no_scores_are_kept(case):
    for program in ("add_logps", "add_grads"):
        text = compiled(case, program).text
        assert "__cudnn$fmha" in text
        assert not [x for x, s in arrays(text) if s.dims[-2:] == (S, S)]


@on(CUDA + TPU)
def test_no_gradient_is_summed_in_16_bits(case):
    """By the products themselves neither: those sum in the units' float32."""
    text = compiled(case, "add_grads").text
    sums = [x for x in hlo.instructions(text) if x.code in ("scatter", "select-and-scatter")]
    halves = [x for x in sums if any(s.dtype in ("bf16", "f16") for s in x.shapes)]
    assert not halves
    # What devices add: a TPU gives a sum of float32 back in 16 bits where it is rounded next.
    adds = {x.computation: x.shapes[0].dtype for x in hlo.instructions(text) if x.code == "add"}
    exchanges = [
        (x.operation, adds.get(found[1]))
        for x in hlo.instructions(text)
        if x.code.removesuffix("-start") in ("all-reduce", "reduce-scatter")
        and (found := re.search(r"to_apply=%?([\w.\-]+)", x.rest))
    ]
    short = [name for name, dtype in exchanges if dtype in ("bf16", "f16")]
    assert len(exchanges) > len(short) or not case[2]
    if "tensor" in case[2]:  # what those devices add are activations
        return
    # So are what experts on several devices make of a token, forwards and when computed again.
    assert not [name for name in short if "transpose" in name and "rematted" not in name]
    assert "expert" in case[2] or not short


def matrices(run):
    """The shapes of the trained matrices, whole."""
    leaves = leaves_of(run.policy.params, run.policy.params)
    return [leaf.shape for _, leaf, _ in leaves if len(leaf.shape) > 1]


@on([case for case in CUDA + TPU if case[2].get("fsdp")])
def test_no_device_has_a_whole_master_moment_or_accumulator(case):
    run = described(*case[:2], tuple(case[2].items()))
    whole = set(matrices(run)) | {shape[::-1] for shape in matrices(run)}
    for program in ("add_grads", "apply"):
        text = compiled(case, program).text
        kept = [s for x, s in arrays(text) if x.computation == "ENTRY" and x.code == "parameter"]
        assert not [s for s in kept if s.dims in whole]
    text = compiled(case, "apply").text
    assert not [s for _, s in arrays(text) if s.dims in whole and s.dtype in ("f32", "s8", "u8")]


@on([case for case in CUDA + TPU if case[2] == {"fsdp": 4}])
def test_an_update_gathers_and_scatters_what_docs_scaling_says(case):
    """Each matrix of a layer and the head, gathered in 16 bits once per direction, and scattered
    in 32; a quarter of it stays. The table of the embedding stays where it is."""
    run = described(*case[:2], tuple(case[2].items()))
    used = sum(math.prod(shape) for shape in matrices(run))  # the head is the embedding: once
    gathered, scattered, whole = 0, 0, 0
    for x in hlo.collectives(compiled(case, "add_grads").text):
        square = [s for s in x.shapes if len(s.dims) == 2]
        if x.kind == "all-gather" and "shard_map" in x.operation:
            gathered += sum(math.prod(s.dims) for s in square if s.dtype == "bf16")
        elif x.kind == "reduce-scatter":
            scattered += sum(math.prod(s.dims) for s in square if s.dtype == "f32")
        elif x.kind == "all-reduce":  # a TPU's choice for matrices as small as these
            whole += sum(math.prod(s.dims) for s in square)
    assert gathered == 2 * used and 4 * scattered + whole == used
    assert case[1].startswith("v5p") or not whole


@pytest.mark.parametrize("target", ["v5p:2x2x1", "v5p:4x4x4", "v6e:8x8", "v6e:2x4:2", "h100:64"])
def test_every_shape_that_multiplies_to_a_slice_is_a_mesh(target):
    devices = target_of(target).devices
    count = len(devices)
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    shapes = [x for x in product(divisors, repeat=4) if math.prod(x) == count]
    for shape in shapes:
        axes = dict(zip(MESH_AXES, shape, strict=True))
        mesh = make_mesh(**axes, devices=devices)
        assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices)
    with pytest.raises(ConfigError, match=r"cannot be arranged|needs"):
        make_mesh(data=count - 1 if devices[0].platform == "tpu" else count + 1, devices=devices)


@pytest.mark.parametrize(("target", "attention"), [("h200:1", "cudnn"), ("v5p:2x2x1", "xla")])
def test_a_target_decides_not_the_machine_that_compiles(target, attention):
    assert jax.default_backend() == "cpu"
    run = described("dense", target, (("fsdp", 4),) if "v5p" in target else (), "auto")
    assert (run.policy.dtype, run.goal.attention) == ("bfloat16", attention)

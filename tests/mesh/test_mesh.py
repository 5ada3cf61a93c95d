"""What is computed does not depend on the mesh; what is communicated is what the table says."""

import math
import re

import jax
import numpy as np
import pytest
from flax import nnx
from mesh_cases import B, S, T, assert_as_on_one_device, batch, network, on_one_device, placed

from gspo_jax.mesh.sharding import make_mesh, shard_batch
from gspo_jax.update.objective import Given, Gradients

# Dense on every axis that it has, alone and mixed; the mixture also over its experts.
ALONE = [
    (kind, {"data": 1} | {axis: n})
    for kind, axes in (("dense", ("data", "fsdp", "tensor")), ("moe", ("data", "fsdp", "tensor")))
    for axis in axes
    for n in (2, 4, 8)
]
MIXED = [
    ("dense", {"data": 2, "fsdp": 2, "tensor": 2}),
    ("dense", {"data": 2, "fsdp": 4}),
    ("dense", {"data": 1, "fsdp": 2, "tensor": 2}),
    ("dense", {"data": 1, "fsdp": 4, "tensor": 2}),
    ("dense", {"data": 4, "tensor": 2}),
    *(("moe", {"data": 1, "expert": n}) for n in (2, 4, 8)),
    ("moe", {"data": 1, "fsdp": 4, "expert": 2}),
    ("moe", {"data": 1, "expert": 4, "tensor": 2}),
    ("moe", {"data": 2, "fsdp": 2, "expert": 2}),
    ("moe", {"data": 2, "expert": 4}),
    ("moe", {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}),
]


def name(case):
    kind, axes = case
    return "-".join([kind, *(f"{axis}{n}" for axis, n in axes.items() if n > 1)])


@pytest.mark.long
@pytest.mark.parametrize(("kind", "axes"), ALONE + MIXED, ids=map(name, ALONE + MIXED))
def test_any_mesh_computes_and_samples_what_one_device_does(kind, axes):
    assert_as_on_one_device(kind, axes)


@pytest.mark.long
def test_what_is_replayed_is_not_what_the_router_would_choose():
    """Or the comparisons above would prove nothing about replay."""
    _, metrics = on_one_device("moe")[0]
    assert metrics["router/changed"] > 0.5


# ------------------------------------------------------------------------- compiled programs


def programs_on(kind, **axes):
    """The texts of the compiled `add_grads` and `apply`."""
    mesh = make_mesh(**axes)
    with jax.set_mesh(mesh):
        state, made = placed(kind, mesh)
        whole = shard_batch(batch(kind), mesh)
        given = shard_batch(Given(np.zeros((B, T), np.float32)), mesh)
        trained = Gradients(state.params)
        total = made.start_grads(trained, whole)
        rows = np.arange(B, dtype=np.int32).reshape(2, 8)
        add = made.add_grads.lower(total, trained, whole, given, rows, np.int32(2), width=S)
        apply = made.apply.lower(state, total, whole, given)
        return add.compile().as_text(), apply.compile().as_text()


@pytest.fixture(scope="module")
def fsdp():
    return programs_on("dense", data=1, fsdp=8)


def collectives(text, kind):
    """Shapes and operations (as JAX names them) of the collectives of several devices."""
    found = re.findall(rf"= (.*?) {kind}(?:-start)?\((.*?)op_name=\"([^\"]*)\"", text)
    found = [(shapes, op) for shapes, how, op in found if "{{0},{1}" not in how]
    return [(shape, op) for shapes, op in found for shape in arrays(shapes)]


def arrays(text):
    """(dtype, shape) of every array that is mentioned."""
    found = re.findall(r"\b(f32|f16|bf16|u8|s8)\[([\d,]+)\]", text)
    return [(dtype, tuple(map(int, dims.split(",")))) for dtype, dims in found]


KERNELS = (
    [(64, 64)] * 2 + [(64, 96)] * 2 + [(96, 64)] + [(64, 64)] * 2
)  # q, o; gate, up; down; k, v
HEAD = (64, 160)


@pytest.mark.long
def test_an_fsdp_step_gathers_the_weights_of_one_layer_after_the_other(fsdp):
    add, _ = fsdp
    weights = [(shape, op) for (_, shape), op in collectives(add, "all-gather") if len(shape) == 2]
    weights = [(shape, op) for shape, op in weights if "shard_map" in op]
    forward = [shape for shape, op in weights if "transpose" not in op]
    backward = [shape for shape, op in weights if "rematted" in op]
    # Each of two layers' seven matrices, and the head: once in each direction, and each by itself.
    assert sorted(forward) == sorted(backward) == sorted([*KERNELS * 2, HEAD])
    assert len(weights) == 2 * (2 * 7 + 1)


@pytest.mark.long
def test_an_fsdp_step_scatters_the_gradient_of_every_matrix(fsdp):
    add, _ = fsdp
    scattered = sorted(shape for (_, shape), _ in collectives(add, "reduce-scatter"))
    of_layer = [(8, 64)] * 3 + [(64, 8)] + [(8, 96)] * 2 + [(96, 8)]
    assert scattered == sorted([*of_layer * 2, (8, 160)])
    # What is all-reduced, in whole or in shards, is no matrix's: those of norms and biases.
    reduced = {shape for (_, shape), op in collectives(add, "all-reduce") if "transpose" in op}
    assert reduced and not reduced & {*KERNELS, HEAD, HEAD[::-1], *scattered, (160, 8)}


@pytest.mark.long
def test_accumulators_masters_and_moments_are_whole_on_no_device(fsdp):
    for text in fsdp:
        loop = re.search(r"ENTRY[^\n]*\n", text)[0]
        whole = {(160, 64), (64, 160), *KERNELS}
        assert not whole & {shape for _, shape in arrays(loop)}
    _, apply = fsdp
    sizes = [math.prod(shape) for _, shape in arrays(apply)]
    assert max(sizes) <= 160 * 64 // 8  # the largest shard of any matrix


@pytest.mark.long
def test_logits_are_those_of_a_devices_own_rows_and_of_its_part_of_the_vocabulary():
    add, _ = programs_on("dense", data=2, fsdp=2, tensor=2)
    # 8 rows of a microbatch over 4, 12 tokens each; 160 ids over 2. The head is gathered: [64, 80].
    with_ids = {shape for _, shape in arrays(add) if shape[-1] in (80, 160)}
    assert (24, 80) in with_ids
    assert max(math.prod(shape[:-1]) for shape in with_ids if shape[-1] == 80) <= 64
    assert not {shape for shape in with_ids if shape[-1] == 160 and math.prod(shape) > 160}


@pytest.mark.long
def test_experts_do_not_travel_and_their_tokens_come_back_summed():
    add, _ = programs_on("moe", data=2, expert=4)
    experts = [
        shape for _, shape in arrays(add) if len(shape) == 3 and shape[1:] in ((64, 40), (40, 64))
    ]
    assert experts and max(shape[0] for shape in experts) == 2  # of eight
    # 4 rows of 24 tokens: gathered by each of the 4 devices, its own 24 scattered back.
    tokens = [shape for (_, shape), _ in collectives(add, "all-gather")]
    assert (4 * S, 64) in tokens
    assert (S, 64) in [shape for (_, shape), _ in collectives(add, "reduce-scatter")]


def test_the_networks_have_different_sizes_wherever_shapes_are_told_apart():
    shapes = [x.shape for x in jax.tree.leaves(nnx.state(nnx.merge(*network("dense"))))]
    assert sorted({s for s in shapes if len(s) == 2}) == [(64, 64), (64, 96), (96, 64), (160, 64)]

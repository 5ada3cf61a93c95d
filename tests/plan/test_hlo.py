"""The text of a compiled program, as XLA writes it for CPUs, GPUs and TPUs."""

import numpy as np
import pytest

from gspo_jax.plan.hlo import Shape, collectives, groups_of, instructions, kernels

# A loop whose body gathers weights while something else goes on, sums gradients, and scatters.
GPU = """HloModule jit_f, is_scheduled=true

%fused_add (param_0: f32[16,8]) -> f32[16,8] {
  %param_0 = f32[16,8]{1,0} parameter(0)
  ROOT %add.1 = f32[16,8]{1,0} add(%param_0, %param_0)
}

%body (arg: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %arg = (s32[], bf16[4,8]{1,0}) parameter(0)
  %w = bf16[4,8]{1,0} get-tuple-element(%arg), index=1
  %start = ((bf16[4,8]{1,0}, s32[5]), (bf16[16,8]{1,0}, s32[20])) all-gather-start(%w, %i), GROUPS
  %fusion = f32[16,8]{1,0} fusion(%x), kind=kLoop, calls=%fused_add
  %done = (bf16[16,8]{1,0}, s32[20]) all-gather-done(%start)
  %scatter = ((f32[16,8]{1,0}), f32[4,8]{1,0}) reduce-scatter-start(%fusion), IOTA, to_apply=%sum
  %scattered = f32[4,8]{1,0} reduce-scatter-done(%scatter)
  ROOT %tuple = (s32[], bf16[4,8]{1,0}) tuple(%n, %w)
}

ENTRY %main (p: bf16[4,8]) -> (s32[], bf16[4,8]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %loop = (s32[], bf16[4,8]{1,0}) while(%init), condition=%cond, body=%body
  %sum = (f32[7]{0}, f32[]) all-reduce-start(%a, %b), replica_groups={{0,1},{2,3}}, to_apply=%sum
  %one = f32[9]{0} all-reduce(%c), replica_groups={{0},{1},{2},{3}}, to_apply=%sum
  ROOT %out = (f32[7]{0}, f32[]) all-reduce-done(%sum)
}
""".replace("GROUPS", "replica_groups={{0,1,2,3}}, dimensions={0}").replace(
    "IOTA", "replica_groups=[1,4]<=[4]"
)
# Tiles and memory spaces stand in a TPU's layouts; its exchanges need no second instruction.
TPU = """HloModule jit_f

ENTRY %main.1 (p.1: bf16[64,256]) -> bf16[256,256] {
  %p.1 = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
  %cs = (bf16[64,256]{1,0:LAYOUTS(1)}, bf16[64,256]{1,0:LAYOUT}, u32[]{:S(2)}) copy-start(%p.1)
  ROOT %ag = bf16[256,256]{1,0:LAYOUT} all-gather(%cd), replica_groups=mesh['a'=2,'b'=4] {'b'}
}
""".replace("LAYOUT", "T(8,128)(2,1)")


def test_an_exchange_in_two_instructions_counts_once_and_only_what_it_gives():
    found = [(x.kind, x.looped, x.shapes, x.sent) for x in collectives(GPU)]
    gathered = [Shape("bf16", (16, 8)), Shape("s32", (20,))]
    assert found == [
        ("all-gather", True, gathered, (2 * 128 + 4 * 20) * 3 // 4),
        ("reduce-scatter", True, [Shape("f32", (4, 8))], 4 * 32 * 3),  # three parts are others'
        ("all-reduce", False, [Shape("f32", (7,)), Shape("f32", ())], 4 * 8),  # halves, twice
    ]


def test_a_tpus_layouts_are_no_shapes():
    (found,) = collectives(TPU)
    assert (found.shapes, found.sent) == ([Shape("bf16", (256, 256))], 2 * 256 * 256 * 3 // 4)
    assert found.groups.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    start = next(x for x in instructions(TPU) if x.code == "copy-start")
    assert [x.dims for x in start.shapes] == [(64, 256), (64, 256), ()]


def test_kernels_are_what_a_round_of_the_loop_launches():
    assert kernels(GPU) == 3  # a gather, a fusion, a scatter; not what names or awaits them
    assert kernels(TPU) == 0


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
    ],
)
def test_groups_of_devices_are_read_however_they_are_written(text, groups):
    np.testing.assert_array_equal(groups_of(text), groups)

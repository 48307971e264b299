"""Bytes that the update moves, in a step compiled by XLA:GPU: the floor, if one kernel can update a weight."""

import pytest

from benchmarks import hlo, update_traffic
from benchmarks.models import language_model
from benchmarks.step_time import leaves

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused (p0: f32[8,16], p1: s32[], p2: bf16[16]) -> f32[8,16] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,16]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,16}
  %p2 = bf16[16]{0} parameter(2)
  %wide = f32[16]{0} convert(%p2)
  %row = f32[1,16]{1,0} reshape(%wide)
  %sum = f32[1,16]{1,0} add(%slice, %row)
  ROOT %write = f32[8,16]{1,0} dynamic-update-slice(%p0, %sum, %p1, %zero)
}

%fused.1 (p0: f32[8,16], p1: u4[8,16]) -> (f32[8], u4[8,16]) {
  %p0 = f32[8,16]{1,0} parameter(0)
  %none = f32[] constant(0)
  %sums = f32[8]{0} reduce(%p0, %none), dimensions={1}, to_apply=%add
  %p1 = u4[8,16]{1,0:E(4)} parameter(1)
  %flipped = u4[8,16]{1,0:E(4)} not(%p1)
  ROOT %both = (f32[8]{0}, u4[8,16]{1,0:E(4)}) tuple(%sums, %flipped)
}

%body (carry: (s32[], f32[8,16], bf16[16])) -> (s32[], f32[8,16], bf16[16]) {
  %carry = (s32[], f32[8,16]{1,0}, bf16[16]{0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %stack = f32[8,16]{1,0} get-tuple-element(%carry), index=1
  %grad = bf16[16]{0} get-tuple-element(%carry), index=2
  %stepped = f32[8,16]{1,0} fusion(%stack, %i, %grad), kind=kLoop, calls=%fused
  ROOT %next = (s32[], f32[8,16]{1,0}, bf16[16]{0}) tuple(%i, %stepped, %grad)
}

ENTRY %main (a: f32[8,16], b: bf16[16], c: u4[8,16]) -> (f32[8,16], f32[8], u4[8,16]) {
  %a = f32[8,16]{1,0} parameter(0)
  %b = bf16[16]{0} parameter(1)
  %c = u4[8,16]{1,0:E(4)} parameter(2)
  %start = s32[] constant(0)
  %init = (s32[], f32[8,16]{1,0}, bf16[16]{0}) tuple(%start, %a, %b)
  %loop = (s32[], f32[8,16]{1,0}, bf16[16]{0}) while(%init), condition=%done, body=%body, \
backend_config={"known_trip_count":{"n":"8"}}
  %end = f32[8,16]{1,0} get-tuple-element(%loop), index=1
  %last = (f32[8]{0}, u4[8,16]{1,0:E(4)}) fusion(%a, %c), kind=kInput, calls=%fused.1
  %sums = f32[8]{0} get-tuple-element(%last), index=0
  %bits = u4[8,16]{1,0:E(4)} get-tuple-element(%last), index=1
  ROOT %out = (f32[8,16]{1,0}, f32[8]{0}, u4[8,16]{1,0:E(4)}) tuple(%end, %sums, %bits)
}
"""


@pytest.mark.parametrize(("state", "of_state"), [([0], [True, True]), ([1], [True, False]), ([2], [False, True])])
def test_what_kernels_read_and_write(state, of_state):
  stepped, last = hlo.kernels(PROGRAM, state)
  # The loop runs eight times. Each time it reads and writes a row of the stack in place, and reads the gradient.
  assert (stepped.name, stepped.launches, stepped.read, stepped.written) == ("stepped", 8, 64 + 4 + 32, 64)
  assert (last.name, last.launches, last.read, last.written) == ("last", 1, 512 + 64, 32 + 64)
  assert [stepped.of_state, last.of_state] == of_state
  assert stepped.bytes == 8 * 164


def test_a_loop_of_unknown_length_is_an_error():
  with pytest.raises(ValueError, match="number of turns of loop"):
    hlo.kernels(PROGRAM.replace("known_trip_count", "unknown"), [0])


def moved(model, mode):
  """Returns the update's bytes as a multiple of the floor, its number of large kernels, and the bytes of the step."""
  found, floor = update_traffic.kernels(model, mode)
  update = found if model.fused_loss is None else [k for k in found if k.of_state]
  large = [k for k in update if k.bytes > 1e-3 * floor]
  return sum(k.bytes for k in update) / floor, sum(k.launches for k in large), sum(k.bytes for k in found)


@pytest.mark.full
@pytest.mark.parametrize("mode", ["optax-f32", "mpo-16", "mpo-8", "mpo-4", "mpo-16-auto"])
def test_one_kernel_steps_a_leaf_and_reads_and_writes_each_byte_once(mode):
  ratio, kernels, _ = moved(leaves(2, 2048, 2048), mode)
  assert 1 <= ratio < 1.001
  assert kernels == 2


@pytest.mark.parametrize("mode", ["mpo-16-layer", "mpo-16-auto"])
@pytest.mark.few(0, full=1)
def test_so_it_is_inside_the_backward_pass(mode):
  model = language_model("125m", layers=1, width=512, heads=8, hidden=1408, vocab=4096, context=256, scan=False)
  ratio, _, whole = moved(model, mode)
  assert 1 <= ratio < 1.01
  # A whole step moves 66 bytes per parameter. With Optax, part of that is reading f32 masters to make bf16 copies.
  assert whole < 0.95 * moved(model, "optax-f32")[2]


@pytest.mark.full
def test_quantised_state_takes_two_passes():
  """The maximum of a block is known only after all of it is computed. With two passes the least is 16.4 bytes."""
  assert moved(leaves(2, 2048, 2048), "mpo-compact")[0] < 1.495

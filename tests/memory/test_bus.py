"""The bytes that cross the bus in a step with arrays in host memory, read from the compiled program."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import optax_mpo as mpo
from optax_mpo._memory import bus
from tests.helpers import relaxed

PROGRAM = """HloModule step

%moved (p: f32[8,4], i: s32[]) -> f32[1,4] {
  %p = f32[8,4]{1,0:S(5)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,4]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,4}
}

%fetch (p: f32[8,4], i: s32[]) -> f32[1,4] {
  %p = f32[8,4]{1,0:S(5)} parameter(0)
  %i = s32[] parameter(1)
  ROOT %fused = f32[1,4]{1,0} fusion(%p, %i), kind=kLoop, calls=%moved
}

%body (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %arg = (s32[], f32[8,4]{1,0:S(5)}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %stack = f32[8,4]{1,0:S(5)} get-tuple-element(%arg), index=1
  %zero = s32[] constant(0)
  %start = ((f32[8,4]{1,0:S(5)}, s32[]), f32[1,4]{1,0}, u32[]) async-start(%stack, %i), calls=%fetch
  %done = f32[1,4]{1,0} async-done(%start)
  %new = f32[8,4]{1,0:S(5)} dynamic-update-slice(%stack, %done, %i, %zero)
  ROOT %out = (s32[], f32[8,4]{1,0:S(5)}) tuple(%i, %new)
}

%small (p: u4[64]) -> u4[64] {
  %p = u4[64]{0:E(4)S(5)} parameter(0)
  ROOT %copy = u4[64]{0:E(4)} copy(%p)
}

%none (p: u4[64]) -> u4[64] {
  %p = u4[64]{0:E(4)S(5)} parameter(0)
  ROOT %made = u4[64]{0:E(4)} broadcast()
}

ENTRY %main (w: f32[8,4], b: u4[64], c: bf16[16], d: s32[]) -> bf16[16] {
  %w = f32[8,4]{1,0:S(5)} parameter(0)
  %b = u4[64]{0:E(4)S(5)} parameter(1)
  %c = bf16[16]{0:S(5)} parameter(2)
  %d = s32[] parameter(3)
  %in = (s32[], f32[8,4]{1,0:S(5)}) tuple(%d, %w)
  %loop = (s32[], f32[8,4]{1,0:S(5)}) while(%in), body=%body, backend_config={"known_trip_count":{"n":"8"}}
  %chosen = u4[64]{0:E(4)} conditional(%d, %b, %b), branch_computations={%none, %small}
  %start = (bf16[16]{0}, bf16[16]{0:S(5)}, u32[]) copy-start(%c)
  %there = bf16[16]{0} copy-done(%start)
  %back = (bf16[16]{0:S(5)}, bf16[16]{0}, u32[]) copy-start(%there)
  %within = bf16[16]{0:S(5)} copy(%c)
  ROOT %done = bf16[16]{0:S(5)} copy-done(%back)
}
"""


def test_a_program_is_read():
  layers, branch, copied = 8 * 4 * 4, 64 // 2, 16 * 2
  assert bus.traffic(PROGRAM) == (layers + branch + copied, layers + copied)


def test_a_program_without_host_memory_moves_nothing():
  assert bus.traffic(PROGRAM.replace("S(5)", "")) == (0, 0)


LAYERS, WIDTH, VOCAB = 6, 512, 640


def loss_fn(params, x):
  layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
  x, _ = lax.scan(layer, x, params["layers"])
  return jnp.mean((x @ params["head"]).astype(jnp.float32) ** 2)


def placed(tree, kind, only=("layers", "head")):
  mesh = AbstractMesh((1,), ("device",))
  here, there = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(), memory_kind=kind)

  def leaf(path, x):
    large = x.size > 2**16 and any(f"'{name}'" in jax.tree_util.keystr(path) for name in only)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there if large else here)

  return jax.tree_util.tree_map_with_path(leaf, tree)


@pytest.mark.full
@pytest.mark.parametrize("weights", [False, True], ids=["state", "weights"])
@pytest.mark.parametrize("compact", [False, True], ids=["exact", "compact"])
def test_a_step_moves_what_arithmetic_says(weights, compact):
  """State once each way; weights of layers twice to the device, since they are recomputed, and once back."""
  inner = mpo.quantized_state(optax.adamw(1e-3)) if compact else optax.adamw(1e-3)
  tx = relaxed(mpo.compensated)(inner, extra_bits=8 if compact else 16)
  masters = {"layers": jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)}
  masters["head"] = jax.ShapeDtypeStruct((WIDTH, VOCAB), jnp.float32)
  params, opt_state = relaxed(jax.eval_shape)(lambda p: mpo.init(tx, p), masters)
  opt_state = placed(opt_state, "pinned_host")
  params = placed(params, "pinned_host", ("layers",) if weights else ())
  x = jax.ShapeDtypeStruct((4, WIDTH), jnp.bfloat16)
  step = mpo.value_and_update(loss_fn, tx)
  report = relaxed(mpo.gpu_memory)(step, params, opt_state, x, donate_argnums=(0, 1), host_memory=2**26)
  stack = LAYERS * WIDTH * WIDTH
  state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(opt_state) if x.sharding.memory_kind == "pinned_host")
  moved = 2 * stack if weights else 0
  if not compact:
    assert state == 10 * (stack + WIDTH * VOCAB)
  assert report.to_host_bytes == state + moved
  assert report.to_device_bytes == state + 2 * moved
  assert report.host_bytes == state + moved
  assert report.fits
  assert "across the bus" in str(report)
  assert not mpo.MemoryReport(**{**vars(report), "host_memory": report.host_bytes - 1}).fits
  assert mpo.MemoryReport(**{**vars(report), "host_memory": report.host_bytes}).fits


def test_host_memory_is_a_number_of_bytes():
  x = jax.ShapeDtypeStruct((8,), jnp.float32)
  with pytest.raises(ValueError, match="host_memory is a number of bytes"):
    mpo.gpu_memory(lambda x: x + 1, x, host_memory="128 GiB")

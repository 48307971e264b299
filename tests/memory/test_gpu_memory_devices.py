"""gpu_memory of a program over several devices: the bytes of one of them, however the shardings are said."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from optax_mpo._memory.gpu_memory import gpu_memory
from tests.memory.test_gpu_memory import P, direct, f32, figures, nbytes


def sharded(mesh, spec, tree):
  return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, spec)), tree)


def fsdp_shapes():
  return [jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)] * 3, [f32(1024, 1024)] * 3, f32(64, 1024)


def fsdp_step(params, momentum, x):
  def loss(params):
    h = x.astype(jnp.bfloat16)
    for w in params:
      h = jnp.tanh(h @ w)
    return jnp.mean(h.astype(jnp.float32) ** 2)

  momentum = jax.tree.map(lambda m, g: 0.9 * m + g.astype(m.dtype), momentum, jax.grad(loss)(params))
  return jax.tree.map(lambda p, m: p - (0.01 * m).astype(p.dtype), params, momentum), momentum


ABSTRACT = AbstractMesh((8,), ("d",), axis_types=(AxisType.Auto,))
PERSISTENT = 3 * 1024 * 1024 * 6


@functools.cache
def fsdp_direct():
  return direct(fsdp_step, *sharded(ABSTRACT, P("d"), fsdp_shapes()), donate=(0, 1), devices=8)


@pytest.mark.parametrize("over", ["abstract mesh", "cpu mesh", "jit"])
@pytest.mark.few(1)
def test_fsdp_by_every_way_to_say_it(over):
  mesh = ABSTRACT if over == "abstract mesh" else Mesh(np.array(jax.devices()[:8]), ("d",))
  args = fsdp_shapes()
  if over == "jit":
    layout = NamedSharding(mesh, P("d"))
    step = jax.jit(fsdp_step, in_shardings=layout, donate_argnums=(0, 1))
    report = gpu_memory(step, *args, devices=8, params_argnum=0)
  else:
    args = sharded(mesh, P("d"), args)
    report = gpu_memory(fsdp_step, *args, donate_argnums=(0, 1), devices=8, params_argnum=0)
  assert figures(report) == fsdp_direct()
  assert report.argument_bytes == (PERSISTENT + nbytes(fsdp_shapes()[2])) // 8
  assert report.aliased_bytes == PERSISTENT // 8
  assert report.per_parameter(report.aliased_bytes) == 6
  assert report.bytes_per_parameter == 8 * report.total_bytes / (3 * 1024 * 1024)
  assert "each of 8 x NVIDIA H100" in str(report)


def test_arrays_on_cpu_devices_are_laid_out_alike_on_the_target():
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))
  w = jax.device_put(jnp.ones((512, 512)), NamedSharding(mesh, P(None, "model")))
  x = jax.device_put(jnp.ones((64, 512)), NamedSharding(mesh, P("data")))
  report = gpu_memory(lambda w, x: x @ w, w, x, devices=8)
  assert report.argument_bytes == 512 * 512 * 4 // 2 + 64 * 512 * 4 // 4
  assert report.output_bytes == 64 * 512 * 4 // 8


def test_a_function_may_hold_its_own_mesh():
  mesh = Mesh(np.array(jax.devices()[:4]), ("d",))

  def fn(w, x):
    w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P("d")))
    return jax.shard_map(
      lambda w, x: jax.lax.psum(x @ w.T, "d"), mesh=mesh, in_specs=(P(None, "d"), P(None, "d")), out_specs=P()
    )(w, x)

  report = gpu_memory(fn, f32(64, 512), f32(16, 512), devices=4)
  assert report.argument_bytes == 4 * (64 * 512 + 16 * 512)  # without shardings: replicated


def test_explicit_axes():
  mesh = AbstractMesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit, AxisType.Auto))
  args = sharded(mesh, P("a"), (f32(64, 64), f32(64, 64)))
  report = gpu_memory(lambda x, y: x + y, *args, devices=8)
  assert report.argument_bytes == 2 * 64 * 64 * 4 // 4


def test_without_shardings_all_is_replicated():
  report = gpu_memory(lambda w: 2 * w, f32(1024), devices=16, params_argnum=0)
  assert figures(report) == (4096, 4096, 0, 0)
  assert report.bytes_per_parameter == 16 * 8


def test_layouts_that_are_not_over_the_devices():
  args = sharded(ABSTRACT, P("d"), (f32(64),))
  with pytest.raises(ValueError, match=r"w\['a'\] is laid out over 8 devices, but devices=1\. Pass devices=8"):
    gpu_memory(lambda w: w, {"a": args[0]})
  step = jax.jit(lambda w: w, in_shardings=NamedSharding(ABSTRACT, P("d")))
  with pytest.raises(ValueError, match="laid out over 8 devices, but devices=4"):
    gpu_memory(step, f32(64), devices=4)
  other = AbstractMesh((8,), ("e",), axis_types=(AxisType.Auto,))
  with pytest.raises(ValueError, match="over more than one mesh"):
    gpu_memory(lambda v, w: v + w, *args, *sharded(other, P("e"), (f32(64),)), devices=8)

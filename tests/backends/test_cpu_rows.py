"""On CPUs, weights with 8-bit state are updated by rows: in place, with the same bits, and only where possible."""

import collections
import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mpo as mpo
from optax_mpo._backends import cpu_rows

pytestmark = pytest.mark.full

# With fusion and algsimp off, XLA computes every operation separately and unchanged, so that the same operations give
# the same results. (algsimp turns a division by a scalar that enters the loop into a product with its inverse. If the
# scalar does not enter the loop, it merges two divisions into one.)
EXACT = {"xla_backend_optimization_level": 0, "xla_disable_hlo_passes": "fusion,algsimp"}
OPTIMIZERS = {
  "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
  "lion": lambda: optax.lion(1e-3, weight_decay=0.1),
  "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
  "masked": lambda: optax.adamw(
    optax.linear_schedule(1e-2, 1e-3, 5), mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
  ),
  "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
}


def mixed() -> optax.GradientTransformation:
  """An optimizer whose update of each leaf of `begin` needs the whole gradients of both."""

  def update(updates, params):
    del params
    sums = jnp.cumsum(updates["w"].ravel() * jnp.sum(updates["b"])).reshape(updates["w"].shape)
    return {"w": sums, "b": updates["b"] + jnp.max(sums, axis=1)[:8]}

  return optax.chain(optax.adam(1e-2), optax.stateless(update))


def compact(inner: optax.GradientTransformation, **kwargs) -> optax.GradientTransformation:
  return mpo.compensated(mpo.quantized_state(inner), **{"extra_bits": 8, **kwargs})


def begin(tx, *shape: int, dtype=jnp.bfloat16):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  params, state = mpo.init(tx, {"w": jnp.asarray(x), "b": jnp.ones(8)}, dtype=dtype)
  grads = jax.tree.map(lambda p: (p * jnp.asarray(0.3, p.dtype) + jnp.asarray(0.01, p.dtype)).astype(p.dtype), params)
  return params, state, grads


def step(tx, params, state, grads):
  updates, state = tx.update(grads, state, params)
  return mpo.apply_updates(params, updates), state


def loss(params, grads):
  """A loss whose gradients are `grads`."""
  return sum(
    jnp.vdot(p.astype(jnp.float32), g.astype(jnp.float32)) for p, g in zip(params.values(), grads.values(), strict=True)
  )


def compiled(tx, *args, options=None):
  jitted = jax.jit(functools.partial(step, tx), donate_argnums=(0, 1), compiler_options=options)
  return jitted.lower(*args).compile()


def text(program) -> str:
  return program.as_text() or ""


def at_once(monkeypatch) -> None:
  monkeypatch.setattr(cpu_rows, "of_weight", lambda update: None)


def assert_same(a, b) -> None:
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize(
  ("name", "shape"),
  [("adamw", (1024, 1024)), ("adamw", (3, 512, 1000)), ("adamw", (40, 130, 160)), ("adamw", (1000, 1056))]
  + [(name, (2, 512, 1024)) for name in OPTIMIZERS if name != "adamw"],
)
@pytest.mark.few(0, full=2)
def test_rows_are_stepped_as_the_whole_is(name, shape, monkeypatch):
  tx = compact(OPTIMIZERS[name]())
  params, state, grads = begin(tx, *shape)
  by_rows = compiled(tx, params, state, grads, options=EXACT)
  assert " while(" in text(by_rows)
  released = mpo.value_and_update(loss, tx, two_pass=name == "clipped")
  fused = jax.jit(released, compiler_options=EXACT).lower(params, state, grads).compile()
  assert " while(" in text(fused)
  at_once(monkeypatch)
  whole = compiled(tx, params, state, grads, options=EXACT)
  assert " while(" not in text(whole)
  want = got = released = (params, state)
  for _ in range(3):
    want, got = (f(*jax.tree.map(jnp.copy, x), grads) for f, x in ((whole, want), (by_rows, got)))
    released = fused(*released, grads)[1:]
  assert_same(got, want)
  assert_same(released, want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("bits", [16, 8, 0])
@pytest.mark.few(0, full=2)
def test_all_forms_of_weights_are(bits, dtype, monkeypatch):
  tx = compact(optax.adamw(1e-2), extra_bits=bits)
  args = begin(tx, 1024, 512, dtype=dtype)
  by_rows = compiled(tx, *args, options=EXACT)
  assert " while(" in text(by_rows)
  at_once(monkeypatch)
  assert_same(by_rows(*jax.tree.map(jnp.copy, args)), compiled(tx, *args, options=EXACT)(*args))


def test_no_array_of_the_weight_is_made(monkeypatch):
  """Temporaries are those of some rows. There is no f32 array of the whole weight."""
  tx = compact(optax.adamw(1e-2))
  args = begin(tx, 4096, 2048)
  size = args[0]["w"].size
  memory = compiled(tx, *args).memory_analysis()
  assert memory.temp_size_in_bytes < 20 * cpu_rows.ELEMENTS + 4 * size  # plus gradient and weight as integers
  at_once(monkeypatch)
  assert compiled(tx, *args).memory_analysis().temp_size_in_bytes > 8 * size


def test_nothing_is_computed_twice():
  """Divisions and roots take longest: there is one for each level, code and weight. Dither is computed per column."""
  tx = compact(optax.adamw(1e-2))
  program = text(compiled(tx, *begin(tx, 1024, 1024)))
  found = collections.Counter(re.findall(r"= f32\[512,1024\]\S* (divide|sqrt|rsqrt)\(", program))
  # Levels of two moments, codes of the first, the second by its bias correction, Adam's quotient (by that of the first,
  # too), and `xla_cpu.held` of the new master weights.
  assert found == {"divide": 6, "sqrt": 2}
  assert len(re.findall(r"= f32\[1024\]\S* divide\(", program)) == 2  # `xla_cpu.held` of the dither of two moments


@pytest.mark.parametrize(
  ("make", "shape"),
  [
    (lambda: compact(optax.adamw(1e-2)), (1024, 256)),  # too small to need rows
    (lambda: compact(optax.adamw(1e-2)), (2**20,)),  # one row
    (lambda: compact(optax.adamw(1e-2)), (1021, 1024)),  # the number of rows does not divide
    (lambda: mpo.compensated(optax.adamw(1e-2)), (1024, 1024)),  # no 8-bit state
    (lambda: mpo.compensated(mpo.quantized_state(optax.adamw(1e-2), state_bits=4), extra_bits=8), (1024, 1024)),
    (lambda: compact(optax.adamw(1e-2), extra_bits=4), (1024, 1024)),
    (lambda: compact(optax.adamw(1e-2), rounding="stochastic"), (1024, 1024)),  # random numbers for the whole weight
    (lambda: compact(optax.lamb(1e-2)), (1024, 1024)),  # a norm of the weight
    (lambda: compact(mixed()), (1024, 1024)),  # updates of leaves depend on each other's whole gradients
  ],
)
def test_everything_else_is_stepped_at_once(make, shape):
  args = begin(make(), *shape)
  assert " while(" not in text(compiled(make(), *args))


def scanned_loss(params, x):
  y, _ = jax.lax.scan(lambda y, w: (jnp.tanh(y @ w) @ w.T, None), x, params["w"])
  return jnp.sum(jnp.square(y.astype(jnp.float32)))


def scanned_fused_loss(params, x):
  y, _ = mpo.fused_scan(lambda w, y, _: (jnp.tanh(y @ w) @ w.T, None))(params["w"], x)
  return jnp.sum(jnp.square(y.astype(jnp.float32)))


@pytest.mark.parametrize("shape", [(3, 1024, 640), (3, 40, 96)], ids=["in two pieces", "in one"])
@pytest.mark.parametrize(("route", "name"), [("auto", "adamw"), ("layers", "lion")])
@pytest.mark.few(0, full=1)
def test_layers_of_a_scan_are_stepped_as_the_whole_is(route, name, shape, monkeypatch):
  tx = compact(OPTIMIZERS[name]())
  w = np.random.default_rng(0).normal(size=shape).astype(np.float32) * 0.02
  args = mpo.init(tx, {"w": jnp.asarray(w)})
  x = jnp.asarray(np.random.default_rng(1).normal(size=(4, shape[1])), jnp.bfloat16)
  done = []
  by_rows = cpu_rows.Rows.step

  def noted(self, grad, *rest):
    results = by_rows(self, grad, *rest)
    done.append((self.stacked, grad.shape[self.axis] // self.count))
    return results

  monkeypatch.setattr(cpu_rows.Rows, "step", noted)

  def run():
    if route == "auto":
      step = mpo.value_and_update(scanned_loss, tx)
    else:
      step = mpo.fused_value_and_update(scanned_fused_loss, tx)
    # With fused layers algsimp stays on: only it removes their layout constraints, and lion divides by no scalar.
    options = EXACT if route == "auto" else EXACT | {"xla_disable_hlo_passes": "fusion"}
    step, new = jax.jit(step, compiler_options=options), args
    for _ in range(2):
      _, *new = step(*new, x)
    return new

  got = run()
  assert done == [(True, 2 if shape[1] == 1024 else 1)]
  monkeypatch.setattr(cpu_rows, "of_layer", lambda *_: None)
  assert_same(got, run())
  assert len(done) == 1
  assert bool((got[0]["w"] != args[0]["w"]).any())


def test_all_cores_step_rows():
  tx = compact(optax.adamw(1e-2))
  program = text(compiled(tx, *begin(tx, 1024, 1024)))
  assert "outer_dimension_partitions" in program
  assert "xla_cpu_small_call" not in program  # JAX 0.12's XLA runs these on one core


def test_a_norm_outside_of_compensated_leaves_rows_apart():
  tx = optax.chain(optax.clip_by_global_norm(1.0), compact(optax.adam(1e-2)))
  assert " while(" in text(compiled(tx, *begin(tx, 1024, 1024)))


def test_other_transformations_of_a_step(monkeypatch):
  """Under vmap and under jvp, the update gives the same results."""
  tx = compact(optax.adamw(1e-2))
  args = begin(tx, 1024, 512)
  two = jax.tree.map(lambda x: jnp.stack([x, x]), args)
  params, _ = jax.jit(jax.vmap(functools.partial(step, tx)), compiler_options=EXACT)(*two)
  want, _ = jax.jit(functools.partial(step, tx), compiler_options=EXACT)(*args)
  assert_same(jax.tree.map(lambda x: x[1], params), want)

  def scaled(size, params, state, grads):
    new, _ = step(tx, params, state, jax.tree.map(lambda g: (g.astype(size.dtype) * size).astype(g.dtype), grads))
    return new["w"].astype(jnp.float32)

  tangent = jax.jit(lambda s: jax.jvp(lambda s: scaled(s, *args), [s], [1.0])[1])
  got = tangent(jnp.float32(1.0))
  at_once(monkeypatch)
  np.testing.assert_array_equal(
    got, jax.jit(lambda s: jax.jvp(lambda s: scaled(s, *args), [s], [1.0])[1])(jnp.float32(1.0))
  )


@functools.cache
def on_two_devices() -> str:
  """Returns the optimized program of a sharded step on two CPU devices, compiled in a separate process."""
  program = """
import functools, jax, jax.numpy as jnp, optax, optax_mpo as mpo
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
tx = mpo.compensated(mpo.quantized_state(optax.adamw(1e-2)), extra_bits=8)
params, state = mpo.init(tx, jnp.ones((1024, 1024)))
where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
params = jax.device_put(params, where)
state = jax.device_put(state, jax.tree.map(
  lambda x: where if x.ndim else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()), state))
def step(params, state, grads):
  updates, state = tx.update(grads, state, params)
  return mpo.apply_updates(params, updates), state
print(jax.jit(step).lower(params, state, params).compile().as_text())
"""
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout


def test_a_jaxpr_says_no_more_than_it_has_to():
  """The program of one large leaf with 8-bit state took 1.2 MB of text, as the update was written out in its params."""
  tx = compact(optax.adamw(1e-3))
  params, state, grads = begin(tx, 1024, 1024)
  text = str(jax.make_jaxpr(functools.partial(step, tx))(params, state, grads))
  assert "step_weight" in text
  assert len(text) < 80_000


def test_several_devices_step_what_they_hold():
  assert "bf16[512,1024]" in on_two_devices()
  assert " while(" not in on_two_devices()
  assert "all-gather" not in on_two_devices()

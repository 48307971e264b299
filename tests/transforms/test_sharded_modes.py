"""Gradient release in shard_map and on meshes with explicit axes equals the ordinary step there, bit for bit.

Compiled without fusion, as in transforms/test_sharding.py.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_mpo as mpo
from tests.helpers import assert_same_bits, ordinary_step
from tests.transforms.test_sharding import OPTIMIZERS, WIDTH, fused_loss, loss_fn, make_params

pytestmark = pytest.mark.full

OPTIONS = {
  "xla_allow_excess_precision": False,
  "xla_backend_optimization_level": 0,
  "xla_disable_hlo_passes": "fusion",
}


def layer(p, x):
  return x + jnp.tanh((x * p["scale"][None]) @ whole(p["up"])) @ whole(p["down"])


def whole(w):
  """Gathers a sharded weight. With explicit axes, the model has to do this itself."""
  return jax.reshard(w, P(None, None)) if any(jax.typeof(w).sharding.spec) else w


def gathered_loss(params, x):
  def one(x, p):
    return layer(p, x), None

  embed = whole(params["embed"])
  x, _ = lax.scan(jax.checkpoint(one), x.astype(jnp.bfloat16) @ embed, params["layers"])
  return jnp.mean(jnp.square((x @ embed.T).astype(jnp.float32)))


def gathered_fused_loss(params, x):
  embed = mpo.fused_value(params["embed"])
  x = x.astype(jnp.bfloat16) @ whole(embed)
  x, _ = mpo.fused_scan(lambda p, x, _: (layer(p, x), None))(params["layers"], x)
  return jnp.mean(jnp.square((x @ whole(embed).T).astype(jnp.float32)))


def unrolled_loss(params, x):
  embed = mpo.fused_value(params["embed"])
  x = x.astype(jnp.bfloat16) @ whole(embed)
  for p in params["layers"]:
    x = mpo.fused_layer(layer)(p, x)
  return jnp.mean(jnp.square((x @ whole(embed).T).astype(jnp.float32)))


def unrolled_params():
  params = make_params()
  layers = [jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(2)]
  return {"embed": params["embed"], "layers": layers}


CASES = {  # the params, the loss for arrays, and the step with gradient release
  "auto scanned": (make_params, loss_fn, lambda loss, tx: mpo.value_and_update(loss(loss_fn), tx)),
  "layer scanned": (make_params, loss_fn, lambda loss, tx: mpo.fused_value_and_update(loss(fused_loss), tx)),
  "auto unrolled": (unrolled_params, unrolled_loss, lambda loss, tx: mpo.value_and_update(loss(unrolled_loss), tx)),
  "layer unrolled": (
    unrolled_params,
    unrolled_loss,
    lambda loss, tx: mpo.fused_value_and_update(loss(unrolled_loss), tx),
  ),
}


def compare(one, other, params, state, x, steps=3):
  want, got = (None, params, state), (None, params, state)
  for _ in range(steps):
    want, got = one(*want[1:], x), other(*got[1:], x)
  assert_same_bits(got, want)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), got[1], params)
  assert all(jax.tree.leaves(moved)), "nothing was trained"


def averaged(axis):
  """A transformation that averages gradients over devices, for each weight where it is updated."""

  def update(updates, state, params=None):
    return jax.tree.map(lambda g: lax.pmean(g, axis), updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@pytest.mark.parametrize(
  ("case", "mean"),
  [
    ("auto scanned", "by the derivative"),
    pytest.param("layer scanned", "by the derivative", marks=pytest.mark.slow),
    ("layer unrolled", "by the derivative"),
    ("layer scanned", "by the optimizer"),
  ],
)
def test_data_parallel_in_shard_map(case, mean):
  """JAX's derivative of a mean over devices sums the gradients. Without its checks (check_vma), tx has to."""
  make, loss, fused = CASES[case]
  checked = mean == "by the derivative"
  inner = optax.sgd(1e-1, momentum=0.9) if checked else optax.chain(averaged("data"), optax.sgd(1e-1, momentum=0.9))
  tx = mpo.compensated(inner)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

  def averaged_loss(loss):
    return (lambda params, x: lax.pmean(loss(params, x), "data")) if checked else loss

  def jit(step):
    def each(params, state, x):
      value, *rest = step(params, state, x)
      return lax.pmean(value, "data") if not checked else value, *rest

    mapped = jax.shard_map(each, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=checked)
    return jax.jit(mapped, compiler_options=OPTIONS)

  params, state = mpo.init(tx, make())
  x = jax.random.normal(jax.random.key(1), (16, WIDTH))
  compare(jit(ordinary_step(averaged_loss(loss), tx)), jit(fused(averaged_loss, tx)), params, state, x)


def on_mesh(params, state, rows):
  mesh = jax.sharding.get_mesh()
  specs = {"embed": P("data"), "up": P(None, "data"), "down": P(None, "data"), "scale": P()}

  def sharding(path, leaf):
    spec = specs[path[-1].key] if rows else P()
    return NamedSharding(mesh, P(*spec[len(spec) - leaf.ndim :]) if leaf.ndim < len(spec) else spec)

  params = jax.device_put(params, jax.tree_util.tree_map_with_path(sharding, params))
  return params, jax.device_put(state, mpo.state_sharding(params, state))


@pytest.mark.parametrize(
  ("case", "optimizer"),
  [
    ("auto scanned", "exact"),
    pytest.param("layer scanned", "exact", marks=pytest.mark.slow),
    pytest.param("auto unrolled", "compact", marks=pytest.mark.slow),
    ("layer unrolled", "exact"),
  ],
)
def test_data_parallel_with_explicit_axes(case, optimizer):
  make, loss, fused = CASES[case]
  tx = OPTIMIZERS[optimizer]()
  with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))):
    params, state = on_mesh(*mpo.init(tx, make()), rows=False)
    x = jax.device_put(jax.random.normal(jax.random.key(1), (16, WIDTH)), P("data"))
    one = jax.jit(ordinary_step(loss, tx), compiler_options=OPTIONS)
    other = jax.jit(fused(lambda loss: loss, tx), compiler_options=OPTIONS)
    compare(one, other, params, state, x)


@pytest.mark.parametrize(
  "case",
  [
    pytest.param("auto scanned", marks=pytest.mark.slow),
    "auto unrolled",
    "layer scanned",
    pytest.param("layer unrolled", marks=pytest.mark.slow),
  ],
)
def test_weights_in_parts_with_explicit_axes(case):
  make, loss, fused = CASES[case]
  tx = OPTIMIZERS["exact"]()
  swap = {loss_fn: gathered_loss, fused_loss: gathered_fused_loss}
  with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))):
    params, state = on_mesh(*mpo.init(tx, make()), rows=True)
    x = jax.device_put(jax.random.normal(jax.random.key(1), (16, WIDTH)), P("data"))
    one = jax.jit(ordinary_step(swap.get(loss, loss), tx), compiler_options=OPTIONS)
    other = jax.jit(fused(lambda loss: swap.get(loss, loss), tx), compiler_options=OPTIONS)
    compare(one, other, params, state, x)
    _, stepped, _ = other(params, state, x)
    assert stepped["embed"].sharding.is_equivalent_to(params["embed"].sharding, 2)

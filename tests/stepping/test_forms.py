"""`value_and_update` accepts losses as libraries write them: modules, lifted scans, shard_map, foreign primitives."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_mpo as mpo
from tests.helpers import ordinary_step, quick_jit
from tests.stepping.test_value_and_update import (
  OPTIMIZERS,
  WIDTH,
  assert_equal_steps,
  batch,
  mean_square,
  normal,
)


def assert_equal_to_the_unfused_step(loss, params):
  tx = mpo.compensated(OPTIMIZERS["momentum"]())
  assert_equal_steps(loss, tx, *mpo.init(tx, params))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
  """A module like Equinox's: a pytree whose leaves are weights, with a static field."""

  weight: jax.Array
  bias: jax.Array
  activation: str = dataclasses.field(metadata={"static": True})

  def __call__(self, x):
    return getattr(jax.nn, self.activation)(x @ self.weight + self.bias[None])


def test_modules_that_are_pytrees():
  modules = [Linear(normal(i, WIDTH, WIDTH), jnp.zeros(WIDTH), name) for i, name in enumerate(["tanh", "silu"])]

  def loss(modules, x):
    for module in modules:
      x = module(x)
    return mean_square(x)

  assert_equal_to_the_unfused_step(loss, modules)


class Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x + nn.Dense(WIDTH)(jnp.tanh(x))


def test_linen_remat_scan():
  model = nn.remat_scan(Block, lengths=(2, 2))()
  params = model.init(jax.random.key(0), jnp.ones((4, WIDTH)))["params"]
  assert params["Dense_0"]["kernel"].shape == (2, 2, WIDTH, WIDTH)

  def loss(params, x):
    return mean_square(model.apply({"params": params}, x))

  assert_equal_to_the_unfused_step(loss, params)
  tx = optax.sgd(1e-2)
  table = mpo.explain(loss, tx, params, tx.init(params), batch(0))
  assert {leaf.stepped for leaf in table} == {"in scan"}
  assert "in scan" in str(table)


def test_nnx_jit_inside():
  model = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
  graph, params = nnx.split(model, nnx.Param)

  @nnx.jit
  def run(model, x):
    return jnp.tanh(model(x))

  def loss(params, x):
    return mean_square(run(nnx.merge(graph, params, copy=True), x))

  assert_equal_to_the_unfused_step(loss, params)


def test_shard_map_inside():
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

  def local(p, x):
    x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])
    return lax.pmean(mean_square(x @ p["out"]), "data")

  def loss(p, x):
    return jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())(p, x)

  assert_equal_to_the_unfused_step(loss, {"layers": normal(0, 2, WIDTH, WIDTH), "out": normal(1, WIDTH, WIDTH)})


def test_loops_that_are_and_are_not_differentiated():
  def loss(p, x):
    x = lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"]), x)
    # A while loop has no reverse-mode derivative, and needs none here.
    scale = lax.while_loop(lambda s: s < 3, lambda s: s * 2, lax.stop_gradient(jnp.abs(x).mean() + 0.5))
    return mean_square(x * scale.astype(x.dtype))

  assert_equal_to_the_unfused_step(loss, {"w": normal(0, WIDTH, WIDTH)})


twice_p = Primitive("twice")
twice_p.def_impl(lambda x: x * 2)
twice_p.def_abstract_eval(lambda x: x)
ad.deflinear2(twice_p, lambda ct, _: [twice_p.bind(ct)])
mlir.register_lowering(twice_p, mlir.lower_fun(lambda x: x * 2, multiple_results=False))


def test_primitives_that_nobody_has_heard_of():
  def loss(p, x):
    x, _ = lax.scan(lambda x, w: (x + twice_p.bind(jnp.tanh(x @ w)), None), x, p["layers"])
    return mean_square(twice_p.bind(x @ p["out"]))

  assert_equal_to_the_unfused_step(loss, {"layers": normal(0, 2, WIDTH, WIDTH), "out": normal(1, WIDTH, WIDTH)})


def test_donating_one_array_as_two_params_is_an_error_and_nothing_is_lost():
  w = normal(0, WIDTH, WIDTH)
  tx = optax.sgd(1e-2)
  params = {"a": w, "b": w}

  def loss(p, x):
    return mean_square(x @ p["a"] @ p["b"])

  state = tx.init(params)
  step = jax.jit(mpo.value_and_update(loss, tx), donate_argnums=(0, 1))
  with pytest.raises(Exception, match="donate"):
    step(params, state, batch(0))
  assert not w.is_deleted()
  want = quick_jit(ordinary_step(loss, tx))(params, state, batch(0))
  got = quick_jit(mpo.value_and_update(loss, tx))(params, state, batch(0))  # works without donation
  assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), want, got))

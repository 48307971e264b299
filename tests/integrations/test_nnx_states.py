"""Flax NNX states, with variables around their leaves, work wherever a tree of params or optimizer state does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_mpo as mpo
from optax_mpo.export import load_safetensors, save_safetensors
from optax_mpo.flax import Optimizer
from tests.helpers import assert_same_bits

X = jnp.ones((2, 8), jnp.bfloat16)


def make(tx=None):
  model = nnx.Sequential(nnx.Linear(8, 64, rngs=nnx.Rngs(0)), nnx.Linear(64, 8, rngs=nnx.Rngs(1)))
  return model, Optimizer(model, tx or mpo.compensated(optax.adam(1e-2)))


def states(tx=None):
  """Returns params and optimizer state with NNX's variables and without."""
  model, optimizer = make(tx)
  params, opt_state = nnx.state(model, nnx.Param), optimizer.opt_state
  return (params, opt_state), (nnx.as_pure(params), nnx.as_pure(opt_state))


def variables_of(tree):
  return [type(x) for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))]


def loss(params, x):
  graphdef = nnx.graphdef(make()[0])
  return jnp.mean(nnx.merge(graphdef, params)(x).astype(jnp.float32) ** 2)


@pytest.mark.parametrize("shapes", [False, True])
def test_master_params(shapes):
  given, plain = states()
  masters = jax.eval_shape(mpo.master_params, *given) if shapes else mpo.master_params(*given)
  want = mpo.master_params(*plain)
  assert set(variables_of(masters)) == {nnx.Param}
  assert isinstance(masters, nnx.State)
  if shapes:
    assert jax.tree.map(lambda x: x.dtype, nnx.as_pure(masters)) == jax.tree.map(lambda x: x.dtype, want)
  else:
    assert_same_bits(nnx.as_pure(masters), want)
  for mixed in ((given[0], plain[1]), (plain[0], given[1])):
    assert_same_bits(jax.tree.leaves(mpo.master_params(*mixed)), jax.tree.leaves(want))


def test_convert_keeps_the_variables():
  given, plain = states()
  for tx in (mpo.compensated(mpo.quantized_state(optax.adam(1e-2), min_size=1), 8), optax.adam(1e-2)):
    want = mpo.convert(tx, *plain)
    got = mpo.convert(tx, *given)
    assert set(variables_of(got[0])) == {nnx.Param}
    assert set(variables_of(got[1])) == {nnx.OptState}
    assert_same_bits(nnx.as_pure(got), want)
    shapes = jax.eval_shape(lambda p, s, tx=tx: mpo.convert(tx, p, s), *given)
    assert jax.tree.structure(shapes) == jax.tree.structure(got)
    assert_same_bits(mpo.convert(tx, given[0], plain[1]), (got[0], want[1]))


def test_a_run_that_is_only_shapes_is_restored_and_converted():
  """In the old precision, the model and its optimizer exist only as shapes."""
  model, optimizer = nnx.eval_shape(lambda: make(optax.chain(mpo.compensated(optax.adam(1e-2)))))
  params, opt_state = nnx.state(model, nnx.Param), optimizer.opt_state
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((params, opt_state)))
  new = jax.eval_shape(lambda p, s: mpo.convert(optax.chain(optax.adam(1e-2)), p, s), params, opt_state)
  assert {x.dtype.name for x in jax.tree.leaves(new)} == {"float32", "int32"}


def test_safetensors(tmp_path):
  given, plain = states()
  save_safetensors(tmp_path / "a", *given)
  save_safetensors(tmp_path / "b", *plain)
  assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
  for like in (given[0], jax.eval_shape(lambda: given[0])):
    got = load_safetensors(tmp_path / "a", like)
    assert jax.tree.structure(got) == jax.tree.structure(like)
    assert_same_bits(nnx.as_pure(got), mpo.master_params(*plain))
  model, _ = make()
  nnx.update(model, load_safetensors(tmp_path / "a", nnx.state(model, nnx.Param)))
  assert model.layers[0].kernel.get_value().dtype == jnp.float32


@pytest.mark.parametrize("shapes", [False, True])
def test_explain(shapes):
  given, plain = states()
  tx = mpo.compensated(optax.adam(1e-2))
  want = mpo.explain(loss, tx, *plain, X)
  got = mpo.explain(loss, tx, *(jax.eval_shape(lambda: given) if shapes else given), X)
  assert got == want
  assert len(got) == 4


@pytest.mark.parametrize("make_step", [mpo.value_and_update])
def test_steps(make_step):
  given, plain = states()
  step = jax.jit(make_step(loss, mpo.compensated(optax.adam(1e-2))))
  got, want = step(*given, X), step(*plain, X)
  assert jax.tree.structure(got[1:]) == jax.tree.structure(given)
  assert_same_bits(nnx.as_pure(got), want)


def test_fused_layers():
  given, plain = states()

  def loss(p, x):
    x = mpo.fused_layer(lambda p, x: x @ p["kernel"] + p["bias"][None])(p["layers"][0], x)
    return jnp.mean(
      mpo.fused_layer(lambda p, x: x @ p["kernel"] + p["bias"][None])(p["layers"][1], x).astype(jnp.float32) ** 2
    )

  step = mpo.fused_value_and_update(loss, mpo.compensated(optax.adam(1e-2)))
  _, params, opt_state = step(plain[0], given[1], X)
  _, want, _ = step(*plain, X)
  assert_same_bits(params, want)
  assert jax.tree.structure(opt_state) == jax.tree.structure(given[1])


def test_shardings():
  given, _ = states()
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  params = jax.device_put(given[0], NamedSharding(mesh, P("data")))
  shardings = mpo.state_sharding(params, given[1])
  opt_state = jax.device_put(given[1], shardings)
  moments = nnx.as_pure(opt_state).inner_state[0].mu
  assert jax.tree.map(lambda x: x.sharding, moments) == jax.tree.map(lambda x: x.sharding, nnx.as_pure(params))
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
  assert jax.tree.leaves(mpo.state_sharding(shapes, jax.eval_shape(lambda: given[1]))) == jax.tree.leaves(shardings)


def test_lost_updates_and_loss_scale():
  given, plain = states(mpo.loss_scaled(mpo.compensated(optax.adam(1e-2)), 64.0))
  updates = jax.tree.map(lambda x: jnp.full(x.shape, 1e-6), given[0])
  got = mpo.lost_updates(given[0], updates, 16, given[1])
  want = mpo.lost_updates(plain[0], nnx.as_pure(updates), 16, plain[1])
  assert set(variables_of(got)) == {nnx.Param}
  assert_same_bits(nnx.as_pure(got), want)
  assert float(np.asarray(mpo.loss_scale(given[1]))) == 64.0

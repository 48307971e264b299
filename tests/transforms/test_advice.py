"""Errors about arguments and about updates that depend on each other name the cause, and what they recommend works."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mpo as mpo
from tests.helpers import assert_same_bits, ordinary_step, quick_jit

PARAMS = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
X = jnp.ones((2, 4))


def loss(p, x):
  return jnp.mean((jnp.tanh(x.astype(p["a"].dtype) @ p["a"]) @ p["b"]).astype(jnp.float32) ** 2)


def made(tx):
  return PARAMS, tx.init(PARAMS)


# --- Extra arguments --------------------------------------------------------------------------------------------------

LOSS = {
  "reduce_on_plateau": lambda: optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
  "polyak_sgd": optax.polyak_sgd,
  "momo": lambda: optax.contrib.momo(),
  "momo_adam": lambda: optax.contrib.momo_adam(),
}
SEARCHES = {
  "lbfgs": optax.lbfgs,
  "linesearch": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)),
}


def fused_loss(p, x):
  layer = mpo.fused_layer(lambda p, x: jnp.tanh(x.astype(p["a"].dtype) @ p["a"]) @ p["b"])
  return jnp.mean(layer(p, x).astype(jnp.float32) ** 2)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", SEARCHES)
def test_line_searches_are_refused_by_name(name, wrapped):
  tx = SEARCHES[name]()
  tx = mpo.compensated(tx) if wrapped else tx
  params, state = mpo.init(tx, PARAMS) if wrapped else made(tx)
  for caller, step in (
    ("value_and_update", mpo.value_and_update(loss, tx)),
    ("explain", functools.partial(mpo.explain, loss, tx)),
  ):
    with pytest.raises(TypeError, match=rf"^{caller}: tx.update needs the extra argument 'grad'.*value_and_grad") as e:
      step(params, state, X)
    assert "value=value, grad=grad, value_fn=value_fn" in str(e.value)

  value, grad = jax.value_and_grad(loss)(params, X)  # what the message recommends
  updates, _ = tx.update(grad, state, params, value=value, grad=grad, value_fn=lambda p: loss(p, X))
  assert all(np.isfinite(np.asarray(u, np.float32)).all() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("name", LOSS)
def test_missing_extra_arguments_are_named(name):
  tx = mpo.compensated(LOSS[name]())
  params, state = mpo.init(tx, jax.tree.map(lambda p: 0.1 * p, PARAMS))
  before = mpo.master_params(params, state)
  step = mpo.fused_value_and_update(fused_loss, tx)
  with pytest.raises(TypeError, match=r"tx.update needs the extra argument 'value'.*tx_args={'value': ...}"):
    step(params, state, X)
  _, params, state = step(params, state, X, tx_args={"value": jnp.float32(1)})
  assert not np.array_equal(mpo.master_params(params, state)["a"], before["a"])


def test_other_type_errors_are_those_of_the_transformation():
  def update(grads, state, params=None):
    raise TypeError("mine")

  tx = optax.GradientTransformation(lambda p: (), update)
  with pytest.raises(TypeError, match="mine"):
    mpo.value_and_update(loss, tx)(PARAMS, (), X)


# --- Leaves that are not arrays ---------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class MLP:
  """A module as Equinox makes it: its activation is a leaf of the tree."""

  a: Any
  b: Any
  activation: Any

  def __call__(self, x):
    return self.activation(x.astype(self.a.dtype) @ self.a) @ self.b


def partition(tree):
  """`eqx.partition(tree, eqx.is_inexact_array)`."""
  return (
    jax.tree.map(lambda x: x if isinstance(x, jax.Array) else None, tree),
    jax.tree.map(lambda x: None if isinstance(x, jax.Array) else x, tree),
  )


def combine(*trees):
  """`eqx.combine(*trees)`."""
  return jax.tree.map(lambda x, y: y if x is None else x, *trees, is_leaf=lambda x: x is None)


@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.relu, "tanh", object()], ids=lambda x: type(x).__name__)
def test_functions_and_other_objects_among_the_params_are_named(activation):
  tx = mpo.compensated(optax.adam(1e-2))
  masked = optax.masked(tx, lambda params: jax.tree.map(lambda x: isinstance(x, jax.Array), params))
  model = MLP(**PARAMS, activation=activation)
  params, state = mpo.init(tx, partition(model)[0])

  def of_model(model, x):
    return jnp.mean(model(x).astype(jnp.float32) ** 2)

  calls = {
    "init": (lambda: mpo.init(tx, model), lambda: mpo.init(masked, model)),
    "value_and_update": [lambda t=t: mpo.value_and_update(of_model, t)(model, state, X) for t in (tx, optax.sgd(1.0))],
    "fused_value_and_update": [lambda: mpo.fused_value_and_update(of_model, tx)(model, state, X)],
    "explain": [lambda: mpo.explain(of_model, tx, model, state, X)],
    "convert": [lambda: mpo.convert(tx, model, state)],
    "apply_updates": [lambda: mpo.apply_updates(model, params)],
    "": [lambda: tx.init(model), lambda: mpo.lost_updates(model, params)],
  }
  kind = type(activation).__name__
  for caller, variants in calls.items():
    for call in variants:
      with pytest.raises(TypeError, match=rf"^({caller}: )?params.activation is a {kind}, not.*eqx.partition") as error:
        call()
      assert str(error.value).startswith(caller)


def test_a_module_is_trained_as_its_error_recommends():
  tx = mpo.compensated(optax.adam(1e-2))
  params, static = partition(MLP(**PARAMS, activation=jnp.tanh))
  layer = mpo.fused_layer(lambda params, x: combine(params, static)(x))
  steps = {
    "automatic": mpo.value_and_update(lambda p, x: jnp.mean(combine(p, static)(x).astype(jnp.float32) ** 2), tx),
    "by layers": mpo.fused_value_and_update(lambda p, x: jnp.mean(layer(p, x).astype(jnp.float32) ** 2), tx),
    "ordinary": ordinary_step(lambda p, x: jnp.mean(combine(p, static)(x).astype(jnp.float32) ** 2), tx),
  }
  results = {}
  for name, step in steps.items():
    step, run = quick_jit(step), mpo.init(tx, params)
    for _ in range(3):
      _, *run = step(*run, X)
    results[name] = run
  assert_same_bits(results["automatic"], results["ordinary"])
  assert_same_bits(results["by layers"], results["ordinary"])
  trained = combine(mpo.master_params(*results["automatic"]), static)
  assert trained.activation is jnp.tanh
  assert trained(X).dtype == jnp.float32


def test_cast_leaves_what_is_not_an_array_alone():
  model = MLP(**PARAMS, activation=jnp.tanh)
  low = mpo.cast(model)
  assert low.activation is jnp.tanh
  assert low(X).dtype == jnp.bfloat16


# --- Arguments in the wrong order -------------------------------------------------------------------------------------


def test_arguments_in_the_wrong_order_are_told_the_right_one():
  tx = mpo.compensated(optax.adam(1e-2))
  params, state = mpo.init(tx, PARAMS)
  for call, right in (
    (lambda: mpo.init(PARAMS, tx), "init: tx has to be.*a dict.*init(tx, params)"),
    (lambda: mpo.convert(params, tx, state), "convert: tx .*convert(tx, params, opt_state)"),
    (lambda: mpo.value_and_update(tx, loss), "value_and_update: loss_fn .*value_and_update(loss_fn, tx)"),
    (lambda: mpo.value_and_update(loss, params), "value_and_update: tx .*value_and_update(loss_fn, tx)"),
    (lambda: mpo.fused_value_and_update(tx, loss), "fused_value_and_update: loss_fn .*(loss_fn, tx)"),
    (lambda: mpo.explain(tx, loss, params, state, X), "explain: loss_fn .*(loss_fn, tx, params, opt_state, *args)"),
    (lambda: mpo.explain(loss, params, tx, state, X), "explain: tx .*(loss_fn, tx, params, opt_state, *args)"),
    (lambda: mpo.master_params(state, params), "master_params: .*master_params(params, opt_state)"),
    (lambda: mpo.compensated(8), "compensated: inner .* a int.*compensated(inner)"),
    (lambda: mpo.quantized_state(8), "quantized_state: inner .* a int.*quantized_state(inner)"),
    (lambda: mpo.loss_scaled(2.0**15), "loss_scaled: inner .* a float.*loss_scaled(inner)"),
    (lambda: mpo.with_kernels(params), "with_kernels: tx .* a dict.*with_kernels(tx)"),
    (lambda: mpo.cast(jnp.bfloat16, PARAMS), "cast: dtype .* a dict.*cast(params, dtype)"),
    (lambda: mpo.init(tx, PARAMS, dtype=PARAMS), "init: dtype .* a dict"),
  ):
    pattern = right.replace("(", r"\(").replace(")", r"\)").replace("*args", r"\*args")
    with pytest.raises(TypeError, match=pattern):
      call()
  with pytest.raises(
    ValueError, match=r"lost_updates: extra_bits .* a CompensatedState.*\(params, updates, extra_bits, opt_state\)"
  ):
    mpo.lost_updates(params, PARAMS, state)

  def swapped(grads, state, params):
    updates, _ = tx.update(grads, state, params)
    return mpo.apply_updates(updates, params)

  with pytest.raises(TypeError, match=r"apply_updates: params\['a'\] is an update.*apply_updates\(params, updates\)"):
    jax.jit(swapped)(params, state, params)


def test_shardings_of_arguments_in_the_wrong_order():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  params, state = jax.device_put(mpo.init(mpo.compensated(optax.adam(1e-2)), PARAMS), everywhere)
  with pytest.raises(TypeError, match=r"state_sharding\(params, opt_state\)"):
    mpo.state_sharding(state, params)
  mpo.state_sharding(params, state)
  mpo.state_sharding(params, optax.sgd(0.1).init(params))  # a state without leaves is valid


# --- Updates that depend on each other --------------------------------------------------------------------------------


def twice_clipped():
  return optax.chain(optax.clip_by_global_norm(1.0), optax.clip_by_global_norm(0.5), optax.sgd(0.1))


@pytest.mark.parametrize(
  ("make", "helps"),
  [
    (lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), True),
    (lambda: optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), 2), True),
    (twice_clipped, False),
    (lambda: optax.flatten(optax.adam(0.1)), False),
  ],
)
def test_two_passes_are_recommended_where_they_help(make, helps, monkeypatch):
  monkeypatch.setattr("optax_mpo._updates.coupled.SMALL", 1)
  tx = make()
  params, state = made(tx)
  for call in (mpo.value_and_update(loss, tx), functools.partial(mpo.explain, loss, tx)):
    with pytest.raises(ValueError, match="couples") as error:
      call(params, state, X)
    assert ("two_pass=True" in str(error.value)) == helps
    assert not any(word in str(error.value) for word in ("fused_layer", "adaptive_grad_clip"))
  both = mpo.value_and_update(loss, tx, two_pass=True)
  if helps:
    jax.jit(both)(params, state, X)
  else:
    with pytest.raises(ValueError, match=r"two_pass: tx .*tx.update") as error:
      both(params, state, X)
    assert "two_pass=True" not in str(error.value)
  updates, _ = tx.update(jax.grad(loss)(params, X), state, params)  # the ordinary step, which is also recommended
  assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_what_is_recommended_in_place_of_clipping_by_norm_works_in_scans():
  """These update a stack in its scan. optax.adaptive_grad_clip needs the whole stack: it is not recommended."""
  stack, x = jnp.ones((3, 4, 4)), jnp.ones((2, 4))
  stacked = mpo.fused_scan(lambda w, x, _: (jnp.tanh(x @ w), None))

  def by_layers(p, x):
    return jnp.mean(stacked(p["a"], x, None)[0] ** 2) + jnp.mean(mpo.fused_value(p["b"]) ** 2)

  params = {"a": stack, "b": PARAMS["b"]}
  coupled = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
  with pytest.raises(ValueError, match=r"clip_by_delayed_norm.*\(optax.clip\).*one fused_layer.*tx.update") as error:
    mpo.fused_value_and_update(by_layers, coupled)(params, coupled.init(params), x)
  assert "adaptive_grad_clip" not in str(error.value)
  for clip in (optax.clip(1.0), mpo.clip_by_delayed_norm(1.0)):
    clipped = optax.chain(clip, optax.sgd(0.1))
    mpo.fused_value_and_update(by_layers, clipped)(params, clipped.init(params), x)
  whole = mpo.fused_layer(lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["a"])[0] @ p["b"])
  one = mpo.fused_value_and_update(lambda p, x: jnp.mean(whole(p, x) ** 2), coupled)
  one(params, coupled.init(params), x)

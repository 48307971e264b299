"""Extra arguments of `tx.update`: the loss as `value`, and what `tx_args` has, give the bits of the ordinary step."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import optax_mpo as mpo
from tests.helpers import assert_same_bits, quick_jit
from tests.stepping.test_stack_scalars import with_others
from tests.stepping.test_stacks import D


def scaled_by_argument():
  """Multiplies updates by the sum of the extra argument `factors`."""

  def update(updates, state, params=None, *, factors, **extra_args):
    return jax.tree.map(lambda u: u * (factors["a"] + factors["b"]), updates), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def ordinary(loss, tx, extra_args):
  def step(params, opt_state, x):
    value, grads = jax.value_and_grad(loss)(params, x)
    updates, opt_state = tx.update(grads, opt_state, params, **extra_args(value))
    return value, mpo.apply_updates(params, updates), opt_state

  return step


FACTORS = {"factors": {"a": jnp.float32(0.25), "b": 0.5}}
PLATEAU = functools.partial(optax.contrib.reduce_on_plateau, patience=1, factor=0.5, rtol=1.0)
CASES = {  # the transformation, the extra arguments of the ordinary step, those of ours, options
  "the loss": (lambda: optax.chain(optax.adamw(1e-2), PLATEAU()), lambda value: {"value": value}, None, {}),
  "another value": (
    lambda: optax.chain(optax.adamw(1e-2), PLATEAU()),
    lambda value: {"value": jnp.float32(3)},
    {"value": jnp.float32(3)},
    {},
  ),
  "factors": (lambda: optax.chain(scaled_by_argument(), optax.sgd(0.1)), lambda value: FACTORS, FACTORS, {}),
  "all of them": (
    lambda: optax.chain(scaled_by_argument(), mpo.record_norms(), optax.adamw(1e-2), PLATEAU()),
    lambda value: {"value": value} | FACTORS,
    FACTORS,
    {},
  ),
  "two passes": (optax.polyak_sgd, lambda value: {"value": value}, None, {"two_pass": True}),
}


def is_plateau(x):
  return isinstance(x, optax.contrib.ReduceLROnPlateauState)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.few(3)
def test_extra_arguments_give_the_bits_of_the_ordinary_step(name):
  make, extra_args, tx_args, options = CASES[name]
  loss, params = with_others("first axis")
  tx = mpo.compensated(make())
  params, state = mpo.init(tx, params)
  given = {} if tx_args is None else {"tx_args": tx_args}
  one = quick_jit(ordinary(loss, tx, extra_args))
  other = quick_jit(functools.partial(mpo.value_and_update(loss, tx, **options), **given))
  want, got = (None, params, state), (None, params, state)
  for i in range(30):
    x = jax.random.normal(jax.random.key(100 + i), (4, D))
    want, got = one(*want[1:], x), other(*got[1:], x)
    assert_same_bits(got, want)
  plateau = jax.tree.leaves(got[2], is_leaf=is_plateau)[-1]
  assert not is_plateau(plateau) or plateau.scale < 1  # the learning rate has been reduced


@pytest.mark.parametrize("around", ["8-bit state", "kernels", "eight devices", "models at once"])
@pytest.mark.few(2)
def test_the_loss_reaches_the_update_in_every_setting(around):
  loss, params = with_others("first axis")
  tx = optax.chain(optax.adamw(1e-2), PLATEAU())
  tx = mpo.compensated(mpo.quantized_state(tx) if around == "8-bit state" else tx)
  tx = mpo.with_kernels(tx) if around == "kernels" else tx
  one, other = ordinary(loss, tx, lambda value: {"value": value}), mpo.value_and_update(loss, tx)
  params, state = mpo.init(tx, params)
  x = jax.random.normal(jax.random.key(100), (8, D))
  if around == "eight devices":
    mesh = jax.make_mesh((8,), ("data",))
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    params, state = jax.device_put((params, state), NamedSharding(mesh, PartitionSpec()))
  if around == "models at once":
    one, other = jax.vmap(one), jax.vmap(other)
    params, state, x = jax.tree.map(lambda a: jnp.stack([a, a]), (params, state, x))
  one, other = quick_jit(one), quick_jit(other)
  want, got = (None, params, state), (None, params, state)
  for _ in range(3):
    want, got = one(*want[1:], x), other(*got[1:], x)
  assert_same_bits(got, want)
  assert float(jnp.max(jax.tree.leaves(got[2], is_leaf=is_plateau)[-1].scale)) < 1


def test_stacks_are_still_updated_in_their_scan():
  loss, params = with_others("first axis")
  tx = mpo.compensated(optax.chain(optax.adamw(1e-2), PLATEAU()))
  table = {x.name: x.stepped for x in mpo.explain(loss, tx, *mpo.init(tx, params), jnp.ones((4, D)))}
  assert table["params['w']"] == "in scan"
  assert table["params['last']"] == "at once"


def test_layers_that_the_loss_does_not_use_wait_for_it_too():
  """Nothing reads these weights after the forward pass."""

  def loss(params, x):
    total, _ = jax.lax.scan(lambda total, w: (total + jnp.sum(x @ w).astype(jnp.float32), None), 0.0, params["w"][:2])
    return jnp.tanh(total / 100)

  plateau = optax.contrib.reduce_on_plateau(patience=1, factor=0.5, rtol=1.0)
  tx = mpo.compensated(optax.chain(optax.adamw(1e-2), plateau))
  params, state = mpo.init(tx, {"w": jax.random.normal(jax.random.key(0), (3, D, D))})
  x = jnp.ones((4, D), jnp.bfloat16)
  want = quick_jit(ordinary(loss, tx, lambda value: {"value": value}))(params, state, x)
  assert_same_bits(quick_jit(mpo.value_and_update(loss, tx))(params, state, x), want)


def test_a_step_that_depends_on_the_loss_has_its_derivative():
  def loss(params, x):
    return jnp.mean((x @ params["w"]) ** 2)

  def update(updates, state, params=None, *, value, **extra_args):
    return jax.tree.map(lambda u: u * value, updates), state

  tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
  params = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
  x = jax.random.normal(jax.random.key(1), (5, 4))

  def after(step, params):
    return jnp.sum(step(params, tx.init(params), x)[1]["w"] ** 2)

  want = jax.grad(functools.partial(after, ordinary(loss, tx, lambda value: {"value": value})))(params)
  assert_same_bits(jax.grad(functools.partial(after, mpo.value_and_update(loss, tx)))(params), want)


def test_by_fused_layers():
  layer = mpo.fused_layer(lambda w, x: jnp.tanh(x @ w))
  tx = mpo.compensated(optax.chain(scaled_by_argument(), optax.adamw(1e-2)))
  params, state = mpo.init(tx, {"a": 0.3 * jax.random.normal(jax.random.key(0), (D, D))})
  x = jax.random.normal(jax.random.key(1), (4, D), jnp.bfloat16)
  fused = mpo.fused_value_and_update(lambda p, x: jnp.mean(layer(p["a"], x).astype(jnp.float32) ** 2), tx)
  one = ordinary(lambda p, x: jnp.mean(jnp.tanh(x @ p["a"]).astype(jnp.float32) ** 2), tx, lambda value: FACTORS)
  assert_same_bits(
    quick_jit(functools.partial(fused, tx_args=FACTORS))(params, state, x), quick_jit(one)(params, state, x)
  )


def test_tx_args_has_to_be_a_dict():
  tx = optax.sgd(0.1)
  for tx_args in (3.0, {1: 2.0}):
    with pytest.raises(TypeError, match="value_and_update: tx_args has to be a dict of the extra arguments"):
      mpo.value_and_update(jnp.sum, tx)(jnp.ones(2), tx.init(jnp.ones(2)), tx_args=tx_args)


def test_functions_cannot_be_handed_on():
  tx = optax.sgd(0.1)
  with pytest.raises(TypeError, match=r"tx_args\['value_fn'\] is a function, and a step hands on arrays and numbers"):
    mpo.value_and_update(jnp.sum, tx)(jnp.ones(2), tx.init(jnp.ones(2)), tx_args={"value_fn": ordinary})


def grads_first():
  """Its first argument has another name than in Optax."""

  def update(grads, state, params=None, **extra_args):
    return grads, state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


NAMES = [
  ("params", lambda: mpo.compensated(optax.sgd(0.1))),
  ("updates", lambda: mpo.compensated(optax.sgd(0.1))),
  ("state", lambda: mpo.compensated(optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()))),
  ("grads", lambda: mpo.compensated(grads_first())),
]


@pytest.mark.parametrize(("name", "make"), NAMES, ids=[name for name, _ in NAMES])
def test_names_of_what_the_step_passes_itself(name, make):
  tx = make()
  params, state = mpo.init(tx, {"w": jnp.ones((2, 2))})
  layer = mpo.fused_layer(lambda w, x: jnp.mean(x @ w))
  x, tx_args = jnp.ones((4, 2), params["w"].dtype), {name: jnp.ones(2)}

  def loss(p, x):
    return jnp.mean(x @ p["w"])

  routes = [
    functools.partial(mpo.value_and_update(loss, tx), params, state, x),
    functools.partial(mpo.value_and_update(loss, tx, microbatches=2), params, state, x),
    functools.partial(mpo.fused_value_and_update(lambda p, x: layer(p["w"], x), tx), params, state, x),
    functools.partial(mpo.explain, loss, tx, params, state, x),
  ]
  for route in routes:
    with pytest.raises(TypeError, match=f"^tx_args: '{name}' cannot be an extra argument of tx.update.*Leave it out"):
      route(tx_args=tx_args)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_transformation_that_takes_no_extra_arguments_gets_none(microbatches):
  """Although Optax asks for `**extra_args`, `optax.contrib.sam` has none."""

  def update(updates, state, params=None):
    return jax.tree.map(lambda u: -u, updates), state

  tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
  params = {"w": jnp.ones(2)}
  step = mpo.value_and_update(lambda p, x: jnp.mean(x @ p["w"]), tx, microbatches=microbatches)
  _, params, _ = step(params, tx.init(params), jnp.ones((4, 2)))
  assert_same_bits(params, {"w": jnp.zeros(2)})

"""Steps whose state, or weights too, are in host memory: the same bits as with everything on the device."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_mpo as mpo
from optax_mpo._stepping import rows
from tests.host_memory import X, assert_equal, kinds, loss_fn, masters, on_host, ordinary_update

STEPS = 20


def fused_loss(params, x, **options):
  """The same loss with fused layers; `options` are those of the stack."""
  stack = mpo.fused_scan(lambda p, x, _: (jnp.tanh(x @ p["w"] + p["b"][None]), None), **{"remat": True} | options)
  head = mpo.fused_layer(lambda p, x: jnp.mean((x @ p).astype(jnp.float32) ** 2))
  return head(params["head"], stack(params["layers"], x @ mpo.fused_value(params["embedding"]))[0])


def trained(tx, state=lambda s: s, params=lambda p: p, steps=STEPS, make=mpo.value_and_update, **options):
  low, opt_state = mpo.init(tx, masters())
  low, opt_state = params(low), state(opt_state)
  before = kinds((low, opt_state))
  step = jax.jit(make(loss_fn, tx, **options), donate_argnums=(0, 1))
  for _ in range(steps):
    value, low, opt_state = step(low, opt_state, X)
  assert kinds((low, opt_state)) == before
  return jax.device_get((value, low, opt_state))


def ordinary(loss_fn, tx):
  def step(params, opt_state, x):
    value, grads = jax.value_and_grad(lambda p: loss_fn(p, x))(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return value, mpo.apply_updates(params, updates), opt_state

  return step


OPTIMIZERS = {
  "adamw": (lambda: optax.adamw(1e-3), {}),
  "sgd": (lambda: optax.sgd(1e-2, momentum=0.9), {}),
  "lion": (lambda: optax.lion(1e-4), {}),
  "8-bit adamw": (lambda: mpo.quantized_state(optax.adamw(1e-3)), {}),
  "schedule": (lambda: optax.adamw(optax.linear_schedule(1e-3, 0.0, 10)), {}),
  "adafactor": (lambda: optax.adafactor(1e-3, min_dim_size_to_factor=128), {}),
  "adafactor per layer": (
    lambda: mpo.per_layer(optax.adafactor(1e-3, min_dim_size_to_factor=128), lambda path, leaf: leaf.ndim == 3),
    {"two_pass": True},
  ),
  "8-bit sgd": (lambda: mpo.quantized_state(optax.sgd(1e-2, momentum=0.9)), {}),
  "8-bit lion": (lambda: mpo.quantized_state(optax.lion(1e-4)), {}),
  "norms": (lambda: optax.chain(mpo.record_norms(), mpo.clip_by_delayed_norm(0.1), optax.adamw(1e-3)), {}),
  "clip in two passes": (lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-3)), {"two_pass": True}),
  "per layer": (lambda: mpo.per_layer(optax.lamb(1e-3), lambda path, leaf: leaf.ndim == 3), {"two_pass": True}),
  "microbatches": (lambda: optax.adamw(1e-3), {"microbatches": 2}),
}


@pytest.fixture(params=["whole", "by rows"])
def elements(request, monkeypatch):
  """The most elements of a leaf that are fetched at a time."""
  if request.param == "by rows":
    monkeypatch.setattr(rows, "_ELEMENTS", 2**14)
    monkeypatch.setattr(rows, "ELEMENTS_OF_LAYER", 2**14)


@pytest.mark.few(1, full=3)
@pytest.mark.parametrize("weights", ["weights on the device", "weights too"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_with_all_on_the_device_bit_for_bit(name, weights, elements):
  make, options = OPTIMIZERS[name]
  tx = mpo.compensated(make())
  device = trained(tx, **options)
  assert_equal(trained(tx, on_host, on_host if weights == "weights too" else lambda p: p, **options), device)


@pytest.mark.few(1, full=3)
@pytest.mark.parametrize("name", [*OPTIMIZERS, "clip"])
def test_ordinary_steps_too(name, elements):
  make = OPTIMIZERS[name][0] if name in OPTIMIZERS else OPTIMIZERS["clip in two passes"][0]
  tx = mpo.compensated(make())
  assert_equal(trained(tx, on_host, make=ordinary), trained(tx, make=ordinary))


def test_the_ordinary_update_takes_weights_there_too():
  tx = mpo.compensated(mpo.quantized_state(optax.adamw(1e-3)))
  low, state = mpo.init(tx, masters())
  grads = jax.tree.map(jnp.ones_like, low)
  step = jax.jit(lambda grads, state, low: ordinary_update(tx, grads, state, low))
  assert_equal(jax.device_get(step(grads, on_host(state), on_host(low))), jax.device_get(step(grads, state, low)))


@pytest.mark.parametrize("make", ["value_and_update", "ordinary", "fused"])
@pytest.mark.few(1)
def test_a_state_half_on_the_host_is_streamed(make):
  """The bits on the device and the moments on the host, and one of the two moments."""
  make = {"value_and_update": mpo.value_and_update, "ordinary": ordinary, "fused": fused}[make]
  tx = mpo.compensated(optax.adamw(1e-3))

  def bits_here(state):
    return on_host(state)._replace(compensation=state.compensation)

  def one_moment_here(state):
    adam, *rest = state.inner_state
    return on_host(state)._replace(inner_state=(on_host(adam)._replace(mu=adam.mu), *on_host(rest)))

  device = trained(tx, make=make, steps=3)
  for half in (bits_here, one_moment_here):
    assert_equal(trained(tx, half, make=make, steps=3), device)


@pytest.mark.few(1)
@pytest.mark.parametrize("weights", ["weights on the device", "weights too"])
@pytest.mark.parametrize("axis", [1, 2])
def test_stacks_along_any_axis_are_streamed(axis, weights):
  def moved(tree, source, destination):
    layers = dict(tree["layers"], w=jnp.moveaxis(tree["layers"]["w"], source, destination))
    return tree | {"layers": layers}

  def loss(params, x):
    return loss_fn(moved(params, axis, 0), x)

  tx = mpo.compensated(optax.adamw(1e-3))
  step = jax.jit(mpo.value_and_update(loss, tx), donate_argnums=(0, 1))

  def run(params, state):
    for _ in range(3):
      _, params, state = step(params, state, X)
    return jax.device_get((params, state))

  params, state = mpo.init(tx, moved(masters(), 0, axis))
  there = jax.tree.map(jnp.copy, (params, state))
  there = on_host(there) if weights == "weights too" else (there[0], on_host(there[1]))
  assert_equal(run(*there), run(params, state))


def test_derivatives_of_a_step_are_refused_with_advice_that_works():
  tx = mpo.compensated(optax.sgd(1e-2, momentum=0.9))
  params, state = mpo.init(tx, masters(), state_memory="pinned_host")

  def loss_after(scale, state):
    _, new, _ = mpo.value_and_update(lambda p, x: loss_fn(p, x) * scale, tx)(params, state, X)
    return loss_fn(new, X)

  differentiated = jax.jit(jax.grad(loss_after))
  with pytest.raises(NotImplementedError, match="cannot be differentiated"):
    differentiated(1.0, state)
  advised = jax.device_put(state, jax.memory.Space.Device)
  expected = differentiated(1.0, mpo.init(tx, masters())[1])
  assert_equal(differentiated(1.0, advised), expected)
  assert jnp.isfinite(expected)


def test_derivatives_of_an_ordinary_step_are_those_on_the_device():
  tx = mpo.compensated(optax.sgd(1e-2, momentum=0.9))
  params, state = mpo.init(tx, masters())

  def loss_after(scale, state):
    _, new, _ = ordinary(lambda p, x: loss_fn(p, x) * scale, tx)(params, state, X)
    return loss_fn(new, X)

  differentiated = jax.jit(jax.grad(loss_after))
  expected = differentiated(1.0, state)
  assert expected != 0
  assert_equal(differentiated(1.0, on_host(state)), expected)


def test_streamed_evaluates_the_same_loss():
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), masters())
  evaluate = jax.jit(mpo.streamed(lambda p, x, scale=1: {"loss": loss_fn(p, x), "scale": scale}))
  device = jax.device_get(evaluate(params, X))
  assert_equal(device["loss"], jax.device_get(jax.jit(loss_fn)(params, X)))
  assert_equal(jax.device_get(evaluate(on_host(params), X)), device)
  assert int(device["scale"]) == 1


def fused(loss_fn, tx, **options):
  return mpo.fused_value_and_update(functools.partial(fused_loss, **options), tx)


FUSED = {
  **{name: OPTIMIZERS[name] for name in ("adamw", "sgd", "lion", "8-bit adamw", "schedule")},
  "delayed clip": (lambda: optax.chain(mpo.record_norms(), mpo.clip_by_delayed_norm(0.1), optax.adamw(1e-3)), {}),
  "per layer": (lambda: mpo.per_layer(optax.lamb(1e-3), lambda path, leaf: leaf.ndim == 3), {}),
  "microbatches": (lambda: optax.adamw(1e-3), {"microbatches": 2, "in_axes": (0, None)}),
  "activations kept": (lambda: optax.adamw(1e-3), {"remat": False, "reverse": True}),
}


@pytest.mark.few(1, full=3)
@pytest.mark.parametrize("weights", ["weights on the device", "weights too"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_are_those_with_all_on_the_device_bit_for_bit(name, weights, elements):
  make, options = FUSED[name]
  run = functools.partial(trained, mpo.compensated(make()), make=fused, **options)
  assert_equal(run(on_host, on_host if weights == "weights too" else lambda p: p), run())


def test_fused_layers_outside_of_jit_say_what_to_do():
  tx = mpo.compensated(optax.adamw(1e-3))
  params, state = mpo.init(tx, masters(), state_memory="pinned_host")
  with pytest.raises(ValueError, match="the step under jax"):
    fused(None, tx)(params, state, X)


def test_sharded_state_is_streamed_on_each_device():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  by_rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
  tx = mpo.compensated(optax.adamw(1e-3))

  def run(memory_kind):
    params = jax.tree.map(lambda x: jax.device_put(x, by_rows), masters())
    low, state = mpo.init(tx, params)
    shardings = mpo.state_sharding(low, state, memory_kind=memory_kind)
    state = jax.device_put(state, shardings)
    out = (None, jax.tree.map(lambda x: x.sharding, low), shardings)
    step = jax.jit(mpo.value_and_update(loss_fn, tx), donate_argnums=(0, 1), out_shardings=out)
    for _ in range(3):
      value, low, state = step(low, state, X)
    assert kinds(state.inner_state[0].mu)["head"] == (memory_kind or "device")
    return jax.device_get((value, low, state))

  assert_equal(run("pinned_host"), run(None))


def test_programs_without_host_memory_are_what_they_were():
  tx = mpo.compensated(optax.adamw(1e-3))
  params, state = mpo.init(tx, masters())
  step = functools.partial(mpo.value_and_update(loss_fn, tx), params, state)
  assert "device_put" not in str(jax.make_jaxpr(step)(X))


def test_explain_says_where_a_state_is_fetched_whole(monkeypatch):
  monkeypatch.setattr(rows, "_ELEMENTS", 2**14)
  tx = mpo.compensated(optax.adamw(1e-3))
  params = {"w": jnp.ones((8, 331 * 64)), "prime": jnp.ones((331, 512))}
  low, state = mpo.init(tx, params, state_memory="pinned_host")

  def loss(p, x):
    return jnp.sum((x @ p["prime"]).astype(jnp.float32)) + jnp.sum(p["w"].astype(jnp.float32) ** 2)

  rows_of = {row.name: row for row in mpo.explain(loss, tx, low, state, jnp.ones((2, 331), jnp.bfloat16))}
  assert "331 rows do not divide into equal parts" in rows_of["params['prime']"].why
  assert "fetched whole" not in rows_of["params['w']"].why

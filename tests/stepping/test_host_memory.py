"""Steps whose state, or weights too, are in host memory: the same bits as with everything on the device."""

import functools
import os
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mpo as mpo
from optax_mpo._stepping import rows
from optax_mpo._transforms import sharding
from tests.helpers import ROOT, assert_same_bits

HOST = jax.sharding.NamedSharding(
  jax.make_mesh((1,), ("device",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1]),
  jax.sharding.PartitionSpec(),
  memory_kind="pinned_host",
)
WIDTH, LAYERS, STEPS = 320, 3, 20
X = jax.random.normal(jax.random.key(2), (8, WIDTH), jnp.bfloat16)


def masters():
  keys = jax.random.split(jax.random.key(0), 4)
  return {
    "embedding": jax.random.normal(keys[3], (WIDTH, WIDTH)) * 0.05,
    "layers": {"w": jax.random.normal(keys[0], (LAYERS, WIDTH, WIDTH)) * 0.05, "b": jnp.zeros((LAYERS, WIDTH))},
    "head": jax.random.normal(keys[1], (WIDTH, WIDTH)) * 0.05,
  }


def loss_fn(params, x):
  def layer(x, p):
    return jnp.tanh(x @ p["w"] + p["b"][None]), None

  x, _ = jax.lax.scan(jax.checkpoint(layer), x @ params["embedding"], params["layers"])
  return jnp.mean((x @ params["head"]).astype(jnp.float32) ** 2)


def fused_loss(params, x, **options):
  """The same loss with fused layers; `options` are those of the stack."""
  stack = mpo.fused_scan(lambda p, x, _: (jnp.tanh(x @ p["w"] + p["b"][None]), None), **{"remat": True} | options)
  head = mpo.fused_layer(lambda p, x: jnp.mean((x @ p).astype(jnp.float32) ** 2))
  return head(params["head"], stack(params["layers"], x @ mpo.fused_value(params["embedding"]))[0])


def kinds(tree):
  return jax.tree.map(lambda x: x.sharding.memory_kind, tree)


def on_host(tree):
  """The tree with its large leaves in host memory."""

  def move(x):
    return jax.device_put(x, HOST) if x.size > 2**16 else x

  return jax.tree.map(move, tree)


def trained(tx, state=lambda s: s, params=lambda p: p, steps=STEPS, make=mpo.value_and_update, **options):
  low, opt_state = mpo.init(tx, masters())
  low, opt_state = params(low), state(opt_state)
  before = kinds((low, opt_state))
  step = jax.jit(make(loss_fn, tx, **options), donate_argnums=(0, 1))
  for _ in range(steps):
    value, low, opt_state = step(low, opt_state, X)
  assert kinds((low, opt_state)) == before
  return jax.device_get((value, low, opt_state))


def assert_equal(a, b):
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


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
    monkeypatch.setattr(rows, "_ELEMENTS_OF_LAYER", 2**14)


@pytest.mark.few(2, full=5)
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


def ordinary_update(tx, grads, state, params):
  updates, state = tx.update(grads, state, params)
  return mpo.apply_updates(params, updates), state


def test_init_makes_the_state_there_and_state_sharding_says_where():
  tx = mpo.compensated(optax.adamw(1e-3))
  params, state = mpo.init(tx, masters(), state_memory="pinned_host")
  adam = state.inner_state[0]
  assert kinds(adam.mu) == kinds(state.compensation)
  assert kinds(adam.mu)["layers"] == {"w": "pinned_host", "b": "device"}
  assert kinds(adam.count) == "device"
  assert set(jax.tree.leaves(kinds(params))) == {"device"}
  plain = mpo.init(tx, masters())
  assert_equal(jax.device_get((params, state)), jax.device_get(plain))
  moved = jax.device_put(plain[1], mpo.state_sharding(*plain, memory_kind="pinned_host"))
  assert kinds(moved) == kinds(state)
  chosen = mpo.state_sharding(*plain, memory_kind="pinned_host", where=lambda path, leaf: leaf.shape == (WIDTH, WIDTH))
  memory = jax.tree.map(lambda s: s.memory_kind, chosen).inner_state[0].mu
  assert (memory["head"], memory["layers"]["w"]) == ("pinned_host", "device")
  assert_equal(jax.device_get(mpo.master_params(params, moved)), masters())


def test_where_without_a_memory_is_refused():
  params = masters()
  with pytest.raises(ValueError, match="Pass memory_kind"):
    mpo.state_sharding(params, params, where=lambda path, leaf: True)


def test_a_memory_that_the_device_does_not_have_is_refused_by_name():
  tx = mpo.compensated(optax.adamw(1e-3))
  with pytest.raises(ValueError, match="has no memory 'hbm2', but 'device', 'pinned_host'"):
    mpo.init(tx, masters(), state_memory="hbm2")


def test_a_platform_without_host_memory_says_so():
  memories = [types.SimpleNamespace(kind="device")]
  device = types.SimpleNamespace(device_kind="a card", addressable_memories=lambda: memories)
  with pytest.raises(ValueError, match=r"a card has no memory 'pinned_host', but 'device'.*leave memory_kind out"):
    sharding._check_memory(types.SimpleNamespace(device_set=[device]), "pinned_host")


def test_streamed_evaluates_the_same_loss():
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), masters())
  evaluate = jax.jit(mpo.streamed(lambda p, x, scale=1: {"loss": loss_fn(p, x), "scale": scale}))
  device = jax.device_get(evaluate(params, X))
  assert_equal(device["loss"], jax.device_get(jax.jit(loss_fn)(params, X)))
  assert_equal(jax.device_get(evaluate(on_host(params), X)), device)
  assert int(device["scale"]) == 1


@pytest.mark.parametrize("bits", [16, 4])
def test_a_checkpoint_keeps_the_memory_and_is_that_of_the_device(tmp_path, bits):
  tx = mpo.compensated(mpo.quantized_state(optax.adamw(1e-3)), extra_bits=bits)
  device = mpo.init(tx, masters())
  there = mpo.init(tx, masters(), state_memory="pinned_host")
  like = jax.tree.map(jnp.zeros_like, device[0]), there[1]
  for folder, saved in (("host", there), ("device", device)):
    with mpo.checkpoint.Checkpointer(tmp_path / folder) as checkpoints:
      checkpoints.save(1, saved)
      _, found = checkpoints.restore(like)
    assert kinds(found[1]) == kinds(there[1])
    assert_equal(jax.device_get(found), jax.device_get(device))


def test_what_reads_state_takes_it_from_there():
  tx = mpo.compensated(mpo.quantized_state(optax.adamw(1e-3)), extra_bits=8)
  params, state = mpo.init(tx, masters(), state_memory="pinned_host")
  low, plain = mpo.init(tx, masters())
  assert_equal(mpo.dequantized(state), mpo.dequantized(plain))
  target = mpo.compensated(optax.adamw(1e-3))
  assert_equal(mpo.convert(target, on_host(params), state), mpo.convert(target, low, plain))
  grads = jax.tree.map(jnp.ones_like, params)
  assert_equal(ordinary_update(tx, grads, state, params), ordinary_update(tx, grads, plain, low))
  large = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  assert_equal(mpo.lost_updates(params, large, 8, opt_state=state), mpo.lost_updates(low, large, 8, opt_state=plain))


@jax.custom_vjp
def deadly(x, step):
  """`x`. The derivative kills the process in step 4, when the layers are updated and the embedding is not."""
  return x


def _kill(grad, step):
  if step == 4:
    os.kill(os.getpid(), signal.SIGKILL)
  return grad


deadly.defvjp(
  lambda x, step: (x, step),
  lambda step, grad: (jax.pure_callback(_kill, jax.ShapeDtypeStruct(grad.shape, grad.dtype), grad, step), None),
)


def run_with_checkpoints(folder, steps, loss=loss_fn):
  """Trains from the last checkpoint in `folder` to a number of steps, with state and weights on the host."""
  tx = mpo.compensated(mpo.quantized_state(optax.adamw(1e-3)), extra_bits=8)
  low, state = mpo.init(tx, masters(), state_memory="pinned_host")
  run, done = (on_host(low), state), 0
  step = jax.jit(mpo.value_and_update(loss, tx), donate_argnums=(0, 1))
  with mpo.checkpoint.Checkpointer(folder, max_to_keep=2) as checkpoints:
    if checkpoints.steps():
      done, run = checkpoints.restore(run)
    for i in range(done + 1, steps + 1):
      _, *run = step(*run, *((X,) if loss is loss_fn else (X, i)))
      checkpoints.save(i, tuple(run))
  return done, tuple(run)


def train_until_killed(folder):
  def loss(params, x, step):
    return loss_fn({**params, "embedding": deadly(params["embedding"], step)}, x)

  run_with_checkpoints(folder, 6, loss)


@pytest.mark.full
def test_a_kill_during_a_step_loses_nothing_that_a_checkpoint_had(tmp_path):
  program = f"from {__name__} import train_until_killed; train_until_killed({str(tmp_path / 'killed')!r})"
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  killed = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  done, got = run_with_checkpoints(tmp_path / "killed", 6)
  assert done == 3
  assert {x.sharding.memory_kind for x in jax.tree.leaves(got) if x.size > 2**16} == {"pinned_host"}
  assert_equal(jax.device_get(got), jax.device_get(run_with_checkpoints(tmp_path / "whole", 6)[1]))


def fused(loss_fn, tx, **options):
  return mpo.fused_value_and_update(functools.partial(fused_loss, **options), tx)


FUSED = {
  **{name: OPTIMIZERS[name] for name in ("adamw", "sgd", "lion", "8-bit adamw", "schedule")},
  "delayed clip": (lambda: optax.chain(mpo.record_norms(), mpo.clip_by_delayed_norm(0.1), optax.adamw(1e-3)), {}),
  "per layer": (lambda: mpo.per_layer(optax.lamb(1e-3), lambda path, leaf: leaf.ndim == 3), {}),
  "microbatches": (lambda: optax.adamw(1e-3), {"microbatches": 2, "in_axes": (0, None)}),
  "activations kept": (lambda: optax.adamw(1e-3), {"remat": False, "reverse": True}),
}


@pytest.mark.few(2, full=4)
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


def test_init_with_a_memory_inside_jit_says_what_to_do():
  tx = mpo.compensated(optax.adamw(1e-3))
  with pytest.raises(ValueError, match="Call init outside of jit"):
    jax.jit(lambda p: mpo.init(tx, p, state_memory="pinned_host"))(masters())


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


def test_a_state_of_small_leaves_stays_with_a_warning():
  tx = mpo.exact(optax.adamw(1e-3))
  params, state = mpo.init(tx, {"w": jnp.ones((8, 8))})
  with pytest.warns(UserWarning, match=r"no leaf has more than 65536 elements.*where=lambda path, leaf: True"):
    shardings = mpo.state_sharding(params, state, memory_kind="pinned_host")
  assert {s.memory_kind for s in jax.tree.leaves(shardings)} == {"device"}
  moved = mpo.state_sharding(params, state, memory_kind="pinned_host", where=lambda path, leaf: True)
  assert {s.memory_kind for s in jax.tree.leaves(moved)} == {"pinned_host"}


@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize("flax", ["linen", "nnx"])
def test_objects_of_flax_keep_their_state_there(flax):
  import flax.linen as nn
  from flax import nnx

  from optax_mpo.flax import Optimizer, TrainState

  x = jnp.linspace(-1.0, 1.0, 2 * 320).reshape(2, 320)

  def linen(memory):
    model = nn.Dense(320, dtype=jnp.bfloat16)
    params = model.init(jax.random.key(0), x)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=mpo.exact(optax.adamw(1e-2)), state_memory=memory)
    step = jax.jit(lambda s: s.step_with(lambda v: jnp.mean(model.apply(v, x).astype(jnp.float32) ** 2))[0])
    return (done := step(step(state))).params, done.opt_state

  def in_nnx(memory):
    model = nnx.Linear(320, 320, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    optimizer = Optimizer(model, mpo.exact(optax.adamw(1e-2)), state_memory=memory)
    step = nnx.jit(lambda m, o: o.step_with(m, lambda m: jnp.mean(m(x).astype(jnp.float32) ** 2)))
    step(model, optimizer)
    step(model, optimizer)
    return nnx.as_pure(nnx.state(model)), nnx.as_pure(nnx.state(optimizer))["opt_state"]

  made = {"linen": linen, "nnx": in_nnx}[flax]
  want, got = made(None), made("pinned_host")
  kinds = {leaf.size > 2**16: leaf.sharding.memory_kind for leaf in jax.tree.leaves(got[1])}
  assert kinds == {True: "pinned_host", False: "device"}
  assert_same_bits(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, want))

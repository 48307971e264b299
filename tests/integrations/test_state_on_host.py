"""What is done with state in host memory around a step: making, moving, saving, killing, reading; Flax."""

import os
import signal
import subprocess
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_mpo as mpo
from optax_mpo._transforms import sharding
from optax_mpo.flax import Optimizer, TrainState
from tests.helpers import ROOT, assert_same_bits
from tests.host_memory import WIDTH, X, assert_equal, kinds, loss_fn, masters, on_host, ordinary_update


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


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.few(1)
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


def test_init_with_a_memory_inside_jit_says_what_to_do():
  tx = mpo.compensated(optax.adamw(1e-3))
  with pytest.raises(ValueError, match="Call init outside of jit"):
    jax.jit(lambda p: mpo.init(tx, p, state_memory="pinned_host"))(masters())


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

"""What Optax users rely on, for compensated around every optimizer: stable states, donation, extra args, vmap."""

import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from jax.sharding import PartitionSpec

import optax_mpo as mpo
from tests.helpers import assert_same_bits, exact_jit, quick_jit
from tests.transforms.test_exactness import OPTIMIZERS, loss_fn, make_batches, make_params


def make_step(tx):
  def step(params, state, x, y):
    grads = jax.grad(loss_fn)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return mpo.apply_updates(params, updates), state

  return step


def nbytes(tree) -> int:
  return sum(-(-x.size * (4 if x.dtype == jnp.uint4 else 8 * x.dtype.itemsize) // 8) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("bits", [0, 4, 8, 16])
def test_no_bytes_but_the_ones_promised(bits):
  params, state = mpo.init(
    mpo.compensated(optax.lion(1e-4), extra_bits=bits), {"w": jnp.ones((64, 33)), "b": jnp.ones(7)}
  )
  assert nbytes(params) == 2 * (64 * 33 + 7)
  assert nbytes(state.compensation) == -(-64 * 33 * bits // 8) + -(-7 * bits // 8)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.few(2, full=8)
def test_donation_scan_and_no_recompilation(name):
  """One compilation serves all steps, every donated buffer is reused, and lax.scan accepts the state as its carry."""
  tx = mpo.compensated(OPTIMIZERS[name](), extra_bits=16)
  params, state = mpo.init(tx, make_params())
  batches = make_batches(4)
  step = jax.jit(make_step(tx), donate_argnums=(0, 1), keep_unused=True)
  # To be donated, constants and scalars that leaves of a state share need separate buffers.
  params, state = jax.tree.map(jnp.array, (params, state))

  compiled = step.lower(params, state, *batches[0]).compile()
  assert compiled.memory_analysis().alias_size_in_bytes == nbytes((params, state))

  before = jax.tree.map(jax.typeof, (params, state))
  scanned = jax.lax.scan(
    lambda carry, batch: (make_step(tx)(*carry, *batch), None),
    jax.tree.map(jnp.array, (params, state)),
    tuple(jnp.stack(b) for b in zip(*batches, strict=True)),
  )[0]
  assert jax.tree.map(jax.typeof, scanned) == before
  for batch in batches:
    params, state = step(params, state, *batch)
  assert step._cache_size() == 1


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_states_are_ordinary_trees(bits):
  tx = mpo.compensated(optax.adamw(1e-3), extra_bits=bits)
  params, state = mpo.init(tx, make_params())
  chex.assert_trees_all_equal(jax.tree.map(lambda x: x, state), state)
  assert_same_bits(pickle.loads(pickle.dumps(state)), state)
  abstract = jax.eval_shape(lambda p: mpo.init(tx, p), make_params())
  assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
    lambda x: (x.shape, x.dtype), (params, state)
  )
  assert_same_bits(jax.jit(lambda p: mpo.init(tx, p))(make_params()), (params, state))


@pytest.mark.parametrize("bits", [0, 4, 8, 16])
def test_orbax_gives_back_what_it_was_given(bits, tmp_path):
  tx = mpo.compensated(optax.adamw(1e-3), extra_bits=bits)
  params, state = mpo.init(tx, make_params(), where=lambda path, leaf: leaf.ndim >= 1)
  # Orbax cannot store uint4. optax_mpo.checkpoint does the same.
  saved = jax.tree.map(lambda x: x.astype(jnp.uint8) if x.dtype == jnp.uint4 else x, (params, state))
  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "checkpoint", saved)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "checkpoint", jax.eval_shape(lambda: saved))
  restored = jax.tree.map(lambda x, like: x.astype(like.dtype), restored, (params, state))
  assert_same_bits(restored, (params, state))


def test_map_params_reaches_bits_and_moments():
  tx = mpo.compensated(optax.adamw(1e-3))
  params, state = mpo.init(tx, make_params())
  specs = jax.tree.map(lambda p: PartitionSpec(*["x"] * p.ndim), params)
  mapped = optax.tree.map_params(tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: "other")
  assert mapped.compensation == specs
  assert (mapped.inner_state[0].mu, mapped.inner_state[0].count) == (specs, "other")


def test_map_params_of_mixed_trees_with_optax_own_rule_for_masked_leaves():
  tx = mpo.compensated(optax.adamw(1e-3))
  _, state = mpo.init(tx, make_params(), where=lambda path, leaf: leaf.ndim >= 2)
  mapped = optax.tree.map_params(
    tx, lambda x: x if isinstance(x, optax.MaskedNode) else 0, state, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
  )
  assert mapped.compensation["layer0"] == {"w": 0, "b": optax.MaskedNode()}


def test_extra_args_reach_the_inner_transformation():
  def update(updates, state, params=None, *, factor, **extra_args):
    return jax.tree.map(lambda g: factor * g, updates), state

  inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
  tx = optax.chain(optax.scale(1.0), mpo.compensated(inner))
  params, state = mpo.init(tx, jnp.ones(2))
  updates, _ = tx.update(jnp.ones(2), state, params, factor=2.0, unused=None)
  np.testing.assert_array_equal(updates, [2.0, 2.0])
  # A transformation without extra args accepts some, as everywhere in Optax.
  mpo.compensated(optax.sgd(1.0)).update(jnp.ones(2), mpo.compensated(optax.sgd(1.0)).init(params), params, value=1.0)


def test_injected_hyperparameters_can_be_set_without_recompiling():
  tx = mpo.compensated(optax.inject_hyperparams(optax.sgd)(learning_rate=0.5))
  params, state = mpo.init(tx, jnp.ones(2))
  assert state.inner_state.hyperparams["learning_rate"].dtype == jnp.float32  # bf16 params would have made it bf16
  step = jax.jit(lambda p, s: (lambda u, s: (mpo.apply_updates(p, u), s))(*tx.update(jnp.ones(2), s, p)))
  params, state = step(params, state)
  np.testing.assert_array_equal(params, [0.5, 0.5])
  state.inner_state.hyperparams["learning_rate"] = jnp.float32(0.25)
  params, state = step(params, state)
  np.testing.assert_array_equal(params, [0.25, 0.25])
  assert step._cache_size() == 1


@pytest.mark.parametrize("bits", [0, 4, 8, 16])
@pytest.mark.few(1)
def test_vmap_over_an_ensemble_equals_a_loop(bits):
  # Uses momentum and the gradient of a square. For a batch, XLA computes Adam's power b1**count differently than for a
  # scalar, and sums a matrix product in another order, in plain f32 Optax too.
  tx = mpo.compensated(optax.sgd(1e-2, momentum=0.9), extra_bits=bits)
  members = [make_params(seed) for seed in range(3)]

  def step(params, state):
    updates, state = tx.update(jax.tree.map(lambda p: 2 * p, params), state, params)
    return mpo.apply_updates(params, updates), state

  def train(carry, step):
    for _ in range(10):
      carry = step(*carry)
    return carry

  stack = lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
  init = lambda params: mpo.init(tx, params)  # noqa: E731
  together = train(jax.vmap(init)(stack(*members)), exact_jit(jax.vmap(step)))
  alone = exact_jit(step)
  assert_same_bits(together, stack(*(train(init(params), alone) for params in members)))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_sharded_params_have_sharded_bits(bits):
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, PartitionSpec("x"))
  tx = mpo.compensated(optax.sgd(1e-2, momentum=0.9), extra_bits=bits)
  master = jnp.linspace(-1.0, 1.0, 64).reshape(16, 4)

  def step(params, state):
    updates, state = tx.update(2 * params, state, params)
    return mpo.apply_updates(params, updates), state

  sharded = jax.jit(lambda p: mpo.init(tx, p))(jax.device_put(master, sharding))
  whole = mpo.init(tx, master)
  step = quick_jit(step)
  for _ in range(5):
    sharded, whole = step(*sharded), step(*whole)
  assert sharded[1].compensation.sharding.is_equivalent_to(sharding, 2)
  assert_same_bits(sharded, whole)

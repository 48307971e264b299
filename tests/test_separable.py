"""Updates taken apart by dataflow: stepping every component alone is the whole update, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mpo as mpo
from optax_mpo import _compensated, _separable


def make_params(seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  return {
    "a": {"w": jax.random.normal(keys[0], (6, 8)), "b": jax.random.normal(keys[1], (8,))},
    "c": {"w": jax.random.normal(keys[2], (3, 6, 8)), "none": None},
    "scalar": jnp.float32(0.7),
  }


def make_grads(params, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.1, jnp.float32), params)


def assert_same_bits(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype), jax.tree_util.keystr(path)
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


def whole_step(tx, params, opt_state, grads):
  updates, opt_state = tx.update(grads, opt_state, params)
  return mpo.apply_updates(params, updates), opt_state


# --- The new weights taken from compensated, without the addition -----------------------------------------------------


def numbers(seed, count=4096):
  """Weights and steps of every size, with the pairs that need a code in the update."""
  rng = np.random.default_rng(seed)
  masters = rng.integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
  masters = np.where(np.abs(masters) < 1e37, masters, np.float32(1.0))
  factors = rng.choice([-1.0, 1.0], count) * 2.0 ** rng.integers(-26, 4, count) * rng.choice([1.0, 1.5, 1 / 3], count)
  steps = np.where(rng.random(count) < 0.2, -masters, masters * factors).astype(np.float32)
  steps[:8] = [0.0, np.nan, np.inf, -np.inf, 1e-40, -1e-40, 1.0, -0.0]
  return jnp.asarray(masters), jnp.asarray(steps)


@pytest.mark.parametrize("bits", [0, 4, 8, 16])
def test_direct_weights_are_those_of_the_addition(bits):
  tx = mpo.compensated(optax.identity(), bits)
  masters, steps = numbers(bits)
  params, state = mpo.init(tx, {"w": masters})

  def direct_step(params, state, grads):
    with _compensated.direct():
      return whole_step(tx, params, state, grads)

  operations = []
  results = []
  for step in (lambda *args: whole_step(tx, *args), direct_step):
    operations.append(len(jax.make_jaxpr(step)(params, state, {"w": steps}).eqns))
    results.append(jax.jit(step)(params, state, {"w": steps}))
  assert_same_bits(results[1], results[0])
  assert operations[1] < operations[0]
  assert bool((results[0][0]["w"] != params["w"]).any())


def test_a_changed_update_is_added():
  double = optax.stateless(lambda updates, params: jax.tree.map(lambda u: 2 * u, updates))
  tx = optax.chain(mpo.compensated(optax.sgd(0.1)), double)
  params, state = mpo.init(tx, {"w": jnp.ones(3)})
  update = _separable.Update(tx, params, state, "test")
  got, _ = step_in_groups(update, jax.tree.leaves(params), jax.tree.leaves(state), [jnp.ones(3)])
  assert_same_bits(got, jax.tree.leaves(whole_step(tx, params, state, {"w": jnp.ones(3)})[0]))
  np.testing.assert_allclose(got[0].astype(jnp.float32), 0.8, rtol=1e-2)


def test_updates_of_other_params_are_added():
  tx = mpo.compensated(optax.sgd(0.1))
  params, state = mpo.init(tx, {"w": jnp.ones(3)})
  with _compensated.direct():
    updates, _ = tx.update({"w": jnp.ones(3)}, state, params)
    assert float(mpo.apply_updates({"w": jnp.full(3, 2, jnp.bfloat16)}, updates)["w"][0]) == 1.8984375


def test_slices_leave_the_addition_out():
  def operations(tx, params):
    update = _separable.Update(tx, *mpo.init(tx, params), "test")
    return len(update.group([0], "test").operations)

  params = {"w": jnp.ones(3)}
  tx = mpo.compensated(optax.sgd(0.1))
  added = optax.chain(tx, optax.stateless(lambda updates, params: jax.tree.map(lambda u: 1 * u, updates)))
  assert operations(tx, params) < operations(added, params) / 2


# --- What is shared, and what is known --------------------------------------------------------------------------------


def step_in_groups(update, params, state, grads):
  """Steps every component alone, and returns the new leaves of the params and the state."""
  values, shared_states = update.run_shared()
  new_params, new_state = list(params), list(state)
  for index, value in shared_states.items():
    new_state[index] = value
  for leaves in update.components(range(len(params))):
    group = update.group(leaves, "test")
    ps, ss = group.step(
      [grads[i] for i in leaves],
      [params[i] for i in leaves],
      [state[j] for j in group.states],
      [values[v] for v in group.shared],
    )
    for i, p in zip(leaves, ps, strict=True):
      new_params[i] = p
    for j, s in zip(group.states, ss, strict=True):
      new_state[j] = s
  return new_params, new_state


def test_constants_need_not_be_handed_in():
  mask = jnp.asarray(np.random.default_rng(0).random((64, 64)) < 0.5)
  masked = optax.stateless(lambda updates, params: {"w": jnp.where(mask, updates["w"], 0.0)})
  tx = optax.chain(masked, optax.sgd(lambda count: 0.5**count))
  params = {"w": jnp.ones((64, 64))}
  update = _separable.Update(tx, params, tx.init(params), "test")
  group = update.group([0], "test")
  assert [c.shape for c in group.constants.values()] == [(64, 64)]
  values, _ = update.run_shared()
  assert 0 < len(group.shared) <= 2  # the learning rate, and the zero
  assert set(values).isdisjoint(group.constants)
  (new,), _ = group.step([params["w"]], [params["w"]], [], [values[v] for v in group.shared])
  np.testing.assert_array_equal(new, np.where(mask, 0.0, 1.0))

"""Stochastic rounding: unbiased, reproducible, and the same in shards and layer by layer."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_mpo as mpo
from optax_mpo._codecs import bf16, stochastic_rounding
from optax_mpo._updates.by_leaf import Update
from tests.helpers import one_layer

LESS_THAN_16 = (0, 4, 8)


def train(bits: int, steps: int, *, seed: int = 0, rounding="stochastic", size: float = 1e-6, shape=(64, 64)):
  tx = mpo.compensated(optax.sgd(size), extra_bits=bits, rounding=rounding, seed=seed)
  params, state = mpo.init(tx, {"w": jnp.full(shape, 1.5)})

  @jax.jit
  def step(params, state):
    updates, state = tx.update({"w": jnp.ones(shape)}, state, params)
    return mpo.apply_updates(params, updates), state

  for _ in range(steps):
    params, state = step(params, state)
  assert step._cache_size() == 1
  return params, state


@pytest.mark.parametrize("bits", LESS_THAN_16)
def test_updates_far_below_the_last_place_count_on_average(bits):
  """Half an ulp is 2^-8 with no bits, 2^-12 with 4 and 2^-16 with 8. The updates are 30 to 400 times smaller."""
  size = {0: 1e-5, 4: 2.0**-19, 8: 2.0**-21}[bits]
  params, state = train(bits, 200, size=size)
  moved = 1.5 - float(np.mean(np.asarray(mpo.master_params(params, state)["w"], np.float64)))
  assert moved == pytest.approx(200 * size, rel=0.1)
  stuck, state = train(bits, 20, size=size, rounding="nearest")
  assert float(mpo.master_params(stuck, state)["w"].max()) == 1.5


@pytest.mark.parametrize("bits", LESS_THAN_16)
def test_what_can_be_kept_stays_and_rounding_is_proportional(bits):
  random = stochastic_rounding.random_bits(0, jnp.int32(5), 1, (1 << 16,))
  place = 2.0 ** -(7 + bits)
  for share in (0.0, 0.25, 0.9):
    x = jnp.full(random.shape, -1 - share * place, jnp.float32)
    y = np.asarray(bf16.round_stochastically(x, random, bits), np.float64)
    assert set(np.unique(-1 - y)) <= {0.0, -place, place}
    assert np.mean(y == -1 - place) == pytest.approx(share, abs=0.01)
    np.testing.assert_array_equal(bf16.join(*bf16.split(jnp.asarray(y, jnp.float32), bits)), y)
  special = jnp.float32([jnp.inf, -jnp.inf, 3.4028235e38, 0.0])
  y = np.asarray(bf16.round_stochastically(special, jnp.full(4, 0xFFFFFFFF, jnp.uint32), bits))
  np.testing.assert_array_equal(y[[0, 1, 3]], [np.inf, -np.inf, 0])
  assert np.isfinite(y[2])
  assert np.isnan(bf16.round_stochastically(jnp.float32([jnp.nan]), jnp.uint32([0xFFFFFFFF]), bits)).all()


def test_sixteen_bits_have_nothing_to_round():
  plain, state = train(16, 5, rounding="nearest")
  stochastic, other = train(16, 5)
  chex.assert_trees_all_equal((stochastic, other.compensation), (plain, state.compensation))


def test_the_same_seed_gives_the_same_and_others_do_not():
  first, again, other = train(0, 10, seed=1), train(0, 10, seed=1), train(0, 10, seed=2)
  chex.assert_trees_all_equal(first, again)
  assert not np.array_equal(first[0]["w"], other[0]["w"])


def test_random_bits_are_random_in_every_direction():
  step = jnp.int32(3)
  base = np.asarray(stochastic_rounding.random_bits(0, step, 0, (256, 256)))
  neighbours = {
    "seed": stochastic_rounding.random_bits(1, step, 0, (256, 256)),
    "step": stochastic_rounding.random_bits(0, step + 1, 0, (256, 256)),
    "leaf": stochastic_rounding.random_bits(0, step, 1, (256, 256)),
    "row": np.roll(base, 1, 0),
    "column": np.roll(base, 1, 1),
  }
  assert len(np.unique(base)) > 65_000
  for name, other in neighbours.items():
    flipped = np.unpackbits((base ^ np.asarray(other)).view(np.uint8)).mean()
    assert flipped == pytest.approx(0.5, abs=0.003), name
    high = np.corrcoef((base >> 16).ravel(), (np.asarray(other) >> 16).ravel())[0, 1]
    assert abs(high) < 0.02, name
  bits = np.unpackbits(base.view(np.uint8)).reshape(-1, 32).mean(0)
  np.testing.assert_allclose(bits, 0.5, atol=0.01)


def test_the_state_of_nearest_rounding_is_as_ever_and_the_other_counts():
  params = {"w": jnp.ones(3)}
  _, nearest = mpo.init(mpo.compensated(optax.adam(1e-3), extra_bits=8), params)
  assert not isinstance(nearest.inner_state, mpo.RoundingState)
  _, state = train(8, 3)
  assert int(state.inner_state.step) == 3
  chex.assert_trees_all_equal_structs(
    mpo.init(mpo.compensated(optax.adam(1e-3), extra_bits=8, rounding="stochastic"), params)[1].inner_state.inner_state,
    nearest.inner_state,
  )


@pytest.mark.parametrize("spec", [PartitionSpec("x"), PartitionSpec(None, "x"), PartitionSpec()], ids=str)
@pytest.mark.few(1)
def test_shards_round_as_the_whole_does(spec):
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, spec)
  tx = mpo.compensated(optax.sgd(1e-3), extra_bits=0, rounding="stochastic", seed=7)
  master = jax.random.normal(jax.random.key(0), (16, 32))

  def step(params, state):
    updates, state = tx.update(params, state, params)
    return mpo.apply_updates(params, updates), state

  compiled = jax.jit(step, compiler_options={"xla_disable_hlo_passes": "fusion"})
  sharded = jax.jit(lambda p: mpo.init(tx, p))(jax.device_put(master, sharding))
  text = compiled.lower(*sharded).compile().as_text()
  assert "all-gather" not in text
  whole = mpo.init(tx, master)
  for _ in range(4):
    sharded, whole = compiled(*sharded), compiled(*whole)
  chex.assert_trees_all_equal(jax.device_get(sharded), jax.device_get(whole))


def test_layers_round_as_their_stack_does():
  layers = 4
  params = {"w": jax.random.normal(jax.random.key(0), (layers, 8, 16))}
  tx = mpo.compensated(optax.sgd(1e-3), extra_bits=4, rounding="stochastic")
  params, state = mpo.init(tx, params)
  grads = {"w": jax.random.normal(jax.random.key(1), (layers, 8, 16))}
  updates, want_state = tx.update(grads, state, params)
  want = mpo.apply_updates(params, updates)
  update = Update(tx, params, state, "test")
  shared, _ = update.run_shared()
  group = update.group([0], "test")
  run = one_layer(group, layers)
  leaves = jax.tree.leaves(state)
  for layer in range(layers):
    (weight,), (kept,) = run(
      [grads["w"][layer]],
      [params["w"][layer]],
      [leaves[j][layer] for j in group.states],
      [shared[v] for v in group.shared],
      jnp.int32(layer),
    )
    np.testing.assert_array_equal(weight, want["w"][layer])
    np.testing.assert_array_equal(kept, want_state.compensation["w"][layer])


def test_bad_options_and_states():
  with pytest.raises(ValueError, match="rounding has to be 'nearest' or 'stochastic', but it is 'up'"):
    mpo.compensated(optax.sgd(1e-3), rounding="up")  # pyright: ignore
  with pytest.raises(ValueError, match="seed has to be a Python int"):
    mpo.compensated(optax.sgd(1e-3), seed=1.5)  # pyright: ignore
  params, state = train(8, 1)
  with pytest.raises(
    ValueError, match="made with rounding='stochastic', but this transformation has rounding='nearest'"
  ):
    mpo.compensated(optax.sgd(1e-3), extra_bits=8).update(params, state, params)
  params, state = train(8, 1, rounding="nearest")
  with pytest.raises(ValueError, match="made with rounding='nearest', but"):
    mpo.compensated(optax.sgd(1e-3), extra_bits=8, rounding="stochastic").update(params, state, params)

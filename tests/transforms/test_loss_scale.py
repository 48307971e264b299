"""Loss scaling: what is divided, which steps are skipped, how the scale changes; and lost_updates."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mpo as mpo

PARAMS = {"w": jnp.linspace(0.5, 1.5, 24).reshape(4, 6)}


def make(inner=None, **options):
  tx = mpo.loss_scaled(mpo.compensated(inner or optax.adam(1e-2), extra_bits=8), **options)
  params, state = mpo.init(tx, PARAMS, dtype=jnp.float16)
  step = jax.jit(lambda g, s, p: (lambda u, s: (mpo.apply_updates(p, u), s))(*tx.update(g, s, p)))
  return step, params, state


def test_tiny_gradients_arrive():
  """1e-9 is zero in fp16. Times 2^15 it is 3.3e-5."""
  step, params, state = make(optax.sgd(1e6), scale=2.0**15)
  assert jnp.float16(1e-9) == 0

  def loss(p):
    return mpo.loss_scale(state) * 1e-9 * p["w"].astype(jnp.float32).sum()

  new, new_state = step(jax.grad(loss)(params), state, params)
  before, after = (mpo.master_params(p, s)["w"] for p, s in ((params, state), (new, new_state)))
  np.testing.assert_allclose(before - after, 1e-3, rtol=0.02)


@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
@pytest.mark.parametrize("dynamic", [True, False])
def test_steps_that_overflow_are_left_out(bad, dynamic):
  step, params, state = make(scale=1024.0, dynamic=dynamic)
  good = {"w": jnp.ones((4, 6), jnp.float16)}
  params, state = step(good, state, params)
  new, new_state = step({"w": good["w"].at[1, 2].set(bad)}, state, params)
  chex.assert_trees_all_equal(new, params)
  chex.assert_trees_all_equal(new_state.inner_state, state.inner_state)
  assert (int(new_state.skipped), int(new_state.good_steps)) == (1, 0)
  assert float(mpo.loss_scale(new_state)) == (512 if dynamic else 1024)
  moved, _ = step(good, new_state, new)
  assert not np.array_equal(moved["w"], new["w"])


def test_the_scale_grows_after_good_steps_and_has_bounds():
  step, params, state = make(scale=4.0, growth_interval=3, factor=4.0, min_scale=2.0)
  good, bad = {"w": jnp.ones((4, 6))}, {"w": jnp.full((4, 6), jnp.inf, jnp.float32)}
  scales = []
  for grads in (good, good, good, good, bad, bad, bad, good, good, good):
    params, state = step(grads, state, params)
    scales.append(float(mpo.loss_scale(state)))
  assert scales == [4, 4, 16, 16, 4, 2, 2, 2, 2, 8]
  assert step._cache_size() == 1


def test_scaled_training_is_that_without_scale():
  """A power of two changes no significand bit of f32 gradients."""
  plain = mpo.compensated(optax.adam(1e-2), extra_bits=8)
  params, state = mpo.init(plain, PARAMS, dtype=jnp.float16)
  step, scaled, scaled_state = make(scale=2.0**10)
  for seed in range(5):
    grads = {"w": jax.random.normal(jax.random.key(seed), (4, 6))}
    updates, state = jax.jit(plain.update)(grads, state, params)
    params = mpo.apply_updates(params, updates)
    scaled, scaled_state = step(jax.tree.map(lambda g: g * 1024, grads), scaled_state, scaled)
  chex.assert_trees_all_equal(scaled, params)
  chex.assert_trees_all_equal(scaled_state.inner_state.compensation, state.compensation)


def test_with_compact_state_and_stochastic_rounding_and_keys():
  inner = optax.chain(optax.add_noise(0.01, 0.5, 0), optax.adam(1e-2))
  tx = mpo.loss_scaled(mpo.compensated(mpo.quantized_state(inner, min_size=1), extra_bits=4, rounding="stochastic"))
  params, state = mpo.init(tx, PARAMS, dtype=jnp.float16)
  bad = {"w": jnp.full((4, 6), jnp.inf)}
  updates, new = jax.jit(tx.update)(bad, state, params)
  chex.assert_trees_all_equal(mpo.apply_updates(params, updates), params)
  assert jax.tree.structure(new) == jax.tree.structure(state)
  chex.assert_trees_all_equal(new.inner_state.compensation, state.inner_state.compensation)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"scale": 0.0}, "scale has to be a finite number above 0, but it is 0.0"),
    ({"scale": float("inf")}, "scale has to be a finite number"),
    ({"factor": 1.0}, "dynamic scaling needs factor > 1"),
    ({"growth_interval": 0}, "growth_interval >= 1"),
    ({"scale": 1.0, "min_scale": 2.0}, "min_scale <= scale"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    mpo.loss_scaled(optax.sgd(1.0), **options)


def test_bad_states():
  with pytest.raises(TypeError, match="loss_scaled: update was given a EmptyState"):
    mpo.loss_scaled(optax.sgd(1.0)).update(PARAMS, optax.EmptyState(), PARAMS)
  with pytest.raises(ValueError, match="there are 0 LossScaleStates"):
    mpo.loss_scale(optax.sgd(1.0).init(PARAMS))


# --- lost_updates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "smallest"), [(0, 2.0**-8), (4, 2.0**-12), (8, 2.0**-16), (16, 2.0**-24)])
def test_updates_are_lost_below_half_of_the_last_place(bits, smallest):
  params = {"w": jnp.full(8, 1.0, jnp.bfloat16), "b": jnp.zeros(4, jnp.bfloat16)}
  sizes = jnp.float32([0, 0, 0.9, 0.9, 0.9, 1.1, 1.1, 1.1]) * smallest
  updates = {"w": sizes, "b": jnp.full(4, 1e-9)}
  shares = jax.jit(mpo.lost_updates, static_argnums=2)(params, updates, bits)
  assert float(shares["w"]) == 3 / 8  # an update of zero is not lost
  assert float(shares["b"]) == 0


def test_bits_in_the_state_count():
  tx = mpo.compensated(optax.sgd(1.0), extra_bits=8)
  just_below = 1.0 + 2.0**-8 - 2.0**-15  # counting its bits, the update crosses to the next bf16 number
  params, state = mpo.init(tx, {"w": jnp.full(2, just_below)})
  updates = {"w": jnp.full(2, 2.0**-14)}
  assert float(mpo.lost_updates(params, updates)["w"]) == 1
  assert float(mpo.lost_updates(params, updates, 0, state)["w"]) == 0
  chex.assert_trees_all_equal(mpo.lost_updates({"w": jnp.ones(2)}, {"w": jnp.full(2, 1e-9)}), {"w": jnp.ones([])})


def test_lost_updates_refuses_what_does_not_fit():
  with pytest.raises(ValueError, match=r"lost_updates: params\['w'\] has shape \(4, 6\), but its update has \(2,\)"):
    mpo.lost_updates(PARAMS, {"w": jnp.ones(2)})
  with pytest.raises(ValueError, match="bits has to be one of"):
    mpo.lost_updates(PARAMS, PARAMS, extra_bits=3)
  with pytest.raises(ValueError, match=r"has nothing at params\['w'\]"):
    mpo.lost_updates(PARAMS, {})
  with pytest.raises(TypeError, match=r"params\['w'\] is int32"):
    mpo.lost_updates({"w": jnp.ones(2, jnp.int32)}, {"w": jnp.ones(2)})

"""The fp16 codec against float64, and training with fp16 params."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mpo as mpo
from optax_mpo._codecs import codec, fp16

SMALLEST = 2.0**-14  # the smallest normal number


def numbers(count: int = 200_000) -> np.ndarray:
  rng = np.random.default_rng(0)
  x = rng.uniform(1, 2, count) * 2.0 ** rng.integers(-32, 16, count) * rng.choice([-1, 1], count)
  edges = [
    0,
    65503.9,
    2.0**-14,
    2.0**-14 - 2.0**-38,
    2.0**-15,
    2.0**-17,
    2.0**-24,
    2.0**-25,
    1 + 2.0**-11,
    1 - 2.0**-12,
  ]
  x = np.concatenate([x, edges, np.negative(edges)]).astype(np.float32)
  return x[np.abs(x) <= 65504]


def to_fp16(x: np.ndarray) -> np.ndarray:
  """Rounds float64 to fp16 values, ties away from zero, in float64 arithmetic."""
  place = 2.0 ** np.maximum(np.frexp(x)[1] - 11, -24)
  rounded = np.copysign(np.floor(np.abs(x) / place + 0.5) * place, x)
  return np.where(np.abs(rounded) > 65504, np.copysign(np.inf, rounded), rounded)


def test_sixteen_bits_are_exact_from_two_to_the_minus_17_on():
  x = numbers()
  low, kept = fp16.split(x, 16)
  back = np.asarray(fp16.join(low, kept))
  large = np.abs(x) >= 2.0**-17
  np.testing.assert_array_equal(np.asarray(low, np.float64)[large], to_fp16(x.astype(np.float64))[large])
  np.testing.assert_array_equal(np.asarray(fp16.split(x, 0)[0], np.float64), to_fp16(x.astype(np.float64)))
  np.testing.assert_array_equal(back[large].view(np.uint32), x[large].view(np.uint32))
  np.testing.assert_allclose(back[~large].astype(np.float64), x[~large], rtol=0, atol=2.0**-41)
  assert np.abs(back[~large].astype(np.float64) - x[~large]).max() > 2.0**-42  # the bound is tight


@pytest.mark.parametrize("bits", [4, 8])
def test_fewer_bits_round_to_half_a_unit(bits):
  x = numbers()
  back = np.asarray(fp16.join(*fp16.split(x, bits)), np.float64)
  normal, finite = np.abs(x) >= SMALLEST, np.isfinite(back)
  assert np.abs(x[~finite]).min(initial=65504) > 65500
  assert np.abs(back[normal & finite] / x[normal & finite].astype(np.float64) - 1).max() <= 2.0 ** -(11 + bits)
  assert np.abs(back - x)[~normal].max() <= 2.0 ** -(25 + bits)


@pytest.mark.parametrize("bits", fp16.BITS)
def test_splitting_again_and_every_foreign_pair(bits):
  x = jnp.asarray(numbers())
  low, kept = fp16.split(x, bits)
  again = fp16.split(fp16.join(low, kept), bits)
  chex.assert_trees_all_equal(again, (low, kept))
  every = jnp.asarray(np.arange(1 << 16, dtype=np.uint16).view(np.float16))
  for code in range(0, 1 << bits, max(1, (1 << bits) // 64)) if bits else ():
    joined = fp16.join(every, jnp.full(every.shape, code, codec.bits_dtype(bits)))
    np.testing.assert_array_equal(fp16.split(joined, 0)[0], every)  # NaN equals NaN here


@pytest.mark.parametrize("bits", fp16.BITS)
def test_special_values(bits):
  x = jnp.float32([65519.99, 65520, 1e30, jnp.inf, -jnp.inf, jnp.nan, -0.0])
  low, kept = fp16.split(x, bits)
  back = np.asarray(fp16.join(low, kept))
  np.testing.assert_array_equal(back[1:6], [np.inf, np.inf, np.inf, -np.inf, np.nan])
  np.testing.assert_array_equal(np.isinf(low), np.isinf(back))
  assert np.signbit(np.asarray(low)[6])
  assert back[6] == 0
  if bits in (0, 16):
    assert float(low[0]) == 65504


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_stochastic_rounding_is_unbiased_and_keeps_what_can_be_kept(bits):
  random = jnp.asarray(np.random.default_rng(1).integers(0, 1 << 32, 1 << 16, dtype=np.uint32))
  for center in (1.0, 3e-3, 2.0**-16):
    exact = center * (1 + 0.3 * 2.0 ** -(10 + bits))
    rounded = fp16.round_stochastically(jnp.full(random.shape, exact, jnp.float32), random, bits)
    kept = fp16.join(*fp16.split(rounded, bits))
    np.testing.assert_array_equal(kept, rounded)
    unit = max(center * 2.0 ** -(10 + bits), 2.0 ** -(24 + bits))
    assert float(np.mean(np.asarray(rounded, np.float64) - np.float32(exact))) == pytest.approx(0, abs=0.02 * unit)
    np.testing.assert_array_equal(fp16.round_stochastically(kept, random, bits), kept)
  top = jnp.full(random.shape, 65519.0, jnp.float32)
  assert bool(jnp.isfinite(fp16.split(fp16.round_stochastically(top, random, bits), 0)[0]).all())


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_updates_lead_to_their_weights_or_the_bits_say_so(bits):
  """At any ratio of old to new, with both `apply_updates`: the master always rounds to the param."""
  rng = np.random.default_rng(2)
  old = (rng.normal(size=1 << 15) * 2.0 ** rng.integers(-24, 12, 1 << 15)).astype(np.float32)
  new = (rng.normal(size=1 << 15) * 2.0 ** rng.integers(-24, 12, 1 << 15)).astype(np.float32)
  tx = mpo.compensated(optax.stateless(lambda g, p: jax.tree.map(lambda n, o: n - o, g, p)), extra_bits=bits)
  low, state = mpo.init(tx, jnp.asarray(old), dtype=jnp.float16)
  updates, state = tx.update(jnp.asarray(new), state, low)
  for apply_updates in (mpo.apply_updates, optax.apply_updates):
    params = apply_updates(low, updates)
    master = np.asarray(mpo.master_params(params, state), np.float64)
    np.testing.assert_array_equal(np.asarray(mpo.cast(master.astype(np.float32), jnp.float16)), np.asarray(params))
    bound = np.abs(new) * 2.0 ** -min(11 + bits, 23) + np.abs(old) * 2.0**-23 + 2.0 ** -(25 + bits)
    assert (np.abs(master - new) <= bound).all()


def test_sixteen_bit_training_follows_f32_masters():
  """Bit for bit, for weights that stay in the exact range. The reference casts with the codec's rounding."""
  rng = np.random.default_rng(0)
  w = {"w": jnp.asarray(rng.uniform(0.5, 2, (32, 16)), jnp.float32)}
  data = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
  tx = optax.adam(1e-4)
  ours = mpo.compensated(tx)

  def loss(p):
    return jnp.mean(jnp.square((data.astype(jnp.float16) @ p["w"]).astype(jnp.float32) - 1))

  options = {"xla_allow_excess_precision": False}

  @jax.jit(compiler_options=options)
  def master_step(p, s):
    g = jax.tree.map(lambda g: g.astype(jnp.float32), jax.grad(loss)(mpo.cast(p, jnp.float16)))
    u, s = tx.update(g, s, p)
    return optax.apply_updates(p, u), s

  @jax.jit(compiler_options=options)
  def step(p, s):
    u, s = ours.update(jax.grad(loss)(p), s, p)
    return mpo.apply_updates(p, u), s

  want, held = (w, tx.init(w)), mpo.init(ours, w, dtype=jnp.float16)
  for _ in range(100):
    want, held = master_step(*want), step(*held)
  assert held[0]["w"].dtype == jnp.float16
  chex.assert_trees_all_equal(mpo.master_params(*held), want[0])
  assert float(jnp.abs(want[0]["w"] - w["w"]).max()) > 1e-3


def test_formats_may_be_mixed():
  params = {**mpo.cast({"a": jnp.full(3, 1 / 3)}, jnp.float16), **mpo.cast({"b": jnp.full(3, 1 / 3)}), "c": jnp.ones(3)}
  tx = mpo.compensated(optax.sgd(1e-4), extra_bits=8)
  state = tx.init(params)
  updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
  new = mpo.apply_updates(params, updates)
  chex.assert_trees_all_equal_dtypes(new, params)
  master = mpo.master_params(new, state)
  for name in "abc":
    assert float(master[name][0] - params[name].astype(jnp.float32)[0]) == pytest.approx(-1e-4, rel=0.1)


def test_derivatives_pass_straight_through():
  x = jnp.float32([0.3, 1e-6])
  np.testing.assert_array_equal(jax.grad(lambda x: mpo.cast(x, jnp.float16).astype(jnp.float32).sum())(x), [1, 1])

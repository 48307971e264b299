"""The wide code: blocks of 8-bit floats, for arrays whose small numbers must not become zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mpo as mpo
from optax_mpo._codecs import blocks

DTYPE = jnp.dtype(jnp.float8_e4m3fn)
FLOOR = 2.0**-17  # relative to the largest number in a block


def stored(x: jax.Array) -> blocks.Quantized:
  return blocks.quantize(x, DTYPE, 32)


def numbers(seed: int = 0) -> jax.Array:
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(64, 96)) * 10.0 ** rng.uniform(-4, 0, (64, 96)), jnp.float32)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 3e38, 1.17])
def test_every_code_comes_back(scale):
  """A number on a level is stored exactly, with nearest and with proportional rounding, at any scale."""
  patterns = jnp.arange(256, dtype=jnp.uint8)
  codes = jax.lax.bitcast_convert_type(patterns, DTYPE)
  used = np.abs(np.asarray(codes, np.float32)) <= 256  # larger codes are not used
  levels = jnp.where(used, codes.astype(jnp.float32) / 256, 0).reshape(8, 32)
  levels = jnp.concatenate([levels, jnp.ones((8, 1))], 1)[:, 1:].at[:, 0].set(1.0)  # the largest number of each block
  largest = blocks.dequantize(blocks.quantize(jnp.full((8, 32), scale, jnp.float32), DTYPE, 32))[:, :1]
  x = levels * largest
  q = stored(x)
  np.testing.assert_array_equal(blocks.dequantize(q), x)
  for step in range(8):
    again = blocks.requantize(x, q, jnp.int32(step), 3)
    np.testing.assert_array_equal(blocks.dequantize(again), x)


def test_the_error_is_relative_down_to_the_floor():
  x = np.asarray(numbers())
  back = np.asarray(blocks.dequantize(stored(x)))
  largest = np.abs(x).reshape(64, 3, 32).max(-1, keepdims=True)
  magnitude = np.abs(x).reshape(64, 3, 32)
  bound = np.maximum(magnitude * 2.0**-4, largest * 2.0**-18) + largest * 2.0**-9
  assert (np.abs(back - x).reshape(64, 3, 32) <= bound).all()
  normal = magnitude > largest * 2.0**-14
  error = np.abs(back - x).reshape(64, 3, 32)[normal] / magnitude[normal]
  assert error.max() <= 2.0**-4 + 2.0**-8
  assert np.sqrt(np.mean(error**2)) < 0.03


def test_what_is_not_zero_does_not_become_zero():
  x = jnp.asarray([[1.0, 0.0, -0.0, 1e-30, -1e-30, 1e-6, -3e-6, 2.0**-127] + [0.0] * 24], jnp.float32)
  back = np.asarray(blocks.dequantize(stored(x)))[0]
  assert back[0] == 1
  assert (back[[1, 2]] == 0).all()
  np.testing.assert_array_equal(back[[3, 4, 5, 6]], [FLOOR, -FLOOR, FLOOR, -FLOOR])
  q = stored(x)
  for step in range(20):  # nor in a decay, where most small values come from
    q = blocks.requantize(blocks.dequantize(q) * 0.5, q, jnp.int32(step), 0)
  assert (np.asarray(blocks.dequantize(q))[0][[3, 4, 5, 6]] != 0).all()


def test_a_block_of_zeros_and_one_that_is_not_finite():
  x = numbers()
  q = stored(x)
  np.testing.assert_array_equal(blocks.dequantize(stored(jnp.zeros((2, 32)))), jnp.zeros((2, 32)))
  bad = x.at[3, 5].set(jnp.nan).at[4, 40].set(-jnp.inf)
  new = blocks.requantize(bad * 2, q, jnp.int32(0), 0)
  good = blocks.requantize(x * 2, q, jnp.int32(0), 0)
  for part, old, other in zip(new, q, good, strict=True):
    per = part.shape[-1] // 3
    expected = other.at[3, :per].set(old[3, :per]).at[4, per : 2 * per].set(old[4, per : 2 * per])
    np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("beta", [0.9, 0.99, 0.999, 0.9999])
def test_a_decay_does_not_stick(beta):
  """Beside an element that stays, the others decay as in f32, on average."""
  x = jnp.abs(numbers(1)).at[:, ::32].set(2.0)
  moving = (jnp.arange(96) % 32 != 0)[None]

  def step(q, i):
    y = blocks.dequantize(q)
    return blocks.requantize(jnp.where(moving, y * beta, y), q, i, 0), None

  steps = int(np.ceil(np.log(0.5) / np.log(beta)))  # decays to a half
  q, _ = jax.jit(lambda q: jax.lax.scan(step, q, jnp.arange(steps)))(stored(x))
  start, end = np.asarray(blocks.dequantize(stored(x))), np.asarray(blocks.dequantize(q))
  large = (start > 2.0 * 2**-10) & np.asarray(moving)
  # An element's first move comes half a level early on average. A level is 1/16 to 1/8 of the number.
  assert abs(np.mean(end[large] / start[large]) / beta**steps - 1) < 0.1


def adam_of_ones_own():
  def update(g, state, p=None):
    count, m, v = state["count"] + 1, {}, {}
    for k in g:
      m[k] = 0.9 * state["m"][k] + 0.1 * g[k]
      v[k] = 0.999 * state["v"][k] + 0.001 * g[k] * g[k]
    steps = {k: -3e-3 * (m[k] / (1 - 0.9**count)) / (jnp.sqrt(v[k] / (1 - 0.999**count)) + 1e-8) for k in g}
    return steps, {"count": count, "m": m, "v": v}

  def init(p):
    return {"count": jnp.zeros([], jnp.int32), "m": optax.tree.zeros_like(p), "v": optax.tree.zeros_like(p)}

  return optax.GradientTransformation(init, update)


def scanned(p, x, y):
  x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x.astype(p["w"].dtype), p["w"])
  return jnp.mean((x.astype(jnp.float32) - y) ** 2)


def test_it_trains_as_f32_state_does_in_all_routes():
  key = jax.random.key(0)
  params = {"w": jax.random.normal(key, (3, 64, 64)) / 8}
  x, y = jax.random.normal(jax.random.key(1), (64, 64)), jnp.tanh(jax.random.normal(jax.random.key(2), (64, 64)))

  def losses(tx, released):
    p, s = mpo.init(tx, params)

    def ordinary(p, s, x, y):
      value, g = jax.value_and_grad(scanned)(p, x, y)
      u, s = tx.update(g, s, p)
      return value, mpo.apply_updates(p, u), s

    step = jax.jit(mpo.value_and_update(scanned, tx) if released else ordinary)
    found = []
    for _ in range(60):
      value, p, s = step(p, s, x, y)
      found.append(float(value))
    return np.array(found), s

  want, _ = losses(mpo.compensated(adam_of_ones_own()), False)
  tx = mpo.compensated(mpo.quantized_state(adam_of_ones_own()))
  (plain, state), (released, _) = losses(tx, False), losses(tx, True)
  inner = state.inner_state.inner_state
  assert (inner["m"]["w"].values.dtype, inner["v"]["w"].values.dtype) == (DTYPE, jnp.uint8)
  np.testing.assert_allclose(plain, want, rtol=0.02)
  np.testing.assert_allclose(released, plain, rtol=0.005)  # the last bit of a gradient may change a rounding


def test_large_leaves_are_stepped_by_rows_like_others():
  params = {"w": jnp.linspace(-1, 1, 2**20).reshape(1024, 1024)}
  grads = {"w": jnp.cos(jnp.arange(2.0**20)).reshape(1024, 1024)}
  tx = mpo.compensated(mpo.quantized_state(adam_of_ones_own()))
  p, s = mpo.init(tx, params)
  _, new = jax.jit(tx.update)(grads, s, p)
  inner = mpo.dequantized(new).inner_state.inner_state
  np.testing.assert_allclose(inner["m"]["w"], 0.1 * grads["w"], atol=0.1 * 2.0**-8, rtol=2.0**-4)
  assert new.inner_state.inner_state["m"]["w"].values.dtype == DTYPE


def test_kernels_leave_it_to_xla_and_say_so():
  tx = mpo.with_kernels(mpo.compensated(mpo.quantized_state(adam_of_ones_own())))
  p, s = mpo.init(tx, {"w": jnp.ones((3, 64, 64)) / 8})
  (leaf,) = mpo.explain(scanned, tx, p, s, jnp.ones((8, 64)), jnp.ones((8, 64)))
  assert (leaf.stepped, leaf.why) == ("in scan", "no kernel: it is stored as float8_e4m3fn")

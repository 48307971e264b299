"""The order of computations, and that nothing is computed twice."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mpo as mpo
from optax_mpo._core import types, xla_cpu

SHAPE = (256, 512)


@pytest.mark.parametrize("dtype", types.LOW_DTYPES)
def test_what_is_held_is_what_it_was(dtype):
  bits = np.random.default_rng(0).integers(0, 2**32, SHAPE, np.uint32)
  bits[0, :6] = 0, 0x8000_0000, 0x7F80_0000, 0xFF80_0000, 0x3F80_0000, 0x0080_0000
  x = jnp.asarray(bits.view(np.float32))
  x = jnp.where(jnp.isnan(x) | (jnp.abs(x) < 2.0**-126), 1, x)  # XLA:CPU flushes subnormal numbers in divisions
  like = jax.random.normal(jax.random.key(0), SHAPE).astype(dtype)
  held = jax.jit(xla_cpu.held)(x, like)
  np.testing.assert_array_equal(np.asarray(held).view(np.uint32), np.asarray(x).view(np.uint32))


def test_it_is_differentiated_and_mapped_like_its_argument():
  x, like = jnp.ones((3, *SHAPE)), jnp.ones(SHAPE, jnp.bfloat16)

  def loss(x):
    return jnp.sum(jax.vmap(xla_cpu.held, (0, None))(x, like) ** 2)

  np.testing.assert_array_equal(jax.jit(jax.grad(loss))(x), 2 * x)
  np.testing.assert_array_equal(jax.vmap(xla_cpu.held, (None, 0))(x[0], jnp.stack([like, like])), x[:2])


def test_xla_cpu_computes_new_weights_once_and_copies_no_old_ones():
  tx = mpo.compensated(optax.adamw(1e-3))
  params, state = mpo.init(tx, {"w": jnp.ones(SHAPE)})

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return mpo.apply_updates(params, updates), state

  text = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile().as_text()
  large = rf"\[{SHAPE[0]},{SHAPE[1]}\]\S*"
  assert not re.findall(rf"= \w+{large} copy\(", text)
  assert len(re.findall(rf"= f32{large} sqrt\(", text)) == 1  # of the second moment


def test_a_released_step_is_differentiated_and_mapped():
  params, x = {"v": jnp.ones((4, 4)), "w": jnp.ones((4, 4))}, jnp.ones((3, 4))
  tx = optax.sgd(0.5)

  def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params["v"]) @ params["w"])

  def released(params, x):
    return mpo.value_and_update(loss, tx)(params, tx.init(params), x)[1]["v"]

  def ordinary(params, x):
    updates, _ = tx.update(jax.grad(loss)(params, x), tx.init(params), params)
    return optax.apply_updates(params, updates)["v"]

  want, got = (jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(params, x))))(x) for f in (ordinary, released))
  np.testing.assert_allclose(got, want, rtol=1e-6)  # XLA may order the sums of a derivative differently
  stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
  want, got = (jax.jit(jax.vmap(f, (0, None)))(stacked, x) for f in (ordinary, released))
  np.testing.assert_allclose(got, want, rtol=1e-6)  # or those of products of batches

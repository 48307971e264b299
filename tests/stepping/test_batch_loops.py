"""Gradient accumulation that a loss does by hand: `explain` advises microbatches, and only there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import optax_mpo as mpo
from tests.helpers import quick_jit

D, BATCH, PARTS = 16, 8, 4
ADVICE = f"pass microbatches={PARTS} to value_and_update"


def layer(x, w):
  return jnp.tanh(x @ w), None


def loss_of(params, x):
  x = (x * params["scale"][None]) @ params["first"]
  x, _ = lax.scan(jax.checkpoint(layer), x, params["layers"])
  return jnp.mean(x**2)


def cut(x):
  return x.reshape(PARTS, -1, D)


def summed(params, x, *_):
  return lax.scan(lambda total, part: (total + loss_of(params, part), None), jnp.float32(0), cut(x))[0] / PARTS


def rematerialised(params, x, *_):
  def body(carry, part):
    total, count = carry
    return (loss_of(params, part) + total, count + jnp.sum(part > 0)), None

  (total, count), _ = lax.scan(jax.checkpoint(body), (jnp.float32(0), jnp.int32(0)), cut(x))
  return total / count.astype(jnp.float32)


def mapped(params, x, *_):
  losses, _ = lax.map(lambda part: (loss_of(params, part), part @ params["first"]), cut(x))  # the second is not used
  return jnp.mean(losses)


def indexed(params, x, *_):
  size = BATCH // PARTS

  def body(i, total):
    return total + loss_of(params, lax.dynamic_slice_in_dim(x, i * size, size))

  return lax.fori_loop(0, PARTS, body, jnp.float32(0)) / PARTS


def in_a_jit(params, x, key):
  noisy = x + 0.1 * jax.random.normal(key, x.shape)
  return jax.jit(summed)(params, noisy)


LOOPS = [summed, rematerialised, mapped, indexed, in_a_jit]


def shared_by_layers(params, x, *_):
  x, _ = lax.scan(lambda x, w: (jnp.tanh(layer(x, w)[0] @ params["first"]), None), x, params["layers"])
  return jnp.mean(x**2)


def repeated(params, x, *_):
  return jnp.mean(lax.scan(lambda x, _: layer(x, params["first"]), x, None, length=PARTS)[0])


def recurrent(params, x, *_):
  def cell(carry, x):
    hidden = jnp.tanh(carry[0] @ params["first"] + x)
    return (hidden, carry[1] + jnp.mean(hidden**2)), None

  return lax.scan(cell, (jnp.zeros((BATCH // PARTS, D)), jnp.float32(0)), cut(x))[0][1]


def chunks_of_logits(params, x, *_):
  x, _ = lax.scan(layer, x, params["layers"])
  return lax.scan(lambda t, x: (t + jnp.mean(x @ params["first"]), None), jnp.float32(0), cut(x))[0]


def patches(params, x, *_):
  x = lax.map(lambda part: part @ params["first"], cut(x)).reshape(BATCH, D)
  return jnp.mean(lax.scan(layer, x, params["layers"])[0])


def pooled(params, x, *_):
  x, _ = lax.scan(lambda t, part: (t + part @ params["first"], None), jnp.zeros((BATCH // PARTS, D)), cut(x))
  return jnp.mean(jnp.tanh(x))


def samples(params, x, key):
  def body(total, key):
    return total + jnp.mean((x + jax.random.normal(key, x.shape)) @ params["first"]), None

  return lax.scan(body, jnp.float32(0), jax.random.split(key, PARTS))[0]


def product_of_losses(params, x, *_):
  return lax.scan(lambda t, part: (t * jnp.mean(part @ params["first"]), None), jnp.float32(1), cut(x))[0]


OTHERS = [shared_by_layers, repeated, recurrent, chunks_of_logits, patches, pooled, samples, product_of_losses]


def made():
  tx, w = optax.sgd(0.1), 0.1 * jax.random.normal(jax.random.key(0), (6, D, D))
  params = {"first": w[0], "layers": w[1:], "scale": jnp.ones(D)}
  return tx, params, tx.init(params)


def reasons(loss, key=None):
  table = mpo.explain(loss, *made(), jnp.ones((BATCH, D)), key)
  return {leaf.name[8:-2]: leaf.why for leaf in table}


@pytest.mark.parametrize("loss", LOOPS)
def test_a_loop_over_parts_of_the_batch_is_advised_microbatches(loss):
  for leaf, why in reasons(loss, jax.random.key(0)).items():
    assert "its gradient is summed in `scan`" in why, leaf
    assert f"for each of {PARTS} parts of the batch" in why, leaf
    assert ADVICE in why, leaf


@pytest.mark.parametrize("loss", OTHERS)
@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.few(9)
def test_other_loops_that_read_a_weight_whole_are_not(loss, make_key):
  found = reasons(loss, make_key(0))
  assert "its gradient is summed in `scan`" in found["first"]
  assert all("microbatches" not in why for why in found.values())


def test_another_loop_beside_it():
  """Only leaves that the loop over the batch reads are advised."""
  found = reasons(lambda p, x, _: summed(p | {"first": jnp.eye(D)}, x) + repeated(p, x))
  assert ADVICE in found["layers"]
  assert "microbatches" not in found["first"]


def test_the_advice_works():
  """Without the loop, microbatches give the same loss and weights, and no weight waits for the whole gradient."""
  tx, params, state = made()
  x = jax.random.normal(jax.random.key(1), (BATCH, D))
  want = quick_jit(mpo.value_and_update(summed, tx))(params, state, x)
  got = quick_jit(mpo.value_and_update(loss_of, tx, microbatches=PARTS))(params, state, x)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)  # sums in another order
  places = {leaf.name: leaf.stepped for leaf in mpo.explain(loss_of, tx, params, state, x)}
  assert places["params['layers']"] == "in scan"

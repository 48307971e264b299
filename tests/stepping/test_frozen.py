"""If a weight's update reads no gradient, none is computed, held or stacked for it, in one pass and in two."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_mpo as mpo
from tests.helpers import ordinary_step

LAYERS, WIDTH, RANK = 4, 128, 2
X = jnp.ones((256, WIDTH), jnp.bfloat16)
LABELS = {"base": "frozen", "a": "trained", "b": "trained"}


def lora(layer, x):
  return jnp.tanh(x @ layer["base"] + x @ layer["a"] @ layer["b"])


def scanned(p, x):
  return jnp.mean(jax.lax.scan(lambda x, layer: (lora(layer, x), None), x, p)[0].astype(jnp.float32) ** 2)


def rematerialised(p, x):
  layer = jax.checkpoint(lambda x, layer: (lora(layer, x), None))
  return jnp.mean(jax.lax.scan(layer, x, p)[0].astype(jnp.float32) ** 2)


def unrolled(p, x):
  for i in range(LAYERS):
    x = lora(jax.tree.map(lambda w, i=i: w[i], p), x)
  return jnp.mean(x.astype(jnp.float32) ** 2)


def closed_over(p, x):
  """The frozen weight is a constant of the scan, and all layers share it."""
  layers = {k: p[k] for k in "ab"}

  def body(x, layer):
    return lora({**layer, "base": p["base"][0]}, x), None

  return jnp.mean(jax.lax.scan(body, x, layers)[0].astype(jnp.float32) ** 2)


def made():
  shapes = {"base": (LAYERS, WIDTH, WIDTH), "a": (LAYERS, WIDTH, RANK), "b": (LAYERS, RANK, WIDTH)}
  return {k: jax.random.normal(jax.random.key(i), shape) / WIDTH**0.5 for i, (k, shape) in enumerate(shapes.items())}


def flops(step, *args):
  return jax.jit(step).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("loss", [scanned, rematerialised, unrolled, closed_over])
@pytest.mark.parametrize("two_pass", [False, True])
@pytest.mark.few(2)
def test_no_gradient_is_computed_that_no_update_reads(loss, two_pass):
  inner = optax.chain(optax.clip_by_global_norm(1e-3), optax.adam(1e-2)) if two_pass else optax.adam(1e-2)
  tx = optax.multi_transform({"trained": mpo.compensated(inner), "frozen": optax.set_to_zero()}, LABELS)
  masters = made()
  p, s = mpo.init(tx, {**masters, "base": mpo.cast(masters["base"])})
  released = mpo.value_and_update(loss, tx, two_pass=two_pass)
  # Two passes run the ordinary forward and backward pass twice.
  assert flops(released, p, s, X) <= (2.1 if two_pass else 1.02) * flops(ordinary_step(loss, tx), p, s, X)
  table = {leaf.name: leaf for leaf in mpo.explain(loss, tx, p, s, X, two_pass=two_pass)}
  base = table["params['base']"]
  assert (base.stepped, base.gradient_bytes) == ("without a gradient", 0)


def test_a_frozen_stack_is_updated_by_what_its_update_reads():
  labels = {"trained": optax.adam(1e-2), "frozen": optax.chain(optax.set_to_zero(), optax.add_decayed_weights(-1e-2))}
  tx = mpo.compensated(optax.multi_transform(labels, LABELS))
  masters = made()
  p, s = mpo.init(tx, masters)
  new = [jax.jit(f)(p, s, X) for f in (ordinary_step(scanned, tx), mpo.value_and_update(scanned, tx))]
  for expected, found in zip(*map(jax.tree.leaves, new), strict=True):
    assert jnp.array_equal(expected, found)
  assert jnp.array_equal(mpo.master_params(*new[1][1:])["base"], masters["base"] + masters["base"] * jnp.float32(-1e-2))


def test_a_loss_of_frozen_weights_alone():
  tx = optax.set_to_zero()
  p = {"w": jnp.ones(3), "n": jnp.arange(3)}  # integers have no gradients
  step = jax.jit(mpo.value_and_update(lambda p: jnp.sum(p["w"] * p["n"].astype(jnp.float32)), tx))
  value, new, _ = step(p, tx.init(p))
  assert float(value) == 3
  chex.assert_trees_all_equal(new, p)


def test_a_gradient_that_is_one_number_is_no_zero_gradient():
  tx = mpo.compensated(optax.sgd(0.5))
  p, s = mpo.init(tx, {"w": jnp.ones((8, 8)), "v": jnp.ones((8, 8))})

  def loss(p):
    return jnp.sum(p["w"].astype(jnp.float32))

  assert [leaf.stepped for leaf in mpo.explain(loss, tx, p, s)] == ["with a zero gradient", "at once"]
  _, new, _ = jax.jit(mpo.value_and_update(loss, tx))(p, s)
  assert new["w"][0, 0] == 0.5
  assert new["v"][0, 0] == 1

"""Microbatches inside fused layers: sums in f32, the same steps, and the memory of one part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mpo as mpo
from tests.helpers import assert_same_bits, quick_jit

LAYERS, WIDTH, BATCH, TIME = 3, 16, 12, 5


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 0.2, jnp.float32)


def layer(p, x, _=None):
  return x + jnp.tanh(x @ p["w"]) @ p["v"], None


def make_params():
  stack = {"w": normal(0, LAYERS, WIDTH, 2 * WIDTH), "v": normal(1, LAYERS, 2 * WIDTH, WIDTH)}
  return {"embed": normal(2, 7, WIDTH), "layers": stack, "head": normal(3, WIDTH, 7)}


def head(p, x, tokens):
  logits = (x @ p).astype(jnp.float32)
  return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


def make_loss(count, **options):
  embed = mpo.fused_layer(lambda p, tokens: p[tokens], microbatches=count)
  stack = mpo.fused_scan(layer, microbatches=count, **options)
  last = mpo.fused_layer(head, microbatches=count, out_axes=None)

  def loss(params, tokens):
    x, _ = stack(params["layers"], embed(params["embed"], tokens))
    return last(params["head"], x, tokens)

  return loss


def batch(i):
  return jnp.asarray(np.random.default_rng(i).integers(0, 7, (BATCH, TIME)))


jit = quick_jit


@pytest.mark.parametrize("count", [2, 4, 12])
@pytest.mark.few(1)
def test_steps_are_those_of_the_whole_batch_up_to_the_order_of_summation(count):
  """In f32, where a sum of parts and a whole sum differ only by rounding."""
  tx = optax.sgd(0.5, momentum=0.9)
  params = make_params()
  want = got = (None, params, tx.init(params))
  whole, parts = (
    jit(mpo.fused_value_and_update(make_loss(1), tx)),
    jit(mpo.fused_value_and_update(make_loss(count), tx)),
  )
  for i in range(5):
    want, got = whole(*want[1:], batch(i)), parts(*got[1:], batch(i))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
  assert not np.allclose(got[1]["head"], params["head"], atol=1e-3)


@pytest.mark.parametrize("remat", [True, jax.checkpoint_policies.dots_saveable], ids=["remat", "policy"])
def test_gradients_of_bf16_weights_are_summed_in_f32_and_rounded_once(remat):
  """A layer sums the gradients of three parts in f32, from the last to the first, and rounds the sum to bf16 once."""
  tx = optax.sgd(1.0)
  w = normal(0, WIDTH, WIDTH).astype(jnp.bfloat16)
  x = normal(1, BATCH, WIDTH).astype(jnp.bfloat16)

  def apply(w, x):
    return jnp.sum(jnp.square((x @ w).astype(jnp.float32)), -1)

  dense = mpo.fused_layer(apply, remat=remat, microbatches=3)
  _, new, _ = jit(mpo.fused_value_and_update(lambda w, x: jnp.mean(dense(w, x)), tx))(w, tx.init(w), x)

  @jit
  def reference(w, x):
    total = jnp.zeros(w.shape, jnp.float32)
    for part in reversed(jnp.split(x, 3)):
      grad = jax.grad(lambda wide, part: jnp.sum(apply(wide.astype(w.dtype), part) / BATCH))(
        w.astype(jnp.float32), part
      )
      total += grad
    return mpo.apply_updates(w, -total.astype(w.dtype))

  assert_same_bits(new, reference(w, x))


def test_inputs_of_any_axis_and_what_all_parts_get():
  tx = optax.sgd(0.1)

  def apply(p, x, mask, key, scale, flag):
    assert flag is True
    noise = jax.random.normal(key, x.shape[:1])
    return (x @ p["w"]) * mask[..., None] * scale, {"noise": noise, "size": jnp.int32(x.shape[1])}

  params = {"w": normal(0, WIDTH, WIDTH)}
  parts = mpo.fused_layer(
    apply, microbatches=3, in_axes=(1, 1, None, None, None), out_axes=(1, {"noise": None, "size": None})
  )

  def loss(layer, p, x, mask, key, scale):
    y, aux = layer(p, x, mask, key, scale, True)
    return jnp.mean(y**2), aux

  x, mask = normal(1, TIME, BATCH, WIDTH), jnp.ones((TIME, BATCH))
  args = (x, mask, jax.random.key(0), jnp.float32(2))
  step = jit(mpo.fused_value_and_update(functools.partial(loss, parts), tx, has_aux=True))
  (value, aux), new, _ = step(params, tx.init(params), *args)
  want, grads = jax.value_and_grad(lambda p: loss(apply, p, *args)[0])(params)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  np.testing.assert_allclose(new["w"], params["w"] - 0.1 * grads["w"], rtol=1e-5, atol=1e-7)
  assert aux["noise"].shape == (TIME,)
  assert int(aux["size"]) == BATCH


def test_without_handles_the_batch_is_whole():
  loss = make_loss(4)
  params = make_params()
  assert_same_bits(jit(loss)(params, batch(0)), jit(make_loss(1))(params, batch(0)))


def test_errors():
  tx = optax.sgd(1.0)
  params = make_params()
  with pytest.raises(ValueError, match="fused_layer: a batch of 12 does not split into 5 microbatches"):
    mpo.fused_value_and_update(make_loss(5), tx)(params, tx.init(params), batch(0))
  with pytest.raises(ValueError, match="microbatches has to be 1 or more, but it is 0"):
    mpo.fused_layer(layer, microbatches=0)
  dense = mpo.fused_layer(lambda w, x, y: x @ w + y, microbatches=2)
  with pytest.raises(ValueError, match=r"share one batch axis, but in_axes=0 finds the sizes \[4, 6\]"):
    mpo.fused_value_and_update(lambda w, x: jnp.sum(dense(w, x, jnp.ones((6, 3)))), tx)(
      jnp.eye(3), tx.init(jnp.eye(3)), jnp.ones((4, 3))
    )
  dense = mpo.fused_layer(lambda w, x: x @ w, microbatches=2, in_axes=(0, 0))
  with pytest.raises(ValueError, match=r"fused_layer: in_axes=\(0, 0\) does not fit"):
    mpo.fused_value_and_update(lambda w, x: jnp.sum(dense(w, x)), tx)(jnp.eye(3), tx.init(jnp.eye(3)), jnp.ones((4, 3)))


@pytest.mark.full
def test_temporaries_are_those_of_one_part_and_the_boundaries():
  """Bytes compiled by XLA:GPU. Inside, a layer is 8 times as wide as the activations between layers."""
  width, rows = 256, 4096
  struct = jax.ShapeDtypeStruct
  params = {
    "w": struct((8, width, 8 * width), jnp.bfloat16),
    "v": struct((8, 8 * width, width), jnp.bfloat16),
  }
  tx = mpo.compensated(optax.adamw(1e-3))
  state = jax.eval_shape(tx.init, params)
  temporaries = {}
  for count in (1, 8):
    stack = mpo.fused_scan(layer, remat=True, microbatches=count)
    step = mpo.fused_value_and_update(lambda p, x, stack=stack: jnp.mean(stack(p, x)[0].astype(jnp.float32) ** 2), tx)
    x = struct((rows, width), jnp.bfloat16)
    temporaries[count] = mpo.gpu_memory(step, params, state, x, donate_argnums=(0, 1)).temporary_bytes
  boundaries = 8 * rows * width * 2
  inside = 8 * rows * width * 2
  layer_gradient = 2 * 8 * width**2 * (2 + 4)  # bf16 gradients, and their f32 sums
  assert temporaries[1] > boundaries + 2 * inside
  assert temporaries[8] < boundaries + 4 * inside / 8 + layer_gradient + 6 * rows * width * 2

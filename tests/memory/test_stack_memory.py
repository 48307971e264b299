"""Stacks of layers as people store and scan them take no more memory than a stack along the first axis.

Temporaries of the step compiled by XLA:GPU, in bytes per parameter: AdamW, 16 layers of 2048 x 2048, batch 8. Without
gradient release they would be at least 2, the gradient in bf16.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

import optax_mpo as mpo

L, D = 16, 2048

layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
two_layers = jax.checkpoint(lambda x, w: (jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]), None))
group = jax.checkpoint(lambda x, w: (scan(x, w), None))


def scan(x, w):
  return lax.scan(layer, x, w)[0]


def frozen(x):
  return jnp.full((2, D, D), 0.1, x.dtype)


def exact():
  return mpo.compensated(optax.adamw(1e-3))


def compact():
  return mpo.compensated(mpo.quantized_state(optax.adamw(1e-2)), extra_bits=8)


CASES = {  # the axis of the layers, how they are scanned, the bounds with 16 bits and with 8 bits and 8-bit state
  "first axis": (0, scan, 0.28, 0.56),
  "second axis": (1, scan, 0.28, 0.56),
  "cast": (0, lambda x, w: scan(x.astype(jnp.float32), w.astype(jnp.float32)), 0.66, 0.9),
  "reversed": (0, lambda x, w: scan(x, w[::-1]), 0.28, 0.56),
  "in two parts": (0, lambda x, w: scan(scan(x, w[:3]), w[3:]), 0.28, 0.56),
  "even, then odd": (0, lambda x, w: scan(scan(x, w[::2]), w[1::2]), 0.28, 0.56),
  "alternating": (0, lambda x, w: lax.scan(two_layers, x, (w[::2], w[1::2]))[0], 0.42, 0.7),
  "pairs": (0, lambda x, w: lax.scan(two_layers, x, w.reshape(L // 2, 2, D, D))[0], 0.52, 1.1),
  "two levels": (0, lambda x, w: lax.scan(group, x, w.reshape(4, 4, D, D))[0], 0.28, 0.56),
  "split": (0, lambda x, w: scan(scan(x, jnp.split(w, [3])[0]), jnp.split(w, [3])[1]), 0.28, 0.56),
  "after frozen layers": (0, lambda x, w: scan(x, jnp.concatenate([frozen(x), w])), 0.4, 0.68),
  "before frozen layers": (1, lambda x, w: scan(x, jnp.concatenate([w, frozen(x)])), 0.4, 0.68),
  "some frozen": (0, lambda x, w: scan(x, jnp.concatenate([lax.stop_gradient(w[:2]), w[2:]])), 0.28, 0.56),
  "some unused": (0, lambda x, w: scan(x, w[:12]), 0.28, 0.56),
  "first alone": (0, lambda x, w: scan(layer(x, w[0])[0], w[1:]), 0.4, 0.68),
  "last alone": (1, lambda x, w: layer(scan(x, w[:-1]), w[-1])[0], 0.4, 0.68),
  "first and last alone": (0, lambda x, w: layer(scan(layer(x, w[0])[0], w[1:-1]), w[-1])[0], 0.52, 0.8),
  "stacks of stacks": ((0, 1), lambda x, w: lax.scan(group, x, w)[0], 0.9, 0.56),
}


def temporaries(loss, tx, shape, dtype=jnp.bfloat16, **options):
  """The bytes per parameter."""
  params, state = jax.eval_shape(lambda: mpo.init(tx, {"w": jnp.zeros(shape)}, dtype=dtype))
  x = jax.ShapeDtypeStruct((8, D), jnp.bfloat16)
  step = mpo.value_and_update(loss, tx, **options)
  report = mpo.gpu_memory(step, params, state, x, donate_argnums=(0, 1), target="h200")
  return report.temporary_bytes / (L * D * D)


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("optimizer", [exact, compact], ids=["exact", "compact"])
@pytest.mark.filterwarnings("ignore:compensated. without a gradient")
@pytest.mark.few(1, full=4)
def test_temporaries(name, optimizer):
  axis, run, *bounds = CASES[name]
  shape = (4, 4, D, D) if axis == (0, 1) else (D, L, D) if axis else (L, D, D)

  def loss(params, x):
    w = params["w"] if axis == (0, 1) else jnp.moveaxis(params["w"], axis, 0)
    return jnp.mean(run(x, w).astype(jnp.float32) ** 2)

  assert temporaries(loss, optimizer(), shape) <= bounds[optimizer is compact]


FLOAT8 = {  # bounds; decoded whole, weights would take 2 more
  "first axis": (lambda x, w: scan(x, w), 0.46),
  "in two parts": (lambda x, w: scan(scan(x, w[:3]), w[3:]), 0.5),
  "without remat": (lambda x, w: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], 0.48),
}


@pytest.mark.parametrize("name", FLOAT8)
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.few(1, full=2)
def test_float8_is_decoded_layer_by_layer(name, bits):
  run, bound = FLOAT8[name]
  tx = mpo.compensated(optax.adam(1e-3), extra_bits=bits)

  def loss(params, x):
    return jnp.mean(run(x, params["w"]).astype(jnp.float32) ** 2)

  assert temporaries(loss, tx, (L, D, D), jnp.float8_e4m3fn) <= bound


@pytest.mark.parametrize("remat", [jax.checkpoint, lambda layer: layer], ids=["remat", "no remat"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.few(0, full=2)
def test_float8_layers_of_their_own_are_decoded_for_each_use(remat, transposed):
  tx = mpo.compensated(optax.adam(1e-3))
  params, state = jax.eval_shape(lambda: mpo.init(tx, [jnp.zeros((D, D))] * L, dtype=jnp.float8_e4m3fn))

  def loss(params, x):
    for w in params:
      x = remat(lambda x, w: jnp.tanh(x @ (w.T if transposed else w)))(x, w)
    return jnp.mean(x.astype(jnp.float32) ** 2)

  step, x = mpo.value_and_update(loss, tx), jax.ShapeDtypeStruct((8, D), jnp.bfloat16)
  report = mpo.gpu_memory(step, params, state, x, donate_argnums=(0, 1), target="h200")
  assert report.temporary_bytes / (L * D * D) <= 0.54  # all decoded weights take 2


NEEDS_ALL = {  # what an update needs of the whole stack, such as its norm or a flag for all gradients; in two passes?
  "param rms": (lambda: optax.chain(optax.adam(1e-3), optax.scale_by_param_block_rms()), False, 0.28),
  "NaNs": (lambda: optax.chain(optax.zero_nans(), optax.adam(1e-3)), False, 0.28),
  "rms": (lambda: optax.chain(optax.clip_by_block_rms(1.0), optax.adam(1e-3)), True, 0.3),
  "LAMB": (lambda: optax.lamb(1e-3), True, 0.3),
  "Adafactor": (lambda: optax.adafactor(1e-3), True, 0.55),
  "norm of all": (lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), True, 0.3),
}


@pytest.mark.parametrize("name", list(NEEDS_ALL))
@pytest.mark.parametrize("way", ["first axis", "in two parts"])
@pytest.mark.few(1, full=4)
def test_a_few_numbers_of_a_whole_stack_need_no_whole_gradient(name, way):
  inner, two_pass, bound = NEEDS_ALL[name]

  def loss(params, x):
    return jnp.mean(CASES[way][1](x, params["w"]).astype(jnp.float32) ** 2)

  assert temporaries(loss, mpo.compensated(inner()), (L, D, D), two_pass=two_pass) <= bound


def test_a_stack_is_not_laid_out_as_the_gradient_of_a_convolution_is():
  """XLA:GPU makes that gradient with its axes in another order. It laid all stacks out alike, which took 8.05.

  It also laid the weights of all layers out as the convolution wants them, 2 bytes per parameter.
  """
  shape = (L, 3, D // 2, D // 2)

  def loss(params, x):
    def layer(x, kernel):
      return jnp.tanh(lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))), None

    return jnp.mean(lax.scan(jax.checkpoint(layer), x, params["w"])[0].astype(jnp.float32) ** 2)

  tx = exact()
  params, state = jax.eval_shape(lambda: mpo.init(tx, {"w": jnp.zeros(shape)}))
  x = jax.ShapeDtypeStruct((1, 64, D // 2), jnp.bfloat16)
  report = mpo.gpu_memory(
    mpo.value_and_update(loss, tx), params, state, x, donate_argnums=(0, 1), target="h200", params_argnum=0
  )
  assert report.temporary_bytes / report.parameter_count <= 0.6


PER_LAYER = {  # one layer is 1/16 = 0.0625 of the stack; Newton-Schulz holds four f32 matrices of its size
  "Muon": (lambda: optax.contrib.muon(1e-3), 8, 1.02),
  "Muon, 8-bit state": (lambda: mpo.quantized_state(optax.contrib.muon(1e-3)), 5.07, 1.22),
  "Adafactor": (lambda: optax.adafactor(1e-3), 4.01, 0.4),
  "LAMB": (lambda: optax.lamb(1e-3), 12, 0.52),
}


@pytest.mark.parametrize("name", list(PER_LAYER))
@pytest.mark.few(1)
def test_per_layer_takes_its_state_and_the_update_of_one_layer(name):
  inner, stored, bound = PER_LAYER[name]
  tx = mpo.compensated(mpo.per_layer(inner()))

  def loss(params, x):
    return jnp.mean(scan(x, params["w"]).astype(jnp.float32) ** 2)

  kept = jax.eval_shape(lambda: mpo.init(tx, {"w": jnp.zeros((L, D, D))}))
  assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)) <= (stored + 0.001) * L * D * D
  assert temporaries(loss, tx, (L, D, D)) <= bound

"""With `jax_enable_x64`, the library gives the same programs, dtypes and bits as without it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import optax_mpo as mpo
from optax_mpo._codecs import bf16, blocks, float8, fp16, levels, stochastic_rounding
from optax_mpo.checkpoint import Checkpointer

WIDTH = 48


def make_params(layers=3, width=WIDTH, dtype=np.float32):
  random = np.random.default_rng(0)
  normal = [random.normal(size=(layers, width, width)) / width**0.5, random.normal(size=(width, 8)) / 4, np.zeros(8)]
  return {k: jnp.asarray(x.astype(dtype)) for k, x in zip(("layers", "head", "bias"), normal, strict=True)}


def make_batch(width=WIDTH):
  return jnp.asarray(np.random.default_rng(1).normal(size=(4, width)).astype(np.float32))


def scanned(params, x):
  y, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x.astype(params["layers"].dtype), params["layers"])
  return jnp.mean((y @ params["head"] + params["bias"][None]).astype(jnp.float32) ** 2)


layer = mpo.fused_scan(lambda w, y, _: (jnp.tanh(y @ w), None), remat=True)


def fused(params, x):
  y, _ = layer(params["layers"], x.astype(jnp.bfloat16))
  return jnp.mean(
    (y @ mpo.fused_value(params["head"]) + mpo.fused_value(params["bias"])[None]).astype(jnp.float32) ** 2
  )


head = mpo.fused_layer(
  lambda p, y: jnp.mean((y @ p["head"] + p["bias"][None]).astype(jnp.float32) ** 2), microbatches=2, out_axes=None
)


def in_parts(params, x):
  y, _ = layer(params["layers"], x.astype(jnp.bfloat16))
  return head({"head": params["head"], "bias": params["bias"]}, y)


def ordinary_step(tx):
  def step(params, state, x):
    def loss(params, x):
      return scanned(params, x) * scale_of(state)

    value, grads = jax.value_and_grad(loss)(params, x)
    updates, state_ = tx.update(grads, state, params)
    return value, mpo.apply_updates(params, updates), state_

  return step


def scale_of(state):
  return mpo.loss_scale(state) if isinstance(state, mpo.LossScaleState) else jnp.float32(1)


ROUTES = {
  "ordinary": ordinary_step,
  "released": lambda tx: mpo.value_and_update(scanned, tx),
  "two passes": lambda tx: mpo.value_and_update(scanned, tx, two_pass=True),
  "fused scan": lambda tx: mpo.fused_value_and_update(fused, tx),
  "microbatches": lambda tx: mpo.fused_value_and_update(in_parts, tx),
}
# With x64, Optax itself computes schedules and Adam's bias corrections in float64, so its masters are the reference.
WIDER = {
  "adamw": lambda: optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10)),
  "adafactor": lambda: optax.adafactor(1e-2),
  "lamb": lambda: optax.lamb(1e-2),
}
ALIKE = {
  "rmsprop": lambda: optax.rmsprop(1e-2, momentum=0.9),
  "lion": lambda: optax.lion(1e-2),
  "sgd": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
}
STORED = {
  "16 bits": lambda tx: mpo.compensated(tx),
  "8-bit state": lambda tx: mpo.compensated(mpo.quantized_state(tx, min_size=16), 8),
  "4-bit state": lambda tx: mpo.compensated(mpo.quantized_state(tx, 4, min_size=16), 4),
  "stochastic": lambda tx: mpo.compensated(tx, 0, rounding="stochastic", seed=3),
  "kernels": lambda tx: mpo.with_kernels(mpo.compensated(mpo.quantized_state(tx, min_size=16), 8)),
}


def train(make_tx, route, steps=3, dtype=jnp.bfloat16, **sizes):
  """Makes some steps. Returns params, state, masters and losses as NumPy arrays."""
  tx = make_tx()
  params, state = mpo.init(tx, make_params(**sizes), dtype=dtype)
  step = jax.jit(ROUTES[route](tx))
  values = []
  for _ in range(steps):
    value, params, state = step(params, state, make_batch(sizes.get("width", WIDTH)))
    values.append(value)
  return jax.tree.map(np.asarray, (params, state, mpo.master_params(params, state), values))


def assert_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x, y)


def check(run):
  """Asserts that `run()` gives the same with and without x64, and nothing with 64 bits."""
  want = run()
  with jax.enable_x64(True):
    got = run()
  assert_equal(got, want)
  assert all(x.dtype.itemsize <= 4 for x in jax.tree.leaves(got))


@pytest.mark.parametrize("route", list(ROUTES)[:3])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.few(1, full=3)
def test_steps_store_in_every_way(route, stored):
  clip = optax.clip_by_global_norm(0.05) if route == "two passes" else optax.identity()
  check(lambda: train(lambda: STORED[stored](optax.chain(clip, ALIKE["rmsprop"]())), route))


@pytest.mark.parametrize("route", ["fused scan", "microbatches"])
@pytest.mark.parametrize("stored", ["16 bits", "8-bit state", "kernels"])
@pytest.mark.few(1, full=2)
def test_fused_layers(route, stored):
  check(lambda: train(lambda: STORED[stored](ALIKE["rmsprop"]()), route))


@pytest.mark.parametrize("name", ["lion", "sgd"])
@pytest.mark.parametrize("route", ["ordinary", "released"])
@pytest.mark.few(1)
def test_other_transformations(name, route):
  check(lambda: train(lambda: STORED["16 bits"](ALIKE[name]()), route))


@pytest.mark.parametrize("route", ["ordinary", "released", "fused scan"])
@pytest.mark.full
def test_large_weights_with_8_bit_state(route):
  """Weights large enough to be updated by rows."""
  check(lambda: train(lambda: STORED["8-bit state"](ALIKE["rmsprop"]()), route, 2, layers=2, width=736))


@pytest.mark.parametrize("name", WIDER)
@pytest.mark.parametrize("route", list(ROUTES)[:2])
@pytest.mark.few(1, full=2)
def test_training_is_that_of_optax_with_f32_masters(name, route):
  before = train(lambda: STORED["16 bits"](WIDER[name]()), route)
  with jax.enable_x64(True):
    tx = WIDER[name]()
    masters = make_params()
    state = tx.init(masters)

    @jax.jit
    def step(masters, state, x):
      grads = jax.grad(scanned)(mpo.cast(masters), x)
      updates, state = tx.update(jax.tree.map(lambda g: g.astype(jnp.float32), grads), state, masters)
      return optax.apply_updates(masters, updates), state

    for _ in range(3):
      masters, state = step(masters, state, make_batch())
    got = train(lambda: STORED["16 bits"](WIDER[name]()), route)
  for x, y in zip(jax.tree.leaves(got[2]), jax.tree.leaves(masters), strict=True):
    # XLA turns (a / b) / c into a / (b * c), but not in a scan where b was converted from float64.
    np.testing.assert_allclose(x, y, rtol=0, atol=0 if route == "ordinary" else 1e-7)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(lambda x: (x.shape, x.dtype), before)


@pytest.mark.parametrize("route", ["ordinary", "released", "fused scan"])
@pytest.mark.parametrize("stored", ["8-bit state", "stochastic"])
@pytest.mark.few(0, full=3)
def test_state_has_the_same_dtypes_whatever_optax_computes(stored, route):
  want = train(lambda: STORED[stored](WIDER["adamw"]()), route)
  with jax.enable_x64(True):
    got = train(lambda: STORED[stored](WIDER["adamw"]()), route)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(lambda x: (x.shape, x.dtype), want)
  np.testing.assert_allclose(got[3], want[3], rtol=1e-2)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.few(1)
def test_loss_scaling_in_fp16(dynamic):
  def make():
    scaled = mpo.loss_scaled(
      mpo.compensated(optax.rmsprop(1e-2)), np.float64(2.0**18), dynamic=dynamic, growth_interval=2
    )
    return scaled

  check(lambda: train(make, "ordinary", dtype=jnp.float16))


def test_nothing_is_computed_in_64_bits():
  """Optax and the loss function could compute in 64 bits, but here they do not."""
  for stored in STORED:
    with jax.enable_x64(True):
      tx = STORED[stored](optax.sgd(0.5, momentum=0.5))
      params, state = mpo.init(tx, make_params())
      for name in ("ordinary", "released", "fused scan"):
        step = ROUTES[name](tx)
        text = jax.jit(step).lower(params, state, make_batch()).as_text()
        wide = [line for line in text.splitlines() if "xf64>" in line or "tensor<f64>" in line]
        assert not wide, (stored, name, wide[:5])


@pytest.mark.parametrize(("codec", "bits"), [(codec, bits) for codec in (bf16, fp16, float8) for bits in codec.BITS])
def test_codecs(codec, bits):
  x = np.random.default_rng(2).normal(size=1000).astype(np.float32) * np.float32(10.0) ** np.arange(-8, 2).repeat(100)
  x = x.astype(np.float32)

  def run():
    wide = jnp.asarray(x)
    low, kept = codec.split(wide, bits)
    new, _ = codec.split(wide * 3, bits)
    change = codec.difference(low, new)
    random = stochastic_rounding.random_bits(1, jnp.int32(5), 2, x.shape)
    rounded = codec.round_stochastically(wide, random, bits)
    results = low, kept, codec.join(low, kept), change, codec.add_difference(low, change), random, rounded
    return jax.tree.map(np.asarray, results)

  check(run)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", levels.KINDS)
def test_blocks(bits, kind):
  x = np.random.default_rng(3).normal(size=(7, 100)).astype(np.float32)

  def run():
    wide = jnp.abs(jnp.asarray(x)) if kind == "nonnegative" else jnp.asarray(x)
    stored = blocks.quantize(wide, levels.KINDS[kind](bits).dtype, 32)
    moved = blocks.requantize(wide * jnp.float32(0.999), stored, jnp.int32(4), 6)
    return jax.tree.map(np.asarray, (stored, moved, blocks.dequantize(moved)))

  check(run)


def test_a_run_is_carried_over_and_saved(tmp_path):
  before, after = STORED["16 bits"](ALIKE["rmsprop"]()), STORED["8-bit state"](ALIKE["rmsprop"]())

  def run(folder):
    params, state = mpo.init(before, make_params())
    _, params, state = jax.jit(ordinary_step(before))(params, state, make_batch())
    params, state = mpo.convert(after, params, state)
    with Checkpointer(folder) as checkpoints:
      checkpoints.save(1, (params, state))
      _, (params, state) = checkpoints.restore((params, state))
    shown = mpo.dequantized(state), mpo.master_params(params, state)
    return jax.tree.map(np.asarray, (params, state, shown))

  folders = iter([tmp_path / "32", tmp_path / "64"])
  check(lambda: run(next(folders)))


def test_float64_params_are_named():
  with jax.enable_x64(True), pytest.raises(TypeError, match=r"params\['bias'\] is float64"):
    mpo.init(STORED["16 bits"](ALIKE["rmsprop"]()), make_params(dtype=np.float64))

"""Fused layers equal the ordinary step bit for bit, for every kind of layer, input and output.

The ordinary step is the same loss function with arrays, `jax.value_and_grad`, `tx.update` and `mpo.apply_updates`,
jitted.

Scanned layers are updated one at a time, in a loop of another shape than that of the ordinary update. There LLVM may
choose another product of a*b + c*d for a fused multiply-add, in plain Optax too, so moving averages can differ in the
last bit. Tests run without these instructions (tests/conftest.py), and these cases with LLVM at its lowest level.
"""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import pallas as pl

import optax_mpo as mpo
from tests.helpers import assert_same_bits, exact_jit, ordinary_step, quick_jit

LAYERS, WIDTH, VOCAB, TIME, STEPS = 2, 8, 7, 5, 100


def assert_equal_steps(loss_fn, tx, params, opt_state, batches, has_aux=False, scanned=False):
  """Runs both kinds of step from the same start, each on its own results. Compares all losses and the final results."""
  jit = quick_jit if scanned else exact_jit
  fused = jit(mpo.fused_value_and_update(loss_fn, tx, has_aux=has_aux))
  plain = jit(ordinary_step(loss_fn, tx, has_aux=has_aux))
  got, want = (params, opt_state), (params, opt_state)
  for batch in batches:
    value, *got = fused(*got, *batch)
    wanted, *want = plain(*want, *batch)
    assert_same_bits(value, wanted)
  assert_same_bits(got, want)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), got[0], params)
  assert all(jax.tree.leaves(moved)), "nothing was trained"
  return got


# --- A small Transformer-like model with all features -----------------------------------------------------------------


def block(p, x, key, bias):
  h = x * p["scale"].astype(x.dtype)[None, None] + bias[None]
  h = jax.nn.gelu(h @ p["up"]) @ p["down"]
  keep = jax.random.bernoulli(key, 0.9, h.shape)
  return x + jnp.where(keep, h / 0.9, 0).astype(x.dtype)


def make_params(scan):
  def normal(scale, *shape):
    return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

  rng = np.random.default_rng(0)
  blocks = {
    "up": normal(0.3, LAYERS, WIDTH, 2 * WIDTH),
    "down": normal(0.3, LAYERS, 2 * WIDTH, WIDTH),
    "scale": jnp.full((LAYERS, WIDTH), 1.1, jnp.float32),
  }
  return {
    "embedding": normal(1.0, VOCAB, WIDTH),
    "position": normal(0.1, TIME, WIDTH),
    "blocks": blocks if scan else [jax.tree.map(lambda w, i=i: w[i], blocks) for i in range(LAYERS)],
    "head": {"scale": jnp.full(WIDTH, 0.9, jnp.float32)},
  }


def model_loss(scan, remat, params, tokens, key):
  """Has a tied embedding, a position that every block closes over, dropout keys, integer inputs and aux outputs."""
  embedding, position = mpo.fused_value((params["embedding"], params["position"]))
  x = embedding[tokens]
  bias = position.astype(x.dtype)
  keys = jax.random.split(key, LAYERS)
  if scan:
    stack = mpo.fused_scan(lambda p, x, key: (block(p, x, key, bias), jnp.mean(x)), remat=remat)
    x, means = stack(params["blocks"], x, keys)
  else:
    layer = mpo.fused_layer(lambda p, x, key: (block(p, x, key, bias), jnp.mean(x)), remat=remat)
    means = []
    for p, key in zip(params["blocks"], keys, strict=True):
      x, mean = layer(p, x, key)
      means.append(mean)
    means = jnp.stack(means)

  def head(p, x, embedding, tokens):
    logits = ((x * p["scale"].astype(x.dtype)[None, None]) @ embedding.T).astype(jnp.float32)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)
    return -jnp.mean(picked), jnp.argmax(logits, -1)

  loss, predictions = mpo.fused_layer(head)(params["head"], x, embedding, tokens)
  return loss + 0.01 * jnp.mean(means.astype(jnp.float32)), {"predictions": predictions, "means": means}


def batches(count):
  # XLA has an operation for this kind of key. With threefry, most of the compile time would go to the keys.
  rng = np.random.default_rng(0)
  keys = [jax.random.key(i, impl="unsafe_rbg") for i in range(count)]
  return [(rng.integers(0, VOCAB, (4, TIME), np.int32), key) for key in keys]


def init(tx, params, where=None):
  return jax.jit(lambda params: mpo.init(tx, params, where=where))(params)


def decays(tree):
  return jax.tree_util.tree_map_with_path(lambda path, _: "scale" not in str(path[-1]), tree)


OPTIMIZERS = {
  "sgd": lambda: optax.sgd(1e-2),
  "momentum": lambda: optax.sgd(1e-2, momentum=0.9, nesterov=True),
  "adamw": lambda: optax.adamw(optax.cosine_decay_schedule(1e-2, 100), weight_decay=0.1, mask=decays),
  "lion": lambda: optax.lion(1e-3, weight_decay=0.1),
  "rmsprop": lambda: optax.rmsprop(1e-3, momentum=0.9),
  "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
}
REMATS = {"remat": True, "no_remat": False, "policy": jax.checkpoint_policies.dots_saveable}


def is_matrix(path, leaf):
  return "scale" not in str(path[-1])


@pytest.mark.parametrize(
  ("name", "scan"),
  # Scanned adafactor is refused, since it needs norms over the whole stack (program/test_by_layer.py).
  [
    pytest.param(name, scan, marks=[pytest.mark.slow] * (scan and name != "adamw"))
    for name in OPTIMIZERS
    for scan in (False, True)
    if (name, scan) != ("adafactor", True)
  ],
)
@pytest.mark.few(1, full=4)
def test_a_hundred_steps_equal_the_unfused_path(name, scan):
  """Matrices are bf16 with 16 bits, scales are f32."""
  tx = mpo.compensated(OPTIMIZERS[name]())
  params, opt_state = init(tx, make_params(scan), where=is_matrix)
  loss_fn = functools.partial(model_loss, scan, True)
  assert_equal_steps(loss_fn, tx, params, opt_state, batches(STEPS), has_aux=True, scanned=scan)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.few(1, full=2)
def test_every_rematerialisation_equals_the_unfused_path(remat, scan):
  tx = mpo.compensated(optax.adamw(1e-2), extra_bits=8)
  params, opt_state = init(tx, make_params(scan))
  loss_fn = functools.partial(model_loss, scan, REMATS[remat])
  assert_equal_steps(loss_fn, tx, params, opt_state, batches(STEPS), has_aux=True, scanned=scan)


PLAIN = {
  "adamw_f32": lambda: optax.adamw(1e-2),
  "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
  "lamb": lambda: optax.lamb(1e-3),
  "multi_steps": lambda: optax.MultiSteps(optax.sgd(1e-2, momentum=0.9), 2),
  "inject": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(1e-2, 0.0, 10)),
  "frozen_part": lambda: optax.multi_transform(
    {"on": optax.adam(1e-2), "off": optax.set_to_zero()},
    lambda params: jax.tree_util.tree_map_with_path(lambda path, _: "off" if "up" in str(path) else "on", params),
  ),
}


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.full
def test_a_layer_large_enough_to_be_stepped_one_weight_after_the_other(remat):
  def fn(p, x):
    h = jax.nn.gelu(x.astype(p["up"].dtype) @ p["up"] + p["bias"][None])
    return x + (h @ p["down"] * p["scale"][None]).astype(x.dtype), h.mean()

  def loss_fn(params, x):
    layer = mpo.fused_layer(fn, remat=remat)
    x, first = layer(params["a"], x)
    y, second = layer(params["b"], x)
    return jnp.mean(y**2) + (first * second).astype(y.dtype)

  def weights(key):
    up, down = jax.random.split(jax.random.key(key))
    return {
      "up": jax.random.normal(up, (512, 1024)) / 20,
      "down": jax.random.normal(down, (1024, 512)) / 30,
      "bias": jnp.full(1024, 0.1),
      "scale": jnp.ones(512),
    }

  tx = mpo.compensated(optax.adamw(1e-3))
  params, opt_state = mpo.init(tx, {"a": weights(1), "b": weights(2)})
  jaxpr = str(jax.make_jaxpr(mpo.fused_value_and_update(loss_fn, tx))(params, opt_state, jnp.ones((4, 512))))
  assert jaxpr.count("optimization_barrier") > 2 * 3, "only around the backward pass"
  data = [(jax.random.normal(jax.random.key(i), (4, 512)),) for i in range(10)]
  assert_equal_steps(loss_fn, tx, params, opt_state, data, scanned=True)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.few(2)
def test_transformations_without_compensation(name):
  def loss_fn(params, x):
    layer = mpo.fused_layer(lambda p, x: jnp.tanh(x @ p["up"]) * p["scale"][None])
    for p in params:
      x = layer(p, x)
    return jnp.sum(x**2)

  rng = np.random.default_rng(0)
  params = [{"up": jnp.asarray(rng.standard_normal((4, 4)), jnp.float32), "scale": jnp.ones(4)} for _ in range(2)]
  tx = PLAIN[name]()
  fused, plain = exact_jit(mpo.fused_value_and_update(loss_fn, tx)), exact_jit(ordinary_step(loss_fn, tx))
  got = want = (params, tx.init(params))
  for i in range(4):
    x = jnp.full((2, 4), 0.5 + i)
    value, *got = fused(*got, x)
    wanted, *want = plain(*want, x)
    assert_same_bits(value, wanted)
  assert_same_bits(got, want)
  assert bool((got[0][0]["scale"] != params[0]["scale"]).any())


def test_steps_can_be_mixed_with_unfused_ones():
  tx = mpo.compensated(optax.adamw(1e-2))
  loss_fn = functools.partial(model_loss, False, False)
  start = init(tx, make_params(False))
  steps = [
    exact_jit(mpo.fused_value_and_update(loss_fn, tx, has_aux=True)),
    exact_jit(ordinary_step(loss_fn, tx, has_aux=True)),
  ]
  got = want = start
  for i, batch in enumerate(batches(6)):
    _, *got = steps[i % 2](*got, *batch)
    _, *want = steps[1](*want, *batch)
  assert_same_bits(got, want)


def test_without_jit_and_with_donation():
  tx = mpo.compensated(optax.sgd(1e-2, momentum=0.9))
  loss_fn = functools.partial(model_loss, True, True)
  params, opt_state = init(tx, make_params(True))
  (batch,) = batches(1)
  step = mpo.fused_value_and_update(loss_fn, tx, has_aux=True)
  eager = step(params, opt_state, *batch)
  donated = jax.jit(step, donate_argnums=(0, 1))(*jax.tree.map(jnp.copy, (params, opt_state)), *batch)
  # Without jit, bf16 rounds after every operation, which can differ by two ulps. Then the bits belong to other weights.
  got, want = ((value, mpo.master_params(params, state)) for value, params, state in (eager, donated))
  chex.assert_trees_all_close(got[0][0], want[0][0], rtol=2**-7)
  chex.assert_trees_all_close(got[1], want[1], atol=1e-2 * 2**-6)  # learning rate times gradient error
  assert_same_bits(opt_state, init(tx, make_params(True))[1])  # the inputs are unchanged


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_loss_that_is_not_finite_steps_as_the_unfused_path(bad):
  def loss_fn(params, x):
    return jnp.sum(mpo.fused_layer(lambda w, x: x @ w)(params, x))

  tx = mpo.compensated(optax.adam(1e-2))
  params, opt_state = mpo.init(tx, jnp.eye(3))
  x = jnp.full((2, 3), bad, jnp.bfloat16)
  want = exact_jit(ordinary_step(loss_fn, tx))(params, opt_state, x)
  assert_same_bits(exact_jit(mpo.fused_value_and_update(loss_fn, tx))(params, opt_state, x), want)
  assert not np.isfinite(np.asarray(want[1], np.float32)).all()


# --- Inputs, outputs, functions ---------------------------------------------------------------------------------------


def test_inputs_and_outputs_of_any_kind():
  def fn(p, x, extras, *, scale, mode, mask):
    assert mode == "double"
    assert extras["nothing"] is None
    x = jnp.where(mask, x @ p["w"] * scale, 0) * extras["factor"]
    return {"x": x, "ids": extras["ids"] + 1, "none": None}, (jax.random.key_data(extras["key"]),)

  def loss_fn(params, x, extras, mask):
    out, (data,) = mpo.fused_layer(fn, remat=True)(params, x, extras, scale=2.0, mode="double", mask=mask)
    assert out["none"] is None
    return jnp.sum(jnp.square(out["x"])), (out["ids"], data)

  extras = {"ids": jnp.arange(3), "key": jax.random.key(1), "nothing": None, "factor": jnp.array(0.5)}
  params = {"w": jnp.eye(3) * 0.3}
  tx = optax.adam(1e-2)
  args = jnp.arange(6.0).reshape(2, 3), extras, jnp.array([[True], [False]])
  assert_equal_steps(loss_fn, tx, params, tx.init(params), [args] * 3, has_aux=True)


def test_scan_carries_and_ys_of_any_kind_and_reverse():
  def fn(p, carry, x):
    x_in, flag = x
    h = jnp.tanh(carry["h"] @ p + x_in)
    return {"h": h, "count": carry["count"] + flag}, (h.sum(), carry["count"])

  def loss_fn(params, x, xs):
    stack = mpo.fused_scan(fn, remat=True, reverse=True, unroll=2)
    carry, (sums, counts) = stack(params, {"h": x, "count": 0}, xs)
    return jnp.sum(carry["h"]) + jnp.sum(sums[1:] ** 2), (carry["count"], counts)

  tx = optax.sgd(1e-2)
  params = jnp.stack([jnp.eye(3) * 0.3 * i for i in range(1, 5)])
  args = jnp.ones((2, 3)), (jnp.arange(12.0).reshape(4, 1, 3) / 10, jnp.arange(4))
  assert_equal_steps(loss_fn, tx, params, tx.init(params), [args] * 3, has_aux=True, scanned=True)


def test_gradients_reach_the_inputs_of_a_scan_and_what_it_closes_over():
  """Weights of other layers feed the carry, the xs and a closed-over array of a scan."""

  def loss_fn(params, x):
    gate, offsets, first = mpo.fused_value((params["gate"], params["offsets"], params["first"]))
    stack = mpo.fused_scan(lambda p, h, o: (jnp.tanh(h @ p * gate[None]) + o[None], None))
    return jnp.sum(stack(params["stack"], x @ first, offsets)[0] ** 2)

  tx = optax.sgd(1e-2)
  params = {
    "gate": jnp.full(3, 0.7, jnp.float32),
    "offsets": jnp.ones((4, 3)) * 0.1,
    "first": jnp.eye(3),
    "stack": jnp.stack([jnp.eye(3)] * 4),
  }
  assert_equal_steps(loss_fn, tx, params, tx.init(params), [(jnp.ones((2, 3)),)] * 3, scanned=True)


def test_a_custom_vjp_inside_a_layer():
  @jax.custom_vjp
  def clipped(x):
    return x * 2

  clipped.defvjp(lambda x: (x * 2, x), lambda x, g: (jnp.clip(g, -0.1, 0.1) * x,))

  def loss_fn(params, x):
    for remat, w in zip((True, False), params, strict=True):
      x = mpo.fused_layer(lambda w, x: clipped(x @ w), remat=remat)(w, x)
    return jnp.sum(x**2)

  tx, params = optax.adam(1e-2), [jnp.eye(3), jnp.eye(3) * 0.5]
  assert_equal_steps(loss_fn, tx, params, tx.init(params), [(jnp.ones((2, 3)),)] * 3)


def test_a_pallas_kernel_inside_a_layer():
  def kernel(x_ref, o_ref):
    o_ref[...] = jnp.tanh(x_ref[...])

  @jax.custom_vjp
  def tanh(x):
    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)

  tanh.defvjp(lambda x: (tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))

  def loss_fn(params, x):
    return jnp.sum(mpo.fused_layer(lambda w, x: tanh(x @ w), remat=True)(params, x) ** 2)

  tx, params = optax.adam(1e-2), jnp.eye(3)
  assert_equal_steps(loss_fn, tx, params, tx.init(params), [(jnp.ones((2, 3)),)] * 3)


def test_handles_are_indexed_like_the_params():
  seen = []

  @chex.dataclass
  class Weights:
    left: jax.Array
    right: tuple

  def loss_fn(params, x):
    assert list(params) == ["empty", "layers", "named"]
    assert list(params.keys()) == ["empty", "layers", "named"]
    assert "layers" in params
    assert (len(params["layers"]), len(params["empty"])) == (2, 0)
    assert (params["layers"][0]["w"].shape, params["layers"][0]["w"].dtype) == ((3, 3), jnp.float32)
    seen.append(repr(params["named"].right[0]))
    layer = mpo.fused_layer(lambda p, x: x @ p["w"])
    for p in params["layers"]:
      x = layer(p, x)
    return jnp.sum(mpo.fused_layer(lambda p, x: x @ p.left * p.right[0][None])(params["named"], x))

  eye = jnp.eye(3)
  params = {"layers": [{"w": eye}, {"w": eye}], "named": Weights(left=eye, right=(jnp.ones(3),)), "empty": ()}
  tx = optax.adam(1e-2)
  assert_equal_steps(loss_fn, tx, params, tx.init(params), [(jnp.ones((2, 3)),)] * 3)
  assert seen[0] == "Handle(params['named'].right[0])"


def test_without_handles_a_layer_is_just_the_function():
  def fn(p, x):
    return jnp.tanh(x @ p)

  def scanned(p, c, x):
    return fn(p, c), None

  w, x = jnp.eye(3), jnp.ones((2, 3))
  assert str(jax.make_jaxpr(mpo.fused_layer(fn))(w, x)) == str(jax.make_jaxpr(fn)(w, x))
  want = jax.lax.scan(lambda c, p: (fn(p, c), None), x, jnp.stack([w, w]))[0]
  assert_same_bits(mpo.fused_scan(scanned)(jnp.stack([w, w]), x)[0], want)
  assert mpo.fused_value({"a": w, "b": None})["a"] is w
  jax.vmap(jax.grad(lambda w: jnp.sum(mpo.fused_layer(fn)(w, x))))(jnp.stack([w, w]))


# --- Flax -------------------------------------------------------------------------------------------------------------


def test_linen_modules():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
      return nn.Dropout(0.5, deterministic=not train)(nn.relu(x))

  net, head = Net(), nn.Dense(2)
  variables = net.init(jax.random.key(0), jnp.ones((2, 3)), train=False)
  params = {"net": variables["params"], "head": head.init(jax.random.key(1), jnp.ones((2, 4)))["params"]}

  def loss_fn(params, stats, x, key):
    x, new = mpo.fused_layer(net, remat=True)(
      {"params": params["net"], "batch_stats": stats}, x, train=True, mutable=["batch_stats"], rngs={"dropout": key}
    )
    return jnp.mean(mpo.fused_layer(head)(params["head"], x) ** 2), new["batch_stats"]

  tx = optax.adam(1e-2)
  x = jax.random.normal(jax.random.key(2), (8, 3))
  args = [(variables["batch_stats"], x, jax.random.key(i)) for i in range(3)]
  assert_equal_steps(loss_fn, tx, params, tx.init(params), args, has_aux=True)


def test_nnx_modules():
  class Block(nnx.Module):
    def __init__(self, rngs):
      self.linear = nnx.Linear(4, 4, rngs=rngs)
      self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
      return nnx.relu(self.norm(self.linear(x)))

  block, head = Block(nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1))
  _, block_params, stats = nnx.split(block, nnx.Param, ...)
  params = {"block": block_params, "head": nnx.split(head, nnx.Param)[1]}

  def loss_fn(params, stats, x):
    x, stats = mpo.fused_layer(block)((params["block"], stats), x)
    return jnp.mean(mpo.fused_layer(head)(params["head"], x) ** 2), stats

  tx = optax.adam(1e-2)
  x = jax.random.normal(jax.random.key(2), (8, 4))
  assert_equal_steps(loss_fn, tx, params, tx.init(params), [(stats, x)] * 3, has_aux=True)

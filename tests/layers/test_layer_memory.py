"""Memory of gradient release, automatic and by layers: no gradient tree and no copied stacks.

The bytes are those of steps that XLA:GPU compiles for an H200. Limits that are plain numbers are measured and rounded
up. All others are arithmetic on shapes.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_mpo as mpo
from benchmarks import peak_memory
from benchmarks.modes import MODES

pytestmark = pytest.mark.full

WIDTH, HIDDEN, BATCH = 1024, 3072, 64
MATRICES = {False: 2, True: 3}  # of one layer; fewer in unrolled layers, which compile slowly


def make_loss(scan, route):
  def block(p, x):
    h = x @ p["up"]
    return x + (jax.nn.silu(x @ p["gate"]) * h if scan else jax.nn.silu(h)) @ p["down"]

  def loss_fn(params, x):
    if route == "auto" and scan:
      x, _ = jax.lax.scan(lambda x, p: (jax.checkpoint(block)(p, x), None), x, params)
    elif route == "auto":
      for p in params:
        x = jax.checkpoint(block)(p, x)
    elif scan:
      x, _ = mpo.fused_scan(lambda p, x, _: (block(p, x), None), remat=True)(params, x)
    else:
      for p in params:
        x = mpo.fused_layer(block, remat=True)(p, x)
    return jnp.mean(jnp.square(x.astype(jnp.float32)))

  return loss_fn


@functools.cache
def report(scan, layers, route="layer", optimizer=optax.adamw, dump_to=None):
  def shape(*s):
    return jax.ShapeDtypeStruct((layers, *s) if scan else s, jnp.float32)

  layer = {"up": shape(WIDTH, HIDDEN), "down": shape(HIDDEN, WIDTH)}
  if scan:
    layer["gate"] = shape(WIDTH, HIDDEN)
  tx = mpo.compensated(optimizer(1e-3))
  state = jax.eval_shape(lambda p: mpo.init(tx, p), layer if scan else [layer] * layers)
  x = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.bfloat16)
  make = {"auto": mpo.value_and_update, "layer": mpo.fused_value_and_update}[route]
  step = make(make_loss(scan, route), tx)
  return mpo.gpu_memory(step, *state, x, donate_argnums=(0, 1), target="h200", params_argnum=0, dump_to=dump_to)


@pytest.mark.parametrize("route", ["layer", "auto"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.few(0, full=2)
def test_temporaries_are_two_layers_of_gradients_at_most_and_do_not_grow_with_depth(scan, route):
  """Scanned, 8 layers have 900 MB of params and state, and the gradients of 64 layers would take 1.2 GB."""
  left = {}
  optimizer = optax.adamw if scan else optax.sgd  # unrolled with AdamW, compiling takes minutes
  few, many = (8, 64) if scan else (4, 16)
  for layers in (few, many):
    activations = layers * BATCH * WIDTH * 2
    left[layers] = report(scan, layers, route, optimizer).temporary_bytes - activations
    assert left[layers] <= 2 * MATRICES[scan] * WIDTH * HIDDEN * 2, layers
  # More layers cost scalars and space for the next activation, but no weight matrix.
  assert left[many] - left[few] < WIDTH * HIDDEN * 2 / 4


@pytest.mark.parametrize("route", ["layer", "auto"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_all_donated_buffers_are_aliased_and_no_stack_is_copied(scan, route):
  found = report(scan, 24 if scan else 4, route)
  state = found.argument_bytes - BATCH * WIDTH * 2
  assert found.aliased_bytes >= state - 1024
  assert found.output_bytes - found.aliased_bytes < 4096  # the loss, and XLA's table of results
  largest = max(b.bytes for b in found.buffers if b.kind == "temporary")
  assert largest < WIDTH * HIDDEN * 24 * 2 / 8  # an eighth of a stack of compensation bits


def test_the_optimized_program_copies_no_stack(tmp_path):
  """Reads XLA:GPU's program of the step: it copies nothing as large as a stack of one weight."""
  report.__wrapped__(True, 8, dump_to=tmp_path)
  texts = [path.read_text() for path in tmp_path.glob("*gpu_after_optimizations.txt")]
  (text,) = (t for t in texts if f"f32[8,{WIDTH},{HIDDEN}]" in t)
  instructions = re.findall(r" = \w+\[([\d,]*)\]\S* (copy|copy-start|dynamic-update-slice|while|fusion)\(", text)
  assert len([kind for _, kind in instructions if kind == "dynamic-update-slice"]) >= 3 * 4  # the parser works
  copies = [dims for dims, kind in instructions if kind.startswith("copy")]
  assert all(math.prod(map(int, filter(None, dims.split(",")))) < 8 * WIDTH * HIDDEN for dims in copies), copies


# Bytes per parameter of language models with AdamW, 16 bits and batch 1 x 1024. The design goal for 1.3B scanned was
# 12.4. The goal of 12.6 for 350M unrolled is impossible: at the head, f32 and bf16 logits and the 24 activations take
# 0.66 bytes per parameter (docs/fused_layers.md).
AT_MOST = {"lm-1.3b": 12.35, "lm-350m-unrolled": 12.7}


@pytest.mark.parametrize(
  "model", [pytest.param(name, marks=[pytest.mark.slow] * name.endswith("unrolled")) for name in AT_MOST]
)
def test_language_models(model):
  row = peak_memory.measure(model, "mpo-16-layer", "adamw", "h200")
  assert not row.error, row.error
  assert row.total_bytes / row.parameters <= AT_MOST[model]


def test_weights_are_no_residuals():
  """Without rematerialisation, only activations are kept for the backward pass: no weight, cast or transpose."""

  def block(p, x):
    return jnp.tanh(x.astype(jnp.float32) @ p["w"].astype(jnp.float32)).astype(x.dtype)

  def loss_fn(params, x):
    for p in params:
      x = mpo.fused_layer(block)(p, x)
    return jnp.mean(x.astype(jnp.float32))

  width, layers = 4096, 8
  tx = mpo.compensated(optax.sgd(1e-3))
  params = [{"w": jax.ShapeDtypeStruct((width, width), jnp.float32)}] * layers
  state = jax.eval_shape(lambda p: mpo.init(tx, p), params)
  x = jax.ShapeDtypeStruct((8, width), jnp.bfloat16)
  step = mpo.fused_value_and_update(loss_fn, tx)
  found = mpo.gpu_memory(step, *state, x, donate_argnums=(0, 1), target="h200")
  weight = 4 * math.prod((width, width))  # in f32
  assert found.temporary_bytes < 3 * weight  # one cast, one gradient and its cast, not eight casts


def test_steps_of_all_fused_modes_keep_the_shapes_of_their_state():
  model = peak_memory.MODELS["lm-125m"]()
  for mode in ("mpo-16-layer", "mpo-8-layer"):
    training = MODES[mode].build(model, "lion")
    _, params, opt_state = jax.eval_shape(training.step, training.params, training.opt_state, model.batch)
    assert (params, opt_state) == (training.params, training.opt_state)

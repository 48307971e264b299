"""No stack of weights or state is copied, whatever the products in its layers want: on one device, under FSDP and TP.

XLA:GPU lays an array out as its users want it. For a scan it did so with whole stacks: as the gradient that is written
into them, or as what the forward pass multiplies, gathers or convolves. Each copy took 1 to 4 bytes per parameter.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import optax_mpo as mpo

LAYERS, WIDTH, TOKENS = 12, 512, 56  # so that no activation is as large as a stack
MESH = AbstractMesh((8,), ("cards",), axis_types=(AxisType.Auto,))


def heads(x, w):
  return jnp.einsum("bthk,hkd->btd", jnp.tanh(jnp.einsum("btd,dhk->bthk", x, w["in"])), w["out"])


def mlp(x, w):
  return jnp.tanh(x @ w["up"]) @ w["down"]


def tied(x, w):
  return jnp.einsum("btf,df->btd", jnp.tanh(x @ w["up"]), w["up"])


def experts(x, w):
  return jnp.einsum("btd,edf->btf", x, w["experts"])


def routed(x, w):
  sizes = jnp.full(8, x.shape[0] * TOKENS // 8, jnp.int32)
  return lax.ragged_dot(x.reshape(-1, WIDTH), w["experts"], sizes).reshape(x.shape)


def convolution(x, w):
  return lax.conv_general_dilated(x, w["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


FORMS = {
  "heads": (heads, {"in": (WIDTH, 8, 64), "out": (8, 64, WIDTH)}),
  "mlp": (mlp, {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}),
  "tied": (tied, {"up": (WIDTH, 2 * WIDTH)}),
  "experts": (experts, {"experts": (8, WIDTH, WIDTH)}),
  "routed": (routed, {"experts": (8, WIDTH, WIDTH)}),
  "convolution": (convolution, {"kernel": (3, WIDTH, WIDTH)}),
}


def temporaries(form, split, axis):
  """Compiles a step over a scan of layers.

  Args:
    form: one of FORMS.
    split: what is split over eight devices: "fsdp" the weights and the batch, "tp" the weights alone, None nothing.
    axis: the axis along which each weight is split, in a layer.

  Returns:
    The numbers of elements of its temporaries on a device; and of each stack.
  """
  apply, shapes = FORMS[form]
  shardings = [NamedSharding(MESH, PartitionSpec(*spec)) for spec in ([], ["cards"], [None] * (axis + 1) + ["cards"])]
  replicated, by_batch, by_axis = shardings

  def loss(params, x):
    @jax.checkpoint
    def layer(x, w):
      if split == "fsdp":
        x = lax.with_sharding_constraint(x, by_batch)
      return x + apply(x, w), None

    return jnp.mean(lax.scan(layer, x, params)[0].astype(jnp.float32) ** 2)

  tx = mpo.compensated(optax.adamw(1e-3))
  params = {name: jnp.zeros((LAYERS, *shape), jnp.bfloat16) for name, shape in shapes.items()}
  x = jax.ShapeDtypeStruct((8, TOKENS, WIDTH), jnp.bfloat16)
  params, state = jax.eval_shape(lambda: mpo.init(tx, params))
  out, devices = None, 8 if split else 1
  if split:
    params = jax.tree.map(functools.partial(placed, by_axis), params)
    state = jax.tree.map(placed, mpo.state_sharding(params, state), state)
    x = placed(by_batch if split == "fsdp" else replicated, x)
    out = replicated, *jax.tree.map(lambda leaf: leaf.sharding, (params, state))
  step = jax.jit(mpo.value_and_update(loss, tx), donate_argnums=(0, 1), out_shardings=out)
  report = mpo.gpu_memory(step, params, state, x, target="h200", devices=devices)
  found = [math.prod(map(int, re.findall(r"\d+", b.shape.split("[")[1]))) for b in report.buffers if is_array(b)]
  return found, [leaf.size // devices for leaf in jax.tree.leaves(params)]


def placed(sharding, leaf):
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def is_array(buffer):
  return buffer.kind == "temporary" and "(" not in buffer.shape and buffer.bytes > 2**16


CASES = [(form, None, 0) for form in FORMS] + [
  (form, split, axis)
  for form, (_, shapes) in FORMS.items()
  for axis in range(len(next(iter(shapes.values()))))
  for split in ("fsdp", "tp")
  if all(shape[axis] % 8 == 0 for shape in shapes.values())
]


@pytest.mark.parametrize(("form", "split", "axis"), CASES)
@pytest.mark.few(1, full=6)
def test_no_stack_is_copied(form, split, axis):
  found, stacks = temporaries(form, split, axis)
  inputs = LAYERS * 8 * TOKENS * WIDTH
  assert {inputs, inputs // 8} & set(found), "it sees the inputs of the layers"
  assert not set(found) & {size * cards for size in stacks for cards in (1, 8)}

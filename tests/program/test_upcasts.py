"""explain reports products that run in f32 because a low-precision weight meets an f32 input, and no others."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax import lax

import optax_mpo as mpo

X = jnp.ones((4, 8))
F32 = jnp.float32


def square(x):
  return jnp.mean(x.astype(F32) ** 2)


def found(loss, params, x=X, dtype=jnp.bfloat16, **options):
  """Returns the leaves that `explain` reports as computed in f32, and all its rows."""
  tx = mpo.compensated(optax.adam(1e-2))
  low, state = mpo.init(tx, params, dtype=dtype)
  rows = mpo.explain(loss, tx, low, state, x, **options)
  return {row.name for row in rows if "in f32 at" in row.why}, rows


pytestmark = pytest.mark.usefixtures("default_promotion")  # these tests need implicit conversions

W = {"w": jnp.ones((8, 8)), "b": jnp.zeros(8)}
STACK = {"w": jnp.ones((3, 8, 8)), "b": jnp.zeros((3, 8))}


def layer(p, x):
  return jnp.tanh(x @ p["w"] + p["b"])


def scanned(p, x):
  return square(lax.scan(lambda x, p: (layer(p, x).astype(x.dtype), None), x, p)[0])


PROMOTED = {
  "plain": (lambda p, x: square(layer(p, x)), W),
  "jit": (lambda p, x: square(jax.jit(layer)(p, x)), W),
  "remat": (lambda p, x: square(jax.checkpoint(layer)(p, x)), W),
  "scan": (scanned, STACK),
  "scan of remat": (
    lambda p, x: square(lax.scan(lambda x, p: (jax.checkpoint(layer)(p, x), None), x, p)[0]),
    STACK,
  ),
  "scan over a constant": (
    lambda p, x: square(lax.scan(lambda x, _: (layer(p, x), None), x, None, length=2)[0]),
    W,
  ),
  "cond": (lambda p, x: square(lax.cond(x.sum() > 0, layer, lambda p, x: x, p, x)), W),
  "transposed": (lambda p, x: square(x @ p["w"].T + p["b"]), W),
  "reshaped": (lambda p, x: square(x @ p["w"].reshape(4, 16)[:, :].reshape(8, 8) + p["b"]), W),
  "einsum": (lambda p, x: square(jnp.einsum("bi,io->bo", x, p["w"]) + p["b"]), W),
  "converted in a call": (lambda p, x: square(x @ jax.jit(lambda w: w.astype(F32))(p["w"]) + p["b"]), W),
  "custom_jvp": (lambda p, x: square(_custom(p["w"], x) + p["b"]), W),
  "vmap": (lambda p, x: square(jax.vmap(lambda x: x @ p["w"] + p["b"])(x)), W),
}


@jax.custom_jvp
def _custom(w, x):
  return x @ w


_custom.defjvp(lambda primals, tangents: (primals[1] @ primals[0], primals[1] @ tangents[0] + tangents[1] @ primals[0]))


@pytest.mark.parametrize("name", PROMOTED)
def test_a_weight_that_meets_an_f32_input_is_reported(name):
  loss, params = PROMOTED[name]
  names, rows = found(loss, params)
  assert names == {"params['w']"}
  assert "cast that to bfloat16, in Flax with dtype=jnp.bfloat16" in rows[1].why
  assert "test_upcasts.py" in rows[1].why
  assert found(loss, params, X.astype(jnp.bfloat16))[0] == (
    names if name == "converted in a call" else set()
  )  # what the message recommends
  assert found(lambda p, x: loss(jax.tree.map(lambda w: w.astype(F32), p), x), params)[0] == names


DELIBERATE = {
  "summed in f32": lambda p, x: square(
    lax.dot_general(x.astype(jnp.bfloat16), p["w"], (((1,), (0,)), ((), ())), preferred_element_type=F32) + p["b"]
  ),
  "logits to f32": lambda p, x: square((x.astype(jnp.bfloat16) @ p["w"]).astype(F32) + p["b"]),
  "a norm in f32": lambda p, x: square(x * p["b"].astype(F32) @ jnp.ones((8, 8)) + (x.astype(jnp.bfloat16) @ p["w"])),
  "an embedding": lambda p, x: square(p["w"].astype(F32)[jnp.zeros(4, int)] @ jnp.ones((8, 8)) + p["b"]),
  "there and back": lambda p, x: square(x.astype(jnp.bfloat16) @ p["w"].astype(F32).astype(jnp.bfloat16) + p["b"]),
}


@pytest.mark.parametrize("name", DELIBERATE)
def test_what_is_no_weight_converted_for_a_product_is_not(name):
  assert found(DELIBERATE[name], W)[0] == set()


def test_f32_weights_are_no_concern():
  tx = mpo.compensated(optax.adam(1e-2))
  low, state = mpo.init(tx, W, where=lambda *_: False)
  assert not any("f32" in row.why for row in mpo.explain(PROMOTED["plain"][0], tx, low, state, X))


def test_fp16_two_passes_and_convolutions():
  assert "jnp.float16" in found(PROMOTED["plain"][0], W, dtype=jnp.float16)[1][1].why
  kernel = {"w": jnp.ones((3, 8, 8))}

  def loss(p, x):
    return square(nn.Conv(8, (3,), use_bias=False, dtype=x.dtype).apply({"params": {"kernel": p["w"]}}, x))

  assert found(loss, kernel, X[None])[0] == {"params['w']"}
  assert found(loss, kernel, X[None].astype(jnp.bfloat16))[0] == set()


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_layers_of_flax(dtype):
  linen = nn.Sequential([nn.Dense(8, dtype=dtype), nn.Dense(8, dtype=dtype)])
  params = linen.init(jax.random.key(0), X)["params"]
  names, _ = found(lambda p, x: square(linen.apply({"params": p}, x)), params)
  assert len(names) == (0 if dtype else 2)
  model = nnx.Sequential(*(nnx.Linear(8, 8, dtype=dtype, rngs=nnx.Rngs(0)) for _ in range(2)))
  graphdef, params = nnx.split(model)
  names, _ = found(lambda p, x: square(nnx.merge(graphdef, p)(x)), params)
  assert len(names) == (0 if dtype else 2)

"""Random networks with random optimizers: `value_and_update` equals the ordinary step bit for bit.

Both sides are compiled without excess precision and, as all tests (tests/conftest.py), without fused multiply-adds.
"""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import strategies as st
from jax import lax

import optax_mpo as mpo
from tests.helpers import assert_same_bits, ordinary_step, quick_jit, relaxed

WIDTH = 16
POLICIES = {
  "none": lambda f: f,
  "full": jax.checkpoint,
  "dots": functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable),
}


@dataclasses.dataclass(frozen=True)
class Part:
  """A sequence of layers. `kind`: how they are applied. `tied` (first part only): they are applied again at the end."""

  kind: str
  depth: int
  block: str
  remat: str
  tied: bool


@dataclasses.dataclass(frozen=True)
class Network:
  parts: tuple[Part, ...]
  head: str
  dtype: str
  unused: bool
  aux: bool


parts = st.builds(
  Part,
  kind=st.sampled_from(["unrolled", "scan", "reverse", "nested", "unrolled_scan"]),
  depth=st.integers(1, 3),
  block=st.sampled_from(["dense", "gated", "normalised", "shared_inside"]),
  remat=st.sampled_from(list(POLICIES)),
  tied=st.booleans(),
)
networks = st.builds(
  Network,
  parts=st.lists(parts, min_size=1, max_size=3).map(tuple),
  head=st.sampled_from(["own", "tied", "none"]),
  dtype=st.sampled_from(["float32", "bfloat16", "mixed"]),
  unused=st.booleans(),
  aux=st.booleans(),
)

TRANSFORMATIONS = {
  "clip": lambda: optax.clip(0.1),
  "momentum": lambda: optax.trace(0.9, nesterov=True),
  "adam": lambda: optax.scale_by_adam(),
  "lion": lambda: optax.scale_by_lion(),
  "rms": lambda: optax.scale_by_rms(),
  "decay": lambda: optax.add_decayed_weights(0.01),
  "masked_decay": lambda: optax.add_decayed_weights(0.01, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
  "schedule": lambda: optax.scale_by_schedule(optax.linear_schedule(1.0, 0.5, 3)),
  "finite": lambda: optax.apply_if_finite(optax.identity(), 2),
  "global_norm": lambda: optax.clip_by_global_norm(0.05),
}
COUPLED = {"finite", "global_norm"}


def dense(p, x):
  return jnp.tanh(x @ p["w"] + p["b"][None])


def gated(p, x):
  return x + (x @ p["w"]) * jax.nn.sigmoid(x * p["scale"][None]) @ p["v"].T


def normalised(p, x):
  y = x.astype(jnp.float32)
  y = (y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6)).astype(x.dtype)
  return x + jax.jit(jax.nn.silu)((y * p["scale"][None]) @ p["w"]) @ p["v"]


def shared_inside(p, x):
  return x + jnp.tanh(x @ p["w"]) @ p["w"].T + lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x @ p["v"])


BLOCKS = {"dense": dense, "gated": gated, "normalised": normalised, "shared_inside": shared_inside}


def layer_params(network, key, lead):
  keys = jax.random.split(jax.random.key(key), 2)
  small = jnp.float32 if network.dtype == "float32" else jnp.bfloat16
  scales = jnp.bfloat16 if network.dtype == "bfloat16" else jnp.float32
  w, v = (jax.random.normal(k, (*lead, WIDTH, WIDTH)).astype(small) * WIDTH**-0.5 for k in keys)
  return {"w": w, "v": v, "b": jnp.zeros((*lead, WIDTH), scales), "scale": jnp.ones((*lead, WIDTH), scales)}


def make_params(network):
  params = {}
  for i, part in enumerate(network.parts):
    stacked = (part.depth, 2) if part.kind == "nested" else (part.depth,)
    if part.kind == "unrolled":
      params[f"part{i}"] = [layer_params(network, 10 * i + j, ()) for j in range(part.depth)]
    else:
      params[f"part{i}"] = layer_params(network, 10 * i, stacked)
  params["embed"] = layer_params(network, 90, ())["w"]
  if network.head == "own":
    params["head"] = layer_params(network, 91, ())["w"]
  if network.unused:
    params["unused"] = jnp.ones((WIDTH, WIDTH))
  return params


def run_part(part, p, x):
  block = POLICIES[part.remat](BLOCKS[part.block])

  def one(p, x):  # weights may have a wider dtype than activations, and a carry has to keep its dtype
    return block(p, x).astype(x.dtype)

  def scan(p, x, **options):
    return lax.scan(lambda x, p: (one(p, x), None), x, p, **options)[0]

  if part.kind == "unrolled":
    return functools.reduce(lambda x, p: one(p, x), p, x)
  if part.kind == "nested":
    return lax.scan(lambda x, p: (scan(p, x), None), x, p)[0]
  return scan(p, x, reverse=part.kind == "reverse", unroll=part.kind == "unrolled_scan")


def make_loss(network):
  @relaxed  # weights and activations of two dtypes meet, as in models of users
  def loss(params, x):
    x = x.astype(params["embed"].dtype) @ params["embed"]
    for i, part in enumerate(network.parts):
      x = run_part(part, params[f"part{i}"], x)
    if network.parts[0].tied:
      x = run_part(network.parts[0], params["part0"], x)
    if network.head != "none":
      x = x @ (params["head"] if network.head == "own" else params["embed"].T)
    value = jnp.mean(jnp.square(x.astype(jnp.float32)))
    return (value, {"last": x, "name": None}) if network.aux else value

  return loss


def make_optimizer(names, bits):
  tx = optax.chain(*(TRANSFORMATIONS[name]() for name in names), optax.scale(-0.01))
  return tx if bits is None else mpo.compensated(tx, extra_bits=bits)


@hypothesis.settings(max_examples=5, deadline=None, derandomize=True)
@hypothesis.given(
  networks,
  st.lists(st.sampled_from(list(TRANSFORMATIONS)), min_size=1, max_size=3),
  st.sampled_from([None, 0, 4, 8, 16]),
)
@pytest.mark.full
def test_random_networks_and_optimizers(network, names, bits):
  loss, tx = make_loss(network), make_optimizer(names, bits)
  if bits is None:
    params = make_params(network)
    state = tx.init(params)
  else:
    params, state = mpo.init(tx, make_params(network), where=lambda path, leaf: leaf.dtype != jnp.float32 or bits != 4)
  fused = mpo.value_and_update(loss, tx, has_aux=network.aux, two_pass=bool(COUPLED & set(names)))
  one, other = quick_jit(ordinary_step(loss, tx, has_aux=network.aux)), quick_jit(fused)
  want, got = (None, params, state), (None, params, state)
  for i in range(3):
    x = jax.random.normal(jax.random.key(100 + i), (4, WIDTH))
    want, got = one(*want[1:], x), other(*got[1:], x)
    assert_same_bits(got, want)

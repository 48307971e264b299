"""`per_layer` on a scanned model equals the transformation on a list of layers, bit for bit, and is updated in the scan.

Both sides are compiled without fusion, as in `tests/stepping/test_stacks.py`, and without XLA's algebraic simplifier:
it divides by a scalar that divides only one array as a product, and a list of layers shares the scalars of all layers.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from optax import contrib

import optax_mpo as mpo
from tests.helpers import assert_same_bits, quick_jit

L, D = 3, 16
quick = functools.partial(quick_jit, xla_disable_hlo_passes="fusion,algsimp")
INNER = {
  "muon": lambda: contrib.muon(1e-2),
  "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
  "lamb": lambda: optax.lamb(1e-2, weight_decay=0.1),
  "lars": lambda: optax.lars(1e-1, weight_decay=0.1),
  "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(1e-2), optax.sgd(1e-1, momentum=0.9)),
  "clip_by_block_rms": lambda: optax.chain(optax.clip_by_block_rms(1e-3), optax.adam(1e-2)),
}


def make_params():
  keys = jax.random.split(jax.random.key(0), 3)
  w, bias = jax.random.normal(keys[0], (L, D, D)) * D**-0.5, jax.random.normal(keys[1], (L, D)) * 0.1
  return {"head": jax.random.normal(keys[2], (D, D // 2)) * D**-0.5, "layers": {"w": w, "bias": bias}}


def layer(x, p):
  return x + jnp.tanh(x @ p["w"] + p["bias"][None]), None


def loss_of(run):
  def loss(params, x):
    x = run(x.astype(params["head"].dtype), params["layers"])
    return jnp.mean(jnp.square((x @ params["head"]).astype(jnp.float32)))

  return loss


scanned = loss_of(lambda x, layers: lax.scan(layer, x, layers)[0])
unrolled = loss_of(lambda x, layers: functools.reduce(lambda x, p: layer(x, p)[0], layers, x))


def is_stack(path, leaf):
  return path[0].key == "layers"


def as_list(params):
  return params | {"layers": [jax.tree.map(lambda leaf: leaf[i], params["layers"]) for i in range(L)]}


def batch(i):
  return jax.random.normal(jax.random.key(100 + i), (4, D))


def as_one(params):
  return params | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])}


def in_two_programs(loss, tx):
  """The ordinary step, which compiles faster if its gradients are a program of their own."""
  gradients, update = quick(jax.grad(loss)), quick(lambda *args: apply(tx, *args))
  return lambda params, state, x: (None, *update(gradients(params, x), state, params))


def apply(tx, grads, state, params):
  updates, state = tx.update(grads, state, params)
  return mpo.apply_updates(params, updates), state


@pytest.mark.parametrize("name", list(INNER))
@pytest.mark.parametrize(
  "make_step", [in_two_programs, lambda *args: quick(mpo.value_and_update(*args))], ids=["ordinary", "fused"]
)
@pytest.mark.few(4)
def test_training_equals_that_of_a_list_of_layers(name, make_step):
  tx, plain = mpo.per_layer(INNER[name](), is_stack), INNER[name]()
  params = make_params()
  got, want = (None, params, tx.init(params)), (None, as_list(params), plain.init(as_list(params)))
  one, other = make_step(scanned, tx), in_two_programs(unrolled, plain)
  for i in range(30):
    got, want = one(*got[1:], batch(i)), other(*want[1:], batch(i))
  assert_same_bits(got[1], as_one(want[1]))

"""A small model whose state, or weights too, can be in host memory."""

import jax
import jax.numpy as jnp
import numpy as np

import optax_mpo as mpo

HOST = jax.sharding.NamedSharding(
  jax.make_mesh((1,), ("device",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1]),
  jax.sharding.PartitionSpec(),
  memory_kind="pinned_host",
)
WIDTH, LAYERS = 320, 3
X = jax.random.normal(jax.random.key(2), (8, WIDTH), jnp.bfloat16)


def masters():
  keys = jax.random.split(jax.random.key(0), 4)
  return {
    "embedding": jax.random.normal(keys[3], (WIDTH, WIDTH)) * 0.05,
    "layers": {"w": jax.random.normal(keys[0], (LAYERS, WIDTH, WIDTH)) * 0.05, "b": jnp.zeros((LAYERS, WIDTH))},
    "head": jax.random.normal(keys[1], (WIDTH, WIDTH)) * 0.05,
  }


def loss_fn(params, x):
  def layer(x, p):
    return jnp.tanh(x @ p["w"] + p["b"][None]), None

  x, _ = jax.lax.scan(jax.checkpoint(layer), x @ params["embedding"], params["layers"])
  return jnp.mean((x @ params["head"]).astype(jnp.float32) ** 2)


def kinds(tree):
  return jax.tree.map(lambda x: x.sharding.memory_kind, tree)


def on_host(tree):
  """The tree with its large leaves in host memory."""

  def move(x):
    return jax.device_put(x, HOST) if x.size > 2**16 else x

  return jax.tree.map(move, tree)


def assert_equal(a, b):
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def ordinary_update(tx, grads, state, params):
  updates, state = tx.update(grads, state, params)
  return mpo.apply_updates(params, updates), state

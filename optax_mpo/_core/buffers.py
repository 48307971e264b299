"""Gives arrays buffers of their own, so that everything a function returns can be donated.

Why: JAX refuses to donate a buffer twice, and donating it deletes every array that shares it. Outside of `jit`, a leaf
that a function passes through is the argument itself: f32 params that stay in f32, or a state that starts as a copy of
the params (`optax.schedule_free`, `optax.lookahead`). A NumPy array that is passed through changes with the caller's.

How: compare buffers by address, and copy a leaf whose buffer is taken already. Under `jit` there is nothing to do: each
result has its own buffer.
"""

from typing import TypeVar

import jax
import numpy as np
from jax.core import Tracer

from optax_mpo._core.annotations import PyTree

Tree = TypeVar("Tree")

_HOST = -1  # in place of the number of a device


def own(tree: Tree, others: PyTree) -> Tree:
  """Returns `tree`, with copies of the arrays that share a buffer with an earlier leaf or with a leaf of `others`.

  Memory: that of the copies.
  """
  taken = {address for leaf in jax.tree.leaves(others) for address in _addresses(leaf)}

  def own_leaf(leaf: PyTree) -> PyTree:
    addresses = _addresses(leaf)
    if not taken.isdisjoint(addresses):
      if isinstance(leaf, np.ndarray):
        return leaf.copy()
      return jax.device_put(leaf, leaf.sharding, may_alias=False)
    taken.update(addresses)
    return leaf

  return jax.tree.map(own_leaf, tree)


def _addresses(leaf: object) -> list[tuple[int, int]]:
  """Device and address of each buffer of an array; empty for tracers, deleted arrays and non-arrays."""
  if isinstance(leaf, np.ndarray):
    return [(_HOST, leaf.ctypes.data)]
  if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer) or leaf.is_deleted():
    return []
  return [(shard.device.id, shard.data.unsafe_buffer_pointer()) for shard in leaf.addressable_shards]

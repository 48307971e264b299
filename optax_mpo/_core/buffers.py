"""Arrays with buffers of their own, so that what a function returns can be donated whole.

Why: JAX refuses to donate one buffer twice, and to donate one deletes every array that shares it. Outside of `jit` a
leaf that a function passes through is its argument: f32 params that stay in f32, or a state that starts as a copy of
the params (`optax.schedule_free`, `optax.lookahead`).

How: buffers are compared by their addresses, and a leaf whose buffer is taken already is copied. Under `jit` there is
nothing to do: each result has a buffer of its own.
"""

from typing import Any, TypeVar

import jax
from jax.core import Tracer

Tree = TypeVar("Tree")


def own(tree: Tree, others: Any) -> Tree:
  """Returns `tree` with copies in place of the arrays that share a buffer with each other or with a leaf of `others`.

  Memory: that of the copies.
  """
  taken = {address for leaf in jax.tree.leaves(others) for address in _addresses(leaf)}

  def own_leaf(leaf: Any) -> Any:
    addresses = _addresses(leaf)
    if not taken.isdisjoint(addresses):
      return jax.device_put(leaf, leaf.sharding, may_alias=False)
    taken.update(addresses)
    return leaf

  return jax.tree.map(own_leaf, tree)


def _addresses(leaf: Any) -> list[tuple[int, int]]:
  """The device and the address of each buffer of an array; none for what is no array that exists."""
  if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer) or leaf.is_deleted():
    return []
  return [(shard.device.id, shard.data.unsafe_buffer_pointer()) for shard in leaf.addressable_shards]

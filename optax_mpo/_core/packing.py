"""Many small arrays as a few large ones: a tree whose small leaves lie in one array for each dtype.

Why: a jitted step is handed each array of its state one by one, whatever its size. A model of a thousand leaves has
thousands of arrays, most of them vectors.

How: an array lies in the packed one as `jnp.reshape(x, -1)` does, one after the other. The tree stays, with a
placeholder for each packed leaf, so that large leaves keep their paths.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_mpo._core import host, trees, types
from optax_mpo._core.annotations import PyTree, PyTreeDef, Values


class Elsewhere(NamedTuple):
  """Stands in a tree for a leaf that is packed."""


class Layout(NamedTuple):
  """Where the leaves of a tree are.

  Attributes:
    treedef: the structure of the tree.
    places: for each leaf the number of the array that it lies in, and its shape; None for a leaf of its own.
  """

  treedef: PyTreeDef
  places: tuple[tuple[int, tuple[int, ...]] | None, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedState:
  """State of `packed`.

  Attributes:
    arrays: the small leaves of the inner state, one after the other, in one array for each dtype.
    rest: the inner state, with an empty node in place of each leaf that is in `arrays`.
    layout: where each leaf is. `optax_mpo.unpacked` puts the inner state together.
  """

  arrays: tuple[jax.Array, ...]
  rest: PyTree
  layout: Layout = dataclasses.field(metadata={"static": True})


def pack(tree: PyTree, at_most: int) -> PackedState:
  """Packs the leaves of a tree that have `at_most` elements or fewer, where there are several of a dtype."""
  leaves, treedef = jax.tree.flatten(tree)
  by_dtype: dict[np.dtype, list[int]] = {}
  for i, leaf in enumerate(leaves):
    if _can_be_packed(leaf) and leaf.size <= at_most:
      by_dtype.setdefault(jnp.dtype(leaf.dtype), []).append(i)
  kinds = [indices for indices in by_dtype.values() if len(indices) > 1]
  number = {i: k for k, indices in enumerate(kinds) for i in indices}
  places = tuple((number[i], tuple(leaf.shape)) if i in number else None for i, leaf in enumerate(leaves))
  return packed_again(leaves, Layout(treedef, places))


def packed_again(leaves: Values, layout: Layout) -> PackedState:
  """Packs the leaves of a tree as a layout says."""
  arrays: dict[int, list[jax.Array]] = {}
  for leaf, place in zip(leaves, layout.places, strict=True):
    if place is not None:
      arrays.setdefault(place[0], []).append(jnp.reshape(leaf, -1))
  rest = [leaf if place is None else Elsewhere() for leaf, place in zip(leaves, layout.places, strict=True)]
  return PackedState(
    tuple(jnp.concatenate(arrays[k]) for k in range(len(arrays))), layout.treedef.unflatten(rest), layout
  )


def unpack(state: PackedState) -> PyTree:
  """Returns the tree that was packed, of arrays or of ShapeDtypeStructs."""
  ends, leaves = [0] * len(state.arrays), state.layout.treedef.flatten_up_to(state.rest)
  for i, place in enumerate(state.layout.places):
    if place is not None:
      k, shape = place
      start, ends[k] = ends[k], ends[k] + math.prod(shape)
      leaves[i] = _cut(state.arrays[k], start, shape)
  return state.layout.treedef.unflatten(leaves)


def unpack_all(tree: PyTree) -> PyTree:
  """Returns a tree with every `PackedState` in it unpacked."""
  return jax.tree.map(lambda x: unpack_all(unpack(x)) if is_state(x) else x, tree, is_leaf=is_state)


def pack_like(tree: PyTree, form: PyTree) -> PyTree:
  """Returns a tree packed as `form` is, of which it has the leaves: the inverse of `unpack_all`."""

  def pack_one(form: PyTree, part: PyTree) -> PyTree:
    if not is_state(form):
      return part
    return packed_again(form.layout.treedef.flatten_up_to(pack_like(part, unpack(form))), form.layout)

  return jax.tree.map(pack_one, form, tree, is_leaf=is_state)


def is_state(x: object) -> bool:
  """Whether `x` is the state of a `packed`."""
  return isinstance(x, PackedState)


def _cut(
  array: jax.Array | jax.ShapeDtypeStruct, start: int, shape: tuple[int, ...]
) -> jax.Array | jax.ShapeDtypeStruct:
  if isinstance(array, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(shape, array.dtype)
  return jnp.reshape(array[start : start + math.prod(shape)], shape)


def _can_be_packed(leaf: PyTree) -> bool:
  if not trees.is_array(leaf) or host.is_on_host(leaf):
    return False
  return not jnp.issubdtype(leaf.dtype, jax.dtypes.extended) and not types.is_packed(leaf.dtype)

"""Splits a batch into microbatches."""

import jax
import jax.numpy as jnp
import numpy as np

from optax_mpo._core import overwritten, trees
from optax_mpo._core.annotations import PyTree


def spread(axes: PyTree, tree: PyTree, what: str) -> list[int | None]:
  """Returns one axis for each leaf of `tree`, from axes that may stand for whole subtrees.

  Raises:
    ValueError: if `axes`, the argument `what`, does not fit.
  """
  marked = jax.tree.map(lambda a: "none" if a is None else a, axes, is_leaf=lambda a: a is None)
  try:
    found = jax.tree.leaves(jax.tree.broadcast(marked, tree))
  except ValueError as error:
    raise ValueError(f"{what}={axes!r} does not fit {jax.tree.structure(tree)}, as in jax.vmap.") from error
  return [None if a == "none" else a for a in found]


def check_size(leaves: list[jax.Array], axes: list[int | None], count: int, who: str, in_axes: PyTree) -> None:
  """Checks that leaves with a batch axis have the same batch, and that it splits into `count` microbatches.

  Raises:
    ValueError: otherwise.
  """
  batched = [(x, axis) for x, axis in zip(leaves, axes, strict=True) if trees.is_array(x) and axis is not None]
  for x, axis in batched:
    if not isinstance(axis, int) or not -x.ndim <= axis < x.ndim:
      raise ValueError(
        f"{who}: in_axes={in_axes!r} gives {axis!r} for an array of shape {list(x.shape)}, which is none of its axes. "
        "Give the axis of the batch, or None to what has none."
      )
  sizes = {x.shape[axis]: None for x, axis in batched}
  if len(sizes) != 1:
    raise ValueError(
      f"{who}: with microbatches, the inputs have to share one batch axis, but in_axes={in_axes!r} finds the sizes "
      f"{list(sizes)}. Give None to what has none. A random key from jax.random.PRNGKey counts as data, of size 2: "
      "make it with jax.random.key, which is split without an axis."
    )
  (size,) = sizes
  if size % count:
    raise ValueError(f"{who}: a batch of {size} does not split into {count} microbatches of the same size.")


def split(x: jax.Array | np.ndarray, axis: int, count: int, interleaved: bool = False) -> jax.Array:
  """`[..., batch, ...]` to `[count, ..., batch / count, ...]`: contiguous parts, or entries in turn."""
  axis %= x.ndim
  rest = x.shape[axis] // count
  shape = (rest, count) if interleaved else (count, rest)
  x = jnp.asarray(x).reshape(*x.shape[:axis], *shape, *x.shape[axis + 1 :])
  return jnp.moveaxis(x, axis + interleaved, 0)


def refuse_overwritten(params: PyTree, who: str) -> None:
  """Raises ValueError for leaves whose gradient is their new value: those of several microbatches have no sum."""
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  replaced = [trees.name(path) for path in paths if overwritten.is_overwritten(path)]
  if replaced:
    raise ValueError(
      f"{who}: microbatches add up gradients, and {trees.listed(replaced)} are overwritten with theirs, which have no "
      "sum. Leave microbatches out where there are FP8 layers."
    )

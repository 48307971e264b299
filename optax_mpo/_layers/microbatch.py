"""Splits the batch inside a layer: the gradient is summed over the parts, and the weights are updated once.

Why: gradient accumulation usually runs several backward passes and adds up their gradients, in a tree as large as the
model. Gradient release has no such tree, so the two are said to exclude each other. They do if the batch is split
around the model. If it is split inside each layer, only what goes from layer to layer spans the whole batch, and the
sum is as large as one layer.

How: the layer becomes a `lax.scan` over the parts of its inputs, with `jax.checkpoint` around each part. JAX's own
derivative of that scan adds up the gradients of what all parts share: the weights. They are cast to f32 before the scan
and back inside it, so that the sum is in f32 and is rounded once.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from optax_mpo._core import batches, trees, types
from optax_mpo._core.annotations import PyTree


def split(
  fn: Callable[..., PyTree], count: int, in_axes: PyTree, out_axes: PyTree, policy: Callable[..., bool] | None, who: str
) -> Callable[..., PyTree]:
  """Returns `fn(params, *inputs, **kwargs)` that computes the parts of its batch one after the other.

  Args:
    fn: a function of weights and inputs.
    count: the number of parts, all of one size.
    in_axes: for the inputs (a tuple, or one for all), as in `jax.vmap`: the batch axis, or None for what all parts get.
      kwargs go to all parts.
    out_axes: likewise for the results; with None, floats are averaged over the parts and integers are summed.
    policy: the policy of `jax.checkpoint` for what is kept of each part; None keeps only its inputs.
    who: the caller's name, for errors.
  """

  @functools.wraps(fn)
  def parts(params: PyTree, *inputs: PyTree, **kwargs: PyTree) -> PyTree:
    batches.refuse_overwritten(params, who)
    leaves, treedef = jax.tree.flatten(inputs)
    axes = batches.spread(in_axes, inputs, f"{who}: in_axes")
    batches.check_size(leaves, axes, count, who, in_axes)
    moved = [
      batches.split(leaf, axis, count) if trees.is_array(leaf) and axis is not None else None
      for leaf, axis in zip(leaves, axes, strict=True)
    ]

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=policy)
    def one(wide: PyTree, part: list[jax.Array]) -> PyTree:
      narrow = jax.tree.map(lambda w, p: w.astype(p.dtype), wide, params)
      merged = [leaf if p is None else p for leaf, p in zip(leaves, part, strict=True)]
      return fn(narrow, *treedef.unflatten(merged), **kwargs)

    wide = jax.tree.map(_widen, params)
    _, out = lax.scan(lambda _, part: (None, one(wide, part)), None, moved)
    results, out_treedef = jax.tree.flatten(out)
    out_of = batches.spread(out_axes, out, f"{who}: out_axes")
    return out_treedef.unflatten([_merge(y, axis) for y, axis in zip(results, out_of, strict=True)])

  return parts


def _widen(weight: jax.Array) -> jax.Array:
  return weight.astype(jnp.float32) if weight.dtype in types.LOW_DTYPES else weight


def _merge(y: jax.Array, axis: int | None) -> jax.Array:
  """Undoes `batches.split`; without an axis, averages floats and sums integers."""
  if axis is None:
    if jnp.issubdtype(y.dtype, jnp.inexact):
      return jnp.mean(y, 0)
    return jnp.sum(y, 0, dtype=y.dtype if y.dtype.itemsize >= 4 else jnp.int32)  # also with jax_enable_x64
  axis %= y.ndim - 1
  y = jnp.moveaxis(y, 0, axis)
  return y.reshape(*y.shape[:axis], y.shape[axis] * y.shape[axis + 1], *y.shape[axis + 2 :])

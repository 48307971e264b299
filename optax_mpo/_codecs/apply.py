"""Adds updates to params, so that what `compensated` computed is what results.

Why: Optax adds an f32 update to a bf16 weight in f32, and casts. The update of `compensated` leads to its new weight in
that way too, but for a few pairs of old and new (`bf16` says which).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_mpo._codecs import checks, formats, known_weights
from optax_mpo._core import trees

PyTree = Any


def apply_updates(params: PyTree, updates: optax.Updates) -> PyTree:
  """Adds `updates` to `params`, like `optax.apply_updates`, and exactly for the updates of `compensated`.

  The weights that result are those `compensated` computed, to the last bit, at any ratio of old to new (outside of
  `jit`, an update that overflows f32 excepted). `optax.apply_updates` adds in f32, which has 24 bits: where one step
  makes a weight 65536 times smaller it can miss by up to 2^-13 of the old weight, and weights under 2^-100 by as much.
  The compensation bits never move a weight, whichever function is used: a master weight always rounds to its param.

  Args:
    params: a tree of arrays; `None` leaves are passed over.
    updates: a tree of the same structure and shapes.

  Returns:
    Params of the same structure, shapes and dtypes.

  Raises:
    ValueError: where structures or shapes differ, with the path of the leaf.

  Example:
    >>> import jax.numpy as jnp, optax, optax_mpo as mpo
    >>> mpo.apply_updates({"w": jnp.ones(2, jnp.bfloat16)}, {"w": jnp.full(2, 0.5)})
    {'w': Array([1.5, 1.5], dtype=bfloat16)}
  """
  steps = trees.flatten_like(params, updates, "apply_updates: the tree of updates", "Pass what tx.update returned.")
  new = []
  for (leaf_name, leaf), step in zip(trees.named_leaves(params), steps, strict=True):
    made = known_weights.new_weights(step, leaf)
    if made is not None:
      new.append(made)
      continue
    if known_weights.new_weights(leaf, step) is not None:
      raise TypeError(
        f"apply_updates: {leaf_name} is an update of compensated, and its update is the param. "
        "Call apply_updates(params, updates)."
      )
    if not trees.is_array(step) or step.shape != jnp.shape(leaf):
      raise ValueError(
        f"apply_updates: {leaf_name} has shape {jnp.shape(leaf)}, but its update is {checks.described(step)}. "
        "Pass what tx.update returned."
      )
    leaf = jnp.asarray(leaf)
    if formats.is_low(leaf) and jnp.issubdtype(step.dtype, jnp.floating):
      new.append(formats.add_difference(leaf, jnp.asarray(step).astype(jnp.float32)))
    else:
      new.append(formats.add(leaf, jnp.asarray(step)).astype(leaf.dtype))
  return jax.tree.structure(params).unflatten(new)

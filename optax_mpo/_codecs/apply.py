"""Adds updates to params so that the result is exactly what `compensated` computed.

Why: Optax adds an f32 update to a bf16 weight in f32, and casts. With an update of `compensated` this also gives its
new weight, except for a few pairs of old and new weights (listed in `bf16`).

How: within one trace the new weights are known (`known_weights`). Otherwise `formats.add_difference` handles the pairs.
Overwritten leaves get the value that their update holds.
"""

import jax
import jax.numpy as jnp
import optax

from optax_mpo._codecs import checks, formats, known_weights
from optax_mpo._core import host, overwritten, trees
from optax_mpo._core.annotations import PyTree


def apply_updates(params: PyTree, updates: optax.Updates) -> PyTree:
  """Adds `updates` to `params`, like `optax.apply_updates`, but exactly for the updates of `compensated`.

  The new weights are those that `compensated` computed, bit for bit, at any ratio of old to new (except, outside of
  `jit`, for an update that overflows f32). `optax.apply_updates` adds in f32, with 24 significand bits. If one update
  makes a weight 65536 times smaller, it can miss by up to 2^-13 of the old weight; for a weight under 2^-100, by up to
  2^-99. Compensation bits never move a weight, whichever function is used: a master weight always rounds to its param.

  Leaves under the key `_overwrite_with_gradient` (scales and histories of Flax's FP8 layers) become their gradients, by
  either function.

  Args:
    params: a tree of arrays; `None` is skipped.
    updates: a tree of the same structure and shapes.

  Returns:
    Params of the same structure, shapes and dtypes.

  Raises:
    ValueError: if structures or shapes differ, with the path of the leaf.
    TypeError: if a leaf of `params` is not an array, or the two arguments are swapped; the latter is noticed only while
      tracing.

  Example:
    >>> import jax.numpy as jnp, optax, optax_mpo as mpo
    >>> mpo.apply_updates({"w": jnp.ones(2, jnp.bfloat16)}, {"w": jnp.full(2, 0.5)})
    {'w': Array([1.5, 1.5], dtype=bfloat16)}
  """
  trees.check_arrays(params, "apply_updates")
  old, params = params, host.fetched(params)
  steps = trees.flatten_like(params, updates, "apply_updates: the tree of updates", "Pass what tx.update returned.")
  new = []
  for (leaf_name, leaf), step in zip(trees.named_leaves(params), steps, strict=True):
    if isinstance(step, overwritten.NewValue):
      checks.check_new_value("apply_updates", leaf_name, leaf, step.value)
      new.append(jnp.asarray(leaf + step))
      continue
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
  return host.stored_like(jax.tree.structure(params).unflatten(new), old)

"""Leaves whose gradient is their new value: the scales and histories of FP8 products in Flax and qwix.

Why: an FP8 layer measures its inputs and gradients in the backward pass, and has no other way out of it than the
gradients of its scales and histories. These are no gradients, but the values for the next step. Optimizers must not see
them.

How: Flax keeps such leaves in a collection of its own, `_overwrite_with_gradient`. A leaf with this key in its path is
overwritten. Its update is a `NewValue`, which replaces what it is added to. A difference could not be exact: f32 has no
`u` for which `1000 + u` is 1e-6.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_mpo._core.annotations import KeyPath, PyTree

KEY = "_overwrite_with_gradient"  # flax.linen.fp8_ops.OVERWRITE_WITH_GRADIENT


class NewValue:
  """The update of an overwritten leaf: `param + NewValue(x)` is `x`, also in `optax.apply_updates`.

  It is a pytree node of `value` and a flag. A wrapper that sets updates to zero, such as `optax.MultiSteps` between its
  steps, sets the flag to zero as well, and then the param stays as it is.
  """

  __array_ufunc__ = None  # NumPy arrays leave the addition to __radd__, as JAX's do

  def __init__(self, value: ArrayLike, is_new: ArrayLike = np.True_):
    self.value, self.is_new = value, is_new

  def __radd__(self, old: ArrayLike) -> ArrayLike:
    if isinstance(self.is_new, np.bool_):
      return self.value if self.is_new else old
    flag, value = jnp.asarray(self.is_new).astype(bool), jnp.asarray(self.value)
    flag = flag.reshape(flag.shape + (1,) * (value.ndim - flag.ndim))  # it has axes of its own after a vmap
    return jnp.where(flag, value, old)

  def __repr__(self) -> str:
    return f"NewValue({self.value!r}, {self.is_new!r})"


jax.tree_util.register_pytree_with_keys(
  NewValue,
  lambda x: (((jax.tree_util.GetAttrKey("value"), x.value), (jax.tree_util.GetAttrKey("is_new"), x.is_new)), None),
  lambda _, children: NewValue(*children),
)


def is_overwritten(path: KeyPath) -> bool:
  """Whether the leaf at this key path is overwritten with its gradient."""
  return any(getattr(key, "key", None) == KEY for key in path)


def flags(tree: PyTree) -> list[bool]:
  """Returns for each leaf whether it is overwritten."""
  return [is_overwritten(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def is_in(tree: PyTree) -> bool:
  """Whether a tree has overwritten leaves at its top, as Flax's variables do: `{"params": ..., KEY: ...}`."""
  return isinstance(tree, Mapping) and KEY in tree

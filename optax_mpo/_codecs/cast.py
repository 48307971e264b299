"""Casts params to low precision, with the rounding of the compensation codecs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_mpo._codecs import formats
from optax_mpo._core import buffers, trees

PyTree = Any


def cast(
  params: PyTree,
  dtype: Any = jnp.bfloat16,
  where: Callable[[tuple[Any, ...], jax.Array], bool] | None = None,
) -> PyTree:
  """Casts the f32 leaves of `params` to `dtype`, rounding as the compensation codec does (half away from zero).

  In float16, what rounds beyond 65504 becomes infinite, as `astype` makes it.

  These are the weights that `init` makes for bits=16 and bits=0. With 8 or 4 bits a master weight is first rounded to
  what those hold, and about one weight in 512 or 32 comes to lie in the middle between two bf16 numbers and rounds up.

  Args:
    params: a tree of arrays. Leaves of other dtypes than f32 stay as they are.
    dtype: the low precision, bfloat16 or float16.
    where: `where(path, leaf) -> bool` says which f32 leaves go low, with JAX's key paths
      (`jax.tree_util.keystr(path)` makes a string of one). None: all of them.

  Returns:
    A tree of the same structure and shapes. Outside of jit, leaves that stay as they are are copied, so that the result
    can be donated.

  Raises:
    ValueError: for another dtype.
    TypeError: for a float64 leaf that is to be cast, and where `dtype` is none.

  Memory: 2 bytes per parameter that is cast, and the copies.

  Example:
    >>> import jax.numpy as jnp, optax_mpo as mpo
    >>> params = {"w": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    >>> low = mpo.cast(params, where=lambda path, leaf: leaf.ndim >= 2)
    >>> low["w"].dtype.name, low["scale"].dtype.name
    ('bfloat16', 'float32')
  """
  new = [
    formats.split(jnp.asarray(leaf), dtype, 0)[0] if low else leaf for leaf, low in chosen(params, dtype, where, "cast")
  ]
  return buffers.own(jax.tree.structure(params).unflatten(new), params)


def chosen(params: PyTree, dtype: Any, where: Callable[[Any, Any], bool] | None, caller: str) -> list[tuple[Any, bool]]:
  """Returns the leaves, each with whether it is to go low."""
  try:
    jnp.dtype(dtype)
  except (TypeError, ValueError):  # NumPy tries to read a structure out of a dict
    raise TypeError(
      f"{caller}: dtype has to be bfloat16 or float16, but it is a {type(dtype).__name__}. Call "
      f"{'cast(params, dtype)' if caller == 'cast' else 'init(tx, params, dtype=dtype)'}."
    ) from None
  if not formats.is_format(dtype):
    names = " or ".join(formats.NAMES)
    raise ValueError(f"dtype has to be {names}, but it is {jnp.dtype(dtype)}: there is no codec for other formats.")
  found = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    asked = trees.is_array(leaf) and leaf.dtype in (jnp.float32, jnp.float64) and (where is None or where(path, leaf))
    if asked and leaf.dtype == jnp.float64:
      raise TypeError(f"{trees.name(path)} is float64. Convert it to float32 first: its further bits would be lost.")
    found.append((leaf, bool(asked)))
  return found

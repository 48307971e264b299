"""Casts params to low precision, rounding as the compensation codecs do."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from optax_mpo._codecs import formats
from optax_mpo._core import buffers, overwritten, trees
from optax_mpo._core.annotations import KeyPath, PyTree

Where = Callable[[KeyPath, jax.Array], bool]


def cast(
  params: PyTree,
  dtype: DTypeLike = jnp.bfloat16,
  where: Callable[[KeyPath, jax.Array], bool] | None = None,
) -> PyTree:
  """Casts the f32 leaves of `params` to `dtype`, rounding half away from zero as the compensation codec does.

  In float16, numbers that round beyond 65504 become infinite, as with `astype`.

  The result equals the weights that `init` makes for extra_bits=16 and 0. With 8 or 4 bits, `init` first rounds master
  weights to what those bits hold. About one weight in 512 (8 bits) or 32 (4 bits) then lies halfway between two bf16
  numbers and rounds up instead of down.

  Args:
    params: a tree of arrays. Not cast are arrays of dtypes other than f32, leaves that are not arrays, and leaves
      under the key `_overwrite_with_gradient`, such as the scales of Flax's FP8 layers.
    dtype: the low precision, bfloat16 or float16. (float8_e4m3fn needs scales; `init` makes them.)
    where: `where(path, leaf) -> bool` selects the f32 leaves to cast, by JAX's key paths (`jax.tree_util.keystr(path)`
      gives a string). None: all of them.

  Returns:
    A tree of the same structure and shapes. Outside of jit, leaves that are not cast are copied, so that the result can
    be donated.

  Raises:
    ValueError: if `dtype` is neither bfloat16 nor float16.
    TypeError: if `dtype` is not a dtype, or a leaf to cast is float64.

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


def chosen(params: PyTree, dtype: DTypeLike, where: Where | None, caller: str) -> list[tuple[jax.Array, bool]]:
  """Returns each leaf and whether to cast it."""
  names = [name for name in formats.NAMES if caller != "cast" or formats.compute_dtype(jnp.dtype(name)) == name]
  known = f"{', '.join(names[:-1])} or {names[-1]}"
  try:
    jnp.dtype(dtype)
  except (TypeError, ValueError):  # NumPy tries to read a structure out of a dict
    raise TypeError(
      f"{caller}: dtype has to be {known}, but it is a {type(dtype).__name__}. Call "
      f"{'cast(params, dtype)' if caller == 'cast' else 'init(tx, params, dtype=dtype)'}."
    ) from None
  name = jnp.dtype(dtype).name
  if name in formats.NAMES and name not in names:
    raise ValueError(
      f"cast: {name} params need scales, for which a cast has no place. Make params and state together, with "
      "optax_mpo.init(tx, params, dtype=...), and read the weights with optax_mpo.decoded(params, opt_state)."
    )
  if name not in names:
    raise ValueError(f"dtype has to be {known}, but it is {name}: there is no codec for other formats.")
  found = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    wide = trees.is_array(leaf) and leaf.dtype in (jnp.float32, jnp.float64) and not overwritten.is_overwritten(path)
    asked = wide and (where is None or where(path, leaf))
    if asked and leaf.dtype == jnp.float64:
      raise TypeError(f"{trees.name(path)} is float64. Convert it to float32 first: its further bits would be lost.")
    found.append((leaf, bool(asked)))
  return found

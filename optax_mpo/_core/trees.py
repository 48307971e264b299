"""Names for the leaves of a tree, and the checks that every public function makes on its trees."""

import dataclasses
import numbers
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from optax_mpo._core import types
from optax_mpo._core.annotations import KeyPath, PyTree


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Static:
  """A value that is no array, in a tree: what a traced function returns beside its arrays."""

  value: PyTree


def name(path: KeyPath, root: str = "params") -> str:
  """Returns a leaf's name as written in Python, such as `params['head']['w']`."""
  return root + jax.tree_util.keystr(path)


def named_leaves(tree: PyTree, root: str = "params") -> list[tuple[str, PyTree]]:
  """Returns the leaves of `tree` with their names."""
  return [(name(path, root), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def is_array(x: object) -> bool:
  """Whether `x` has a shape and a dtype: a JAX or NumPy array, a tracer, or a ShapeDtypeStruct."""
  return hasattr(x, "shape") and hasattr(x, "dtype")


def flatten_like(tree: PyTree, other: PyTree, what: str, hint: str, root: str = "params") -> list[PyTree]:
  """Returns `other`'s subtrees at the leaves of `tree`.

  Raises:
    ValueError: if the structures differ. The message says where, in terms of `root`, and ends in `hint`.
  """
  try:
    return jax.tree.structure(tree).flatten_up_to(other)
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"{what} has not the structure of {root}: {_first_difference(tree, other, root)}. {hint}"
    ) from error


def _first_difference(tree: PyTree, other: PyTree, root: str) -> str:
  def names(t: PyTree) -> list[str]:
    # Also nodes without leaves (None, MaskedNode), so that they can be reported too.
    return [name(path, root) for path, _ in jax.tree_util.tree_leaves_with_path(t, is_leaf=_is_leafless)]

  ours, theirs = names(tree), names(other)
  missing = [n for n in ours if not any(_inside(m, n) for m in theirs)]
  extra = [m for m in theirs if not any(_inside(m, n) for n in ours)]
  if missing:
    return f"it has nothing at {listed(missing)}"
  if extra:
    return f"it has {listed(extra)}, which {root} has not"
  return f"the containers differ ({jax.tree.structure(other)} against {jax.tree.structure(tree)})"


def _is_leafless(x: PyTree) -> bool:
  return not jax.tree.leaves(x)


def _inside(inner: str, outer: str) -> bool:
  return inner == outer or inner.startswith((outer + "[", outer + "."))


def listed(names: Iterable[str], most: int = 5) -> str:
  """Joins the first `most` names for an error message, and counts the others."""
  names = list(names)
  return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_arrays(params: PyTree, caller: str, also_numbers: bool = True) -> None:
  """Checks that each leaf is an array, or also a Python number, which JAX takes as one.

  Raises:
    TypeError: for any other leaf, such as the activation function of an Equinox module. Neither `jax.jit` nor the
      `init` of an Optax transformation takes these.
  """
  for leaf_name, leaf in named_leaves(params):
    if not (is_array(leaf) or (also_numbers and isinstance(leaf, numbers.Number))):
      raise TypeError(f"{caller}: {_not_an_array(leaf_name, leaf)}")


def _not_an_array(leaf_name: str, leaf: object) -> str:
  if isinstance(leaf, numbers.Number):
    advice = "Convert it with jnp.asarray, or leave it out."
  else:
    advice = (
      "Split the tree: make the state and the step of its arrays alone, with None in place of everything else, and put "
      "the two together inside loss_fn. In Equinox: params, static = eqx.partition(model, eqx.is_inexact_array), and "
      "model = eqx.combine(params, static)."
    )
  return f"{leaf_name} is a {type(leaf).__name__}, not an array. {advice}"


def check_trainable(leaf_name: str, leaf: PyTree) -> None:
  """Checks that `leaf` is a float32 array or has one of the low-precision dtypes; only these are trained.

  Raises:
    TypeError: if it is not an array, or has another dtype.
  """
  if not is_array(leaf):
    raise TypeError(_not_an_array(leaf_name, leaf))
  dtype = leaf.dtype
  if dtype in (*types.LOW_DTYPES, jnp.float32):
    return
  if dtype == jnp.float64:
    advice = "Convert it to float32 first; there is no codec for float64 master weights."
  elif jnp.issubdtype(dtype, jnp.complexfloating):
    advice = (
      "Put optax.contrib.split_real_and_imaginary around: split_real_and_imaginary(compensated(...)). It shows "
      "compensated the real and imaginary parts as float32 leaves."
    )
  else:
    advice = (
      "Only floating-point leaves are trained: take it out of the params, or leave it out with "
      "optax.masked(compensated(...), mask)."
    )
  raise TypeError(f"{leaf_name} is {dtype}. {advice}")

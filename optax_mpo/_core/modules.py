"""Support for Flax: modules used as functions, and trees whose leaves are in NNX variables.

Flax is not imported here: a caller who passes a module or a state has loaded it.
"""

import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax

from optax_mpo._core.annotations import PyTree


def as_function(fn: object, who: str) -> Callable[..., PyTree]:
  """Returns a function `f(params, *inputs, **kwargs)` for a function, a Flax Linen module or an NNX module.

  For an NNX module with state besides its params, `f` takes `(params, state)` first and returns `(out, new state)`.

  Raises:
    TypeError: if `fn` is not callable.
  """
  linen, nnx = sys.modules.get("flax.linen"), sys.modules.get("flax.nnx")
  if linen is not None and isinstance(fn, linen.Module):
    return _linen_function(fn)
  if nnx is not None and isinstance(fn, nnx.Module):
    return _nnx_function(fn, nnx)
  if not callable(fn):
    raise TypeError(f"{who}: fn has to be a function or a Flax module, but it is a {type(fn).__name__}.")
  return fn


def _linen_function(module: Any) -> Callable[..., PyTree]:
  def apply(params: PyTree, *inputs: PyTree, **kwargs: PyTree) -> PyTree:
    variables = params if isinstance(params, Mapping) and "params" in params else {"params": params}
    return module.apply(variables, *inputs, **kwargs)

  return apply


def _nnx_function(module: object, nnx: ModuleType) -> Callable[..., PyTree]:
  graphdef, _, rest = nnx.split(module, nnx.Param, ...)

  def apply(params: PyTree, *inputs: PyTree, **kwargs: PyTree) -> PyTree:
    return nnx.merge(graphdef, params, copy=True)(*inputs, **kwargs)

  def apply_with_state(params_and_state: tuple[PyTree, PyTree], *inputs: PyTree, **kwargs: PyTree) -> PyTree:
    copy = nnx.merge(graphdef, *params_and_state, copy=True)
    out = copy(*inputs, **kwargs)
    return out, nnx.split(copy, nnx.Param, ...)[2]

  return apply_with_state if rest else apply


def variables(tree: PyTree) -> list[PyTree]:
  """The NNX variables in a tree, such as an `nnx.State`, a module or an optimizer; each once."""
  nnx = sys.modules.get("flax.nnx")
  if nnx is None:
    return []
  found = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
  return list({id(x): x for x in found if isinstance(x, nnx.Variable)}.values())


def pure(tree: PyTree) -> PyTree:
  """Returns `tree` with NNX variables replaced by their values, so that two such trees have the same structure."""
  return sys.modules["flax.nnx"].as_pure(tree) if variables(tree) else tree


def in_form_of(original: PyTree, tree: PyTree) -> PyTree:
  """Returns the leaves of `tree`, which was made from `pure(original)`, in the variables of `original`."""
  return jax.tree.structure(original).unflatten(jax.tree.leaves(tree)) if variables(original) else tree


def in_variables_of(original: PyTree, tree: PyTree) -> PyTree:
  """Returns `tree` with each leaf in a variable of the type of `original`'s first one, if it has any."""
  found = variables(original)
  return jax.tree.map(type(found[0]), tree) if found else tree

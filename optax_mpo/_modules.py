"""Flax modules in the place of functions. Flax is not imported: who has a module has it loaded."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

PyTree = Any


def as_function(fn: Any, who: str) -> Callable[..., Any]:
  """Returns a function `f(params, *inputs, **kwargs)` for a function, a Flax Linen module or an NNX module.

  Raises:
    TypeError: for anything else.
  """
  linen, nnx = sys.modules.get("flax.linen"), sys.modules.get("flax.nnx")
  if linen is not None and isinstance(fn, linen.Module):
    return _linen_function(fn)
  if nnx is not None and isinstance(fn, nnx.Module):
    return _nnx_function(fn, nnx)
  if not callable(fn):
    raise TypeError(f"{who}: fn has to be a function or a Flax module, but it is a {type(fn).__name__}.")
  return fn


def _linen_function(module: Any) -> Callable[..., Any]:
  def apply(params: PyTree, *inputs: Any, **kwargs: Any) -> Any:
    variables = params if isinstance(params, Mapping) and "params" in params else {"params": params}
    return module.apply(variables, *inputs, **kwargs)

  return apply


def _nnx_function(module: Any, nnx: Any) -> Callable[..., Any]:
  graphdef, _, rest = nnx.split(module, nnx.Param, ...)

  def apply(params: PyTree, *inputs: Any, **kwargs: Any) -> Any:
    return nnx.merge(graphdef, params, copy=True)(*inputs, **kwargs)

  def apply_with_state(params_and_state: tuple[PyTree, PyTree], *inputs: Any, **kwargs: Any) -> Any:
    copy = nnx.merge(graphdef, *params_and_state, copy=True)
    out = copy(*inputs, **kwargs)
    return out, nnx.split(copy, nnx.Param, ...)[2]

  return apply_with_state if rest else apply

"""Old names of keyword arguments: they work, and warn.

Why: `bits` meant one thing in `compensated` and another in `quantized_state`. Code with the old name goes on.
"""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed(**new_names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
  """Makes a function accept old names of its keyword arguments, with a warning: `@renamed(old="new")`.

  Raises (when called):
    TypeError: if both names are given.
  """

  def decorate(function: Callable[P, R]) -> Callable[P, R]:
    caller = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
      for old, new in new_names.items():
        if old not in kwargs:
          continue
        if new in kwargs:
          raise TypeError(f"{caller}: {old} is the old name of {new}. Pass {new} alone.")
        warnings.warn(f"{caller}: {old} is now called {new}. Write {new}=...", DeprecationWarning, stacklevel=2)
        kwargs[new] = kwargs.pop(old)
      return function(*args, **kwargs)

    return call

  return decorate

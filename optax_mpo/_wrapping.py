"""What every wrapper around an Optax transformation asks of it first."""

from typing import Any

import optax


def as_transformation(inner: Any, caller: str) -> optax.GradientTransformationExtraArgs:
  """Returns `inner` as a transformation that may be given extra arguments.

  Raises:
    TypeError: where it is none.
  """
  if isinstance(inner, optax.MultiSteps):  # no GradientTransformation, but with its two methods
    steps: Any = inner
    inner = optax.GradientTransformationExtraArgs(steps.init, steps.update)
  if not isinstance(inner, optax.GradientTransformation):
    raise TypeError(f"{caller}: inner has to be an Optax transformation, but it is a {type(inner).__name__}.")
  return optax.with_extra_args_support(inner)

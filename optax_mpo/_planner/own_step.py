"""The row of a user's own step: `module:function`, where the function returns the step and its arguments."""

import importlib
import inspect
from collections.abc import Callable, Sequence

from optax_mpo._core.annotations import PyTree
from optax_mpo._memory import parameters
from optax_mpo._planner.cells import Made, Row, Step


def of_function(name: str, batches: Sequence[int], devices: int, card: str) -> Row:
  """The row of a user's own step.

  Args:
    name: `module:function`. The function returns `(step, args)`: a function jitted with `jax.jit` or `nnx.jit`, which
      donates what it updates, and a tuple of its arguments, arrays or `jax.ShapeDtypeStruct`s. If it has a parameter
      `batch`, it is called with each batch size; otherwise once.
    batches: batch sizes.
    devices: see `gpu_memory`.
    card: likewise its target.

  Raises:
    ValueError: if there is no such function.
  """
  function = _found(name)
  takes_batch = "batch" in inspect.signature(function).parameters

  def step(batch: int) -> Step:
    def make() -> Made:
      made = function(batch=batch) if takes_batch else function()
      if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0]) and isinstance(made[1], tuple | list)):
        raise ValueError(f"plan: {name} has to return a pair: the step, and a tuple of its arguments.")
      fn, args = made
      has_params = bool(args) and parameters.size(parameters.of(args[0])) > 0
      return fn, tuple(args), None, {"target": card, "devices": devices, "params_argnum": 0 if has_params else None}

    return Step("", make)

  return Row(name, {batch: step(batch) for batch in (sorted(batches) if takes_batch else [0])})


def _found(name: str) -> Callable[..., PyTree]:
  module, _, function = name.partition(":")
  if not module or not function:
    raise ValueError(
      f"plan: {name!r} names no function of yours. Write module:function, such as my_training:make_step."
    )
  try:
    found = getattr(importlib.import_module(module), function)
  except ModuleNotFoundError as error:
    raise ValueError(f"plan: {module} cannot be imported ({error}). Run the command in the folder it is in.") from error
  except AttributeError as error:
    raise ValueError(f"plan: the module {module} has no function {function}.") from error
  if not callable(found):
    raise ValueError(f"plan: {name} is a {type(found).__name__}, not a function.")
  return found

"""The first checks that every wrapper of an Optax transformation makes on it and on its state."""

import contextvars
import numbers
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from optax_mpo._core import buffers, trees
from optax_mpo._core.annotations import PyTree

State = TypeVar("State")

_TWICE = re.compile(r"got multiple values for (?:keyword )?argument '(\w+)'")  # Python's message


def as_transformation(
  tx: object, caller: str, name: str = "inner", usage: str = "inner"
) -> optax.GradientTransformationExtraArgs:
  """Returns `tx`, the argument `name` of `caller(usage)`, as a transformation that accepts extra arguments.

  The arrays that its `init` makes have buffers of their own, so that params and state can be donated together.

  Raises:
    TypeError: if it is not a transformation.
  """
  if isinstance(tx, optax.MultiSteps):  # not a GradientTransformation, but has its two methods
    steps: Any = tx
    tx = optax.GradientTransformationExtraArgs(steps.init, steps.update)
  if not isinstance(tx, optax.GradientTransformation):
    raise TypeError(
      f"{caller}: {name} has to be an Optax transformation, but it is a {type(tx).__name__}. Call {caller}({usage})."
    )
  made = optax.with_extra_args_support(tx)
  return optax.GradientTransformationExtraArgs(lambda params: buffers.own(made.init(params), params), made.update)


def check_loss(loss_fn: object, caller: str, usage: str) -> None:
  """Raises TypeError if `loss_fn`, an argument of `caller(usage)`, is not callable."""
  if not callable(loss_fn):
    raise TypeError(
      f"{caller}: loss_fn has to be a function, but it is a {type(loss_fn).__name__}. Call {caller}({usage})."
    )


def extra_args(tx_args: Mapping[str, PyTree] | None, caller: str, loss: bool = True) -> dict[str, PyTree]:
  """Checks the extra arguments of `tx.update`, and adds a place for the loss as `value`, which may also be among them.

  Raises:
    TypeError: if they are not a mapping from names to trees of arrays.
  """
  if tx_args is not None and not (isinstance(tx_args, Mapping) and all(isinstance(key, str) for key in tx_args)):
    raise TypeError(
      f"{caller}: tx_args has to be a dict of the extra arguments of tx.update, by name, such as {{'value': x}}, but "
      f"it is a {type(tx_args).__name__}."
    )
  for name, x in trees.named_leaves(dict(tx_args or {}), "tx_args"):
    if not (trees.is_array(x) or isinstance(x, numbers.Number)):
      raise TypeError(
        f"{caller}: {name} is a {type(x).__name__}, and a step hands on arrays and numbers alone. Functions, as line "
        "searches need them, cannot be given: train with jax.value_and_grad and tx.update."
      )
  return ({"value": jnp.zeros([], jnp.float32)} if loss else {}) | dict(tx_args or {})


def update(
  tx: optax.GradientTransformation, updates: PyTree, state: PyTree, params: PyTree, extra_args: dict[str, PyTree]
) -> tuple[PyTree, PyTree]:
  """Returns `tx.update(...)`, without the extra argument `value` where it does not take that.

  Optax asks transformations with extra arguments to ignore those that they do not know, but `optax.contrib.sam` and
  others of its kind raise an error.

  Raises:
    TypeError: if an extra argument has the name of one that is passed by position; and what `tx.update` raises.
  """
  tx_update = optax.with_extra_args_support(tx).update
  try:
    return tx_update(updates, state, params, **extra_args)
  except TypeError as error:
    twice = _TWICE.search(str(error))
    if twice is not None and twice[1] in extra_args:
      raise TypeError(
        f"tx_args: {twice[1]!r} cannot be an extra argument of tx.update, since the step itself passes one of that "
        "name (it passes the updates, the state and the params). Leave it out. If a transformation of your own needs "
        "something else by this name, rename its argument."
      ) from error
    if "value" not in extra_args or "unexpected keyword argument 'value'" not in str(error):
      raise
  return update(tx, updates, state, params, {name: x for name, x in extra_args.items() if name != "value"})


_for_shapes: contextvars.ContextVar[bool] = contextvars.ContextVar("optax_mpo_for_shapes", default=False)


def state_shapes(tx: optax.GradientTransformation, params: PyTree) -> PyTree:
  """Returns the state that `tx.init(params)` would make, as ShapeDtypeStructs, for comparison with another state."""
  token = _for_shapes.set(True)
  try:
    return jax.eval_shape(tx.init, params)
  finally:
    _for_shapes.reset(token)


def is_for_shapes() -> bool:
  """Whether `init` runs for `state_shapes`, so that its result is not used for training."""
  return _for_shapes.get()


def check_state(tx: optax.GradientTransformation, params: PyTree, opt_state: PyTree, caller: str) -> None:
  """Checks params and state.

  Raises:
    TypeError: if a leaf of `params` is not an array.
    ValueError: where `opt_state` does not match the structure and shapes of `tx.init(params)`.
  """
  trees.check_arrays(params, caller)
  try:
    expected = state_shapes(tx, params)
  except jax.errors.ConcretizationTypeError:
    return  # this init reads values; tx.update has to find errors itself
  hint = "Make the state with optax_mpo.init(tx, params) or tx.init(params), for these very params."
  leaves = trees.flatten_like(expected, opt_state, f"{caller}: opt_state", hint, root="tx.init(params)")
  for (name, want), got in zip(trees.named_leaves(expected, "opt_state"), leaves, strict=True):
    if not trees.is_array(want):
      continue
    if jnp.shape(got) != want.shape:
      raise ValueError(
        f"{caller}: {name} has shape {list(jnp.shape(got))}, but for these params it is {list(want.shape)}. {hint}"
      )


def own_state(state: object, kind: type[State], caller: str) -> State:
  """Returns `state`, checked.

  Raises:
    TypeError: if it is not of the type that the wrapper's `init` makes.
  """
  if not isinstance(state, kind):
    raise TypeError(
      f"{caller}: update was given a {type(state).__name__} for its state. Pass the state that this transformation's "
      "init made (inside chain, the whole chain's state goes to the whole chain's update)."
    )
  return state

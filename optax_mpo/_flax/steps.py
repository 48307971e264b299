"""The step that an object for Flax runs: which kind, and what it says where the best kind is not possible."""

import warnings
import weakref
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from optax_mpo._codecs import apply
from optax_mpo._layers import fused_step
from optax_mpo._stepping import releasable, value_and_update

PyTree = Any
Fused = Literal["auto", "layer", "off"]
Where = Callable[[tuple[Any, ...], jax.Array], bool]

_told: "weakref.WeakSet[Any]" = weakref.WeakSet()  # the updates of transformations that a warning has named


def check_fused(fused: str | None, caller: str) -> None:
  """Raises ValueError if there is no such kind of step."""
  if fused not in (None, "auto", "layer", "off"):
    raise ValueError(f"{caller}: fused has to be None, 'auto', 'layer' or 'off', but it is {fused!r}.")


def make_step(
  loss_fn: Callable[..., Any], tx: Any, fused: Fused | None, two_pass: bool, caller: str
) -> Callable[..., tuple[Any, PyTree, optax.OptState]]:
  """Makes a step for a loss function that returns `(loss, aux)`.

  With `fused=None`, the step releases gradients if the update can be taken apart. Only the update decides, before the
  loss function is traced, so that errors of the loss function are raised.
  """
  if fused == "layer":
    return fused_step.fused_value_and_update(loss_fn, tx, has_aux=True)
  released = value_and_update.value_and_update(loss_fn, tx, has_aux=True, two_pass=two_pass)

  def ordinary(params: PyTree, opt_state: optax.OptState, *args: Any) -> tuple[Any, PyTree, optax.OptState]:
    value, grads = jax.value_and_grad(loss_fn, has_aux=True)(params, *args)
    return value, *updated(tx, grads, opt_state, params)[1:]

  def step(params: PyTree, opt_state: optax.OptState, *args: Any) -> tuple[Any, PyTree, optax.OptState]:
    error = releasable.why_not(tx, params, opt_state, two_pass, caller)
    if error is None:
      return released(params, opt_state, *args)
    if fused == "auto":
      kind = NotImplementedError if isinstance(error, NotImplementedError) else ValueError
      raise kind(f'{error} Or make this object with fused="off", for ordinary steps.') from error
    _warn(tx, error, caller)
    return ordinary(params, opt_state, *args)

  return ordinary if fused == "off" else step


def updated(
  tx: optax.GradientTransformation, grads: PyTree, opt_state: optax.OptState, params: PyTree, **extra_args: Any
) -> tuple[optax.Updates, PyTree, optax.OptState]:
  """Returns the updates, the new params and the new state of an ordinary step."""
  updates, opt_state = optax.with_extra_args_support(tx).update(grads, opt_state, params, **extra_args)
  return updates, apply.apply_updates(params, updates), opt_state


def _warn(tx: optax.GradientTransformation, error: Exception, caller: str) -> None:
  if tx.update in _told:
    return
  _told.add(tx.update)
  warnings.warn(
    f"{caller}: this step makes a tree of gradients, 2 to 4 bytes per parameter, because gradient release is not "
    f'possible. {error} To have such steps without this warning, pass fused="off".',
    stacklevel=4,
  )

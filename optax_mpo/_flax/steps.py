"""The step that an object for Flax runs: which kind, and what it says where the best kind is not possible."""

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import optax

from optax_mpo._codecs import apply, masters
from optax_mpo._core import wrapping
from optax_mpo._layers import fused_step
from optax_mpo._stepping import releasable, value_and_update
from optax_mpo._transforms import norms

PyTree = Any
Fused = Literal["auto", "layer", "off"]
Where = Callable[[tuple[Any, ...], jax.Array], bool]

_told: "weakref.WeakSet[Any]" = weakref.WeakSet()  # the updates of transformations that a warning has named


def check_options(fused: str | None, ema_decay: float | None, caller: str) -> None:
  """Raises ValueError if there is no such kind of step, or if an average cannot have this decay."""
  if fused not in (None, "auto", "layer", "off"):
    raise ValueError(f"{caller}: fused has to be None, 'auto', 'layer' or 'off', but it is {fused!r}.")
  if ema_decay is not None and not 0 <= ema_decay < 1:
    raise ValueError(f"{caller}: ema_decay has to be None, or at least 0 and below 1, but it is {ema_decay}.")


def make_step(
  loss_fn: Callable[..., Any],
  tx: Any,
  fused: Fused | None,
  two_pass: bool,
  caller: str,
  tx_args: Mapping[str, Any] | None = None,
) -> Callable[..., tuple[Any, PyTree, optax.OptState]]:
  """Makes a step for a loss function that returns `(loss, aux)`.

  With `fused=None`, the step releases gradients if the update can be taken apart. Only the update decides, before the
  loss function is traced, so that errors of the loss function are raised.
  """
  if fused == "layer":
    return functools.partial(fused_step.fused_value_and_update(loss_fn, tx, has_aux=True), tx_args=tx_args)
  released = value_and_update.value_and_update(loss_fn, tx, has_aux=True, two_pass=two_pass)
  released = functools.partial(released, tx_args=tx_args)

  def ordinary(params: PyTree, opt_state: optax.OptState, *args: Any) -> tuple[Any, PyTree, optax.OptState]:
    weights = masters.decode(params, opt_state, caller)
    value, grads = jax.value_and_grad(loss_fn, has_aux=True)(weights, *args)
    extra_args = wrapping.extra_args(tx_args, caller) | ({} if "value" in (tx_args or {}) else {"value": value[0]})
    return value, *updated(tx, grads, opt_state, params, **extra_args)[1:]

  def step(params: PyTree, opt_state: optax.OptState, *args: Any) -> tuple[Any, PyTree, optax.OptState]:
    error = releasable.why_not(tx, params, opt_state, two_pass, caller, tx_args)
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
  updates, opt_state = wrapping.update(tx, grads, opt_state, params, extra_args)
  return updates, apply.apply_updates(params, updates), opt_state


def metrics(opt_state: optax.OptState, loss: Any) -> dict[str, jax.Array]:
  """What there is to log of a step: recorded norms, learning rates among hyperparameters, and the loss if given."""
  found: dict[str, jax.Array] = {} if loss is None else {"loss": loss}
  found |= norms.recorded(opt_state)
  rates = optax.tree.get_all_with_path(opt_state, "learning_rate")
  return found | {"learning_rate" if not i else f"learning_rate_{i}": rate for i, (_, rate) in enumerate(rates)}


def _warn(tx: optax.GradientTransformation, error: Exception, caller: str) -> None:
  if tx.update in _told:
    return
  _told.add(tx.update)
  warnings.warn(
    f"{caller}: this step makes a tree of gradients, 2 to 4 bytes per parameter, because gradient release is not "
    f'possible. {error} To have such steps without this warning, pass fused="off".',
    stacklevel=4,
  )

"""The step that an object for Flax runs: which kind, and what it says where the best kind is not possible."""

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from optax_mpo._codecs import apply, masters
from optax_mpo._core import trees, types, wrapping
from optax_mpo._core.annotations import KeyPath, PyTree
from optax_mpo._layers import fused_step
from optax_mpo._stepping import explain, releasable, value_and_update
from optax_mpo._stepping.microbatches import Microbatches, step_by_microbatches
from optax_mpo._transforms import average, norms

Fused = Literal["auto", "layer", "off"]
Where = Callable[[KeyPath, jax.Array], bool]
Step = Callable[..., tuple[PyTree, PyTree, optax.OptState]]

# The updates of transformations that a warning has named.
_told: "weakref.WeakSet[optax.TransformUpdateFn]" = weakref.WeakSet()


def check_options(fused: str | None, ema_decay: float | None, ema_bits: int | None, caller: str) -> None:
  """Raises ValueError if there is no such kind of step, or if an average cannot have this decay or these bits."""
  if fused not in (None, "auto", "layer", "off"):
    raise ValueError(f"{caller}: fused has to be None, 'auto', 'layer' or 'off', but it is {fused!r}.")
  if ema_decay is not None and not 0 <= ema_decay < 1:
    raise ValueError(f"{caller}: ema_decay has to be None, or at least 0 and below 1, but it is {ema_decay}.")
  if ema_bits not in average.BITS:
    raise ValueError(f"{caller}: ema_bits has to be None, 8 or 16, but it is {ema_bits!r}.")


def make_step(
  loss_fn: Callable[..., PyTree],
  tx: optax.GradientTransformation,
  fused: Fused | None,
  two_pass: bool,
  caller: str,
  tx_args: Mapping[str, PyTree] | None = None,
  microbatches: int | Microbatches = 1,
) -> Step:
  """Makes a step for a loss function: `loss_fn(params, carry, *args) -> (loss, (aux, carry))`.

  The carry is what the forward pass changes besides the params. Microbatches change it in turn.

  With `fused=None`, the step releases gradients if the update can be taken apart. Only the update decides, before the
  loss function is traced, so that errors of the loss function are raised.
  """
  how = Microbatches.of(microbatches)
  if fused == "layer":
    if how is not None:
      raise ValueError(
        f'{caller}: with fused="layer", the layers split the batch. Leave microbatches out here, and make the layers '
        f"with fused_layer(fn, microbatches={how.count}) and fused_scan(fn, microbatches={how.count})."
      )
    return functools.partial(fused_step.fused_value_and_update(loss_fn, tx, has_aux=True), tx_args=tx_args)

  if how is not None:
    loss_fn = _keeping_the_carry(loss_fn, caller)

  def released(tx: optax.GradientTransformation) -> Step:
    return value_and_update.value_and_update(loss_fn, tx, has_aux=True, two_pass=two_pass)

  def ordinary(tx: optax.GradientTransformation) -> Step:
    return functools.partial(_ordinary, loss_fn, tx, caller)

  def step_of(kind: Callable[[optax.GradientTransformation], Step]) -> Step:
    if how is None:
      return functools.partial(kind(tx), tx_args=tx_args)
    whole = wrapping.as_transformation(tx, caller, "tx", "tx")
    return functools.partial(step_by_microbatches(loss_fn, whole, True, how, kind, has_carry=True), tx_args=tx_args)

  def step(params: PyTree, opt_state: optax.OptState, *args: PyTree) -> tuple[PyTree, PyTree, optax.OptState]:
    error = releasable.why_not(tx, params, opt_state, two_pass, caller, tx_args)
    if error is None:
      return step_of(released)(params, opt_state, *args)
    if fused == "auto":
      kind = NotImplementedError if isinstance(error, NotImplementedError) else ValueError
      raise kind(f'{error} Or make this object with fused="off", for ordinary steps.') from error
    _warn(tx, error, caller)
    return step_of(ordinary)(params, opt_state, *args)

  return step_of(ordinary) if fused == "off" else step


def explain_step(
  loss_fn: Callable[..., PyTree],
  tx: optax.GradientTransformation,
  two_pass: bool,
  caller: str,
  tx_args: Mapping[str, PyTree] | None,
  microbatches: int | Microbatches,
) -> Callable[..., explain.Explanation]:
  """Makes `explained(params, opt_state, carry, *args)`, which explains the released step of `make_step`."""
  how = Microbatches.of(microbatches)
  if how is None:
    explained = functools.partial(explain.explain, loss_fn, tx, has_aux=True, two_pass=two_pass)
  else:
    whole = wrapping.as_transformation(tx, caller, "tx", "tx")
    explained = explain.of_last_microbatch(loss_fn, whole, how, True, two_pass, has_carry=True)
  return functools.partial(explained, tx_args=tx_args)


def _keeping_the_carry(loss_fn: Callable[..., PyTree], caller: str) -> Callable[..., PyTree]:
  """Returns `loss_fn`, which raises ValueError where the carry of one microbatch does not fit the next one."""
  hint = (
    "Each microbatch goes on with what the one before has changed, which has to keep its structure, shapes and dtypes. "
    "Make new variables before the first step, and return other things (as sow collects them) as aux."
  )

  def kept(params: PyTree, carry: PyTree, *args: PyTree) -> tuple[PyTree, tuple[PyTree, PyTree]]:
    loss, (aux, new) = loss_fn(params, carry, *args)
    what = f"{caller}, microbatches: what loss_fn has changed"
    after = trees.flatten_like(carry, new, what, hint, root="before")
    for (name, x), y in zip(trees.named_leaves(carry, "before"), after, strict=True):
      if (jnp.shape(x), jnp.result_type(x)) != (jnp.shape(y), jnp.result_type(y)):
        raise ValueError(f"{what} has {types.struct(y)} at {name}, and it was {types.struct(x)}. {hint}")
    return loss, (aux, new)

  return kept


def _ordinary(
  loss_fn: Callable[..., PyTree],
  tx: optax.GradientTransformation,
  caller: str,
  params: PyTree,
  opt_state: optax.OptState,
  *args: PyTree,
  tx_args: Mapping[str, PyTree] | None = None,
) -> tuple[PyTree, PyTree, optax.OptState]:
  weights = masters.decode(params, opt_state, caller)
  value, grads = jax.value_and_grad(loss_fn, has_aux=True)(weights, *args)
  extra_args = wrapping.extra_args(tx_args, caller) | ({} if "value" in (tx_args or {}) else {"value": value[0]})
  return value, *updated(tx, grads, opt_state, params, extra_args)[1:]


def updated(
  tx: optax.GradientTransformation,
  grads: PyTree,
  opt_state: optax.OptState,
  params: PyTree,
  extra_args: Mapping[str, PyTree],
) -> tuple[optax.Updates, PyTree, optax.OptState]:
  """Returns the updates, the new params and the new state of an ordinary step."""
  updates, opt_state = wrapping.update(tx, grads, opt_state, params, dict(extra_args))
  return updates, apply.apply_updates(params, updates), opt_state


def metrics(opt_state: optax.OptState, loss: jax.Array | None) -> dict[str, jax.Array]:
  """What there is to log of a step: recorded norms, learning rates among hyperparameters, and the loss if given."""
  found: dict[str, jax.Array] = {} if loss is None else {"loss": loss}
  found |= norms.recorded(opt_state)
  rates = [rate for _, rate in optax.tree.get_all_with_path(opt_state, "learning_rate") if trees.is_array(rate)]
  return found | {"learning_rate" if not i else f"learning_rate_{i}": rate for i, rate in enumerate(rates)}


def _warn(tx: optax.GradientTransformation, error: Exception, caller: str) -> None:
  if tx.update in _told:
    return
  _told.add(tx.update)
  warnings.warn(
    f"{caller}: this step makes a tree of gradients, 2 to 4 bytes per parameter, because gradient release is not "
    f'possible; fused="off" keeps it so, without this warning. {error}',
    stacklevel=4,
  )

"""Finds out whether an update allows gradient release, before the loss function is traced."""

from collections.abc import Mapping

import optax

from optax_mpo._core import modules, wrapping
from optax_mpo._core.annotations import PyTree
from optax_mpo._program import jax_forms
from optax_mpo._stepping import value_and_update
from optax_mpo._updates import by_leaf, coupled
from optax_mpo._updates.late import take


def why_not(
  tx: optax.GradientTransformation,
  params: PyTree,
  opt_state: optax.OptState,
  two_pass: bool,
  caller: str,
  tx_args: Mapping[str, PyTree] | None = None,
) -> Exception | None:
  """Returns what `value_and_update` would raise for this update where an ordinary step works, or None.

  Raises:
    ValueError: if `opt_state` does not belong to `tx` and `params`. No step works then.
    TypeError: as `value_and_update` does; no step works then either.
  """
  params, opt_state = modules.pure(params), modules.pure(opt_state)
  tx, extra = wrapping.as_transformation(tx, caller, "tx", "tx"), wrapping.extra_args(tx_args, caller)
  wrapping.check_state(tx, params, opt_state, caller)
  try:
    jax_forms.check_forms(caller)
    update = take(by_leaf.Update(tx, params, opt_state, caller, extra=extra)).update
    if two_pass and update.is_coupled:
      coupled.TwoPass(update, caller)
    else:
      value_and_update.groups_of(update)
  except (NotImplementedError, ValueError) as error:
    return error
  return None

"""Finds out whether an update allows gradient release, before the loss function is traced."""

from typing import Any

import optax

from optax_mpo._core import modules, wrapping
from optax_mpo._program import jax_forms
from optax_mpo._stepping import value_and_update
from optax_mpo._updates import by_leaf, coupled

PyTree = Any


def why_not(
  tx: optax.GradientTransformation, params: PyTree, opt_state: optax.OptState, two_pass: bool, caller: str
) -> Exception | None:
  """Returns what `value_and_update` would raise for this update where an ordinary step works, or None.

  Raises:
    ValueError: if `opt_state` does not belong to `tx` and `params`. No step works then.
    TypeError: as `value_and_update` does; no step works then either.
  """
  params, opt_state = modules.pure(params), modules.pure(opt_state)
  tx = wrapping.as_transformation(tx, caller, "tx", "tx")
  by_leaf.check_state(tx, params, opt_state, caller)
  try:
    jax_forms.check_forms(caller)
    update = by_leaf.Update(tx, params, opt_state, caller)
    if two_pass and update.is_coupled:
      coupled.TwoPass(update, caller)
    else:
      value_and_update.groups_of(update)
  except (NotImplementedError, ValueError) as error:
    return error
  return None

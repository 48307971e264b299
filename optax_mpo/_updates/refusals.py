"""Errors for updates that cannot be taken apart: what couples which leaves, and what to do instead."""

import re
from collections.abc import Sequence
from typing import NoReturn, Protocol

import jax
import jax.numpy as jnp

from optax_mpo._core import trees
from optax_mpo._core.annotations import PyTree, PyTreeDef, Values
from optax_mpo._program import dataflow, jax_forms
from optax_mpo._program.program import Operation, Program

BY_LAYERS = "fused_value_and_update"
"""The caller whose users can put leaves into one layer."""

_MISSING = re.compile(r"missing \d+ required keyword-only arguments?: (.*)")  # Python's message


class _Update(Protocol):
  """What errors tell of a `by_leaf.Update`."""

  names: list[str]
  state_names: list[str]
  program: Program
  given: frozenset[int]
  dependencies: dict[int, int]
  caller: str

  @property
  def inputs(self) -> tuple[list[int], list[int], list[int]]: ...


def raise_if_missing(error: TypeError, caller: str) -> None:
  """Raises TypeError, with advice, if `error` says that `tx.update` needs extra arguments."""
  missing = _MISSING.search(str(error))
  if missing is None:
    return
  names = re.findall(r"'(\w+)'", missing[1])
  needs = f"{caller}: tx.update needs the extra argument {' and '.join(map(repr, names))}"
  if not {"grad", "value_fn"}.isdisjoint(names):
    names = list(dict.fromkeys(["value", *names]))
    raise TypeError(
      f"{needs}: it evaluates the loss again, or needs all gradients at once, and a step with gradient release has "
      "neither. Train with jax.value_and_grad and tx.update(grads, opt_state, params, "
      f"{', '.join(f'{name}={name}' for name in names)})."
    ) from error
  given = ", ".join(f"{name!r}: ..." for name in names)
  loss = " value_and_update hands on the loss as value by itself." if "value" in names else ""
  raise TypeError(f"{needs}. Pass it to the step: step(..., tx_args={{{given}}}).{loss}") from error


def check_state(caller: str, names: Sequence[str], old: Values, form: PyTreeDef, new_state: PyTree) -> None:
  """Raises ValueError where `new_state` has not the structure `form`, or the shapes and dtypes of the leaves `old`."""
  if jax.tree.structure(new_state) != form:
    raise ValueError(
      f"{caller}: tx.update changes the structure of its state, from {form} to {jax.tree.structure(new_state)}. A "
      "fused step writes the state in place and needs it to keep its form."
    )
  for name, before, after in zip(names, old, jax.tree.leaves(new_state), strict=True):
    if (jnp.shape(before), jnp.result_type(before)) != (after.shape, after.dtype):
      raise ValueError(
        f"{caller}: tx.update changes {name} from {jnp.result_type(before)}{list(jnp.shape(before))} to "
        f"{after.dtype}{list(after.shape)}. A fused step writes the state in place and needs it to keep its form. "
        "Where the params are bfloat16, compensated(tx) shows tx f32 params and gradients, and keeps its state f32."
      )


def check_effects(caller: str, program: Program) -> None:
  """Raises ValueError where an update does more than compute."""
  # The name of an axis, which a collective needs, counts as an effect in JAX, but it cannot be lost.
  effects = {o.name for o in program.operations for e in o.eqn.effects if type(e).__name__ != "NamedAxisEffect"}
  if effects:
    raise ValueError(
      f"{caller}: tx.update has side effects ({trees.listed(sorted(effects))}), which steps of single leaves would "
      "lose or repeat. Take them out (jax.debug.print, callbacks), or train with tx.update."
    )


def raise_foreign(
  update: _Update, leaves: Sequence[int], var: int, operations: Sequence[Operation], who: str
) -> NoReturn:
  """Raises ValueError: an operation that updates independent leaves together cannot be cut."""
  grads, params, states = update.inputs
  name = [*update.names, *update.names, *update.state_names][[*grads, *params, *states].index(var)]
  by = next((jax_forms.where(o) for o in operations if var in o.inputs), "its state")
  advice = "Step these leaves in one fused_layer, or train" if update.caller == BY_LAYERS else "Train"
  raise ValueError(
    f"{who}: tx computes the update of {trees.listed(update.names[i] for i in leaves)} together with that of {name}, "
    f"in {by}, which cannot be taken apart. {advice} with tx.update."
  )


def raise_coupled(update: _Update, inside: Sequence[int], outside: Sequence[int], who: str) -> NoReturn:
  """Raises ValueError, which names two sets of leaves and the operation that couples them."""
  ours = dataflow.union([1 << i for i in inside])
  theirs = dataflow.union([1 << i for i in outside])
  # What the new weights need couples them; other operations, such as norms for the logs, only if nothing else does.
  weights = [update.program.outputs[i] for i in (*inside, *outside)]
  needed = dataflow.slice_of(update.program, weights, update.given)
  by = next(
    (
      jax_forms.where(operation)
      for operation in (*needed, *update.program.operations)
      for var in operation.outputs
      if var >= 0 and update.dependencies[var] & ours and update.dependencies[var] & theirs
    ),
    "its state",
  )
  here, there = (trees.listed(update.names[i] for i in leaves) for leaves in (inside, outside))
  together = "step the coupled leaves in one fused_layer, " if update.caller == BY_LAYERS else ""
  raise ValueError(
    f"{who}: tx couples {here} to {there}, in {by}: the update of one needs the gradients of the others, which are "
    "not there when it is stepped. To clip, take the last step's norm (optax_mpo.clip_by_delayed_norm) or each "
    f"leaf alone (optax.clip); {together}or train with tx.update."
  )

"""Replaces each `cond` of a program by its branches and a select.

Why: an operation inside a branch cannot be separated from the rest of it. `optax.apply_if_finite` around clipping, and
`optax.MultiSteps`, compute the norm of all gradients inside a branch. With the branches inlined, that norm is a value
like any other, and the update can be taken apart.

How: compute all branches, and pick the results of one with `select_n`: the same bits. This costs the time of the other
branches, so it is used only for updates that cannot be taken apart otherwise.
"""

import dataclasses

from jax import lax

from optax_mpo._core import types
from optax_mpo._program import jax_forms
from optax_mpo._program.program import Atom, Operation, Program, type_of


def has_branches(program: Program) -> bool:
  """Whether the program has a `cond`."""
  return any(operation.bodies for operation in program.operations)


def opened(program: Program) -> Program:
  """Returns a program without `cond`s. Variables of `program` keep their numbers; new ones are added."""
  new = dataclasses.replace(program, operations=[], constants=dict(program.constants), avals=list(program.avals))
  for operation in program.operations:
    _append(new, operation)
  return new


def _append(new: Program, operation: Operation) -> None:
  if not operation.bodies:
    new.operations.append(operation)
    return
  index, *operands = (_variable(new, atom) for atom in operation.inputs)
  results = [_inlined(new, body, operands) for body in operation.bodies]
  for out, *cases in zip(operation.outputs, *results, strict=True):
    if out >= 0:
      select, _ = jax_forms.trace(lax.select_n, *(types.struct(new.aval(v)) for v in (index, *cases)))
      (chosen,) = select.operations
      new.operations.append(dataclasses.replace(chosen, inputs=(index, *cases), outputs=(out,), caller=operation.eqn))


def _inlined(new: Program, body: Program, operands: list[int]) -> list[int]:
  """Adds the operations of a branch, and returns the variables of its results."""
  named = dict(zip(body.inputs, operands, strict=True))
  for var, value in body.constants.items():
    named[var] = new.new(body.aval(var))
    new.constants[named[var]] = value

  def read(atom: Atom) -> Atom:
    return named[atom] if isinstance(atom, int) else atom

  for operation in body.operations:
    named.update((v, new.new(body.aval(v))) for v in operation.outputs if v >= 0)
    inputs, outputs = tuple(map(read, operation.inputs)), tuple(named.get(v, -1) for v in operation.outputs)
    _append(new, dataclasses.replace(operation, inputs=inputs, outputs=outputs))
  return [_variable(new, read(atom)) for atom in body.outputs]


def _variable(new: Program, atom: Atom) -> int:
  """A variable that holds an atom; a literal becomes a constant of its dtype."""
  if isinstance(atom, int):
    return atom
  var = new.new(type_of(atom))
  new.constants[var] = jax_forms.operand(atom, {})
  return var

"""Puts the body of a scan over layers in place of the scan, in an update that is run for one layer.

Why: an update of a stack is written in parts, each before the next one reads (`by_layer.parts`). If all of it is in one
scan, as `per_layer` makes it, there is only one part, and XLA:CPU copies all layers of each state for each layer.

How: the operations of the body run on one layer, without an axis of layers. A `Crossing` takes this axis away, or puts
it back. A result of the scan is read again where the body goes on with it, so that it can be written before.
"""

import dataclasses
from collections.abc import Sequence

import jax
from jax import lax

from optax_mpo._core.annotations import Shaped
from optax_mpo._program import jax_forms
from optax_mpo._program.entries import Entries, NotSeparableError, Where
from optax_mpo._program.layer_rules import Layer
from optax_mpo._program.program import Atom, Operation, Program


@dataclasses.dataclass(frozen=True, slots=True)
class Crossing(Operation):
  """Takes the axis of layers away from the only operand, or puts it back.

  Attributes:
    entries: where the layer lies in the array with this axis.
    enters: whether the axis is taken away.
  """

  entries: Entries = dataclasses.field(kw_only=True)
  enters: bool = dataclasses.field(kw_only=True)

  @property
  def name(self) -> str:
    """No primitive's name."""
    return "enter_layer" if self.enters else "leave_layer"

  def run(self, value: jax.Array, found: Where, layer: Layer) -> tuple[jax.Array, Where]:
    """Returns the result for one layer, and where the layer lies in it: None inside."""
    if not self.enters:
      return lax.expand_dims(value, [0]), self.entries
    if found is None:
      value = layer.cut(value, self.entries)
    elif found != self.entries:
      raise NotSeparableError(f"{jax_forms.where(self)} mixes the layers")
    return lax.squeeze(value, [0]), None


def opened(program: Program, where: dict[int, Where]) -> Program:
  """Returns a program for `by_layer.run`, with the operations of their bodies in place of scans over layers.

  Args:
    program: the update of a stack.
    where: where the layer lies in each of its variables.
  """
  new = dataclasses.replace(program, operations=[], constants=dict(program.constants), avals=list(program.avals))
  for operation in program.operations:
    found = [where.get(a) if isinstance(a, int) else None for a in operation.inputs]
    entries = next((e for e in found if e is not None), None)
    scan = jax_forms.read_scan(operation) if operation.name == "scan" and entries is not None else None
    if scan is None or entries is None or entries.size != 1:
      new.operations.append(operation)
    else:
      _open(new, operation, scan[0], scan[2], entries)
  return new


def _open(new: Program, scan: Operation, consts: int, body: Program, entries: Entries) -> None:
  def cross(atom: Atom, var: int, enters: bool) -> None:
    new.operations.append(Crossing(scan.eqn, (atom,), (var,), scan.caller, entries=entries, enters=enters))

  def enter(atom: Atom, aval: Shaped) -> int:
    var = new.new(aval)
    cross(atom, var, True)
    return var

  def inside(atom: Atom) -> Atom:
    return atoms[atom] if isinstance(atom, int) else atom

  atoms: dict[int, Atom] = dict(zip(body.inputs, scan.inputs[:consts], strict=False))
  for var, atom in zip(body.inputs[consts:], scan.inputs[consts:], strict=True):
    atoms[var] = enter(atom, body.aval(var))
  for var, constant in body.constants.items():
    atoms[var] = number = new.new(body.aval(var))
    new.constants[number] = constant
  results: dict[int, list[int]] = {}
  for atom, out in zip(body.outputs, scan.outputs, strict=True):
    if isinstance(atom, int) and atom in body.makers and out >= 0:
      results.setdefault(atom, []).append(out)
    elif out >= 0:
      cross(inside(atom), out, False)
  for operation in body.operations:
    outputs: Sequence[int] = [v if v < 0 else new.new(body.aval(v)) for v in operation.outputs]
    inputs = tuple(inside(a) for a in operation.inputs)
    new.operations.append(dataclasses.replace(operation, inputs=inputs, outputs=tuple(outputs)))
    atoms.update(zip(operation.outputs, outputs, strict=True))
    for var in operation.outputs:
      for out in results.get(var, ()):
        cross(atoms[var], out, False)
      if var in results:
        atoms[var] = enter(results[var][0], body.aval(var))

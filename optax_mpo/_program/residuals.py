"""Recomputes stacked residuals that are made from weights alone, layer by layer, in the scan that reads them.

Why: without `jax.checkpoint`, the derivative of a scan over layers stacks all that the backward pass reads. That
includes what is made from weights alone, such as their casts to f32: a second copy, of 4 bytes per parameter.

How: by dataflow. A stacked result may depend on no carry, and only on operands that are made from weights alone. The
scan that reads such a result then computes it again in its body, from the same layers. The first scan no longer does.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
from jax import lax
from jax.extend import core

from optax_mpo._core import types
from optax_mpo._core.annotations import PyTree, Values
from optax_mpo._program import dataflow, jax_forms
from optax_mpo._program.program import Atom, Operation, Program


@dataclasses.dataclass(frozen=True, eq=False)
class _Number:
  """A literal, which has no hash of its own."""

  literal: core.Literal


class _Read(NamedTuple):
  """An operand of a scan, and whether the body reads one layer of it."""

  operand: int | _Number
  scanned: bool

  @property
  def atom(self) -> Atom:
    return self.operand if isinstance(self.operand, int) else self.operand.literal


@dataclasses.dataclass(frozen=True)
class _Source:
  """How one layer of a stacked result is made: by these operations of a scan's body, from what they read."""

  body: Program
  operations: tuple[Operation, ...]
  result: Atom
  reads: dict[_Read, int]  # each with its variable in the body

  def make(self, env: dict[_Read, jax.Array]) -> jax.Array:
    inner = dict(self.body.constants) | {var: env[read] for read, var in self.reads.items()}
    jax_forms.run(self.body, self.operations, inner)
    return jax_forms.value(self.result, inner)


def without_weights(program: Program, weights: Iterable[int]) -> Program:
  """Returns the program without stacked residuals that are made from weights alone.

  Args:
    program: the program of a loss and its gradients.
    weights: the variables of the weights.
  """
  bits = dict.fromkeys(program.inputs, 2) | dict.fromkeys(weights, 1)
  depends = dataflow.dependencies(program, [bits[v] for v in program.inputs])
  sources: dict[int, _Source] = {}
  operations = list(program.operations)
  same: dict[int, Atom] = {}  # variables that are no longer made, and what they are equal to

  def known(atoms: Sequence[Atom]) -> tuple[Atom, ...]:
    return tuple(same.get(a, a) if isinstance(a, int) else a for a in atoms)

  for i, operation in enumerate(operations):
    if same:
      operations[i] = dataclasses.replace(operation, inputs=known(operation.inputs))
    if operation.name == "scan":
      operations[i], forwarded = _reading(program, operations[i], sources)
      same |= forwarded
      sources |= _sources(program, operation, depends)
  if operations == program.operations:
    return program
  outputs = list(known(program.outputs))
  read = dataflow.read_by(operations, outputs)
  cut = [dataflow.without_unused(o, read) if o.name == "scan" else o for o in operations]
  return dataclasses.replace(program, operations=cut, outputs=outputs)


def _sources(program: Program, operation: Operation, depends: dict[int, int]) -> dict[int, _Source]:
  """Finds the stacked results of a scan that are made from weights alone, by variable."""
  consts, carry, _ = jax_forms.scan_counts(operation)
  of_weights = [not isinstance(a, int) or depends[a] <= 1 for a in operation.inputs]
  stacked = {v for v in operation.outputs[carry:] if v >= 0 and depends[v] == 1}
  if not stacked:
    return {}
  body = jax_forms.flatten(jax_forms.scan_body(operation))
  kinds = [0 if of else 1 for of in of_weights]
  kinds[consts : consts + carry] = [1] * carry
  inside = dataflow.dependencies(body, kinds)
  found = {}
  for v, atom in zip(operation.outputs[carry:], body.outputs[carry:], strict=True):
    if v not in stacked or not isinstance(atom, int) or inside[atom]:
      continue
    slice_ = dataflow.slice_of(body, [atom], frozenset())
    read = dataflow.read_by(slice_, [atom])
    reads = {
      _Read(operand if isinstance(operand, int) else _Number(operand), k >= consts + carry): var
      for k, (operand, var) in enumerate(zip(operation.inputs, body.inputs, strict=True))
      if var in read
    }
    found[v] = _Source(body, tuple(slice_), atom, reads)
  return found


def _reading(program: Program, operation: Operation, sources: dict[int, _Source]) -> tuple[Operation, dict[int, Atom]]:
  """Returns a scan whose body makes each layer of such results itself, where it reads them.

  With it come results that the scan does not make, since they are its operands, as the scales of FP8 layers are: JAX
  leaves them out when it traces the scan again.
  """
  consts, carry, _ = jax_forms.scan_counts(operation)
  first, options = consts + carry, jax_forms.scan_options(operation)
  remade = {
    k: sources[a]
    for k, a in enumerate(operation.inputs)
    if k >= first and isinstance(a, int) and a in sources and program.aval(a).shape[0] == options["length"]
  }
  if not remade:
    return operation, {}
  body = core.jaxpr_as_fun(jax_forms.scan_body(operation))
  kept = [a for k, a in enumerate(operation.inputs) if k not in remade]
  added = list(dict.fromkeys(read for source in remade.values() for read in source.reads))

  def scan(operands: Values, read: Values) -> PyTree:
    rest = iter(operands)
    full: list[PyTree] = [None if k in remade else next(rest) for k in range(len(operation.inputs))]
    known = dict(zip(added, read, strict=True))

    def step(carried: list[PyTree], xs: tuple[list[PyTree], dict[_Read, jax.Array]]) -> PyTree:
      scanned, layer = xs
      given = [*full[:consts], *carried, *scanned]
      for k, source in remade.items():
        given[k] = source.make(known | layer)
      out = body(*given)
      return out[:carry], out[carry:]

    xs = full[first:], {read: x for read, x in known.items() if read.scanned}
    return lax.scan(step, full[consts:first], xs, **options)

  atoms = [*kept, *(read.atom for read in added)]
  structs = [types.struct(program.aval(a)) for a in atoms]
  made, _ = jax_forms.trace(scan, structs[: len(kept)], structs[len(kept) :])
  (again,) = made.operations
  of = dict(zip(made.inputs, atoms, strict=True))
  results = [(a, v) for a, v in zip(made.outputs, operation.outputs, strict=True) if v >= 0]
  found = [(a, v) for a, v in results if isinstance(a, int) and (a in of or a in again.outputs)]
  if len(found) != len(results):
    return operation, {}
  named = dict(reversed(found))  # of results that are equal
  of = named | of
  same = {v: of[a] for a, v in found if of[a] != v}
  inputs = tuple(of[a] if isinstance(a, int) else a for a in again.inputs)
  return dataclasses.replace(again, inputs=inputs, outputs=tuple(named.get(v, -1) for v in again.outputs)), same

"""Follows layers back through a program: which entries of which array they come from, and where there are none.

Why: models slice, reverse, transpose and reshape a stack of weights before they scan it. The scan can read its layer
from the stack where it lies, if it is known where that is. And the gradient of a part of a stack is padded with zeros,
so that it need not wait for the gradients of the other parts.

How: the rules of `layer_rules` the other way round, for operations that only move, pick or convert entries.
"""

import math
from collections.abc import Set
from typing import NamedTuple

import numpy as np
from jax.extend import core

from optax_mpo._program import jax_forms, layer_rules
from optax_mpo._program.layer_rules import Entries
from optax_mpo._program.program import Atom, Operation, Program


class Origin(NamedTuple):
  """What an array is made of.

  Attributes:
    source: the variable that it comes from.
    operations: those that make it from the source, in order.
    entries: where a layer lies in the source.
    beside: inputs of the program that the operations read too, such as the scales of a weight. A layer is assumed to
      lie in them as in the source; `by_layer` has to confirm that.
  """

  source: int
  operations: tuple[Operation, ...]
  entries: Entries
  beside: tuple[int, ...] = ()


def origin(program: Program, atom: Atom, count: int, sources: Set[int]) -> Origin | None:
  """Finds the one of `sources` that an array with `count` layers along its first axis is made from, if any.

  The array has to be made from the source alone, or by a call of the source and of smaller inputs of the program.
  """
  chain: list[Operation] = []
  entries: Entries | None = Entries(0)
  beside: tuple[int, ...] = ()
  while isinstance(atom, int) and atom not in sources:
    made = program.makers.get(atom)
    if made is None:
      return None
    operation = program.operations[made]
    chain.append(operation)
    if len(operation.inputs) != 1:
      beside = _beside(program, operation, entries, sources)
      if not beside:
        return None
    else:
      entries = _before(program, operation, entries, count)
    if entries is None:
      return None
    atom = operation.inputs[0]
  return Origin(atom, tuple(chain[::-1]), entries, beside) if isinstance(atom, int) else None


def _beside(program: Program, operation: Operation, entries: Entries, sources: Set[int]) -> tuple[int, ...]:
  """The other operands of a call of a source, if they are smaller inputs of the program with as many entries."""
  source, others = operation.inputs[0], operation.inputs[1:]
  known = all(isinstance(a, int) and a in program.inputs for a in others)
  if operation.name not in jax_forms.CALLS or source not in sources or not known:
    return ()
  shape, shapes = program.aval(source).shape, [program.aval(v).shape for v in others]
  same = all(len(s) == len(shape) and s[entries.axis] == shape[entries.axis] for s in shapes)
  return others if same and sum(map(math.prod, shapes)) * 8 <= math.prod(shape) else ()


def fill(program: Program, atom: Atom, entries: Entries, count: int) -> np.ndarray | None:
  """Returns the scalar that these entries of an array have, all of `count` layers, if the program shows it."""
  if isinstance(atom, core.Literal):
    return np.asarray(atom.val, program.aval(atom).dtype)
  made = program.makers.get(atom)
  if made is None:
    constant = program.constants.get(atom)
    return np.asarray(constant) if isinstance(constant, np.ndarray | np.generic) and not np.ndim(constant) else None
  operation = program.operations[made]
  name, inputs = operation.name, operation.inputs
  if name == "broadcast_in_dim" and not program.aval(inputs[0]).shape:
    return fill(program, inputs[0], entries, count)
  if name == "pad" and _is_padding(program, operation, entries, count):
    return fill(program, inputs[1], entries, count)
  if name in ("add", "add_any"):
    found = [fill(program, a, entries, count) for a in inputs]
    return found[0] if all(x is not None and not x for x in found) else None
  before = _before(program, operation, entries, count)
  found = None if before is None else fill(program, inputs[0], before, count)
  return None if found is None else found.astype(program.aval(atom).dtype)


def _is_padding(program: Program, operation: Operation, entries: Entries, count: int) -> bool:
  """Whether these entries are all filled, none an entry of the operand."""
  low, _, interior = operation.eqn.params["padding_config"][entries.axis]
  step, length = interior + 1, program.aval(operation.inputs[0]).shape[entries.axis]
  return not entries.covered(count) & set(range(low, low + length * step, step))


_ALIKE = frozenset(["convert_element_type", "copy", "copy_p", "optimization_barrier"])


def _before(program: Program, operation: Operation, entries: Entries | None, count: int) -> Entries | None:
  """Where a layer lies in the first operand, if `entries` of the result are these entries of it alone."""
  if entries is None:
    return None
  params, axis, name = operation.eqn.params, entries.axis, operation.name
  old, new = program.aval(operation.inputs[0]).shape, program.aval(operation.outputs[0]).shape
  if name in _ALIKE:
    return entries
  if name == "transpose":
    return entries.on(params["permutation"][axis])
  if name == "squeeze":
    return entries.on([a for a in range(len(old)) if a not in params["dimensions"]][axis])
  if name == "broadcast_in_dim":
    found = [a for a, to in enumerate(params["broadcast_dimensions"]) if to == axis and old[a] == new[axis]]
    return entries.on(found[0]) if found else None
  if name == "reshape" and params.get("dimensions") is None:
    return layer_rules.reshaped(entries, new, old)
  if name == "rev":
    return entries.reversed(new[axis]) if axis in params["dimensions"] else entries
  if name == "slice":
    start, stride = params["start_indices"][axis], (params["strides"] or [1] * len(old))[axis]
    return None if stride > 1 and entries.size > 1 else entries.spread(start, stride)
  if name == "pad":
    low, _, interior = params["padding_config"][axis]
    others = [c for a, c in enumerate(params["padding_config"]) if a != axis]
    if interior or any(c != (0, 0, 0) for c in others):
      return None
    moved = entries.spread(-low, 1)
    return moved if moved.within(old[axis], count) else None
  return None

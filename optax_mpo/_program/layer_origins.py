"""Follows layers back through a program: which entries of which array they come from, and where there are none.

Why: models slice, reverse, transpose and reshape a stack of weights before they scan it. The scan can read its layer
from the stack where it lies, if it is known where that is. And the gradient of a part of a stack is padded with zeros,
so that it need not wait for the gradients of the other parts.

How: the rules of `layer_rules` the other way round, for operations that only move, pick or convert entries.
"""

import itertools
import math
from collections.abc import Set
from typing import NamedTuple

import numpy as np
from jax.extend import core

from optax_mpo._core.annotations import Shaped
from optax_mpo._program import dataflow, jax_forms
from optax_mpo._program.entries import Entries
from optax_mpo._program.layer_rules import ELEMENTWISE
from optax_mpo._program.program import MOVES, Atom, Operation, Program

SUMS = ("add", "add_any")


class Origin(NamedTuple):
  """What an array is made of.

  Attributes:
    sources: the variables that it comes from, and where a layer lies in each: weights, and their scales.
    given: the variables of whole arrays that other layers come from.
    operations: those that make it from these, in order.
  """

  sources: dict[int, Entries]
  given: tuple[int, ...]
  operations: tuple[Operation, ...]


def origin(program: Program, atom: Atom, count: int, sources: Set[int]) -> Origin | None:
  """Finds those of `sources` that an array with `count` layers along its first axis is made from, if any."""
  found: dict[int, Entries] = {}
  given: set[int] = set()

  def follow(atom: Atom, entries: Entries) -> bool:
    if isinstance(atom, int) and atom in sources:
      both = _joined(found.get(atom, entries), entries, count)
      found.update({} if both is None else {atom: both})
      return both is not None
    if not isinstance(atom, int) or (made := program.makers.get(atom)) is None:
      return False
    operation = program.operations[made]
    if joins(operation, entries):
      operands = parts(program, operation, entries, count)
      for operand, part in operands:
        is_made = part is not None and part.layers(count) and follow(operand, part)
        if not is_made and isinstance(operand, int):
          given.add(operand)
      return all(part is not None for _, part in operands)
    if operation.name == "optimization_barrier":
      return follow(operation.inputs[operation.outputs.index(atom)], entries)
    if beside := _beside(program, operation, entries, sources):
      found.update(dict.fromkeys(beside, entries))
      return follow(operation.inputs[0], entries)
    if len(operation.inputs) == 1:
      at = before(program, atom, entries, count)
      return at is not None and follow(operation.inputs[0], at)
    if operation.name not in ELEMENTWISE:
      return False
    return all([is_small(operand, program.aval(atom)) or follow(operand, entries) for operand in operation.inputs])

  def is_small(atom: Atom, result: Shaped) -> bool:
    """Whether an operand is a scalar, or an array that is broadcast, such as a mask. Either is given."""
    atom = base(program, atom)
    if not isinstance(atom, int):
      return True
    if atom in sources or math.prod(program.aval(atom).shape) * 8 > math.prod(result.shape):
      return False
    given.add(atom)
    return True

  if not follow(atom, Entries(0)) or not found:
    return None
  return Origin(found, tuple(sorted(given)), tuple(dataflow.slice_of(program, [atom], given | set(found))))


def base(program: Program, atom: Atom) -> Atom:
  """The array that another is broadcast, moved or converted from."""
  while isinstance(atom, int) and (made := program.makers.get(atom)) is not None:
    operation = program.operations[made]
    if not is_move(operation):
      break
    atom = operation.inputs[0]
  return atom


def is_move(operation: Operation) -> bool:
  """Whether an operation only broadcasts, moves or converts the elements of its first operand."""
  return operation.name in MOVES or operation.name == "broadcast_in_dim"


def _beside(program: Program, operation: Operation, entries: Entries, sources: Set[int]) -> tuple[int, ...]:
  """The other operands of a call of a source, such as its scales, if they are inputs with as many layers, and smaller.

  A layer is assumed to lie in them as in the source; `by_layer` has to confirm that.
  """
  if operation.name not in jax_forms.CALLS:
    return ()
  source = operation.inputs[0]
  others = tuple(a for a in operation.inputs[1:] if isinstance(a, int) and a in program.inputs)
  if source not in sources or not others or len(others) < len(operation.inputs) - 1:
    return ()
  shape, shapes = program.aval(source).shape, [program.aval(v).shape for v in others]
  same = all(len(s) == len(shape) and s[entries.axis] == shape[entries.axis] for s in shapes)
  return others if same and sum(map(math.prod, shapes)) * 8 <= math.prod(shape) else ()


def _joined(a: Entries, b: Entries, count: int) -> Entries | None:
  """The layers of both, if they lie in the same way, one after the other."""
  first, last = sorted((a.layers(count), b.layers(count)), key=lambda layers: layers.start)
  if a._replace(without=b.without) != b or (a != b and first.stop != last.start):
    return None
  return a._replace(without=(first.start, count - last.stop))


def joins(operation: Operation, entries: Entries) -> bool:
  """Whether an operation joins arrays along the axis of the layers."""
  return operation.name == "concatenate" and operation.eqn.params["dimension"] == entries.axis


def parts(program: Program, operation: Operation, entries: Entries, count: int) -> list[tuple[Atom, Entries | None]]:
  """Where the layers lie in each operand of a concatenation; None where it has only a part of a layer."""
  ends = list(itertools.accumulate(program.aval(a).shape[entries.axis] for a in operation.inputs))
  starts = [0, *ends[:-1]]
  return [(a, entries.cut(o, end, count)) for a, o, end in zip(operation.inputs, starts, ends, strict=True)]


def _through(program: Program, atom: int, entries: Entries, count: int) -> tuple[Atom, Entries] | None:
  """The operand that has all of these entries of an array, and where."""
  operation = program.operations[program.makers[atom]]
  if not joins(operation, entries):
    at = before(program, atom, entries, count)
    return None if at is None else (operation.inputs[0], at)
  found = [(a, part) for a, part in parts(program, operation, entries, count) if part is not None]
  return next(((a, part) for a, part in found if part.without == entries.without), None)


def leaves(program: Program, atom: Atom, entries: Entries) -> dict[int, Entries]:
  """Returns the arrays that one layer of a sum of padded and joined arrays is made from, and where it lies in each."""
  if not isinstance(atom, int) or fill(program, atom, entries, 1) is not None:
    return {}
  made = program.makers.get(atom)
  operation = program.operations[made] if made is not None else None
  if operation is not None and operation.name in SUMS:
    return {v: e for a in operation.inputs for v, e in leaves(program, a, entries).items()}
  found = _through(program, atom, entries, 1) if operation is not None else None
  return leaves(program, *found) if found is not None and found[1].size == 1 else {atom: entries}


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
  if name in SUMS:
    found = [fill(program, a, entries, count) for a in inputs]
    return found[0] if all(x is not None and not x for x in found) else None
  through = _through(program, atom, entries, count)
  found = None if through is None else fill(program, *through, count)
  return None if found is None else found.astype(program.aval(atom).dtype)


def _is_padding(program: Program, operation: Operation, entries: Entries, count: int) -> bool:
  """Whether these entries are all filled, none an entry of the operand."""
  low, _, interior = operation.eqn.params["padding_config"][entries.axis]
  step, length = interior + 1, program.aval(operation.inputs[0]).shape[entries.axis]
  return not entries.covered(count) & set(range(low, low + length * step, step))


_ALIKE = frozenset(["convert_element_type", "copy", "copy_p", "device_put", "optimization_barrier", "stop_gradient"])


def before(program: Program, atom: int, entries: Entries, count: int) -> Entries | None:
  """Where a layer lies in the first operand of what makes an array, if its `entries` are these entries of it alone."""
  operation = program.operations[program.makers[atom]]
  params, axis, name = operation.eqn.params, entries.axis, operation.name
  old, new = program.aval(operation.inputs[0]).shape, program.aval(atom).shape
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
    return entries.reshaped(new, old)
  if name == "rev":
    return entries.reversed(new[axis]) if axis in params["dimensions"] else entries
  if name == "slice":
    start, stride = params["start_indices"][axis], (params["strides"] or [1] * len(old))[axis]
    return None if stride > 1 and entries.size > 1 else entries.spread(start, stride)
  if name == "split":
    position = operation.outputs.index(atom)
    return entries.spread(sum(params["sizes"][:position]), 1) if params["axis"] == axis else entries
  if name == "pad":
    low, _, interior = params["padding_config"][axis]
    others = [c for a, c in enumerate(params["padding_config"]) if a != axis]
    if interior or any(c != (0, 0, 0) for c in others):
      return None
    moved = entries.cut(low, low + old[axis], count)
    return moved if moved is not None and moved.without == entries.without else None
  return None

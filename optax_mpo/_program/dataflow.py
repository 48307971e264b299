"""What in a program depends on what: which inputs each variable is made from, and which operations make some variables.

How: `dependencies` is a forward pass with bit sets of inputs, `slice_of` a backward pass.
"""

import dataclasses
import functools
import heapq
import operator
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

from optax_mpo._program import jax_forms
from optax_mpo._program.program import Atom, Operation, Program

_Item = TypeVar("_Item")


def dependencies(program: Program, inputs: Sequence[int], known: Collection[int] = ()) -> dict[int, int]:
  """Returns, for every variable, the union of the bit sets of the inputs it depends on.

  Args:
    program: the program.
    inputs: a bit set for each input of the program.
    known: variables that count as depending on nothing.
  """
  deps = dict.fromkeys(program.constants, 0)
  deps.update(zip(program.inputs, inputs, strict=True))
  for operation in program.operations:
    found = [deps[a] if isinstance(a, int) else 0 for a in operation.inputs]
    for var, bits in zip(operation.outputs, _output_dependencies(operation, found), strict=True):
      if var >= 0:
        deps[var] = 0 if var in known else bits
  return deps


def output_bits(program: Program, deps: dict[int, int]) -> list[int]:
  """The bit sets of a program's outputs."""
  return [deps[a] if isinstance(a, int) else 0 for a in program.outputs]


def _output_dependencies(operation: Operation, inputs: list[int]) -> list[int]:
  if operation.name == "cond":
    per_branch = [output_bits(b, dependencies(b, inputs[1:])) for b in operation.bodies]
    return [inputs[0] | union(bits) for bits in zip(*per_branch, strict=True)]
  if operation.name == "optimization_barrier":
    return inputs
  if operation.name == "scan":
    return _scan_dependencies(operation, inputs)
  return [union(inputs)] * len(operation.outputs)


def union(sets: Iterable[int]) -> int:
  """The union of bit sets."""
  return functools.reduce(operator.or_, sets, 0)


def _scan_dependencies(operation: Operation, inputs: list[int]) -> list[int]:
  scan = jax_forms.read_scan(operation)
  if scan is None:  # each result may depend on every operand
    return [union(inputs)] * len(operation.outputs)
  consts, carry, body = scan
  carried = inputs[consts : consts + carry]
  while True:
    found = output_bits(body, dependencies(body, [*inputs[:consts], *carried, *inputs[consts + carry :]]))
    grown = [a | b for a, b in zip(carried, found[:carry], strict=True)]
    if grown == carried:
      return grown + found[carry:]  # a carried result needs its initial value too
    carried = grown


def read_by(operations: Iterable[Operation], outputs: Iterable[Atom] = ()) -> set[int]:
  """The variables that `operations` read, and those among `outputs`."""
  atoms = [a for operation in operations for a in operation.inputs]
  return {a for a in [*atoms, *outputs] if isinstance(a, int)}


def slice_of(program: Program, outputs: Iterable[Atom], given: set[int] | frozenset[int]) -> list[Operation]:
  """Returns the operations that make `outputs` when the variables `given` are known, in an order in which they can run.

  Operations that keep several values apart (`cond`, `scan`, `optimization_barrier`) are cut down to the needed results.
  """
  needed = {a for a in outputs if isinstance(a, int)} - given
  makers = program.makers
  queue = [-makers[v] for v in needed if v in makers]
  heapq.heapify(queue)
  kept, last = [], 1
  while queue:
    index = heapq.heappop(queue)
    if index == last:
      continue
    last = index
    operation = without_unused(program.operations[-index], needed)
    kept.append(operation)
    for atom in operation.inputs:
      if isinstance(atom, int) and atom not in needed and atom not in given:
        needed.add(atom)
        if atom in makers:
          heapq.heappush(queue, -makers[atom])
  return kept[::-1]


def without_unused(operation: Operation, needed: set[int]) -> Operation:
  used = [v in needed for v in operation.outputs]
  cut = _CUTS.get(operation.name)
  if cut is None or (all(used) and operation.name != "scan"):  # a scan may have operands that no result needs
    return operation
  return cut(operation, used)


def _cut_barrier(operation: Operation, used: list[bool]) -> Operation:
  return dataclasses.replace(operation, inputs=_kept(operation.inputs, used), outputs=_kept(operation.outputs, used))


def _cut_cond(operation: Operation, used: list[bool]) -> Operation:
  """A `cond` with only the results that are used, and the operands that they need."""
  sliced, read = [], set()
  for body in operation.bodies:
    outputs = [a for a, keep in zip(body.outputs, used, strict=True) if keep]
    operations = slice_of(body, outputs, frozenset())
    reads = {a for o in operations for a in o.inputs if isinstance(a, int)} | {a for a in outputs if isinstance(a, int)}
    read |= {i for i, v in enumerate(body.inputs) if v in reads}
    sliced.append((body, outputs, operations))
  index, *operands = operation.inputs
  return dataclasses.replace(
    operation,
    inputs=(index, *(operands[i] for i in sorted(read))),
    outputs=_kept(operation.outputs, used),
    bodies=tuple(
      dataclasses.replace(body, inputs=[body.inputs[i] for i in sorted(read)], outputs=outputs, operations=operations)
      for body, outputs, operations in sliced
    ),
  )


def _kept(items: Sequence[_Item], keep: Sequence[bool]) -> tuple[_Item, ...]:
  return tuple(item for item, wanted in zip(items, keep, strict=True) if wanted)


_CUTS = {"cond": _cut_cond, "optimization_barrier": _cut_barrier, "scan": jax_forms.cut_scan}

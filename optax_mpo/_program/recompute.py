"""Makes arrays again where keeping them would take more memory: decoded weights, and parts of a forward pass.

Why: a decoded weight takes as much memory as a bf16 weight. Made once, it would be kept until the backward pass has
read it, and at the peak there would be those of all layers. Likewise the logits, until a second backward pass.

How: each use of a decoded weight reads an array of its own. A barrier ties it to another operand of that use, so that
XLA neither makes it early nor takes two of them for one.
"""

import dataclasses
import math
from collections.abc import Iterable

import jax.numpy as jnp
from jax import lax

from optax_mpo._core import host, types
from optax_mpo._program import jax_forms
from optax_mpo._program.program import MOVES, Atom, Operation, Program

_SMALL = 2**14  # elements up to which an array is kept
_LARGER = 8  # an array is made again if it is this many times as large as all that it is made from
_LOOPS = frozenset("scan while cond".split())


def fetched_for_each_use(program: Program, weights: Iterable[int], scales: Iterable[int] = ()) -> Program:
  """The program, where each use of a weight in host memory fetches it, and each use of one with scales decodes it.

  Args:
    program: the program of a loss, or of a backward pass.
    weights: the inputs that are weights.
    scales: the inputs that are scales of weights.
  """
  sources = {*(v for v in weights if host.is_on_host(program.aval(v))), *scales}
  reading = [o for o in program.operations if any(isinstance(a, int) and a in sources for a in o.inputs)]
  return for_each_use(program, [v for o in reading if o.name != "scan" for v in o.outputs])


def for_each_use(program: Program, variables: Iterable[int]) -> Program:
  """Returns the program with operations that make some variables again, from inputs of the program.

  Scans read their layers where they lie, and are left as they are.

  Args:
    program: the program of a loss and its gradients.
    variables: the variables; one operation makes each from inputs of the program.
  """
  chains: dict[int, tuple[Operation, ...]] = {}  # what makes a variable, or a transposed or cast one
  for v in variables:
    if v in program.makers and math.prod(program.aval(v).shape) > _SMALL:
      chains[v] = (program.operations[program.makers[v]],)
  if not chains:
    return program
  operations: list[Operation] = []
  for operation in program.operations:
    moved = operation.inputs[0] if operation.name in MOVES else None
    if isinstance(moved, int) and moved in chains:
      chains[operation.outputs[0]] = (*chains[moved], operation)
    elif operation.name != "scan":
      again = {a for a in operation.inputs if isinstance(a, int) and a in chains}
      others = [a for a in operation.inputs if isinstance(a, int) and a not in chains and _is_float(program, a)]
      if others:
        latest = max(others, key=lambda a: program.makers.get(a, -1))
        new = {a: _again(program, chains[a], latest, operations) for a in again}
        inputs = tuple(new.get(a, a) if isinstance(a, int) else a for a in operation.inputs)
        operation = dataclasses.replace(operation, inputs=inputs)
    operations.append(operation)
  return dataclasses.replace(program, operations=operations)


def _is_float(program: Program, atom: Atom) -> bool:
  return jnp.issubdtype(program.aval(atom).dtype, jnp.inexact)


def _again(program: Program, chain: tuple[Operation, ...], after: int, operations: list[Operation]) -> int:
  """Adds what makes the last result of a chain again, once `after` is known, and returns its variable."""
  held = (*(a for a in chain[0].inputs if isinstance(a, int)), after)
  barrier, _ = jax_forms.trace(lambda *xs: lax.optimization_barrier(xs), *(types.struct(program.aval(a)) for a in held))
  known = {a: program.new(program.aval(a)) for a in held}
  operations.append(dataclasses.replace(barrier.operations[0], inputs=held, outputs=tuple(known.values())))
  for operation in chain:
    inputs = tuple(known.get(a, a) if isinstance(a, int) else a for a in operation.inputs)
    known |= {v: program.new(program.aval(v)) for v in operation.outputs}
    operations.append(dataclasses.replace(operation, inputs=inputs, outputs=tuple(known[v] for v in operation.outputs)))
  return known[chain[-1].outputs[0]]


def worth_keeping(program: Program, wanted: Iterable[int], data: dict[int, int]) -> list[int]:
  """Returns variables to keep in place of those `wanted`, which can be made of them again.

  Args:
    program: the program of a loss and its gradients.
    wanted: variables of the forward pass.
    data: by variable, not 0 if it depends on more than weights; what does not is made again.
  """
  kept = set(wanted)
  for v in sorted(kept, key=lambda v: -_bytes(program, v)):
    smaller = _made_from(program, v, data)
    if smaller is not None:
      kept = kept - {v} | smaller
  return sorted(kept)


def starts(program: Program, operations: Iterable[Operation], data: dict[int, int], kept: list[int]) -> list[int]:
  """Returns the variables that a backward pass hands to its loops and makes before any of them, for a second one.

  Kept, such as the gradient of the head's input, they save a second pass the products that make them.

  Args:
    program: the program of a loss and its gradients.
    operations: its backward pass.
    data: by variable, not 0 if it depends on more than weights.
    kept: what the forward pass keeps. No variable larger than all of these is returned.
  """
  limit = max((_bytes(program, v) for v in kept), default=0)
  before: set[int] = set()
  found: set[int] = set()
  late: set[int] = set()
  for operation in operations:
    inputs = {a for a in operation.inputs if isinstance(a, int)}
    if operation.name in _LOOPS:
      found |= {v for v in inputs & before if data.get(v) and _bytes(program, v) <= limit}
    is_late = operation.name in _LOOPS or not inputs.isdisjoint(late)
    (late if is_late else before).update(operation.outputs)
  return sorted(found)


def _made_from(program: Program, variable: int, data: dict[int, int]) -> set[int] | None:
  """Much smaller variables that a variable can be made from without loops; None if there are none."""
  limit = _bytes(program, variable) // _LARGER
  found: set[int] = set()
  queue, seen = [variable], set(program.inputs)
  while queue:
    operation = program.operations[program.makers[queue.pop()]]
    if operation.name in _LOOPS:
      return None
    for atom in operation.inputs:
      if isinstance(atom, int) and data.get(atom) and atom not in seen:
        seen.add(atom)
        if _bytes(program, atom) <= limit:
          found.add(atom)
        else:
          queue.append(atom)
  return found if sum(_bytes(program, v) for v in found) <= limit else None


def _bytes(program: Program, variable: int) -> int:
  aval = program.aval(variable)
  return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 1)

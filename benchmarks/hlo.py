"""Reads an optimized XLA:GPU program, and computes how many bytes each kernel reads and writes.

Why: an optimizer's step is bound by memory. How many bytes it moves is known once XLA has chosen its fusions, and that
needs no GPU. A kernel reads each operand and writes each result once. A slice that is read from an operand, or written
into one in place, counts with the size of the slice. Loops count with their trip count.

Limits: it knows nothing of caches (a number read by two kernels in a row counts twice), nor how close a kernel comes to
the bandwidth of the card.
"""

import dataclasses
import re
from collections.abc import Sequence

from optax_mpo._memory.hlo import FREE, SLICES, TRIPS, Computation, Instruction, elements_needed, parse, results_of


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One kernel, with the number of its launches.

  Attributes:
    name: the name of the instruction.
    opcode: XLA's opcode: fusion, custom-call (a matrix product of cuBLAS), copy, ...
    launches: how often it runs in one training step.
    read: bytes per launch.
    written: bytes per launch.
    of_state: whether it depends on the optimizer's state.
  """

  name: str
  opcode: str
  launches: int
  read: float
  written: float
  of_state: bool

  @property
  def bytes(self) -> float:
    """All bytes that it moves in one training step."""
    return self.launches * (self.read + self.written)


def kernels(text: str, state: Sequence[int]) -> list[Kernel]:
  """Returns all kernels that a program launches.

  Args:
    text: the program, as XLA:GPU dumps it after optimizations.
    state: the indices of the parameters that hold the optimizer's state. A kernel is `of_state` if anything it reads is
      one of them or depends on one. Values carried through a loop depend on the state only if they did before the loop:
      weights that a loop updates in place do not.
  """
  computations, entry = parse(text)
  main = computations[entry]
  marks = [[number in state] for number in range(len(main.parameters))]
  return list(_walk(computations, main, marks, 1)[0])


_Marks = list[bool]  # for each array of a value: whether it depends on the state


def _walk(
  computations: dict[str, Computation], computation: Computation, parameters: Sequence[_Marks], launches: int
) -> tuple[list[Kernel], _Marks]:
  """Returns the kernels of a computation and the marks of its result."""
  marks: dict[str, _Marks] = {}
  made: list[Kernel] = []
  for i in computation.instructions.values():
    inputs = [marks.get(operand, [False]) for operand in i.operands]
    if i.opcode == "parameter":
      marks[i.name] = parameters[i.number]
    elif i.opcode == "tuple":
      marks[i.name] = [mark for each in inputs for mark in each]
    elif i.opcode == "get-tuple-element":
      marks[i.name] = _element(computation, i, inputs[0])
    elif i.opcode == "while":
      trips = TRIPS.search(i.text)
      if trips is None:
        raise ValueError(f"the number of turns of {i.name} is not known")
      made += _walk(computations, computations[i.called], inputs, launches * int(trips[1]))[0]
      marks[i.name] = inputs[0]
    elif i.opcode == "call":
      inner, marks[i.name] = _walk(computations, computations[i.called], inputs, launches)
      made += inner
    elif i.opcode == "async-start":
      inner, result = _walk(computations, computations[i.called], inputs, launches)
      made += inner
      marks[i.name] = [any(result)] * len(i.arrays)
    elif i.opcode == "conditional":
      raise ValueError(f"{i.name}: {i.opcode} is not known here")
    else:
      of_state = any(map(any, inputs))
      marks[i.name] = [of_state] * len(i.arrays)
      if i.opcode not in FREE and not i.opcode.endswith("-done"):
        made.append(Kernel(i.name, i.opcode, launches, *_traffic(computations, computation, i), of_state))
  return made, marks[computation.root]


def _element(computation: Computation, i: Instruction, marks: _Marks) -> _Marks:
  operand = computation.instructions[i.operands[0]]
  if len(marks) != len(operand.arrays):  # the marks of this value are unknown
    return [any(marks)] * len(i.arrays)
  return marks[i.number : i.number + len(i.arrays)]  # tuples are flat after XLA's optimizations


def _traffic(computations: dict[str, Computation], outer: Computation, i: Instruction) -> tuple[float, float]:
  operands = [outer.instructions[name] for name in i.operands]
  if i.opcode == "fusion":
    inner = computations[i.called]
    roots = [inner.source(name) for name in results_of(inner)]
    in_place = [root for root in roots if root.opcode == "dynamic-update-slice"]
    needed = elements_needed(inner, in_place)
    read = sum(p.arrays[0].bytes(needed[p.name]) for p in inner.parameters if p.arrays)
    written = sum(
      (inner.instructions[root.operands[1]] if root in in_place else root).arrays[0].bytes() for root in roots
    )
    return read, written
  if i.opcode == "dynamic-update-slice":
    update = operands[1].arrays[0].bytes()
    return update, update
  if i.opcode in SLICES:
    return i.arrays[0].bytes(), i.arrays[0].bytes()
  if i.opcode.endswith("-start"):  # its result contains its operands
    moved = sum(a.bytes() for o in operands for a in o.arrays)
    return moved, moved
  results = [a for a in i.arrays if a.dtype not in ("token", "opaque")]
  if i.opcode == "custom-call" and "step_weight" in i.text:  # our kernel: updates one layer of its stacks in place
    stacks = {int(number) for number in re.findall(r"\{\d+\}: \((\d+), \{\}\)", i.text)}
    read = sum(o.arrays[0].bytes() / (o.arrays[0].shape[0] if k in stacks else 1) for k, o in enumerate(operands))
    return read, sum(a.bytes() / a.shape[0] for a in results)
  if i.opcode == "custom-call" and len(results) > 1:  # the last one is its workspace
    results = results[:-1]
  return sum(a.bytes() for o in operands for a in o.arrays), sum(a.bytes() for a in results)


def summary(some: Sequence[Kernel], parameters: int) -> str:
  """Returns a readable table of kernels."""
  lines = [f"{'kernel':48} {'launches':>8} {'read':>8} {'written':>8}  bytes per parameter"]
  lines += [
    f"{k.name:48} {k.launches:8} {k.launches * k.read / parameters:8.3f} {k.launches * k.written / parameters:8.3f}"
    for k in some
  ]
  return "\n".join(lines)

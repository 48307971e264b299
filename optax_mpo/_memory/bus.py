"""Reads from a compiled program how many bytes cross the bus between host and device in one run.

Why: a step whose state is in host memory is as fast as the bus at best. How often it fetches a weight is decided by
rematerialisation, by the rows of large leaves and by XLA, so it is read from the program and not computed.

How: an operation moves to the device what it reads of an array in host memory (XLA's memory space 5), unless its result
is there as well; and to the host what it writes there. A slice counts with its own size, an operation in the body of a
loop with the loop's trip count. Of the branches of a conditional, the larger one counts. A loop whose trip count XLA
does not know, such as one that ends when a value is small, counts once.
"""

import dataclasses
from typing import NamedTuple

from optax_mpo._memory import hlo


class Traffic(NamedTuple):
  """Bytes from the host to the device, and from the device to the host."""

  to_device: int
  to_host: int

  def __add__(self, other: "Traffic") -> "Traffic":  # type: ignore[override]  # a sum of figures, not a longer tuple
    return Traffic(self.to_device + other.to_device, self.to_host + other.to_host)

  def times(self, n: int) -> "Traffic":
    return Traffic(self.to_device * n, self.to_host * n)


NONE = Traffic(0, 0)


def traffic(text: str) -> Traffic:
  """Returns what crosses the bus in one run of a program, given as XLA:GPU dumps it after optimizations."""
  if "S(5)" not in text:
    return NONE
  computations, entry = hlo.parse(text)
  return _within(computations, computations[entry])


def _within(computations: dict[str, hlo.Computation], computation: hlo.Computation) -> Traffic:
  total = NONE
  for i in computation.instructions.values():
    if i.opcode in hlo.FREE or i.opcode.endswith("-done"):
      continue
    if i.opcode == "while":
      trips = hlo.TRIPS.search(i.text)
      total += _within(computations, computations[i.called]).times(int(trips[1]) if trips else 1)
    elif i.opcode in ("call", "async-start"):
      total += _within(computations, computations[i.called])
    elif i.opcode == "conditional":
      total += max((_within(computations, computations[name]) for name in i.branches), key=sum)
    elif i.opcode == "fusion":
      total += _of_fusion(computations[i.called])
    else:
      total += _of_operation(i, [computation.instructions[name] for name in i.operands])
  return total


def _of_fusion(inner: hlo.Computation) -> Traffic:
  roots = [inner.source(name) for name in hlo.results_of(inner)]
  in_place = [root for root in roots if root.opcode == "dynamic-update-slice"]
  needed = hlo.elements_needed(inner, in_place)
  read = sum(p.arrays[0].bytes(needed[p.name]) for p in inner.parameters if p.arrays and p.arrays[0].on_host)
  written = [inner.instructions[root.operands[1]] if root in in_place else root for root in roots]
  pairs = zip(roots, written, strict=True)
  return Traffic(int(read), int(sum(w.arrays[0].bytes() for root, w in pairs if root.arrays[0].on_host)))


def _of_operation(i: hlo.Instruction, operands: list[hlo.Instruction]) -> Traffic:
  read = [array for operand in operands for array in operand.arrays]
  made = list(i.arrays)
  if i.opcode == "copy-start":  # its results are the copy, the operand and a token
    made = made[:1]
  elif i.opcode == "dynamic-update-slice":
    read, made = read[1:2], [dataclasses.replace(read[1], on_host=made[0].on_host)]
  elif i.opcode in hlo.SLICES:
    read = [dataclasses.replace(made[0], on_host=read[0].on_host)]
  from_host, into_host = ([a for a in arrays if a.on_host] for arrays in (read, made))
  if len(into_host) == len(made) and from_host:  # within the host
    return NONE
  return Traffic(*(int(sum(a.bytes() for a in arrays)) for arrays in (from_host, into_host)))

"""Reads an optimized XLA:GPU program, and computes how many bytes each kernel reads and writes.

Why: an optimizer's step is bound by memory. How many bytes it moves is known once XLA has chosen its fusions, and that
needs no GPU. A kernel reads each operand and writes each result once. A slice that is read from an operand, or written
into one in place, counts with the size of the slice. Loops count with their trip count.

Limits: it knows nothing of caches (a number read by two kernels in a row counts twice), nor how close a kernel comes to
the bandwidth of the card.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|body)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_FREE = set("parameter constant tuple get-tuple-element bitcast after-all opt-barrier partition-id".split())
_SLICES = {"dynamic-slice", "slice", "gather"}
_ELEMENTWISE = set(
  "abs add and bitcast bitcast-convert broadcast cbrt ceil clamp compare convert copy cosine divide exponential "
  "exponential-minus-one floor is-finite log log-plus-one logistic maximum minimum multiply negate not or power "
  "remainder reshape round-nearest-afz round-nearest-even rsqrt select shift-left shift-right-arithmetic "
  "shift-right-logical sign sine sqrt subtract tan tanh transpose xor".split()
)


@dataclasses.dataclass(frozen=True)
class Array:
  """An array's type: `dtype` as XLA names it, and its shape."""

  dtype: str
  shape: tuple[int, ...]

  @property
  def size(self) -> int:
    """The number of elements."""
    return math.prod(self.shape)

  def bytes(self, elements: int | None = None) -> float:
    """The bytes of this many elements, or of all."""
    return (self.size if elements is None else elements) * _bits(self.dtype) / 8


def _bits(dtype: str) -> int:
  if dtype in ("token", "opaque"):
    return 0
  return 8 if dtype == "pred" else int(re.sub(r"^[a-z]+", "", dtype).split("e")[0])


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a program. `called` is the computation of a fusion or a call, or the body of a loop."""

  name: str
  arrays: tuple[Array, ...]
  opcode: str
  operands: tuple[str, ...]
  called: str
  text: str

  @property
  def number(self) -> int:
    """The index of a parameter or of a tuple element."""
    found = re.search(r"parameter\((\d+)\)|index=(\d+)", self.text)
    return int(found[1] or found[2]) if found else 0


@dataclasses.dataclass(frozen=True)
class Computation:
  """A list of instructions, each after the ones it uses. `root` is the result."""

  instructions: dict[str, Instruction]
  root: str

  @functools.cached_property
  def parameters(self) -> list[Instruction]:
    return sorted((i for i in self.instructions.values() if i.opcode == "parameter"), key=lambda i: i.number)

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for instruction in self.instructions.values():
      for operand in dict.fromkeys(instruction.operands):
        users[operand].append(instruction)
    return users

  def source(self, name: str) -> Instruction:
    """The instruction that computes `name`, behind any bitcasts."""
    found = self.instructions[name]
    while found.opcode == "bitcast":
      found = self.instructions[found.operands[0]]
    return found


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


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """Returns the computations of a program by name, and the name of the entry computation."""
  found: dict[str, Computation] = {}
  entry = name = root = ""
  lines: dict[str, Instruction] = {}
  for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
    if head := _COMPUTATION.match(line):
      name, lines = head[2], {}
      entry = name if head[1] else entry
    elif line.startswith("}"):
      found[name] = Computation(lines, root)
    elif made := _INSTRUCTION.match(line):
      instruction = _instruction(made)
      for operand in instruction.operands:
        if "#" in operand and operand not in lines:  # how JAX 0.12 writes an element of a tuple
          whole, number = operand.split("#")
          array = lines[whole].arrays[int(number)]
          lines[operand] = Instruction(operand, (array,), "get-tuple-element", (whole,), "", f"index={number}")
      lines[instruction.name] = instruction
      root = instruction.name if made[1] else root
  return found, entry


def _instruction(made: re.Match[str]) -> Instruction:
  _, name, shape, opcode, rest = made.groups()
  arrays = tuple(Array(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in _ARRAY.findall(shape))
  operands = re.findall(r"%([\w.\-]+(?:#\d+)?)", _arguments(rest))
  called = _CALLED.search(rest)
  return Instruction(name, arrays, opcode, tuple(operands), called[2] if called else "", made[0])


def _arguments(rest: str) -> str:
  """The text before the parenthesis that closes the arguments."""
  depth = 1
  for i, character in enumerate(rest):
    depth += (character == "(") - (character == ")")
    if not depth:
      return rest[:i]
  return rest


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
      trips = _TRIPS.search(i.text)
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
      if i.opcode not in _FREE and not i.opcode.endswith("-done"):
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
    roots = [inner.source(name) for name in _results(inner)]
    in_place = [root for root in roots if root.opcode == "dynamic-update-slice"]
    needed = _needed(inner, in_place)
    read = sum(p.arrays[0].bytes(needed[p.name]) for p in inner.parameters if p.arrays)
    written = sum(
      (inner.instructions[root.operands[1]] if root in in_place else root).arrays[0].bytes() for root in roots
    )
    return read, written
  if i.opcode == "dynamic-update-slice":
    update = operands[1].arrays[0].bytes()
    return update, update
  if i.opcode in _SLICES:
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


def _results(inner: Computation) -> Iterator[str]:
  root = inner.instructions[inner.root]
  yield from root.operands if root.opcode == "tuple" else [root.name]


def _needed(inner: Computation, in_place: Sequence[Instruction]) -> dict[str, int]:
  """Returns how many elements of each value in a fusion its results need."""
  needed: dict[str, int] = {}
  results = set(_results(inner))
  for i in reversed(inner.instructions.values()):
    if not i.arrays:
      needed[i.name] = 0
      continue
    size = i.arrays[0].size
    whole, slices = (size if i.name in results else 0), 0
    for user in inner.users[i.name]:
      if user in in_place and user.operands[0] == i.name and user.operands.count(i.name) == 1:
        continue
      if user.opcode in _SLICES and user.operands[0] == i.name:
        slices += needed[user.name]
      elif user.opcode in _ELEMENTWISE:
        whole = max(whole, needed[user.name])
      elif user.opcode != "tuple":
        whole = size
    needed[i.name] = min(size, max(whole, slices))
  return needed


def summary(some: Sequence[Kernel], parameters: int) -> str:
  """Returns a readable table of kernels."""
  lines = [f"{'kernel':48} {'launches':>8} {'read':>8} {'written':>8}  bytes per parameter"]
  lines += [
    f"{k.name:48} {k.launches:8} {k.launches * k.read / parameters:8.3f} {k.launches * k.written / parameters:8.3f}"
    for k in some
  ]
  return "\n".join(lines)

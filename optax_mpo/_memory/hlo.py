"""Reads an optimized XLA:GPU program, as XLA dumps it, into computations of instructions.

Why: what a compiled step moves, and where to, is written in its program and nowhere else. Each instruction gets its
opcode, the types of its results with their memory space, its operands, and the computation that it calls. Loops have
their trip count in the text.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\](?:\{[^{}]*(S\(5\))[^{}]*\})?")
_CALLED = re.compile(r"\b(calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
FREE = set("parameter constant tuple get-tuple-element bitcast after-all opt-barrier partition-id".split())
SLICES = {"dynamic-slice", "slice", "gather"}
_ELEMENTWISE = set(
  "abs add and bitcast bitcast-convert broadcast cbrt ceil clamp compare convert copy cosine divide exponential "
  "exponential-minus-one floor is-finite log log-plus-one logistic maximum minimum multiply negate not or power "
  "remainder reshape round-nearest-afz round-nearest-even rsqrt select shift-left shift-right-arithmetic "
  "shift-right-logical sign sine sqrt subtract tan tanh transpose xor".split()
)


@dataclasses.dataclass(frozen=True)
class Array:
  """An array's type: `dtype` as XLA names it, its shape, and whether it is in host memory (XLA's memory space 5)."""

  dtype: str
  shape: tuple[int, ...]
  on_host: bool = False

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
  def branches(self) -> list[str]:
    """The computations that a conditional chooses from."""
    found = [name for listed, one in _BRANCHES.findall(self.text) for name in (listed or one).split(",")]
    return [name.strip().removeprefix("%") for name in found]

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
  arrays = tuple(
    Array(dtype, tuple(int(n) for n in dims.split(",") if n), bool(on_host))
    for dtype, dims, on_host in _ARRAY.findall(shape)
  )
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


def results_of(inner: Computation) -> Iterator[str]:
  root = inner.instructions[inner.root]
  yield from root.operands if root.opcode == "tuple" else [root.name]


def elements_needed(inner: Computation, in_place: Sequence[Instruction]) -> dict[str, int]:
  """Returns how many elements of each value in a fusion its results need."""
  sizes: dict[str, int] = {}
  last = set(results_of(inner))
  for i in reversed(inner.instructions.values()):
    if not i.arrays:
      sizes[i.name] = 0
      continue
    size = i.arrays[0].size
    whole, slices = (size if i.name in last else 0), 0
    for user in inner.users[i.name]:
      if user in in_place and user.operands[0] == i.name and user.operands.count(i.name) == 1:
        continue
      if user.opcode in SLICES and user.operands[0] == i.name:
        slices += sizes[user.name]
      elif user.opcode in _ELEMENTWISE:
        whole = max(whole, sizes[user.name])
      elif user.opcode != "tuple":
        whole = size
    sizes[i.name] = min(size, max(whole, slices))
  return sizes

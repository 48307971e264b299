"""Reads from XLA's dump which buffers make up the peak: their names, sizes, operations and source lines.

XLA:GPU places all temporaries of a program in one allocation. Its size is the peak, and values that live at different
times share its bytes. This module assigns every byte to one value: to the value that occupies it at the peak, or, if it
is unused at the peak, to the largest value that ever occupies it. So the sizes add up to the allocation.

It reads three files with the common prefix `...gpu_after_optimizations`:

  -buffer-assignment.txt   the allocations, and the values in them with offset and size
  -live-range.txt          the values alive at the peak
  .txt                     the program: names and stack frames of operations
"""

import bisect
import collections
import dataclasses
import functools
import pathlib
import re
import sysconfig
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from optax_mpo._memory.report import Buffer

_ALLOCATION = re.compile(r"^allocation \d+: size (\d+),(.*):$")
_VALUE = re.compile(r"^ value: <\d+ (\S+?)(\{[\d,]*\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)$")
_LIVE = re.compile(r"^    (\S+\{[\d,]*\}): ?\d+ bytes")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_LINE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')
_HOST = re.compile(r"\bcolor 5\b")
_WORKER = "_memory/worker.py"
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


class Dump(NamedTuple):
  """What `read` finds: the buffers, and the text of the optimized program."""

  buffers: tuple[Buffer, ...]
  text: str


@dataclasses.dataclass(frozen=True)
class _Value:
  name: str  # the instruction, without the index into a tuple
  index: str  # the index into a tuple: "{}", "{1}"
  size: int
  offset: int
  shape: str


@dataclasses.dataclass
class _Allocation:
  size: int
  kind: str  # XLA's description
  values: list[_Value]

  @property
  def parameter(self) -> int | None:
    found = re.search(r"\bparameter (\d+)\b", self.kind)
    return int(found[1]) if found else None


def read(folder: pathlib.Path, temporary_bytes: int, argument_names: Sequence[str]) -> Dump:
  """Returns the program in a dump, and its buffers, the largest first.

  Args:
    folder: XLA's dump.
    temporary_bytes: the size of the program's temporaries, as XLA reports it. If the dump has several programs, the one
      that comes closest to this size is read.
    argument_names: one name for each parameter of the program.

  Returns:
    The text of the optimized program, and its arguments, outputs and temporaries. Empty if the dump has an unknown
    format.
  """
  programs = [(path, _allocations(path)) for path in sorted(folder.glob("*-buffer-assignment.txt"))]
  if not programs:
    return Dump((), "")
  path, allocations = min(programs, key=lambda p: abs(_temporaries(p[1]) - temporary_bytes))
  prefix = path.name.removesuffix("-buffer-assignment.txt")
  live = _live_at_peak(folder / f"{prefix}-live-range.txt")
  program = folder / f"{prefix}.txt"
  text = program.read_text(errors="replace") if program.exists() else ""
  describe = _Descriptions(text)
  buffers = []
  for allocation in allocations:
    values, number = allocation.values, allocation.parameter
    if not values or _HOST.search(allocation.kind) or "thread-local" in allocation.kind:
      continue
    if number is not None:
      name = argument_names[number] if number < len(argument_names) else f"parameter {number}"
      reused = "maybe-live-out" in allocation.kind
      buffers.append(Buffer(name, "argument", allocation.size, _short(values[0].shape), "", "", True, reused))
    elif "maybe-live-out" in allocation.kind:
      last = values[-1]
      buffers.append(Buffer(last.name, "output", allocation.size, _short(last.shape), *describe(last.name), True))
    elif "preallocated-temp" in allocation.kind:
      buffers += [
        Buffer(
          value.name + value.index.replace("{}", ""),
          "temporary",
          size,
          _short(value.shape),
          *describe(value.name),
          alive,
        )
        for value, size, alive in _shares(allocation, live, describe)
      ]
  return Dump(tuple(sorted(buffers, key=lambda b: (-b.bytes, b.kind, b.name))), text)


def read_device(folder: pathlib.Path) -> tuple[str, int]:
  """Returns the name and the memory in bytes of the card that the program was compiled for, from a dump."""
  text = "".join(path.read_text(errors="replace") for path in sorted(folder.glob("*gpu_target_config.pbtxt"))[:1])
  name = re.search(r'device_description_str: "([^"]*)"', text)
  memory = re.search(r"device_memory_size: (\d+)", text)
  if not name or not memory:
    raise RuntimeError("gpu_memory: XLA's dump does not tell the local card's name and memory. Name it by target=...")
  return name[1], int(memory[1])


def _allocations(path: pathlib.Path) -> list[_Allocation]:
  found: list[_Allocation] = []
  for line in path.read_text(errors="replace").splitlines():
    if allocation := _ALLOCATION.match(line):
      found.append(_Allocation(int(allocation[1]), allocation[2], []))
    elif found and (value := _VALUE.match(line)):
      name, index, size, offset, shape = value.groups()
      found[-1].values.append(_Value(name, index or "{}", int(size), int(offset), shape))
    elif found and not line.strip():
      break  # end of the allocations; the uses of the values follow
  return found


def _temporaries(allocations: Iterable[_Allocation]) -> int:
  return sum(a.size for a in allocations if "preallocated-temp" in a.kind)


def _live_at_peak(path: pathlib.Path) -> set[str]:
  if not path.exists():
    return set()
  lines = iter(path.read_text(errors="replace").splitlines())
  for line in lines:
    if line.rstrip().endswith("(peak):"):
      break
  live = set()
  for line in lines:
    if not (value := _LIVE.match(line)):
      break
    live.add(value[1])
  return live


def _shares(allocation: _Allocation, live: set[str], describe: "_Descriptions") -> list[tuple[_Value, int, bool]]:
  """Assigns each byte of an allocation to a value. Returns (value, bytes, whether it is alive at the peak)."""
  places: dict[tuple[int, int], list[_Value]] = collections.defaultdict(list)
  for value in allocation.values:
    places[value.offset, value.size].append(value)
  claims = []
  for (offset, size), values in places.items():
    alive = [v for v in values if v.name + v.index in live]
    claims.append((not alive, -size, offset, values, alive))
  free = _Free(allocation.size)
  shares = []
  for not_alive, negative_size, offset, values, alive in sorted(claims, key=lambda c: c[:3]):
    size = free.take(offset, offset - negative_size)
    if size:
      # A buffer has several names, such as a loop's state and the value written to it. Take one with a description.
      same = [v for v in values if not alive or v.shape == alive[0].shape]
      named = [v for v in alive if describe(v.name)[1]] or [v for v in same if describe(v.name)[1]] or alive or values
      shares.append((named[0], size, not not_alive))
  return shares


class _Free:
  """The intervals of an allocation that no value has claimed yet."""

  def __init__(self, size: int):
    self._starts, self._ends = [0], [size]

  def take(self, start: int, end: int) -> int:
    """Claims the free bytes between start and end, and returns how many they are."""
    i = max(bisect.bisect_right(self._starts, start) - 1, 0)
    taken = 0
    while i < len(self._starts) and self._starts[i] < end:
      low, high = max(start, self._starts[i]), min(end, self._ends[i])
      if low >= high:
        i += 1
        continue
      taken += high - low
      rest = [(a, b) for a, b in ((self._starts[i], low), (high, self._ends[i])) if a < b]
      self._starts[i : i + 1] = [a for a, _ in rest]
      self._ends[i : i + 1] = [b for _, b in rest]
      i += len(rest)
    return taken


class _Descriptions:
  """Finds an instruction's JAX operation, such as `transpose(jvp())/dot_general`, and its line in the user's code."""

  def __init__(self, text: str):
    self._instructions: dict[str, str] = {}
    tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
    rows: dict[int, str] | None = None
    for line in text.splitlines():
      if line in tables:
        rows = tables[line]
      elif not line.strip():
        rows = None
      elif rows is not None and (row := re.match(r"^(\d+) (.*)$", line)):
        rows[int(row[1])] = row[2].strip('"')
      elif "metadata={" in line and (instruction := _INSTRUCTION.match(line)):
        self._instructions[instruction[1]] = line
    self._files, self._functions = tables["FileNames"], tables["FunctionNames"]
    self._locations = {i: _fields(row) for i, row in tables["FileLocations"].items()}
    self._frames = {i: _fields(row) for i, row in tables["StackFrames"].items()}
    # If no frame has the parent 0, the dump gives a frame's parent as its number plus one, so that 1 means none.
    self._shift = 0 if any(frame.get("parent_frame_id") == 0 for frame in self._frames.values()) else 1

  def __call__(self, name: str) -> tuple[str, str]:
    line = self._instructions.get(name, "")
    operation = _OP_NAME.search(line)
    # The outermost names belong to the worker's call of the exported function.
    return re.sub(r"^jit\([^/]*\)/call_exported/?", "", operation[1]) if operation else "", self._source(line)

  def _source(self, line: str) -> str:
    if not (frame := _FRAME.search(line)):
      inline = _LINE.search(line)
      return f"{inline[1]}:{inline[2]}" if inline else ""
    stack = [s for s in self._stack(int(frame[1])) if not s[0].endswith(_WORKER)]
    own = [s for s in stack if not _is_library(s[0])] or stack
    return "{}:{} in {}".format(*own[0]) if own else ""

  def _stack(self, number: int) -> list[tuple[str, int, str]]:
    """Returns (file, line, function) of a frame and of its callers, the innermost first."""
    stack = []
    while (frame := self._frames.get(number)) and len(stack) < len(self._frames):
      location = self._locations.get(frame.get("file_location_id", 0), {})
      file = self._files.get(location.get("file_name_id", 0), "?")
      function = self._functions.get(location.get("function_name_id", 0), "?").rsplit("<locals>.", 1)[-1]
      stack.append((file, location.get("line", 0), function))
      number = frame.get("parent_frame_id", 0) - self._shift
    return stack


def _fields(row: str) -> dict[str, int]:
  return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", row)}


@functools.cache
def _libraries() -> tuple[str, ...]:
  paths = sysconfig.get_paths()  # takes half a millisecond
  package = str(pathlib.Path(__file__).parent.parent)
  return (package, *(paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")))


def _is_library(file: str) -> bool:
  return file.startswith(_libraries()) or "site-packages" in file


def _short(shape: str) -> str:
  """Removes the layout from a shape: f32[8,4]{1,0} becomes f32[8,4]."""
  shape = re.sub(r"/\*.*?\*/", "", re.sub(r"\{[^}]*\}", "", shape))
  return shape if len(shape) <= 60 else shape[:57] + "..."

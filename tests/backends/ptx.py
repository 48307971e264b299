"""Runs PTX, the assembly of NVIDIA's cards, without a card: what a kernel reads, computes and writes, thread by thread.

Why: bits of a kernel can be tested where there is no card. It knows what our kernels have. Quotients and roots are
rounded correctly, while a card may miss the last bit in `div.full`, `sqrt.approx` and `rsqrt.approx`.

How: a program counter for each thread of a block; the threads that are farthest behind make the next instruction
together. Registers hold bits; the types are those of the instructions.
"""

import operator
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}
_NOTHING = ("bar", "fence", "griddepcontrol")
_WIDTHS = {"%rs": 2, "%r": 4, "%rd": 8}  # bytes of a register
_SPACE = 2**40  # between the addresses of two arrays


def run(ptx: str, arrays: Sequence[np.ndarray], blocks: int, again: Sequence[int] = ()) -> list[np.ndarray]:
  """Launches a kernel.

  Args:
    ptx: has the kernel, and no other.
    arrays: its parameters. They are not changed.
    blocks: how many blocks of 128 threads.
    again: the numbers of the arrays that are parameters once more, after all of them, to be written.

  Returns:
    The arrays as they are then.
  """
  memory = [np.array(x) for x in arrays]
  flat = [x.reshape(-1).view(np.uint8) for x in memory]
  flat += [flat[k] for k in again]
  body = ptx[ptx.index("{", ptx.index(".entry")) + 1 :]
  lines = [part.strip() for line in body.splitlines() for part in line.split("//")[0].split(";")]
  program = [line for line in lines if line and not line.startswith((".", "}", "{"))]
  for block in range(blocks):
    _Block(program, flat, block).run()
  return memory


def _type(name: str) -> np.dtype:
  return np.dtype(np.uint16 if name == "bf16" else f"{_KINDS[name[0]]}{int(name[1:]) // 8}")


class _Block:
  """The threads of a block."""

  def __init__(self, program: list[str], memory: list[np.ndarray], block: int, threads: int = 128):
    self.program, self.memory, self.threads = program, memory, threads
    self.labels = {line[:-1]: i for i, line in enumerate(program) if line.endswith(":")}
    lanes = np.arange(threads)
    self.registers = {"%tid.x": lanes.astype(np.uint32), "%ctaid.x": np.full(threads, block, np.uint32)}
    self.lane, self.at = lanes % 32, np.zeros(threads, int)
    self.shared = np.zeros(2**16, np.uint8)

  def run(self) -> None:
    while (self.at < len(self.program)).any():
      here = int(self.at.min())
      active = self.at == here
      self.at[active] += 1
      line = self.program[here]
      if not line.endswith(":"):
        self._make(line, active)

  def _make(self, line: str, active: np.ndarray) -> None:
    if guard := re.match(r"@(!?)(%p\d+)\s+(.*)", line):
      active = active & (self.registers[guard[2]] != bool(guard[1]))
      line = guard[3]
    name, rest = [*re.split(r"\s+", line, maxsplit=1), ""][:2]
    parts = name.split(".")
    operands = [x.strip() for x in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)]
    if parts[0] == "ret":
      self.at[active] = len(self.program)
    elif parts[0] == "bra":
      self.at[active] = self.labels[operands[0]]
    elif parts[0] == "st":
      self._store(parts, operands, active)
    elif parts[0] not in _NOTHING:
      self._assign(operands[0], self._result(parts, operands), active)

  def _assign(self, target: str, values: Any, active: np.ndarray) -> None:
    names = [x.strip() for x in re.split(r"[{},|]", target) if x.strip()]
    for name, value in zip(names, values if isinstance(values, list) else [values], strict=True):
      old = self.registers.get(name, np.zeros_like(value))
      self.registers[name] = np.where(active, value, old)

  def _read(self, operand: str, dtype: Any) -> np.ndarray:
    """An operand as an array of a dtype: a register, a number, or several registers side by side."""
    if operand.startswith("{"):
      parts = [self._read(x.strip(), np.dtype(f"u{dtype.itemsize // 2}")) for x in operand[1:-1].split(",")]
      return np.stack(parts, -1).view(dtype).reshape(-1)
    if operand in self.registers:
      value = self.registers[operand]
      if value.dtype == bool:
        return value
      value = value.astype(f"u{dtype.itemsize}") if value.itemsize != dtype.itemsize else value
      return value.view(dtype)
    if operand.startswith("0f"):
      return np.full(self.threads, int(operand[2:], 16), np.uint32).view(dtype)
    if re.match(r"[A-Za-z_]", operand):  # the name of the shared memory: it starts at 0
      operand = "0"
    number = int(operand.rstrip("U"), 0) % 2 ** (8 * dtype.itemsize)
    return np.full(self.threads, number, f"u{dtype.itemsize}").view(dtype)

  def _address(self, operand: str) -> np.ndarray:
    register, _, offset = operand[1:-1].replace(" ", "").partition("+")
    dtype = np.dtype(self.registers[register].dtype)
    return self._read(register, dtype).astype(np.uint64) + np.uint64(int(offset or 0))

  def _place(self, parts: list[str], address: int) -> tuple[np.ndarray, int]:
    """The array that an address is in, and the byte there."""
    array, place = divmod(address, _SPACE)
    return (self.shared if "shared" in parts else self.memory[array]), place

  def _load(self, parts: list[str], operands: list[str]) -> Any:
    if parts[1].startswith("param"):
      return np.full(self.threads, int(operands[1].rstrip("]").rsplit("_", 1)[1]) * _SPACE, np.uint64)
    count, dtype = int(parts[2][1:]) if parts[2][0] == "v" else 1, _type(parts[-1])
    found = [self._place(parts, int(address)) for address in self._address(operands[1])]
    raw = np.stack([array[place : place + count * dtype.itemsize] for array, place in found])
    values = np.ascontiguousarray(raw).view(dtype)
    if dtype.kind == "i":  # its sign fills a wider register
      values = values.astype(f"i{_WIDTHS[re.match(r'%[a-z]+', operands[0])[0]]}")
    return [self._bits(values[:, i].copy()) for i in range(count)]

  def _store(self, parts: list[str], operands: list[str], active: np.ndarray) -> None:
    dtype, address = _type(parts[-1]), self._address(operands[0])
    names = [x.strip() for x in operands[1].strip("{}").split(",")]
    values = np.stack([self._read(name, np.dtype(f"u{dtype.itemsize}")) for name in names], -1).view(np.uint8)
    for thread in np.flatnonzero(active):
      array, place = self._place(parts, int(address[thread]))
      array[place : place + values.shape[1]] = values[thread]

  def _result(self, parts: list[str], operands: list[str]) -> Any:
    name = parts[0]
    if name == "ld":
      return self._load(parts, operands)
    if name == "elect":
      return [np.zeros(self.threads, np.uint32), self.lane == 0]
    if name == "setp":
      return self._compare(parts, operands)
    if parts[-1] == "pred":
      first, *rest = (
        self.registers[x] if x in self.registers else np.full(self.threads, int(x) != 0) for x in operands[1:]
      )
      return {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[name](first, *rest)
    dtype = _type(parts[-1])
    if name in ("mov", "cvta"):
      if operands[0].startswith("{"):
        halves = self._read(operands[1], dtype).reshape(-1, 1).view(f"u{dtype.itemsize // 2}")
        return [halves[:, 0].copy(), halves[:, 1].copy()]
      return self._bits(self._read(operands[1], dtype))
    if name == "cvt":
      return self._convert(parts, operands)
    if name == "selp":
      first, second = (self._read(x, dtype) for x in operands[1:3])
      return self._bits(np.where(self.registers[operands[3]], first, second))
    if name == "shfl":
      value, other = self._read(operands[1], dtype), int(operands[2])
      source = (self.lane ^ other) if "bfly" in parts else np.full(self.threads, other)
      return self._bits(value[np.arange(self.threads) - self.lane + source])
    if name == "prmt":
      return self._permute(*(self._read(x, np.dtype(np.uint32)) for x in operands[1:]))
    with np.errstate(all="ignore"):
      return self._bits(self._arithmetic(parts, [self._read(x, dtype) for x in operands[1:]], operands, dtype))

  def _permute(self, low: np.ndarray, high: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Four of eight bytes, each as it is or as its sign."""
    both, picked = np.stack([low, high], -1).view(np.uint8), []
    for i in range(4):
      selector = (chosen >> np.uint32(4 * i)) & np.uint32(15)
      byte = both[np.arange(self.threads), selector & np.uint32(7)]
      picked.append(np.where(selector > 7, np.where(byte > 127, 255, 0), byte).astype(np.uint8))
    return np.stack(picked, -1).view(np.uint32).reshape(-1)

  def _arithmetic(self, parts: list[str], values: list[Any], operands: list[str], dtype: Any) -> Any:
    name, (first, *rest) = parts[0], values
    if name in ("shl", "shr"):
      shift = self._read(operands[2], np.dtype(np.uint32)).astype(f"u{dtype.itemsize}")
      moved = (np.left_shift if name == "shl" else np.right_shift)(first, shift.view(dtype))
      assert (shift < 8 * dtype.itemsize).all()
      return moved
    if name in ("mul", "mad") and parts[1] == "wide":
      wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
      return first.astype(wide) * rest[0].astype(wide)
    if name == "mad":
      return first * rest[0] + rest[1]
    two = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "min": np.fmin}
    two |= {
      "max": np.maximum if "NaN" in parts else np.fmax,
      "and": np.bitwise_and,
      "or": np.bitwise_or,
      "xor": np.bitwise_xor,
    }
    one = {"neg": np.negative, "abs": np.abs, "not": np.bitwise_not, "sqrt": np.sqrt, "rsqrt": rsqrt}
    return two[name](first, rest[0]) if name in two else one[name](first)

  def _compare(self, parts: list[str], operands: list[str]) -> np.ndarray:
    first, second = (self._read(x, _type(parts[-1])) for x in operands[1:3])
    found = getattr(operator, parts[1])(first, second)
    if len(parts) == 4:
      join = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[parts[2]]
      found = join(found, self.registers[operands[3]])
    return found

  def _convert(self, parts: list[str], operands: list[str]) -> np.ndarray:
    source, target = parts[-1], parts[-2]
    value = self._read(operands[1], np.dtype(f"u{self.registers[operands[1]].itemsize}"))
    if source == "bf16":
      return value.astype(np.uint32) << np.uint32(16)
    value = value.astype(f"u{_type(source).itemsize}").view(_type(source))
    if "rmi" in parts or "rpi" in parts:
      value = (np.floor if "rmi" in parts else np.ceil)(value)
    with np.errstate(all="ignore"):
      result = value.astype(_type(target))
    smallest = np.dtype(np.int16 if result.dtype.kind == "i" else np.uint16)  # no register has 8 bits
    return self._bits(result.astype(smallest) if result.itemsize == 1 else result)

  @staticmethod
  def _bits(value: np.ndarray) -> np.ndarray:
    return value if value.dtype == bool else value.view(f"u{value.itemsize}")


def rsqrt(x: Any) -> Any:
  """1 / sqrt(x), f32, rounded once."""
  return (1 / np.sqrt(np.asarray(x, np.float64))).astype(np.float32)

"""The result of `gpu_memory`: sizes in bytes, as a table, a chart or JSON."""

import dataclasses
import json
import os
import pathlib
import re
from typing import Any

_LARGEST = 10  # how many buffers the table shows


@dataclasses.dataclass(frozen=True)
class Buffer:
  """A part of the memory that a program needs, on one device.

  Attributes:
    name: the argument, such as `params['w']`, or else the instruction of the compiled program that writes the buffer.
    kind: `"argument"`, `"output"` (without outputs that reuse an argument's memory) or `"temporary"`.
    bytes: how much the buffer adds to the total. Temporaries share memory if they live at different times, so a
      temporary may be larger than its `bytes`.
    shape: dtype and shape on one device, such as `bf16[8,128]`.
    op_name: the JAX operation, such as `jit(step)/transpose(jvp())/dot_general`. Empty for arguments.
    source: the line of your code that it comes from, such as `model.py:12 in loss`. Empty for arguments.
    at_peak: False for space that is unused at the moment of the peak. It exists because something needs it at another
      time, or because of how the compiler packed the buffers.
    reused: whether an output reuses the memory of this donated argument.
  """

  name: str
  kind: str
  bytes: int
  shape: str
  op_name: str
  source: str
  at_peak: bool
  reused: bool = False


@dataclasses.dataclass(frozen=True)
class MemoryReport:
  """The memory that a compiled function needs on a GPU. Sizes are bytes on one device unless stated otherwise.

  `str(report)` is a table.

  Attributes:
    target: the target as the caller named it, in lower case, such as `"h100"`.
    device: the card's full name.
    devices: how many devices the function runs on.
    device_bytes: the memory of one card, as its driver reports it.
    argument_bytes: the arguments, and arrays that the function captured.
    output_bytes: the results.
    aliased_bytes: results that reuse the memory of donated arguments, so that they need none of their own.
    temporary_bytes: everything else the function needs while it runs: activations, gradients, workspace.
    parameter_count: how many parameters there are, over all devices. None if the caller named no parameters.
    jax_version: the JAX version that compiled the function.
    buffers: what the memory consists of, the largest first. Empty if XLA's dump could not be read.
    host_argument_bytes: the arguments in host memory; `argument_bytes` and the other sizes are without them.
    host_output_bytes: likewise, the results.
    host_aliased_bytes: likewise, results that reuse the memory of donated arguments.
    host_temporary_bytes: likewise, everything else.
    to_device_bytes: what crosses the bus from the host to one device while the function runs once, as read from the
      compiled program (`_memory/bus.py`). What moves arguments that are in host memory.
    to_host_bytes: likewise, from one device to the host.
    host_memory: the host memory that all devices share, if the caller named it.
    without_triton: whether all matrix products were left to cuBLAS. Without a GPU to measure on, XLA uses default tiles
      for Triton, and these may not fit a shape. Temporaries then differ by some percent. For a fair comparison compile
      all functions with `compiler_options={"xla_gpu_enable_triton_gemm": False}`.
  """

  target: str
  device: str
  devices: int
  device_bytes: int
  argument_bytes: int
  output_bytes: int
  aliased_bytes: int
  temporary_bytes: int
  parameter_count: int | None
  jax_version: str
  buffers: tuple[Buffer, ...] = dataclasses.field(default=(), repr=False)
  without_triton: bool = False
  host_argument_bytes: int = 0
  host_output_bytes: int = 0
  host_aliased_bytes: int = 0
  host_temporary_bytes: int = 0
  to_device_bytes: int = 0
  to_host_bytes: int = 0
  host_memory: int | None = None

  @property
  def total_bytes(self) -> int:
    """The peak on one device: arguments + outputs - aliased + temporaries."""
    return self.argument_bytes + self.output_bytes - self.aliased_bytes + self.temporary_bytes

  @property
  def host_bytes(self) -> int:
    """The same in the memory of the host, which is not part of `total_bytes`, for one device."""
    return self.host_argument_bytes + self.host_output_bytes - self.host_aliased_bytes + self.host_temporary_bytes

  @property
  def parameters(self) -> int | None:
    """The same as `parameter_count`, under the name that `explain` uses."""
    return self.parameter_count

  @property
  def fits(self) -> bool:
    """Whether the total is at most the card's memory, and `host_bytes` of all devices at most `host_memory`, if given.

    Leave a margin of about 1 GiB: CUDA's context and its libraries take memory too. JAX takes 75% of the card by
    default. For more, set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 where the function runs.
    """
    return self.total_bytes <= self.device_bytes and self._fits_on_host

  @property
  def _fits_on_host(self) -> bool:
    return self.host_memory is None or self.host_bytes * self.devices <= self.host_memory

  @property
  def bytes_per_parameter(self) -> float | None:
    """`total_bytes` over all devices, divided by the number of parameters. None if the caller named no parameters."""
    return self.per_parameter(self.total_bytes)

  def per_parameter(self, device_bytes: int) -> float | None:
    """Converts a size on one device, such as `report.temporary_bytes`, to bytes per parameter over all devices.

    A function that shards everything has the same figure on 1 device and on 8. One that replicates everything has 8
    times as much on 8 devices.
    """
    return device_bytes * self.devices / self.parameter_count if self.parameter_count else None

  def to_dict(self) -> dict[str, Any]:
    """Returns the fields and the figures derived from them, ready for JSON."""
    derived = {
      "total_bytes": self.total_bytes,
      "host_bytes": self.host_bytes,
      "bytes_per_parameter": self.bytes_per_parameter,
      "fits": self.fits,
    }
    fields = dataclasses.asdict(self)
    buffers = fields.pop("buffers")
    return {**fields, **derived, "buffers": list(buffers)}

  def to_json(self) -> str:
    """Returns `to_dict()` as JSON text."""
    return json.dumps(self.to_dict(), indent=2)

  def __str__(self) -> str:
    where = self.device if self.devices == 1 else f"each of {self.devices} x {self.device}"
    lines = [f"Memory on {where} ({self.target}, JAX {self.jax_version})"]
    if self.parameter_count:
      lines[0] += f", {self.parameter_count:,} parameters"
    for label, size in (
      ("arguments", self.argument_bytes),
      ("outputs", self.output_bytes),
      ("- aliased", -self.aliased_bytes),
      ("temporaries", self.temporary_bytes),
      ("total", self.total_bytes),
    ):
      line = f"  {label:<12}{_human(size):>12}"
      if self.parameter_count:
        line += f"{self.per_parameter(size):>9.2f} bytes/parameter"
      lines.append(line)
    share = self.total_bytes / self.device_bytes
    verdict = "fits" if self.total_bytes <= self.device_bytes else "does not fit"
    lines.append(f"  {verdict}: {share:.1%} of {_human(self.device_bytes)}")
    if self.host_bytes:
      each = f", {self.per_parameter(self.host_bytes):.2f} bytes/parameter" if self.parameter_count else ""
      line = f"  and {_human(self.host_bytes)} of memory on the host{each}"
      if self.host_memory is not None:
        count = f"times {self.devices}, " if self.devices > 1 else ""
        line += f" ({count}{'fits' if self._fits_on_host else 'does not fit'}: {_human(self.host_memory)})"
      lines.append(line)
    if self.to_device_bytes or self.to_host_bytes:
      lines.append(
        f"  across the bus: {_human(self.to_device_bytes)} to the device, {_human(self.to_host_bytes)} to the host"
      )
    if self.without_triton:
      lines.append("  (with cuBLAS for all matrix products: XLA's default tiles for Triton do not fit)")
    if not self.buffers:
      return "\n".join([*lines, "(This version of XLA wrote no list of buffers that could be read.)"])
    groups: dict[str, int] = {}
    for buffer in self.buffers:
      if buffer.kind == "argument":
        root = re.split(r"[\[.]", buffer.name, maxsplit=1)[0]
        groups[root] = groups.get(root, 0) + buffer.bytes
    lines.append("Arguments")
    lines += [f"  {_human(size):>12}  {root}" for root, size in sorted(groups.items(), key=lambda g: -g[1])]
    others = [b for b in self.buffers if b.kind != "argument"]
    if others:
      lines.append("Largest other buffers")
    for b in others[:_LARGEST]:
      line = f"  {_human(b.bytes):>12}  {b.kind:<9}  {b.shape:<24}  {_described(b)}"
      lines.append(line if b.at_peak else f"{line} (not at the peak)")
    if len(others) > _LARGEST:
      lines.append(f"  {_human(sum(b.bytes for b in others[_LARGEST:])):>12}  in {len(others) - _LARGEST} more")
    return "\n".join(lines)

  def plot(self, path: str | os.PathLike[str]) -> None:
    """Draws the report as a stacked bar against the card's memory.

    Args:
      path: the image file to write. Its suffix sets the format: `.png`, `.svg`, `.pdf`.

    Raises:
      ModuleNotFoundError: if matplotlib is not installed.
    """
    try:
      from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
      raise ModuleNotFoundError(
        "MemoryReport.plot needs matplotlib: pip install matplotlib. Without it, print(report) shows the same figures."
      ) from error
    unit = 2.0**30 if max(self.total_bytes, self.device_bytes) >= 2**30 else 2.0**20
    parts = {
      "arguments": self.argument_bytes,
      "other outputs": self.output_bytes - self.aliased_bytes,
      "temporaries": self.temporary_bytes,
    }
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    axes = figure.subplots()
    left = 0.0
    for (label, size), color in zip(parts.items(), ("#4C72B0", "#55A868", "#DD8452"), strict=True):
      axes.barh([0], [size / unit], left=left, color=color, label=f"{label}: {_human(size)}")
      left += size / unit
    axes.axvline(self.device_bytes / unit, color="black", linestyle="--", label=f"memory: {_human(self.device_bytes)}")
    axes.set_yticks([])
    axes.set_xlim(0, 1.05 * max(self.total_bytes, self.device_bytes) / unit)
    axes.set_xlabel("GiB" if unit == 2.0**30 else "MiB")
    where = self.device if self.devices == 1 else f"each of {self.devices} x {self.device}"
    axes.set_title(f"{_human(self.total_bytes)} on {where}: {'fits' if self.fits else 'does not fit'}")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(pathlib.Path(path), dpi=150)


def _described(buffer: Buffer) -> str:
  """Returns a buffer's place in the user's program, short enough for a line of the table."""
  operation = "/".join(buffer.op_name.split("/")[-2:]) or buffer.name
  path, _, rest = buffer.source.rpartition("/")
  return f"{operation}, {rest or path}" if buffer.source else operation


def _human(size: float) -> str:
  for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
    if abs(size) >= 2**power:
      return f"{size / 2**power:.2f} {unit}"
  return f"{size:.0f} B"

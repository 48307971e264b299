"""A function lowered for a card: what `gpu_memory` compiles, and a key by which the result can be remembered."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import tempfile

import jax

from optax_mpo._memory import bus, compiling, gpu_targets, xla_dump
from optax_mpo._memory.report import MemoryReport


@dataclasses.dataclass(frozen=True)
class Lowered:
  """A function lowered for a card.

  Attributes:
    module: the function, as `jax.export` serializes it.
    program: its text, without the places in the source that it comes from.
    request: what else decides how it is compiled; see `worker`.
    names: the names of its arguments.
    captured: the bytes of the arrays that it captured.
    count: how many parameters it has, if known.
    target: the target's name, in lower case.
    card: the target; None for the card in this machine.
    devices: how many devices it runs on.
  """

  module: bytes
  program: str
  request: dict[str, object]
  names: list[str]
  captured: int
  count: int | None
  target: str
  card: gpu_targets.Target | None
  devices: int

  @property
  def key(self) -> str:
    """A hash of all that decides the report: the program, the card, options, the versions of JAX and its compiler."""
    versions = (jax.__version__, importlib.metadata.version("jaxlib"), os.environ.get("XLA_FLAGS", ""))
    rest = json.dumps([self.request, self.captured, self.devices, *versions], sort_keys=True)
    return hashlib.sha256((self.program + rest).encode()).hexdigest()

  def compile(self, host_memory: int | None = None, dump_to: str | pathlib.Path | None = None) -> MemoryReport:
    """Compiles it in a process of its own. Arguments and errors are those of `gpu_memory`."""
    with tempfile.TemporaryDirectory(prefix="optax_mpo_") as folder:
      request = {**self.request, "kernels": dump_to is not None}
      sizes = compiling.run(pathlib.Path(folder), request, self.module, self.card)
      dump = pathlib.Path(folder, "dump")
      if dump_to is not None:
        shutil.copytree(dump, dump_to, dirs_exist_ok=True)
      buffers, text = xla_dump.read(dump, sizes["temp"], self.names)
      device, device_bytes = (self.card.name, self.card.memory) if self.card else xla_dump.read_device(dump)
    traffic = bus.traffic(text)
    return MemoryReport(
      target=self.target,
      device=device,
      devices=self.devices,
      device_bytes=device_bytes,
      argument_bytes=sizes["argument"] + self.captured,
      output_bytes=sizes["output"],
      aliased_bytes=sizes["alias"],
      temporary_bytes=sizes["temp"],
      host_argument_bytes=sizes["host_argument"],
      host_output_bytes=sizes["host_output"],
      host_aliased_bytes=sizes["host_alias"],
      host_temporary_bytes=sizes["host_temp"],
      parameter_count=self.count,
      jax_version=jax.__version__,
      buffers=buffers,
      without_triton=bool(sizes["without_triton"]),
      to_device_bytes=traffic.to_device,
      to_host_bytes=traffic.to_host,
      host_memory=host_memory,
    )

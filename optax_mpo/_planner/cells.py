"""The cells of a plan: what one step, in one storage and at one batch size, needs on a card.

A row has the cells of one storage, from the smallest batch to the largest. A step is not compiled where what persists
between steps alone exceeds the memory, nor after a smaller batch that does not fit. Rows are compiled in parallel: each
compiles in a process of its own (`_memory/compiling.py`), and threads of this process wait for them.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from optax_mpo._core import host
from optax_mpo._core.annotations import PyTree
from optax_mpo._memory.gpu_memory import lower
from optax_mpo._memory.gpu_targets import TARGETS
from optax_mpo._memory.lowered import Lowered
from optax_mpo._planner import fsdp
from optax_mpo._planner.decoder import LMConfig, language_model
from optax_mpo._planner.remembered import Figures, Remembered, key_of
from optax_mpo._planner.storages import STORAGES

Made = tuple[Callable[..., PyTree], tuple[PyTree, ...], PyTree, dict[str, Any]]
_COMPILER = 3 * 2**30  # bytes of memory that a process with XLA's compiler may take


@dataclasses.dataclass(frozen=True)
class Step:
  """A step whose figures are asked.

  Attributes:
    asked: a key of what is asked, without tracing; empty if only the lowered program can tell.
    make: returns the step, its arguments and what of them persists, and arguments of `gpu_memory`. What persists is
      None if only the compiled step can tell: it is then what the step updates in place.
  """

  asked: str
  make: Callable[[], Made]


@dataclasses.dataclass(frozen=True)
class Row:
  """A storage, with its step at each batch size."""

  label: str
  steps: dict[int, Step]


@dataclasses.dataclass(frozen=True)
class Limits:
  """The memory of one device and, if asked, of the host for one device, in bytes."""

  device: int
  host: int | None = None

  def fit(self, figures: Figures) -> bool:
    return figures.peak is not None and figures.peak <= self.device and self.fit_on_host(figures)

  def fit_on_host(self, figures: Figures) -> bool:
    return self.host is None or figures.host <= self.host


def of_decoder(
  config: LMConfig,
  size: str,
  storage: str,
  optimizer: str,
  batches: Sequence[int],
  context: int,
  devices: int,
  card: str,
) -> Row:
  """The row of a storage of STORAGES for the package's decoder language model."""

  def step(batch: int) -> Step:
    asked = key_of(config, storage, optimizer, batch, context, devices, TARGETS[card])

    def make() -> Made:
      model = language_model(config, size, batch=batch, context=context)
      training = STORAGES[storage].build(model, optimizer)
      options: dict[str, Any] = {"target": card, "devices": devices, "params": model.params}
      if devices > 1:
        fn, *args = fsdp.shard(training, model.batch, devices)
        return fn, tuple(args), args[:2], options
      args = (training.params, training.opt_state, model.batch)
      return training.step, args, args[:2], {**options, "donate_argnums": (0, 1)}

    return Step(asked, make)

  return Row(STORAGES[storage].label, {batch: step(batch) for batch in sorted(batches)})


def held_bytes(tree: PyTree) -> tuple[int, int]:
  """The bytes of a tree on one device, and in host memory for one device."""
  leaves = jax.tree.leaves(tree)
  there = [x for x in leaves if host.is_on_host(x)]
  return fsdp.held_bytes([x for x in leaves if not host.is_on_host(x)]), fsdp.held_bytes(there)


def held_of(row: Row, remembered: Remembered) -> Figures | None:
  """What persists between steps, which is known before anything is compiled; None for a step of the user's own."""
  step = row.steps[min(row.steps)]
  found = remembered.get(step.asked) if step.asked else None
  if found is None and (held := step.make()[2]) is not None:
    found = Figures(*held_bytes(held))
  return found


def figures_of(step: Step, limits: Limits, remembered: Remembered) -> Figures:
  """Returns the figures of a step, remembered or compiled."""
  found = remembered.get(step.asked) if step.asked else None
  if found and (found.peak is not None or found.held > limits.device or not limits.fit_on_host(found)):
    return found
  fn, args, held, options = step.make()
  figures = Figures(0, 0) if held is None else Figures(*held_bytes(held))
  if figures.held <= limits.device and limits.fit_on_host(figures):
    lowered = lower(fn, *args, **options)
    figures = remembered.get(lowered.key) or compiled(lowered, None if held is None else figures.held)
    remembered.put(lowered.key, figures)
  if step.asked:
    remembered.put(step.asked, figures)
  return figures


def compiled(lowered: Lowered, held: int | None) -> Figures:
  """Compiles a step and returns its figures."""
  report = lowered.compile()
  return Figures(
    held=report.aliased_bytes if held is None else held,
    host=report.host_bytes,
    peak=report.total_bytes,
    to_device=report.to_device_bytes,
    to_host=report.to_host_bytes,
    parameters=report.parameter_count,
  )


def row_of(row: Row, limits: Limits, remembered: Remembered) -> dict[int, Figures | None]:
  """Returns the figures for each batch size; None where a smaller batch does not fit already."""
  found: dict[int, Figures | None] = {}
  fits = True
  for batch, step in row.steps.items():
    figures = figures_of(step, limits, remembered) if fits else None
    fits = figures is not None and limits.fit(figures)
    found[batch] = figures
  return found


def rows_of(
  rows: Sequence[Row], limits: Limits, remembered: Remembered, jobs: int
) -> Iterator[tuple[Row, dict[int, Figures | None]]]:
  """Yields the figures of each row in order, as soon as they are known, computed by `jobs` threads."""
  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    futures = [pool.submit(row_of, row, limits, remembered) for row in rows]
    try:
      for row, future in zip(rows, futures, strict=True):
        yield row, future.result()
    finally:
      for future in futures:
        future.cancel()


def default_jobs() -> int:
  """As many compilations at a time as there are cores, and memory for them."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  return max(1, min(cores, _free_memory() // _COMPILER))


def _free_memory() -> int:
  try:
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
  except (OSError, StopIteration):
    return _COMPILER

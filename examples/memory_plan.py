"""Which storage modes and batch sizes fit on a GPU that you do not have.

    pip install -e '.[examples,gpu-memory]'               # from the root of the repository
    python examples/memory_plan.py --model llama3-8b --target h100
    python examples/memory_plan.py --model llama3-8b --target h100 --devices 8 --batches 8 16 32
    python examples/memory_plan.py --model 1.3b --target rtx4090 --optimizer lion

Compiles the training step of a decoder language model for the card (optax_mpo.gpu_memory), once for each storage and
batch size, and prints the peak of each. With several devices, training is fully sharded (FSDP): weights and optimizer
state are split by the rows of each matrix, and the batch along its first axis. A step is not compiled if the state that
persists between steps alone exceeds the card's memory. Writes memory_plan.png to --output-dir.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs here; without this, JAX looks for a GPU and complains

import jax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optax_mpo as mpo

if __name__ == "__main__":  # a script does not have the root of the repository, with the models, on its path
  sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import LM_SIZES, language_model
from benchmarks.modes import MODES, OPTIMIZERS
from optax_mpo._planner import fsdp

PyTree = Any
GIB = 2**30
STORAGES = ("optax-f32", "optax-bf16", "mpo-16", "mpo-8", "mpo-16-auto", "mpo-compact-auto")


class Cell(NamedTuple):
  """One storage at one batch size, in bytes on one device. `peak` is None if the held state alone does not fit."""

  storage: str
  batch: int
  held: int
  peak: int | None
  memory: int

  @property
  def fits(self) -> bool:
    return self.peak is not None and self.peak <= self.memory


def plan(args: argparse.Namespace, storage: str, batch: int, memory: int) -> Cell:
  """Measures one cell. `memory` is the card's memory in bytes."""
  model = language_model(args.model, batch=batch, context=args.context)
  training = MODES[storage].build(model, args.optimizer)
  step, params, opt_state, tokens = fsdp.shard(training, model.batch, args.devices)
  held = fsdp.held_bytes((params, opt_state))
  if held > memory:
    return Cell(storage, batch, held, None, memory)
  report = mpo.gpu_memory(step, params, opt_state, tokens, target=args.target, devices=args.devices)
  return Cell(storage, batch, held, report.total_bytes, memory)


def make_table(args: argparse.Namespace, cells: Sequence[Cell]) -> Table:
  where = args.target if args.devices == 1 else f"each of {args.devices} x {args.target}"
  memory = cells[0].memory / GIB
  table = Table(
    title=f"{args.model}, {args.optimizer}, context {args.context}: peak GiB on {where} of {memory:.1f} GiB, per batch",
    caption="Green fits, red does not; '-': what is held from step to step alone does not fit. "
    "Leave about 1 GiB for CUDA's context and libraries.",
  )
  table.add_column("weights kept as")
  table.add_column("held", justify="right")
  for batch in args.batches:
    table.add_column(f"batch {batch}", justify="right")
  for storage in args.storages:
    row = {cell.batch: cell for cell in cells if cell.storage == storage}
    texts = []
    for batch in args.batches:
      peak, color = row[batch].peak, "green" if row[batch].fits else "red"
      texts.append("[red]-" if peak is None else f"[{color}]{peak / GIB:.1f}{' fits' if row[batch].fits else ''}")
    table.add_row(MODES[storage].label, f"{row[args.batches[0]].held / GIB:.1f}", *texts)
  return table


def draw(path: Path, args: argparse.Namespace, cells: Sequence[Cell]) -> None:
  """Draws the peaks as bars (held state, then the rest) against the card's memory."""
  figure = Figure(figsize=(max(7, 1.2 * len(args.batches) * len(args.storages) * 0.6), 4.5), layout="constrained")
  axes = figure.subplots()
  width = 0.85 / len(args.storages)
  for i, storage in enumerate(args.storages):
    row = [cell for cell in cells if cell.storage == storage]
    x = [args.batches.index(cell.batch) + (i - (len(args.storages) - 1) / 2) * width for cell in row]
    held = [cell.held / GIB for cell in row]
    axes.bar(x, held, width * 0.92, color=f"C{i}", label=MODES[storage].label)
    rest = [(cell.peak - cell.held) / GIB if cell.peak else 0 for cell in row]
    axes.bar(x, rest, width * 0.92, bottom=held, color=f"C{i}", alpha=0.4)
  axes.axhline(cells[0].memory / GIB, color="black", linestyle="--", linewidth=1)
  axes.set_xticks(range(len(args.batches)), [f"batch {batch}" for batch in args.batches])
  count = "" if args.devices == 1 else f"{args.devices} x "
  axes.set(
    ylabel="GiB on one device",
    title=f"{args.model}, {args.optimizer}, context {args.context}, on {count}{args.target} (dashed: its memory)",
  )
  axes.spines[["top", "right"]].set_visible(False)
  figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
  figure.savefig(path, dpi=130)


def positive(text: str) -> int:
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
  return value


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description="Which storage and batch sizes fit on a GPU that you do not have.")
  parser.add_argument("--model", choices=LM_SIZES, default="llama3-8b", help="the shape of the model")
  parser.add_argument("--target", default="h100", help="the card: h100, h200, a100-80gb, a100-40gb, l40s, rtx4090, a10")
  parser.add_argument("--devices", type=positive, default=1, help="how many of them, fully sharded")
  parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
  parser.add_argument("--context", type=positive, default=2048, help="tokens of a sequence")
  parser.add_argument("--batches", type=positive, nargs="+", default=[1, 4, 16], help="sequences of a step, in all")
  parser.add_argument("--storages", nargs="+", choices=STORAGES, default=list(STORAGES), metavar="STORAGE")
  parser.add_argument("--output-dir", type=Path, default=Path("runs/memory_plan"))
  args = parser.parse_args(argv)
  console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
  try:
    # An elementwise function compiles in a second. It gives the card's memory, or an error about the target.
    probe = mpo.gpu_memory(lambda x: x + 1, jax.ShapeDtypeStruct((8,), "float32"), target=args.target)
  except (ValueError, ImportError, RuntimeError) as error:
    parser.error(str(error))
  pairs = [(storage, batch) for storage in args.storages for batch in args.batches]
  cells = [plan(args, *pair, probe.device_bytes) for pair in track(pairs, "compiling", console=console)]
  console.print(make_table(args, cells))
  args.output_dir.mkdir(parents=True, exist_ok=True)
  draw(args.output_dir / "memory_plan.png", args, cells)
  console.print(f"Wrote {args.output_dir / 'memory_plan.png'}")
  return 0


if __name__ == "__main__":
  sys.exit(main())

"""Bytes that an optimizer's step moves, kernel by kernel, as compiled by XLA:GPU. Needs no GPU.

    pip install -e '.[benchmarks]'
    python benchmarks/update_traffic.py                 # all rows; some minutes each on 2 cores
    python benchmarks/update_traffic.py --models leaves lm-unrolled --modes mpo-16 mpo-compact --kernels
    python benchmarks/update_traffic.py --list

An update is bound by memory. Its floor is arithmetic: it reads the gradient (two bytes per parameter, in bf16), the
weights and the state once, and writes all but the gradient once. The kernels of the update are those that read the
optimizer's state or anything computed from it (see benchmarks/hlo.py). A row has the bytes that they move, per
parameter and as a ratio to the floor of the mode; their number; and the bytes that the whole step moves, including the
forward and backward pass. `leaves` and `small-leaves` are the optimizer alone, so all kernels count. Prints a table per
model and writes update_traffic.json and update_traffic.png to --output-dir. Rows already in the JSON are kept, unless
--fresh is given or --models or --modes name them.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import optax_mpo as mpo

if __name__ == "__main__":  # a script does not have the root of the repository on its path
  sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import hlo
from benchmarks.models import Model, language_model
from benchmarks.modes import MODES
from benchmarks.step_time import leaves

MODELS: dict[str, Callable[[], Model]] = {
  "leaves": lambda: leaves(3, 4096, 4096),
  "small-leaves": lambda: leaves(64, 512),
  "lm-unrolled": functools.partial(language_model, "350m", layers=4, scan=False),
  "lm-125m": lambda: language_model("125m"),
  "lm-1.3b": lambda: language_model("1.3b"),
  "lm-8.8b": lambda: language_model("8.8b"),
}
DEFAULT_MODES = (
  "optax-f32 optax-bf16 flash-24 mpo-16 mpo-8 mpo-16-layer mpo-16-auto".split()
  + "mpo-compact mpo-compact-layer mpo-compact-auto".split()
  + "mpo-16-kernels mpo-16-layer-kernels mpo-16-auto-kernels".split()
  + "mpo-compact-kernels mpo-compact-layer-kernels mpo-compact-auto-kernels".split()
)
ALONE = ("leaves", "small-leaves")
GRADIENT = 2  # bytes per parameter: bf16


@dataclasses.dataclass(frozen=True)
class Row:
  """One model and mode with AdamW. Bytes are per parameter. Kernels are counted by launches in one step.

  Attributes:
    model: a key of MODELS.
    parameters: the number of parameters.
    leaves: the number of arrays that hold them.
    mode: a key of MODES.
    target: the card to compile for. If a step does not fit on it, XLA recomputes values to make it fit.
    kernels: the kernels of the update.
    moved: the bytes that they read and write.
    floor: the fewest bytes that an update can move.
    step_kernels: the kernels of the whole step.
    step_moved: the bytes that they read and write.
    error: why there are no figures.
  """

  model: str
  parameters: int
  leaves: int
  mode: str
  target: str
  kernels: int = 0
  moved: float = 0.0
  floor: float = 0.0
  step_kernels: int = 0
  step_moved: float = 0.0
  error: str = ""

  @property
  def ratio(self) -> float:
    """The bytes moved, as a multiple of the floor."""
    return self.moved / self.floor


def kernels(model: Model, mode: str, target: str = "h200") -> tuple[list[hlo.Kernel], float]:
  """Returns the kernels of a step with AdamW, and the fewest bytes that its update can move."""
  training = MODES[mode].build(model, "adamw")
  step = jax.jit(training.step, donate_argnums=(0, 1))
  with tempfile.TemporaryDirectory() as folder:
    mpo.gpu_memory(step, training.params, training.opt_state, model.batch, target=target, dump_to=folder)
    # The dump also has other programs (folded constants), which are small.
    text = max((p.read_text() for p in Path(folder).glob("*gpu_after_optimizations.txt")), key=len)
  params, state = jax.tree.leaves(training.params), jax.tree.leaves(training.opt_state)
  held = sum(math.prod(x.shape) * (0.5 if "int4" in x.dtype.name else x.dtype.itemsize) for x in (*params, *state))
  found = hlo.kernels(text, range(len(params), len(params) + len(state)))
  return found, 2 * held + GRADIENT * model.count


def of_update(name: str, found: Sequence[hlo.Kernel]) -> list[hlo.Kernel]:
  """The kernels of a step that belong to the update."""
  return list(found) if name in ALONE else [k for k in found if k.of_state]


def measure(name: str, mode: str, target: str = "h200") -> Row:
  """Compiles one model in one mode."""
  model = MODELS[name]()
  row = Row(name, model.count, len(jax.tree.leaves(model.params)), mode, target)
  try:
    found, floor = kernels(model, mode, target)
  except Exception as error:  # a mode that does not compile becomes a row; the benchmark goes on
    return dataclasses.replace(row, error=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
  update = of_update(name, found)
  return dataclasses.replace(
    row,
    kernels=sum(k.launches for k in update),
    moved=sum(k.bytes for k in update) / model.count,
    floor=floor / model.count,
    step_kernels=sum(k.launches for k in found),
    step_moved=sum(k.bytes for k in found) / model.count,
  )


def make_table(rows: Sequence[Row]) -> Table:
  first = rows[0]
  title = f"{first.model}: {first.parameters / 1e6:,.1f}M parameters in {first.leaves} arrays, AdamW"
  table = Table("", "update, bytes per parameter", "floor", "ratio", "kernels", "step, bytes", "kernels", title=title)
  for row in rows:
    cells = ["", "", "", "", "", row.error]
    if not row.error:
      cells = [f"{row.moved:.2f}", f"{row.floor:.2f}", f"{row.ratio:.3f}", f"{row.kernels}"]
      cells += [f"{row.step_moved:.1f}", f"{row.step_kernels}"]
    table.add_row(MODES[row.mode].label, *cells)
  return table


def draw(path: Path, rows: Sequence[Row]) -> None:
  """Draws the bytes that updates move, with a group of bars per model and a line at each floor."""
  from matplotlib.figure import Figure  # here, so that the rest works without it

  some = [row for row in rows if not row.error]
  if not some:
    return
  models, modes = list(dict.fromkeys(r.model for r in some)), list(dict.fromkeys(r.mode for r in some))
  figure = Figure(figsize=(2 + 2 * len(models), 5), layout="constrained")
  axes = figure.subplots()
  width = 0.85 / len(modes)
  for i, mode in enumerate(modes):
    cells = [row for row in some if row.mode == mode]
    x = [models.index(row.model) + (i - (len(modes) - 1) / 2) * width for row in cells]
    axes.bar(x, [row.moved for row in cells], width * 0.92, label=MODES[mode].label)
    floors = [row.floor for row in cells]
    axes.hlines(floors, [v - width / 2 for v in x], [v + width / 2 for v in x], color="black", linewidth=1.2)
  axes.set_xticks(range(len(models)), models)
  axes.set(ylabel="bytes per parameter", title="What an AdamW update moves, XLA:GPU-compiled; black: the floor")
  axes.spines[["top", "right"]].set_visible(False)
  figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
  figure.savefig(path, dpi=130)


def modes_of(name: str, asked: Sequence[str] | None) -> list[str]:
  """The modes to measure a model in."""
  return [mode for mode in asked or DEFAULT_MODES if not (name in ALONE and "-layer" in mode)]


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description="Bytes that an optimizer's step moves, as XLA:GPU compiles it.")
  parser.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help="default: all")
  parser.add_argument("--modes", nargs="+", choices=MODES, metavar="MODE", help="default: sixteen of them")
  parser.add_argument("--target", default="h200", help="the card to compile for (default: h200)")
  parser.add_argument("--kernels", action="store_true", help="list the kernels of each update, and write no results")
  parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
  parser.add_argument("--fresh", action="store_true", help="measure all rows anew")
  parser.add_argument("--list", action="store_true", help="list the models and modes, and stop")
  args = parser.parse_args(argv)
  console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
  if args.list:
    console.print("models:", ", ".join(MODELS))
    console.print("modes:", *(f"{name}: {mode.label};" for name, mode in MODES.items()))
    return 0
  wanted = [(name, mode) for name in args.models or MODELS for mode in modes_of(name, args.modes)]
  if args.kernels:
    for name, mode in wanted:
      model = MODELS[name]()
      update = sorted(of_update(name, kernels(model, mode, args.target)[0]), key=lambda k: -k.bytes)
      console.print(f"{name}, {mode}", hlo.summary(update, model.count), sep="\n", markup=False)
    return 0
  args.output_dir.mkdir(parents=True, exist_ok=True)
  path = args.output_dir / "update_traffic.json"
  known = json.loads(path.read_text())["rows"] if path.exists() and not args.fresh else []
  rows = {(row["model"], row["mode"]): Row(**row) for row in known}
  again = args.fresh or args.models or args.modes
  columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
  with Progress(*columns, console=console) as progress:
    task = progress.add_task("", total=len(wanted))
    for key in wanted:
      progress.update(task, description=" ".join(key))
      if again or key not in rows:
        rows[key] = measure(*key, args.target)
        ordered = sorted(rows.values(), key=lambda r: (list(MODELS).index(r.model), list(MODES).index(r.mode)))
        report = {"jax": jax.__version__, "optax_mpo": mpo.__version__}
        path.write_text(json.dumps(report | {"rows": [dataclasses.asdict(r) for r in ordered]}, indent=1) + "\n")
      progress.advance(task)
  for name in dict.fromkeys(name for name, _ in wanted):
    console.print(make_table([rows[key] for key in wanted if key[0] == name]))
  draw(path.with_suffix(".png"), list(rows.values()))
  console.print(f"Wrote {path} and {path.with_suffix('.png')}")
  return 0


if __name__ == "__main__":
  sys.exit(main())

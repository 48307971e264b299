"""Peak GPU memory of whole training steps, without a GPU: our modes and the alternatives users would choose.

    pip install -e '.[benchmarks]'
    python benchmarks/peak_memory.py                                        # everything; about half an hour on 2 cores
    python benchmarks/peak_memory.py --models lm-350m --modes optax-f32 mpo-16 --optimizers adamw
    python benchmarks/peak_memory.py --models lm-1.3b-fsdp8 lm-70b-fsdp8       # bytes of one of eight devices
    python benchmarks/peak_memory.py --list

Each row is one step compiled by XLA:GPU (`optax_mpo.gpu_memory`) with params and optimizer state donated: the bytes of
its arguments, its temporaries and in total. Tables show the total and the arguments in bytes per parameter, and the
total in GiB. For a model sharded over several devices, bytes and GiB are those of one device, and bytes per parameter
those of all. Prints a table per optimizer and target, and writes peak_memory.json and peak_memory.png to --output-dir.
Rows already in the JSON are kept, unless --fresh is given or --models or --modes name them.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs here; without this, JAX looks for a GPU and complains

import jax
import optax
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import optax_mpo as mpo

if __name__ == "__main__":  # a script does not have the root of the repository on its path
  sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import Model, language_model, layers, resnet50, vit
from benchmarks.modes import MODES, OPTIMIZERS
from optax_mpo._planner import fsdp

GIB = 2**30

# How the weights of models for several devices are split; activations as XLA likes, or by batch.
SPLITS = {"lm-1.3b-fsdp8": "rows", "lm-1.3b-fsdp8-columns": "columns", "lm-1.3b-fsdp8-largest": "largest"}
BY_BATCH = {f"{name}-by-batch": split for name, split in SPLITS.items()}

MODELS: dict[str, Callable[[], Model]] = {
  "lm-125m": lambda: language_model("125m"),
  "lm-350m": lambda: language_model("350m"),
  "lm-350m-tied": lambda: language_model("350m", tied=True),
  "lm-350m-noremat": lambda: language_model("350m", remat=False),
  "lm-350m-short": lambda: language_model("350m", remat=False, scan=False, context=512),
  "lm-350m-axis1": lambda: language_model("350m", axis=1),
  "lm-350m-groups": lambda: language_model("350m", groups=6),
  "lm-moe-500m": lambda: language_model("moe-500m"),
  "lm-350m-unrolled": lambda: language_model("350m", scan=False),
  "lm-1.3b": lambda: language_model("1.3b"),
  "lm-1.3b-batch8": lambda: language_model("1.3b", batch=8),
  "lm-1.3b-4x2048": lambda: language_model("1.3b", batch=4, context=2048),
  "lm-8.8b": lambda: language_model("8.8b"),
  "lm-70b": lambda: language_model("70b"),
  "lm-70b-h100": lambda: language_model("70b"),
  **dict.fromkeys(SPLITS, lambda: language_model("1.3b", batch=8)),
  **dict.fromkeys(BY_BATCH, lambda: language_model("1.3b", batch=8, activations=fsdp.by_batch(8))),
  "lm-70b-fsdp8": lambda: language_model("70b", batch=8),
  "layers-67m": lambda: layers(16, 2048),
  "layers-67m-unrolled": lambda: layers(16, 2048, scan=False),
  "resnet50": resnet50,
  "vit-l16": lambda: vit("vit-l16"),
}
# Models that are fully sharded over several devices, and models with another target than the rest.
DEVICES: dict[str, int] = dict.fromkeys((*SPLITS, *BY_BATCH, "lm-70b-fsdp8"), 8)
TARGETS = {"lm-70b-fsdp8": "h100", "lm-70b-h100": "h100"}
# The modes for sharded models. flashoptim-jax ravels its state, which then cannot be sharded like the params.
SHARDED_MODES = ("optax-f32", "mpo-16", "mpo-16-layer", "mpo-16-auto", "mpo-compact", "mpo-compact-auto")
_STREAMED = ("mpo-16-host", "mpo-16-host-weights", "mpo-compact-host", "mpo-compact-host-weights")
ON_HOST = ("lm-1.3b", "lm-8.8b", "lm-70b", "lm-70b-h100", "lm-70b-fsdp8")
# The other optimizers run on models where they are used, such as the paper's SGD on a ResNet.
MODELS_OF = {
  "adamw": tuple(MODELS),
  "adamw-clip": ("lm-350m-unrolled", "lm-350m", "lm-1.3b"),
  "adamw-recorded": ("lm-350m", "lm-1.3b"),
  "muon-layers": ("layers-67m", "lm-1.3b"),
  "adafactor-layers": ("layers-67m",),
  "lamb-layers": ("layers-67m",),
  "sgd": ("lm-350m", "lm-1.3b", "vit-l16", "resnet50"),
  "lion": ("lm-350m", "lm-1.3b", "vit-l16"),
}


@dataclasses.dataclass(frozen=True)
class Row:
  """One measured step. Bytes are those of one device. `error` says why there are none."""

  model: str
  parameters: int
  mode: str
  optimizer: str
  target: str
  argument_bytes: int = 0
  temporary_bytes: int = 0
  total_bytes: int = 0
  fits: bool = False
  seconds: float = 0.0
  error: str = ""
  devices: int = 1
  host_bytes: int = 0
  to_device_bytes: int = 0
  to_host_bytes: int = 0

  def per_parameter(self, device_bytes: int) -> float:
    return device_bytes * self.devices / self.parameters

  @property
  def key(self) -> tuple[str, str, str, str]:
    return self.model, self.mode, self.optimizer, self.target


def measure(model_name: str, mode: str, optimizer: str, target: str) -> Row:
  """Compiles one step for `target` and returns its bytes."""
  model = MODELS[model_name]()
  started = time.perf_counter()
  devices = DEVICES.get(model_name, 1)
  row = Row(model_name, model.count, mode, optimizer, target, devices=devices)
  try:
    training = MODES[mode].build(model, optimizer)
    if devices > 1:
      step, *args = fsdp.shard(training, model.batch, devices, (SPLITS | BY_BATCH).get(model_name, "rows"))
      report = mpo.gpu_memory(step, *args, target=target, devices=devices)
    else:
      args = (training.params, training.opt_state, model.batch)
      report = mpo.gpu_memory(training.step, *args, donate_argnums=(0, 1), target=target)
  except Exception as error:  # a mode that does not compile becomes a row; the benchmark goes on
    return dataclasses.replace(row, error=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
  return dataclasses.replace(
    row,
    argument_bytes=report.argument_bytes,
    temporary_bytes=report.temporary_bytes,
    total_bytes=report.total_bytes,
    host_bytes=report.host_bytes,
    to_device_bytes=report.to_device_bytes,
    to_host_bytes=report.to_host_bytes,
    fits=report.fits,
    seconds=round(time.perf_counter() - started, 1),
  )


def _modes_of(model: str) -> Sequence[str]:
  """The modes of a model, unless they are named: of the large ones alone those with state on the host."""
  if model in DEVICES:
    return [*SHARDED_MODES, *(_STREAMED if model in ON_HOST else ())]
  if model == "lm-70b-h100":  # too large for a card with anything else
    return _STREAMED
  return [mode for mode in MODES if model in ON_HOST or not MODES[mode].is_on_host]


def make_tables(rows: Sequence[Row]) -> Iterable[Table]:
  """One table per optimizer and target: bytes per parameter in total (arguments in brackets), and GiB in total."""
  for optimizer, target in dict.fromkeys((row.optimizer, row.target) for row in rows):
    some = [row for row in rows if (row.optimizer, row.target) == (optimizer, target)]
    models = list(dict.fromkeys(row.model for row in some))
    table = Table(title=f"{optimizer}, {target}: bytes per parameter at the peak (held state), GiB")
    table.add_column("")
    for model in models:
      table.add_column(model, justify="right")
    for mode in dict.fromkeys(row.mode for row in some):
      cells = {row.model: row for row in some if row.mode == mode}
      table.add_row(MODES[mode].label, *(describe(cells.get(model)) for model in models))
    yield table


def describe(row: Row | None) -> str:
  if row is None:
    return ""
  if row.error:
    return "does not compile"
  total, held = row.per_parameter(row.total_bytes), row.per_parameter(row.argument_bytes)
  each = "" if row.devices == 1 else " each"
  host = f" + {row.per_parameter(row.host_bytes):.2f} on the host" if row.host_bytes else ""
  return f"{total:.2f} ({held:.2f}){host}\n{row.total_bytes / GIB:.2f} GiB{each}{'' if row.fits else ', does not fit'}"


def draw(path: Path, rows: Sequence[Row]) -> None:
  """Draws the language models with AdamW: per mode, the arguments and what the step adds to them."""
  some = [row for row in rows if row.optimizer == "adamw" and row.model.startswith("lm") and not row.error]
  some = [row for row in some if not row.host_bytes]
  models, modes = list(dict.fromkeys(r.model for r in some)), list(dict.fromkeys(r.mode for r in some))
  if not some:
    return
  figure = Figure(figsize=(1.5 + 1.7 * len(models), 5), layout="constrained")
  axes = figure.subplots()
  width = 0.85 / len(modes)
  for i, mode in enumerate(modes):
    cells = [(j, row) for j, model in enumerate(models) for row in some if (row.model, row.mode) == (model, mode)]
    x = [j + (i - (len(modes) - 1) / 2) * width for j, _ in cells]
    held = [row.per_parameter(row.argument_bytes) for _, row in cells]
    rest = [row.per_parameter(row.total_bytes) - h for (_, row), h in zip(cells, held, strict=True)]
    axes.bar(x, held, width * 0.92, color=f"C{i}", label=MODES[mode].label)
    axes.bar(x, rest, width * 0.92, bottom=held, color=f"C{i}", alpha=0.4)
  axes.set_xticks(range(len(models)), models)
  axes.set(ylabel="bytes per parameter", title=f"Peak memory of an AdamW step on {some[0].target} (pale: temporaries)")
  axes.spines[["top", "right"]].set_visible(False)
  figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
  figure.savefig(path, dpi=130)


def read_rows(path: Path) -> list[Row]:
  return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []


def write_rows(path: Path, rows: Sequence[Row]) -> None:
  order = {key: i for i, key in enumerate((o, m, k) for o in OPTIMIZERS for m in MODELS for k in MODES)}
  ordered = sorted(rows, key=lambda row: order[(row.optimizer, row.model, row.mode)])
  report: dict[str, Any] = {"jax": jax.__version__, "optax": optax.__version__, "optax_mpo": mpo.__version__}
  path.write_text(json.dumps({**report, "rows": [dataclasses.asdict(row) for row in ordered]}, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description="Peak GPU memory of training steps, without a GPU.")
  parser.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help="default: all")
  parser.add_argument("--modes", nargs="+", choices=MODES, metavar="MODE", help="default: all")
  parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="OPTIMIZER")
  parser.add_argument("--target", default="h200", help="the GPU to compile for (default: h200)")
  parser.add_argument("--fresh", action="store_true", help="measure again what the JSON has already")
  parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
  parser.add_argument("--list", action="store_true", help="list the models and modes, and stop")
  args = parser.parse_args(argv)
  console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
  if args.list:
    console.print("models:", *(f"{name} ({make().count / 1e6:,.0f}M)" for name, make in MODELS.items()))
    console.print("modes:", *(f"{name}: {mode.label};" for name, mode in MODES.items()))
    return 0

  wanted = [
    (model, mode, optimizer, str(TARGETS.get(model, args.target)))
    for optimizer in args.optimizers
    for model in args.models or MODELS_OF[optimizer]
    for mode in args.modes or _modes_of(model)
  ]
  args.output_dir.mkdir(parents=True, exist_ok=True)
  path = args.output_dir / "peak_memory.json"
  rows = {row.key: row for row in read_rows(path)}
  again = args.fresh or args.models or args.modes
  columns = (TextColumn("{task.description:45}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
  with Progress(*columns, console=console) as progress:
    task = progress.add_task("", total=len(wanted))
    for key in wanted:
      progress.update(task, description=" ".join(key[:3]))
      if again or key not in rows:
        rows[key] = measure(*key)
        write_rows(path, list(rows.values()))
      progress.advance(task)
  for table in make_tables([rows[key] for key in wanted]):
    console.print(table)
  draw(args.output_dir / "peak_memory.png", [r for r in read_rows(path) if (r.target, r.devices) == (args.target, 1)])
  console.print(f"Wrote {path} and {path.with_suffix('.png')}")
  return 0


if __name__ == "__main__":
  sys.exit(main())

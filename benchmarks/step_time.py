"""Time of training steps, interleaved in one run: our modes and the alternatives users would choose.

    pip install -e '.[benchmarks]'
    python benchmarks/step_time.py                                          # half an hour and more on 2 CPU cores
    python benchmarks/step_time.py --models lm-8m --modes mpo-16 mpo-16-auto --rounds 20
    python benchmarks/step_time.py --list

Each model is compiled in every mode. Then, in each round, all modes make two steps in turn. The order of modes changes
from round to round, so that other load on the machine affects all of them. Only the second step counts: it finds caches
and the allocator as the same program left them, as in training. A row has:

- the median and quartiles of the seconds per step
- the ratio to the first mode of the model (Optax with f32 masters), as the median over rounds
- the seconds until a step is dispatched to the device (on a CPU, some of it is computed by then)
- how many arrays are passed to it
- the seconds to dispatch a program that computes nothing with these arrays: the host's part
- the seconds to trace and to compile

`leaves-*` are the optimizer alone: the gradients are given. `lm-125m-short` sees 128 tokens per step and other language
models 512 or more, so much of its step is the optimizer. `adamw-clip` clips by global norm, which value_and_update does
in two passes. Prints a table per model and optimizer and writes step_time.json and step_time.png to --output-dir. Rows
of other models from the same device and versions are kept.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import optax_mpo as mpo

if __name__ == "__main__":  # a script does not have the root of the repository on its path
  sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import Model, f32, language_model
from benchmarks.modes import MODES as COMPARED
from benchmarks.modes import OPTIMIZERS, WITH_COPY

MODES = COMPARED | WITH_COPY

PyTree = Any


@jax.custom_vjp
def given_gradients(params: PyTree, grads: PyTree) -> jax.Array:
  """A loss whose gradients are `grads`, without computing anything."""
  return jnp.zeros(())


given_gradients.defvjp(
  lambda params, grads: (jnp.zeros(()), (params, grads)),
  lambda kept, _: (jax.tree.map(lambda p, g: g.astype(p.dtype), *kept), jax.tree.map(jnp.zeros_like, kept[1])),
)


def leaves(count: int, *shape: int) -> Model:
  """A model of `count` leaves of one shape whose gradients are its batch, to measure the optimizer alone."""
  params = {f"w{i}": f32(*shape) for i in range(count)}
  grads = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name in params}
  return Model(f"leaves-{count}x{math.prod(shape)}", params, given_gradients, grads)


def mlp(width: int, depth: int, batch: int) -> Model:
  def loss(params: PyTree, x: jax.Array) -> jax.Array:
    y = x.astype(params[0]["w"].dtype)
    for p in params:
      y = jax.nn.relu(y @ p["w"] + p["b"][None])
    return jnp.mean(jnp.square(y.astype(jnp.float32)))

  def fused_loss(params: PyTree, x: jax.Array) -> jax.Array:
    layer = mpo.fused_layer(lambda p, y: jax.nn.relu(y @ p["w"] + p["b"][None]), remat=False)
    y = x.astype(jnp.bfloat16)
    for p in params:
      y = layer(p, y)
    return jnp.mean(jnp.square(y.astype(jnp.float32)))

  params = [{"w": f32(width, width), "b": f32(width)}] * depth
  return Model(f"mlp-{width}x{depth}", params, loss, f32(batch, width), fused_loss)


small_lm = functools.partial(
  language_model, "125m", layers=4, width=256, heads=4, hidden=704, vocab=8192, batch=4, context=128
)
MODELS: dict[str, Callable[[], Model]] = {
  "leaves-8x4m": lambda: leaves(8, 2048, 2048),
  "leaves-64x1": lambda: leaves(64, 1),
  "mlp": lambda: mlp(1024, 4, 128),
  "lm-8m": small_lm,
  "lm-8m-unrolled": functools.partial(small_lm, scan=False),
  "lm-24layers": functools.partial(small_lm, layers=24, width=128, hidden=352),
  "lm-24layers-unrolled": functools.partial(small_lm, layers=24, width=128, hidden=352, scan=False),
  "lm-125m-short": lambda: language_model("125m", context=128),
  "lm-125m": lambda: language_model("125m"),
  "lm-350m": lambda: language_model("350m"),
  "lm-350m-unrolled": lambda: language_model("350m", scan=False),
  "lm-1.3b": lambda: language_model("1.3b"),
}
ON_CPU = tuple(name for name in MODELS if name not in ("lm-350m", "lm-350m-unrolled", "lm-1.3b"))
# On a CPU these are measured in fewer modes and with one optimizer: their steps take seconds on two cores.
LARGE = {
  "lm-125m-short": ("optax-f32", "mpo-16", "mpo-16-layer", "mpo-16-auto", "mpo-compact", "mpo-compact-auto"),
  "lm-125m": ("optax-f32", "mpo-16", "mpo-16-auto", "mpo-compact", "mpo-compact-auto"),
}
BASELINE = "optax-f32"
COUPLED_MODES = ("optax-f32", "mpo-16", "mpo-16-auto", "mpo-compact", "mpo-compact-auto")


@dataclasses.dataclass(frozen=True)
class Row:
  """One model, optimizer and mode. Times are in seconds. `error` says why there are none."""

  model: str
  parameters: int
  mode: str
  optimizer: str
  rounds: int = 0
  arrays: int = 0
  median: float = 0.0
  lower_quartile: float = 0.0
  upper_quartile: float = 0.0
  ratio: float = 0.0
  dispatch: float = 0.0
  host: float = 0.0
  trace: float = 0.0
  compile: float = 0.0
  error: str = ""


class Runner:
  """A compiled step with its params and state."""

  def __init__(self, model: Model, mode: str, optimizer: str):
    training = MODES[mode].build(model, optimizer)
    self._step = jax.jit(training.step, donate_argnums=(0, 1))
    started = time.perf_counter()
    lowered = self._step.lower(training.params, training.opt_state, model.batch)
    traced = time.perf_counter()
    lowered.compile()  # the jitted function, called as users call it, finds the compiled program
    self.trace, self.compile = traced - started, time.perf_counter() - traced
    rng = np.random.default_rng(0)
    self._params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.02, s.dtype), training.params)
    self._state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), training.opt_state)
    self.arrays = len(jax.tree.leaves((training.params, training.opt_state)))
    self._batch = jax.tree.map(lambda s: jnp.asarray(rng.integers(0, 9, s.shape), s.dtype), model.batch)
    self._nothing = jax.jit(lambda *args: (jnp.zeros(()), *args[:2]), donate_argnums=(0, 1))

  def run(self) -> tuple[float, float]:
    """Makes one step. Returns the seconds until it is dispatched and until it is done."""
    started = time.perf_counter()
    _, self._params, self._state = self._step(self._params, self._state, self._batch)
    sent = time.perf_counter() - started
    jax.block_until_ready(self._params)
    return sent, time.perf_counter() - started

  def send_nothing(self) -> float:
    """Returns the seconds to dispatch a program that takes the same arrays and computes nothing."""
    started = time.perf_counter()
    _, self._params, self._state = self._nothing(self._params, self._state, self._batch)
    sent = time.perf_counter() - started
    jax.block_until_ready(self._params)
    return sent


def measure(model_name: str, optimizer: str, modes: Sequence[str], rounds: int) -> list[Row]:
  """Times all modes of one model, in turn."""
  model = MODELS[model_name]()
  runners: dict[str, Runner] = {}
  rows = {mode: Row(model_name, model.count, mode, optimizer) for mode in modes}
  for mode in modes:
    try:
      runners[mode] = Runner(model, mode, optimizer)
      for _ in range(2):  # not measured, since the first calls allocate
        runners[mode].run()
        runners[mode].send_nothing()
    except Exception as error:  # a mode that does not run becomes a row; the benchmark goes on
      rows[mode] = dataclasses.replace(rows[mode], error=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
      runners.pop(mode, None)
  names = list(runners)
  seconds: dict[str, list[float]] = {mode: [] for mode in names}
  sent: dict[str, list[float]] = {mode: [] for mode in names}
  host: dict[str, list[float]] = {mode: [] for mode in names}
  for i in range(rounds):
    for mode in np.random.default_rng(i).permutation(names):
      runners[mode].run()  # not measured: in training, the previous step is one of the same program
      for kept, taken in zip((sent[mode], seconds[mode]), runners[mode].run(), strict=True):
        kept.append(taken)
      host[mode].append(runners[mode].send_nothing())
  for mode, times in seconds.items():
    low, median, high = np.quantile(times, [0.25, 0.5, 0.75])
    rows[mode] = dataclasses.replace(
      rows[mode],
      rounds=rounds,
      arrays=runners[mode].arrays,
      median=float(median),
      lower_quartile=float(low),
      upper_quartile=float(high),
      ratio=float(np.median(np.array(times) / np.array(seconds[names[0]]))),
      dispatch=float(np.median(sent[mode])),
      host=float(np.median(host[mode])),
      trace=runners[mode].trace,
      compile=runners[mode].compile,
    )
  return list(rows.values())


def _is_for_cpu(mode: str) -> bool:
  """Whether to measure a mode on a CPU: kernels make no difference there, and flashoptim-jax runs on GPUs only."""
  return not mode.endswith("-kernels") and not mode.startswith("flash")


def make_table(rows: Sequence[Row]) -> Table:
  first = rows[0]
  title = f"{first.model} ({first.parameters / 1e6:,.1f}M parameters), {first.optimizer}"
  table = Table(
    "", "ms per step", "quartiles", "ratio", "sent after ms", "arrays", "host ms", "trace s", "compile s", title=title
  )
  for row in rows:
    cells = ["", "", "", "", "", "", "", row.error]
    if not row.error:
      cells = [
        f"{row.median * 1e3:.3g}",
        f"{row.lower_quartile * 1e3:.3g} to {row.upper_quartile * 1e3:.3g}",
        f"{row.ratio:.3f}",
        f"{row.dispatch * 1e3:.2f}",
        f"{row.arrays}",
        f"{row.host * 1e3:.2f}",
        f"{row.trace:.1f}",
        f"{row.compile:.1f}",
      ]
    table.add_row(MODES[row.mode].label, *cells)
  return table


def draw(path: Path, rows: Sequence[Row], device: str) -> None:
  """Draws the ratios for AdamW, with a group of bars per model."""
  from matplotlib.figure import Figure  # here, so that the rest works without it

  some = [row for row in rows if row.optimizer == "adamw" and not row.error]
  if not some:
    return
  models, modes = list(dict.fromkeys(r.model for r in some)), list(dict.fromkeys(r.mode for r in some))
  figure = Figure(figsize=(2 + 2 * len(models), 5), layout="constrained")
  axes = figure.subplots()
  width = 0.85 / len(modes)
  for i, mode in enumerate(modes):
    cells = [(models.index(row.model), row.ratio) for row in some if row.mode == mode]
    x = [j + (i - (len(modes) - 1) / 2) * width for j, _ in cells]
    axes.bar(x, [ratio for _, ratio in cells], width * 0.92, label=MODES[mode].label)
  axes.axhline(1, color="black", linewidth=0.8)
  axes.set_xticks(range(len(models)), models)
  axes.set(ylabel="time of a step, Optax with f32 masters = 1", title=f"AdamW on {device}")
  axes.spines[["top", "right"]].set_visible(False)
  figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
  figure.savefig(path, dpi=130)


def read_rows(path: Path, about: dict[str, str]) -> list[Row]:
  """The rows of earlier runs, if from the same device and versions. All modes of a model are from one run."""
  found = json.loads(path.read_text()) if path.exists() else {}
  same = all(found.get(key) == value for key, value in about.items())
  return [Row(**row) for row in found["rows"]] if same else []


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description="Time of training steps against Optax and flashoptim-jax.")
  parser.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help="default: those for a CPU, or all")
  parser.add_argument("--modes", nargs="+", choices=MODES, metavar="MODE", help="default: those for a CPU, or all")
  parser.add_argument(
    "--optimizers", nargs="+", choices=OPTIMIZERS, default=["adamw", "adamw-clip"], metavar="OPTIMIZER"
  )
  parser.add_argument("--rounds", type=int, default=12, help="steps of each mode (default: 12)")
  parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
  parser.add_argument("--list", action="store_true", help="list the models and modes, and stop")
  args = parser.parse_args(argv)
  console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
  if args.list:
    console.print("models:", ", ".join(MODELS))
    console.print("modes:", *(f"{name}: {mode.label};" for name, mode in MODES.items()))
    return 0
  if args.rounds < 1:
    parser.error("--rounds has to be 1 or more")
  args.output_dir.mkdir(parents=True, exist_ok=True)
  device = jax.devices()[0]
  about = {
    "device": device.device_kind if device.platform != "cpu" else f"{platform.machine()}, {os.cpu_count()} cores",
    "jax": jax.__version__,
    "optax": optax.__version__,
    "optax_mpo": mpo.__version__,
  }
  path = args.output_dir / "step_time.json"
  rows = read_rows(path, about)
  for model in args.models or (ON_CPU if device.platform == "cpu" else MODELS):
    for optimizer in args.optimizers[: 1 if device.platform == "cpu" and model in LARGE else None]:
      usual = (m for m in MODES if device.platform != "cpu" or _is_for_cpu(m))
      if device.platform == "cpu":
        usual = LARGE.get(model, usual)
      chosen = list(args.modes or usual)
      if optimizer == "adamw-clip":
        chosen = [mode for mode in chosen if mode in COUPLED_MODES]
      modes = [BASELINE, *(mode for mode in chosen if mode != BASELINE)]
      new = measure(model, optimizer, modes, args.rounds)
      console.print(make_table(new))
      rows = [row for row in rows if (row.model, row.optimizer) != (model, optimizer)] + new
      rows.sort(key=lambda row: (list(MODELS).index(row.model), row.optimizer))
      path.write_text(json.dumps(about | {"rows": [dataclasses.asdict(row) for row in rows]}, indent=1) + "\n")
      draw(path.with_suffix(".png"), rows, about["device"])
  return 0


if __name__ == "__main__":
  sys.exit(main())

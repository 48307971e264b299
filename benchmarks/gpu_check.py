"""What only a GPU can tell: real peak memory against `mpo.gpu_memory`, step times, bandwidth, and exactness.

    benchmarks/run_gpu.sh                                             # all of it, in ten minutes on one card
    python benchmarks/gpu_check.py --models lm-350m --modes mpo-16-auto

Needs jax for CUDA, optax and flax, and no network; flashoptim-jax is measured too, where it is installed. Each model
and mode runs in a process of its own, since a process cannot reset the peak that `memory_stats` counts: first the mode
alone, for its peak, then in turn with Optax and f32 masters, for the ratio of times. `leaves-*` are the optimizer
alone, with the bandwidth that it reaches as a share of that of a copy, measured in the same process. Prints a table and
writes gpu_check.json to --output-dir.

On a CPU it runs as well, with small models: that tries the script, and nothing else.
"""

import argparse
import importlib.util
import json
import subprocess
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

if __name__ == "__main__":  # run as a script: the root of the repository is not on the path
  sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import Model, language_model
from benchmarks.modes import MODES, Training
from benchmarks.step_time import BASELINE, leaves

PyTree = Any
ROUNDS = 20

MODELS: dict[str, Callable[[], Model]] = {
  "leaves-8x16m": lambda: leaves(8, 4096, 4096),
  "leaves-8x64k": lambda: leaves(8, 256, 256),
  "lm-tiny": lambda: language_model("125m", layers=2, width=64, heads=2, hidden=128, vocab=256, context=64),
  "lm-350m": lambda: language_model("350m"),
  "lm-1.3b": lambda: language_model("1.3b"),
  "lm-1.3b-8x1024": lambda: language_model("1.3b", batch=8),
}
ON_GPU = ("leaves-8x16m", "lm-1.3b", "lm-1.3b-8x1024")
ON_CPU = ("leaves-8x64k", "lm-tiny")
DEFAULT_MODES = ["mpo-16", "mpo-16-auto", "mpo-16-auto-kernels", "mpo-16-layer-kernels", "mpo-compact-auto-kernels"]
if importlib.util.find_spec("flashoptim_jax"):  # the rival of 8-bit state, where somebody has brought it
  DEFAULT_MODES.append("flash-24")


class Steps:
  """A step with arrays of its own on the device."""

  def __init__(self, training: Training, batch: PyTree):
    self._step = jax.jit(training.step, donate_argnums=(0, 1))

    def filled(tree: PyTree, value: float) -> PyTree:
      return jax.tree.map(lambda s: jnp.full(s.shape, value, s.dtype), tree)

    self._params, self._state = filled(training.params, 0.01), filled(training.opt_state, 0)
    self._batch = filled(batch, 1)

  def run(self) -> tuple[float, float]:
    """Makes a step; returns the seconds until it is sent and until it is done."""
    started = time.perf_counter()
    _, self._params, self._state = self._step(self._params, self._state, self._batch)
    sent = time.perf_counter() - started
    jax.block_until_ready(self._params)
    return sent, time.perf_counter() - started


def tree_bytes(tree: PyTree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def copy_bandwidth(size: int) -> float:
  """Bytes per second, read and written, of adding one to an array of `size` bytes."""
  x = jnp.zeros(size // 4, jnp.float32)
  add = jax.jit(lambda x: x + 1)
  jax.block_until_ready(add(x))
  seconds = []
  for _ in range(ROUNDS):
    started = time.perf_counter()
    jax.block_until_ready(add(x))
    seconds.append(time.perf_counter() - started)
  return 2 * size / float(np.median(seconds))


def peak_bytes() -> int | None:
  """The most memory that arrays and programs of this process have taken; None on a CPU, which does not count it."""
  stats = jax.devices()[0].memory_stats()
  return stats.get("peak_bytes_in_use") if stats else None


def measure(model_name: str, mode: str) -> dict[str, Any]:
  """All figures of one model and mode."""
  model = MODELS[model_name]()
  training = MODES[mode].build(model, "adamw")
  on_gpu = jax.default_backend() == "gpu"
  row: dict[str, Any] = {"model": model_name, "parameters": model.count, "mode": mode}
  if on_gpu:
    args = (training.params, training.opt_state, model.batch)
    report = mpo.gpu_memory(training.step, *args, donate_argnums=(0, 1), target="local")
    row["predicted_bytes"] = report.total_bytes
  ours = Steps(training, model.batch)
  for _ in range(3):
    ours.run()
  row["peak_bytes"] = peak_bytes()
  theirs = Steps(MODES[BASELINE].build(model, "adamw"), model.batch)
  for _ in range(3):
    theirs.run()
  times = np.array([[ours.run(), theirs.run()] for _ in range(ROUNDS)])  # [rounds, 2 modes, sent and done]
  sent, done = np.median(times, axis=0).T
  row |= {"seconds": done[0], "baseline_seconds": done[1], "dispatch": sent[0], "baseline_dispatch": sent[1]}
  row["ratio"] = float(np.median(times[:, 0, 1] / times[:, 1, 1]))
  if model_name.startswith("leaves"):
    moved = tree_bytes(model.batch) + 2 * tree_bytes((training.params, training.opt_state))
    row["copy_share"] = moved / float(done[0]) / copy_bandwidth(2**30 if on_gpu else 2**24)
  return row


def exactness() -> dict[str, float]:
  """The share of weights and bits that differ after ten steps: fused from unfused, and masters from f32 Optax."""
  model = MODELS["lm-tiny"]()
  tokens = jax.random.randint(jax.random.key(1), model.batch.shape, 0, 256)
  keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(model.params))))
  masters = jax.tree.map(lambda s: jax.random.normal(next(keys), s.shape) * 0.05, model.params)
  adamw = optax.adamw(3e-4, weight_decay=0.1)
  tx = mpo.compensated(adamw)

  def unfused(params: PyTree, state: Any, batch: Any) -> Any:
    value, grads = jax.value_and_grad(model.loss)(params, batch)
    updates, state = tx.update(grads, state, params)
    return value, mpo.apply_updates(params, updates), state

  def plain(params: PyTree, state: Any, batch: Any) -> Any:
    value, grads = jax.value_and_grad(model.loss)(mpo.cast(params), batch)
    updates, state = adamw.update(jax.tree.map(lambda g: g.astype(jnp.float32), grads), state, params)
    return value, optax.apply_updates(params, updates), state

  assert model.fused_loss is not None
  steps = {
    "unfused": unfused,
    "auto": mpo.value_and_update(model.loss, tx),
    "layer": mpo.fused_value_and_update(model.fused_loss, tx),
    "auto with kernels": mpo.value_and_update(model.loss, mpo.with_kernels(tx)),
    "layer with kernels": mpo.fused_value_and_update(model.fused_loss, mpo.with_kernels(tx)),
  }
  found = {}
  for name, step in steps.items():
    state = mpo.init(tx, masters)
    found[name] = ten_steps(step, *state, tokens)
  f32 = ten_steps(plain, masters, adamw.init(masters), tokens)
  shares = {name: share_of_difference(found[name], found["unfused"]) for name in steps if name != "unfused"}
  shares["optax-f32"] = share_of_difference(mpo.master_params(*found["unfused"]), f32[0])
  return shares


def ten_steps(step: Callable[..., Any], params: PyTree, state: Any, batch: Any) -> tuple[PyTree, Any]:
  jitted = jax.jit(step, compiler_options={"xla_allow_excess_precision": False})
  for _ in range(10):
    _, params, state = jitted(params, state, batch)
  return params, state


def share_of_difference(a: PyTree, b: PyTree) -> float:
  pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
  return float(sum(jnp.sum(x != y) for x, y in pairs) / sum(x.size for x, _ in pairs))


def make_table(rows: Sequence[dict[str, Any]]) -> Table:
  table = Table("model", "mode", "peak / predicted GiB", "ms", "ratio", "dispatch ms (Optax)", "share of copy")
  for row in rows:
    if "error" in row:
      table.add_row(row["model"], row["mode"], row["error"])
      continue
    known = row["peak_bytes"] and f"{row['peak_bytes'] / 2**30:.2f} / {row['predicted_bytes'] / 2**30:.2f}"
    dispatch = f"{row['dispatch'] * 1e3:.2f} ({row['baseline_dispatch'] * 1e3:.2f})"
    share = f"{row['copy_share']:.2f}" if "copy_share" in row else ""
    cells = (known or "-", f"{row['seconds'] * 1e3:.2f}", f"{row['ratio']:.3f}", dispatch, share)
    table.add_row(row["model"], row["mode"], *cells)
  return table


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description="Peak memory, times and exactness on a GPU.")
  parser.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help="default: those for this device")
  parser.add_argument("--modes", nargs="+", choices=MODES, default=DEFAULT_MODES, metavar="MODE")
  parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
  parser.add_argument("--one", nargs=2, metavar=("MODEL", "MODE"), help=argparse.SUPPRESS)  # in a process of its own
  args = parser.parse_args(argv)
  if args.one:
    print(json.dumps(measure(*args.one)))
    return 0
  console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
  device = subprocess.run(
    [sys.executable, "-c", "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep='|')"],
    capture_output=True,
    text=True,
    check=True,
  ).stdout.strip()
  platform, kind = device.splitlines()[-1].split("|")
  rows: list[dict[str, Any]] = []
  args.output_dir.mkdir(parents=True, exist_ok=True)
  report: dict[str, Any] = {"device": kind, "jax": jax.__version__, "optax": optax.__version__}
  for model in args.models or (ON_CPU if platform == "cpu" else ON_GPU):
    for mode in args.modes:
      if "-layer" in mode and MODELS[model]().fused_loss is None:
        continue
      command = [sys.executable, __file__, "--one", model, mode]
      done = subprocess.run(command, capture_output=True, text=True)
      last = (done.stdout.strip() or "{}").splitlines()[-1]
      error = {"model": model, "mode": mode, "error": (done.stderr.strip() or "died").splitlines()[-1][:200]}
      rows.append(json.loads(last) if done.returncode == 0 else error)
      (args.output_dir / "gpu_check.json").write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")
  console.print(make_table(rows))
  report["share_of_difference"] = exactness()
  console.print("share of weights and bits that differ after ten steps:", report["share_of_difference"])
  (args.output_dir / "gpu_check.json").write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")
  return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
  sys.exit(main())

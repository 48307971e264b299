"""Measures what needs a GPU: real peak memory against `mpo.gpu_memory`, step times, bandwidth, exactness, training.

    benchmarks/run_gpu.sh                                             # everything, in ten minutes on one card
    benchmarks/run_gpu.sh results --resume                            # a second call: what the first did not finish
    python benchmarks/gpu_check.py --models lm-350m --modes mpo-16-auto

Needs jax for CUDA, flatbuffers, optax and rich, and no network. flashoptim-jax and PyTorch are measured too if they are
installed. Each part runs in a separate process, since a process cannot reset the peak that `memory_stats` counts. It
runs the mode alone, for its peak, and then in turn with Optax and f32 masters, for the ratio of times. `leaves-*` are
the optimizer alone, with its bandwidth as a fraction of that of a copy, measured in the same process. The most
important parts run first, and gpu_check.json in --output-dir is written after each. A part that fails, or has no time
left (--seconds), becomes a row with an `error`; --resume runs those again.

It also runs on a CPU, with small models. That tests the script and nothing else.
"""

import argparse
import functools
import importlib.util
import json
import os
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

if __name__ == "__main__":  # a script does not have the root of the repository on its path
  sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import Model, language_model
from benchmarks.modes import MODES, OPTIMIZERS, Training, transformation
from benchmarks.step_time import BASELINE, leaves

PyTree = Any
ROUNDS = 10
PER_ROUND = 5
"""Steps that are dispatched before waiting, as in training, where the host runs ahead of the card."""

TRAINING_STEPS = {"gpu": 300, "cpu": 3}
TRANSFORMATIONS = {"mpo-16-auto": (16, False, False), "mpo-compact-auto": (8, True, False)}  # bits, compact, kernels
FIXED = {"XLA_FLAGS": "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0 --xla_disable_hlo_passes=dot-merger"}

MODELS: dict[str, Callable[[], Model]] = {
  "leaves-8x64m": lambda: leaves(8, 8192, 8192),
  "leaves-8x64k": lambda: leaves(8, 256, 256),
  "lm-tiny": lambda: language_model("125m", layers=2, width=64, heads=2, hidden=128, vocab=256, context=64),
  "lm-350m": lambda: language_model("350m"),
  "lm-1.3b": lambda: language_model("1.3b"),
  "lm-1.3b-8x1024": lambda: language_model("1.3b", batch=8),
  "text-350m": lambda: language_model("350m", vocab=256, batch=8),
  "text-tiny": lambda: language_model("125m", layers=2, width=64, heads=2, hidden=128, vocab=256, context=64, batch=2),
}
MAIN = ("mpo-16-auto", "mpo-compact-auto", "mpo-16-auto-kernels", "mpo-compact-auto-kernels")
OTHERS = ("mpo-16", "mpo-16-layer-kernels")
if importlib.util.find_spec("flashoptim_jax"):  # another implementation of 8-bit state
  OTHERS += ("flash-24",)
EXACTNESS = ("lm-tiny", "exactness")
TORCH = "torch-f32"
TRAINED = ("optax-f32", "mpo-16-auto", "mpo-compact-auto")  # on the source of the standard library

Part = tuple[str, str]


def parts_of(platform: str, models: Sequence[str] | None, modes: Sequence[str] | None) -> list[Part]:
  """The parts for a device, the most important first."""
  if models or modes:
    return [(model, mode) for model in models or ["lm-350m"] for mode in modes or MAIN]
  if platform == "cpu":
    return [("lm-tiny", "mpo-16-auto"), EXACTNESS, ("leaves-8x64k", "mpo-16-auto"), ("text-tiny", "train mpo-16-auto")]
  return [
    *(("lm-1.3b", mode) for mode in MAIN),
    EXACTNESS,
    *(("leaves-8x64m", mode) for mode in MAIN),
    *(("lm-1.3b", mode) for mode in OTHERS),
    *([("lm-1.3b", TORCH), ("lm-1.3b-8x1024", TORCH)] if importlib.util.find_spec("torch") else []),
    *(("lm-1.3b-8x1024", mode) for mode in MAIN),
    *(("text-350m", f"train {mode}") for mode in TRAINED),
    *(("leaves-8x64m", mode) for mode in OTHERS if "-layer" not in mode),
    *(("lm-1.3b-8x1024", mode) for mode in OTHERS),
  ]


def drawn(tree: PyTree) -> PyTree:
  """Random arrays of these shapes, since a card can be faster on zeros. Integers are tokens from 0 to 255."""
  leaves, treedef = jax.tree.flatten(tree)

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def draw(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    key = jax.random.key(seed)
    if jnp.issubdtype(dtype, jnp.floating):
      return (0.02 * jax.random.normal(key, shape)).astype(dtype)
    return jax.random.randint(key, shape, 0, 256).astype(dtype)

  return treedef.unflatten([draw(seed, leaf.shape, leaf.dtype) for seed, leaf in enumerate(leaves)])


class Steps:
  """A compiled step with its own arrays on the device."""

  def __init__(self, training: Training, batch: PyTree):
    self._step = jax.jit(training.step, donate_argnums=(0, 1))
    # Compile before the arrays exist, so that buffers that the compiler allocates to try kernels are in no peak.
    self._step.lower(training.params, training.opt_state, batch).compile()
    self._params, self._batch = drawn(training.params), drawn(batch)
    self._state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), training.opt_state)

  def run(self) -> tuple[float, float]:
    """Makes PER_ROUND steps. Returns the seconds until the first is dispatched, and the seconds per step."""
    started, sent = time.perf_counter(), 0.0
    for _ in range(PER_ROUND):
      _, self._params, self._state = self._step(self._params, self._state, self._batch)
      sent = sent or time.perf_counter() - started
    jax.block_until_ready(self._params)
    return sent, (time.perf_counter() - started) / PER_ROUND


def tree_bytes(tree: PyTree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def copy_bandwidth(size: int) -> float:
  """Bytes read and written per second when adding one to an array of `size` bytes."""
  x = jnp.zeros(size // 4, jnp.float32)
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jax.block_until_ready(add(x))
  seconds = []
  for _ in range(ROUNDS):
    started = time.perf_counter()
    for _ in range(PER_ROUND):
      x = add(x)
    jax.block_until_ready(x)
    seconds.append((time.perf_counter() - started) / PER_ROUND)
  return 2 * size / float(np.median(seconds))


def peak_bytes() -> int | None:
  """The peak memory of this process's arrays and programs; None on a CPU, which does not count it."""
  stats = jax.devices()[0].memory_stats()
  return stats.get("peak_bytes_in_use") if stats else None


def measure(model_name: str, mode: str) -> dict[str, Any]:
  """Measures one model and mode."""
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
    row["copy_share"] = moved / float(done[0]) / copy_bandwidth(2**32 if on_gpu else 2**24)
  return row


def exactness() -> dict[str, Any]:
  """The fraction of numbers that differ after ten steps.

  Params and state with gradient release are compared with those of the ordinary step, and the ordinary step's masters
  with f32 Optax. The programs differ around their matrix products. So XLA must not choose algorithms by timing, and
  must sum in a fixed order: `FIXED` sets both.
  """
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
  return {"model": EXACTNESS[0], "mode": EXACTNESS[1], "share_of_difference": shares}


def initial(params: PyTree) -> PyTree:
  """Initial f32 weights: ones in norms, small normal numbers elsewhere."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf, x: jnp.ones(leaf.shape) if "norm" in str(path[-1]) else x, params, drawn(params)
  )


def standard_library() -> np.ndarray:
  """The source of the standard library's modules as bytes: u8[n]."""
  sources = sorted(Path(json.__file__).parent.parent.glob("*.py"))
  return np.frombuffer(b"".join(path.read_bytes() for path in sources), np.uint8)


def train(model_name: str, mode: str) -> dict[str, Any]:
  """Trains on text and returns the losses. Every mode starts from the same weights and sees the same batches."""
  model = MODELS[model_name]()
  training = MODES[mode].build(model, "adamw")
  masters = initial(model.params)
  if mode == "optax-f32":
    params, state = masters, OPTIMIZERS["adamw"]().init(masters)
  else:
    params, state = jax.jit(lambda p: mpo.init(transformation("adamw", *TRANSFORMATIONS[mode]), p))(masters)
  del masters
  text, draw = standard_library(), np.random.default_rng(0)
  count, length = model.batch.shape
  step, losses, started = jax.jit(training.step, donate_argnums=(0, 1)), [], 0.0
  for index in range(TRAINING_STEPS[jax.default_backend()]):
    starts = draw.integers(0, len(text) - length, count)
    batch = jnp.asarray(np.stack([text[s : s + length] for s in starts]), jnp.int32)
    loss, params, state = step(params, state, batch)
    losses.append(loss)
    if index == 0:
      jax.block_until_ready(params)
      started = time.perf_counter()
  values = [float(loss) for loss in losses]
  seconds = (time.perf_counter() - started) / (len(values) - 1)
  return {
    "model": model_name,
    "parameters": model.count,
    "mode": f"train {mode}",
    "seconds": seconds,
    "peak_bytes": peak_bytes(),
    "losses": [round(value, 4) for value in values],
    "last_losses_mean": float(np.mean(values[-20:])),
  }


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
    cells = [row["model"], row["mode"]]
    if "error" in row:
      cells += [row["error"]]
    elif "share_of_difference" in row:
      cells += ["differing: " + ", ".join(f"{name} {share:.2g}" for name, share in row["share_of_difference"].items())]
    else:
      sizes = [row.get("peak_bytes"), row.get("predicted_bytes")]
      cells += [" / ".join(f"{size / 2**30:.2f}" for size in sizes if size) or "-", f"{row['seconds'] * 1e3:.2f}"]
      if "losses" in row:
        cells += [f"loss {row['last_losses_mean']:.4f}"]
      elif "ratio" in row:
        cells += [f"{row['ratio']:.3f}", f"{row['dispatch'] * 1e3:.2f} ({row['baseline_dispatch'] * 1e3:.2f})"]
        cells += [f"{row['copy_share']:.2f}"] if "copy_share" in row else []
    table.add_row(*cells)
  return table


def run_part(model: str, mode: str, seconds: float) -> dict[str, Any]:
  """Runs a part in a separate process. Returns a row, with an `error` if it fails or takes longer than `seconds`."""
  row: dict[str, Any] = {"model": model, "mode": mode}
  if seconds < 15:
    return row | {"error": "no time left"}
  env = os.environ | (FIXED if mode == "exactness" else {})
  command = [sys.executable, __file__, "--one", model, mode]
  try:
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=seconds)
  except subprocess.TimeoutExpired:
    return row | {"error": "no time left"}
  if done.returncode:
    print(done.stderr[-4000:], file=sys.stderr)
    return row | {"error": ([line for line in done.stderr.splitlines() if "Error" in line] or ["died"])[-1][:300]}
  return json.loads(done.stdout.strip().splitlines()[-1])


def measure_part(model: str, mode: str) -> dict[str, Any]:
  if mode == "exactness":
    return exactness()
  if mode == TORCH:
    from benchmarks import torch_rival  # needs PyTorch

    batch, context = (int(n) - k for k, n in enumerate(MODELS[model]().batch.shape))
    return {"model": model, "mode": mode} | torch_rival.measure("1.3b", batch, context, "cuda", ROUNDS, PER_ROUND)
  kind, _, trained = mode.partition(" ")
  return train(model, trained) if kind == "train" else measure(model, mode)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description="Peak memory, times, exactness and training on a GPU.")
  parser.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help="default: those for this device")
  parser.add_argument("--modes", nargs="+", choices=MODES, metavar="MODE", help="default: those for this device")
  parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
  parser.add_argument("--resume", action="store_true", help="keep the rows that are there, and run what is missing")
  parser.add_argument("--seconds", type=float, default=570, help="no part goes on for longer than this after the start")
  parser.add_argument("--one", nargs=2, metavar=("MODEL", "MODE"), help=argparse.SUPPRESS)  # for run_part
  args = parser.parse_args(argv)
  if args.one:
    print(json.dumps(measure_part(*args.one)))
    return 0
  started = time.perf_counter()
  console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
  device = subprocess.run(
    [sys.executable, "-c", "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep='|')"],
    capture_output=True,
    text=True,
    check=True,
  ).stdout.strip()
  platform, kind = device.splitlines()[-1].split("|")
  path = args.output_dir / "gpu_check.json"
  args.output_dir.mkdir(parents=True, exist_ok=True)
  report: dict[str, Any] = {"device": kind, "jax": jax.__version__, "optax": optax.__version__, "rows": []}
  if args.resume and path.exists():
    kept = json.loads(path.read_text())
    if kept["device"] != kind or kept["jax"] != jax.__version__:
      parser.error(f"{path} is of {kept['device']} with JAX {kept['jax']}: give another --output-dir.")
    report["rows"] = [row for row in kept["rows"] if "error" not in row]
  for model, mode in parts_of(platform, args.models, args.modes):
    if "-layer" in mode and MODELS[model]().fused_loss is None:
      continue
    if any((row["model"], row["mode"]) == (model, mode) for row in report["rows"]):
      continue
    row = run_part(model, mode, args.seconds - (time.perf_counter() - started))
    report["rows"].append(row)
    path.write_text(json.dumps(report, indent=1) + "\n")
    shown = {name: value for name, value in row.items() if name != "losses"}
    console.print(f"{time.perf_counter() - started:5.0f} s", shown, soft_wrap=True)
  console.print(make_table(report["rows"]))
  return 1 if any("error" in row for row in report["rows"]) else 0


if __name__ == "__main__":
  sys.exit(main())

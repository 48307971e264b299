"""The parts of gpu_check.py, each run in a process of its own: peaks, times, host streaming, exactness, training.

    python benchmarks/gpu_parts.py times lm-tiny mpo-16-auto mpo-16 --seconds 60

Needs no GPU, but only a GPU's figures mean anything. Each figure is printed when it is known, as a line `ROW {json}`; a
later row of the same mode replaces an earlier one. A mode that raises becomes a row with an `error`, and the others go
on. A mode for which memory is short beside others is tried again when those are gone.
"""

import argparse
import functools
import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optax_mpo as mpo

if __name__ == "__main__":  # a script does not have the root of the repository on its path
  sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import Model, language_model
from benchmarks.modes import MODES, Training
from benchmarks.step_time import BASELINE, leaves

PyTree = Any
WARM_UP = 3
PER_ROUND = 5
"""Steps that are dispatched before waiting, as in training, where the host runs ahead of the card."""
ROUNDS = (5, 20)
ROUNDS_SECONDS = 25.0

_tiny = functools.partial(language_model, "125m", layers=2, width=64, heads=2, hidden=128, vocab=256, context=64)
_small = functools.partial(language_model, "125m", layers=2, width=128, heads=2, hidden=512, vocab=256, context=64)
MODELS: dict[str, Callable[[], Model]] = {
  "leaves-8x64m": lambda: leaves(8, 8192, 8192),
  "leaves-8x64k": lambda: leaves(8, 256, 256),
  "lm-tiny": _tiny,
  "lm-small": _small,  # some of its state is large enough for host memory
  "lm-350m": lambda: language_model("350m"),
  "lm-1.3b": lambda: language_model("1.3b"),
  "lm-1.3b-8x1024": lambda: language_model("1.3b", batch=8),
  "lm-1.3b-32x1024": lambda: language_model("1.3b", batch=32),
  "text-350m": lambda: language_model("350m", vocab=256, batch=8),
  "text-tiny": lambda: _tiny(batch=2),
}


def on_gpu() -> bool:
  return jax.default_backend() == "gpu"


def say(**row: Any) -> None:
  """Prints a row for gpu_check.py, at once."""
  print("ROW " + json.dumps(row), flush=True)


def described(error: BaseException) -> str:
  """An exception in one line."""
  lines = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {lines[0][:250]}"


def is_out_of_memory(error: BaseException) -> bool:
  return "RESOURCE_EXHAUSTED" in str(error)


def drawn(tree: PyTree) -> PyTree:
  """Random arrays of these shapes, since a card can be faster on zeros. Integers are tokens from 0 to 255.

  A stack is drawn layer by layer, so that this takes less memory than a step.
  """
  leaves, treedef = jax.tree.flatten(tree)

  def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.floating):
      return (0.02 * jax.random.normal(key, shape)).astype(dtype)
    return jax.random.randint(key, shape, 0, 256).astype(dtype)

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def draw_leaf(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    key = jax.random.key(seed)
    if len(shape) < 3:
      return draw(key, shape, dtype)
    return lax.map(lambda k: draw(k, shape[1:], dtype), jax.random.split(key, shape[0]))

  return treedef.unflatten([draw_leaf(seed, leaf.shape, leaf.dtype) for seed, leaf in enumerate(leaves)])


def on_this_device(tree: PyTree) -> PyTree:
  """Replaces the abstract meshes in the shardings of a tree of shapes by this machine's first device."""
  mesh = Mesh(np.array(jax.devices()[:1]), ("device",))

  def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    kind = x.sharding.memory_kind if x.sharding is not None else None
    sharding = NamedSharding(mesh, PartitionSpec(), memory_kind=kind or "device")
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(place, tree)


class Steps:
  """A compiled step with its own arrays, on the device or in host memory, as the shapes say."""

  def __init__(self, training: Training, batch: PyTree):
    shapes, results = (training.params, training.opt_state, batch), None
    if any(leaf.sharding is not None for leaf in jax.tree.leaves(shapes)):
      shapes = on_this_device(shapes)
      results = (None, *jax.tree.map(lambda x: x.sharding, shapes[:2]))
    self._step = jax.jit(training.step, donate_argnums=(0, 1), out_shardings=results)
    # Compile before the arrays exist, so that buffers that the compiler allocates to try kernels are in no peak.
    self._step.lower(*shapes).compile()

    def put(x: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
      return x if shape.sharding is None else jax.device_put(x, shape.sharding)

    self._state = jax.tree.map(lambda s: put(jnp.zeros(s.shape, s.dtype), s), shapes[1])
    self._params, self._batch = (jax.tree.map(put, drawn(shapes[k]), shapes[k]) for k in (0, 2))

  def run(self, count: int = PER_ROUND) -> tuple[float, float]:
    """Makes `count` steps. Returns the seconds until the first is dispatched, and the seconds per step."""
    started, sent = time.perf_counter(), 0.0
    for _ in range(count):
      _, self._params, self._state = self._step(self._params, self._state, self._batch)
      sent = sent or time.perf_counter() - started
    jax.block_until_ready((self._params, self._state))
    return sent, (time.perf_counter() - started) / count


def warm(mode: str, model: Model) -> tuple[Steps, float]:
  """Returns a step that has run, and its seconds."""
  steps = Steps(MODES[mode].build(model, "adamw"), model.batch)
  for _ in range(WARM_UP - 1):
    steps.run(1)
  return steps, steps.run(1)[1]


def tree_bytes(tree: PyTree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def copy_bandwidth(size: int) -> float:
  """Bytes read and written per second when adding one to an array of `size` bytes."""
  x = jnp.zeros(size // 4, jnp.float32)
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jax.block_until_ready(add(x))
  seconds = []
  for _ in range(10):
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


def quartiles(values: Iterable[float]) -> list[float]:
  return [float(x) for x in np.quantile(np.array(list(values)), [0.25, 0.75])]


# --- The parts --------------------------------------------------------------------------------------------------------


def peak(model_name: str, modes: Sequence[str], seconds: float) -> None:
  """The peak of one mode, its time alone, and then what `gpu_memory` predicts for the peak."""
  (mode,) = modes
  model = MODELS[model_name]()
  steps, once = warm(mode, model)
  count = 5 if once < 1 else 1
  row = {"model": model_name, "parameters": model.count, "mode": mode, "seconds_alone": steps.run(count)[1]}
  row["peak_bytes"] = peak_bytes()
  if not on_gpu():
    say(**row)
    return
  say(**row, error="no prediction yet")  # kept if what follows fails or takes too long
  training = MODES[mode].build(model, "adamw")
  args = (training.params, training.opt_state, model.batch)
  report = mpo.gpu_memory(training.step, *args, donate_argnums=(0, 1), target="local")
  say(**row, predicted_bytes=report.total_bytes)


def times(model_name: str, modes: Sequence[str], seconds: float) -> None:
  """The times of modes in turn with Optax and f32 masters; for `leaves-*` also the bandwidth of the update."""
  model, waiting = MODELS[model_name](), list(modes)
  copied = copy_bandwidth(2**32 if on_gpu() else 2**24) if model_name.startswith("leaves") else 0.0
  while waiting:
    waiting = _times(model_name, model, waiting, copied)
    gc.collect()


def _times(model_name: str, model: Model, modes: Sequence[str], copied: float) -> list[str]:
  """Times modes in turn. Returns those for which memory is short beside the others."""
  runners, waiting = {BASELINE: warm(BASELINE, model)}, []
  for mode in modes:
    try:
      runners[mode] = warm(mode, model)
    except Exception as error:  # a mode that does not run becomes a row; the others go on
      if is_out_of_memory(error) and len(runners) > 1:
        waiting.append(mode)
      else:
        say(model=model_name, mode=mode, error=described(error))
    gc.collect()
  each = 2 if max(once for _, once in runners.values()) > 0.3 else PER_ROUND
  fitting = ROUNDS_SECONDS / (each * sum(once for _, once in runners.values()))
  rounds = int(np.clip(fitting, *ROUNDS)) if on_gpu() else 2
  found: list[dict[str, tuple[float, float]]] = []
  for index in range(rounds):
    found.append({})
    for mode in np.random.default_rng(index).permutation(list(runners)):
      try:
        found[-1][mode] = runners[mode][0].run(each)
      except Exception as error:
        if mode == BASELINE:
          raise
        del runners[mode]
        if is_out_of_memory(error) and len(runners) > 1:
          waiting.append(str(mode))
        else:
          say(model=model_name, mode=str(mode), error=described(error))
  for mode in runners:
    training = MODES[mode].build(model, "adamw")
    taken, base = np.array([r[mode] for r in found]), np.array([r[BASELINE] for r in found])
    (sent, done), ratios = np.median(taken, axis=0), taken[:, 1] / base[:, 1]
    row = {"seconds": float(done), "quartiles": quartiles(taken[:, 1]), "dispatch": float(sent), "rounds": rounds}
    if mode != BASELINE:
      row |= {"ratio": float(np.median(ratios)), "ratio_quartiles": quartiles(ratios)}
      row |= dict(zip(("baseline_dispatch", "baseline_seconds"), np.median(base, axis=0).tolist(), strict=True))
    if copied:
      moved = tree_bytes(model.batch) + 2 * tree_bytes((training.params, training.opt_state))
      row["copy_share"] = moved / float(done) / copied
    say(model=model_name, parameters=model.count, mode=mode, **row)
  return waiting


def sweep(model_name: str, modes: Sequence[str], seconds: float) -> None:
  """The codec on all 2^32 patterns; on a CPU on the first of them."""
  from benchmarks import sweep_codec

  patterns = 1 << 32 if on_gpu() else sweep_codec.CHUNK
  for mode in modes:  # "codec-16"
    try:
      violations = sweep_codec.violations(int(mode.rpartition("-")[2]), patterns)
      say(model=model_name, mode=mode, patterns=patterns, violations=violations)
    except Exception as error:
      say(model=model_name, mode=mode, error=described(error))


def torch(model_name: str, modes: Sequence[str], seconds: float) -> None:
  """PyTorch on the same shapes: f32 masters with autocast, and bf16 weights with stochastic rounding."""
  from benchmarks import torch_rival  # needs PyTorch

  batch, context = (int(n) - k for k, n in enumerate(MODELS[model_name]().batch.shape))
  size = "1.3b" if "1.3b" in model_name else "125m"
  for mode in modes:
    try:
      say(model=model_name, mode=mode, **torch_rival.measure(size, mode, batch, context, "cuda"))
    except Exception as error:
      say(model=model_name, mode=mode, error=described(error))


def parts() -> dict[str, Callable[[str, Sequence[str], float], None]]:
  from benchmarks import gpu_exactness, gpu_host  # here, since they import this module

  return {
    "peak": peak,
    "times": times,
    "sweep": sweep,
    "torch": torch,
    "exactness": gpu_exactness.exactness,
    "train": gpu_exactness.train,
    "host": gpu_host.host,
  }


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description="One part of gpu_check.py.")
  parser.add_argument("part", help="peak, times, sweep, torch, exactness, train or host")
  parser.add_argument("model")
  parser.add_argument("modes", nargs="+")
  parser.add_argument("--seconds", type=float, default=120, help="how long it may take (training takes all of it)")
  args = parser.parse_args(argv)
  parts()[args.part](args.model, args.modes, args.seconds)
  return 0


if __name__ == "__main__":
  # As a module, so that there is one copy of it for the modules that import it.
  from benchmarks import gpu_parts

  sys.exit(gpu_parts.main())

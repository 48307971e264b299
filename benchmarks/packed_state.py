"""What `packed` does for a model of a thousand leaves: time to hand over params and state, launches, time to compile.

    python benchmarks/packed_state.py                      # ten minutes on two CPU cores
    python benchmarks/packed_state.py --layers 25 --rounds 20

250 unrolled layers, each with a matrix of 256 x 256 and three vectors. Hand-over: a jitted function that takes params
and state, donated, and returns them as they are, on a CPU; it is the host's part of a step that grows with the number
of arrays. Modes take turns; medians. Launches: kernels of `tx.update` and `apply_updates`, compiled for an H100 without
one, and the seconds of that. Prints a table and writes packed_state.json to --output-dir.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import optax

import optax_mpo as mpo

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # a script does not have the root of the repository on its path
  sys.path.insert(0, str(ROOT))

from benchmarks import hlo  # noqa: E402

PyTree = Any

MODES: dict[str, Callable[[], optax.GradientTransformation]] = {
  "Optax, f32 master": lambda: optax.adam(1e-3),
  "`exact`": lambda: mpo.exact(optax.adam(1e-3)),
  "`packed(exact)`": lambda: mpo.packed(mpo.exact(optax.adam(1e-3))),
  "`compact`": lambda: mpo.compact(optax.adam(1e-3)),
  "`packed(compact)`": lambda: mpo.packed(mpo.compact(optax.adam(1e-3))),
}


def start(mode: str, layers: int, width: int = 256) -> tuple[PyTree, PyTree]:
  """Params and state."""
  vectors = ("bias", "norm", "scale")
  layer = {"w": jnp.ones((width, width)), **{name: jnp.ones(width) for name in vectors}}
  masters = {f"layer{i:03d}": jax.tree.map(jnp.array, layer) for i in range(layers)}
  tx = MODES[mode]()
  return (masters, tx.init(masters)) if "Optax" in mode else mpo.init(tx, masters)


def hand_over(layers: int, rounds: int) -> dict[str, float]:
  """Milliseconds to call a function with params and state, by mode."""
  function = jax.jit(lambda tree: jax.tree.map(lambda x: x, tree), donate_argnums=0)
  trees = {mode: function(start(mode, layers)) for mode in MODES}
  times: dict[str, list[float]] = {mode: [] for mode in MODES}
  for _ in range(rounds):
    for mode in MODES:
      jax.block_until_ready(trees[mode])
      begun = time.perf_counter()
      trees[mode] = function(trees[mode])
      times[mode].append(1e3 * (time.perf_counter() - begun))
  return {mode: statistics.median(found) for mode, found in times.items()}


def compiled(mode: str, layers: int) -> tuple[int, float]:
  """The kernels of an update on a GPU, and the seconds to compile them."""
  tx = MODES[mode]()

  def step(params: PyTree, state: PyTree, grads: PyTree) -> tuple[PyTree, PyTree]:
    updates, state = tx.update(grads, state, params)
    return mpo.apply_updates(params, updates), state

  params, state = jax.eval_shape(lambda: start(mode, layers))
  grads = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), params)
  begun = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    mpo.gpu_memory(step, params, state, grads, donate_argnums=(0, 1), target="h100", dump_to=folder)
    seconds = time.perf_counter() - begun
    text = max((p.read_text() for p in Path(folder).glob("*gpu_after_optimizations.txt")), key=len)
  return len(hlo.kernels(text, range(0))), seconds


def table(rows: Sequence[dict[str, Any]]) -> str:
  lines = ["| | arrays | to hand over | launches of the update | to compile them |", "|---|---|---|---|---|"]
  base = rows[0]["milliseconds"]
  lines += [
    f"| {r['mode']} | {r['arrays']} | {r['milliseconds'] / base:.2f} | {r['launches']} | {r['seconds']:.0f} s |"
    for r in rows
  ]
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--layers", type=int, default=250)
  parser.add_argument("--rounds", type=int, default=200)
  parser.add_argument("--output-dir", type=Path, default=ROOT / "benchmarks/results")
  options = parser.parse_args()
  times = hand_over(options.layers, options.rounds)
  rows = []
  for mode in MODES:
    arrays = len(jax.tree.leaves(jax.eval_shape(lambda mode=mode: start(mode, options.layers))))
    launches, seconds = compiled(mode, options.layers)
    row = {"mode": mode, "arrays": arrays, "milliseconds": times[mode], "launches": launches, "seconds": seconds}
    rows.append(row)
    print(row, flush=True)
  print(table(rows))
  options.output_dir.mkdir(parents=True, exist_ok=True)
  report = {"jax": jax.__version__, "layers": options.layers, "rounds": options.rounds, "rows": rows}
  (options.output_dir / "packed_state.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
  main()

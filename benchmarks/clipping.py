"""Final validation losses by how gradients are clipped: none, exactly (two passes), by a delayed norm, layer by layer.

    pip install -e '.[benchmarks]'
    python benchmarks/clipping.py                                  # three seeds; ten minutes on two CPU cores
    python benchmarks/clipping.py --cases sgd-high --seeds 5

Trains the language model of examples/, its layers a stack, on the source of Python's standard library, with gradient
release and 16 bits. Only the exact rule is allowed two passes. AdamW and SGD with momentum have a low and a high
learning rate each, constant after a linear warmup. Same seeds and same data for all rules. Prints a table and writes
clipping.json to --output-dir.
"""

import argparse
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax

import optax_mpo as mpo

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # a script does not have the root of the repository on its path
  sys.path.insert(0, str(ROOT))

from examples import lm_data  # noqa: E402
from examples.lm_model import Transformer, init_params, next_byte_loss  # noqa: E402

PyTree = Any

MODEL = Transformer(layers=4, width=64, heads=2, scan=True)
PARAMETERS = 246_336
BATCH, CONTEXT, WARMUP = 8, 64, 50
MAX_NORM = 1.0
MAX_RMS = MAX_NORM / PARAMETERS**0.5  # if all weights have this RMS, the global norm is MAX_NORM

RULES: dict[str, Callable[[], optax.GradientTransformation]] = {
  "none": optax.identity,
  "exact": lambda: optax.clip_by_global_norm(MAX_NORM),
  "delayed": lambda: mpo.clip_by_delayed_norm(MAX_NORM),
  "delayed-0.9": lambda: mpo.clip_by_delayed_norm(MAX_NORM, decay=0.9),
  "layers": lambda: mpo.per_layer(optax.clip_by_block_rms(MAX_RMS), lambda path, _: path[0].key == "layers"),
}
LABELS = {
  "none": "none",
  "exact": "`optax.clip_by_global_norm`, two passes",
  "delayed": "`clip_by_delayed_norm`",
  "delayed-0.9": "`clip_by_delayed_norm`, decay 0.9",
  "layers": "`per_layer(optax.clip_by_block_rms)`",
}
OPTIMIZERS: dict[str, Callable[[optax.Schedule], optax.GradientTransformation]] = {
  "AdamW": lambda rate: optax.adamw(rate, weight_decay=0.01),
  "SGD": lambda rate: optax.sgd(rate, momentum=0.9),
}
CASES = {
  "adamw-low": ("AdamW", 3e-3),
  "adamw-high": ("AdamW", 3e-2),
  "sgd-low": ("SGD", 0.1),
  "sgd-high": ("SGD", 1.0),
}


def train(case: str, rule: str, seeds: Sequence[int], steps: int, corpus: lm_data.Corpus) -> list[float]:
  """Trains once per seed. Returns the final validation losses."""
  optimizer, learning_rate = CASES[case]
  schedule = optax.linear_schedule(0.0, learning_rate, WARMUP)
  tx = mpo.compensated(optax.chain(RULES[rule](), OPTIMIZERS[optimizer](schedule)))
  loss = functools.partial(next_byte_loss, MODEL)
  update = mpo.value_and_update(loss, tx, two_pass=rule == "exact")

  def step(carry: tuple[PyTree, optax.OptState], batch: jax.Array) -> tuple[tuple[PyTree, optax.OptState], None]:
    _, params, opt_state = update(*carry, batch)
    return (params, opt_state), None

  run = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches)[0])
  evaluate = jax.jit(loss)
  validation = lm_data.validation_batches(corpus.validation, 16, 32, CONTEXT)
  losses = []
  for seed in seeds:
    batches = [lm_data.training_batch(corpus.train, BATCH, CONTEXT, seed, i) for i in range(steps)]
    params, _ = run(mpo.init(tx, init_params(MODEL, jax.random.key(seed))), np.stack(batches))
    losses.append(float(np.mean([evaluate(params, batch) for batch in validation])))
  return losses


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Returns means and standard deviations over seeds in Markdown, with a column per case."""
  columns = list(dict.fromkeys((row["optimizer"], row["learning_rate"]) for row in rows))
  lines = ["| clipping | " + " | ".join(f"{name}, {rate:g}" for name, rate in columns) + " |"]
  lines.append("|---" * (1 + len(columns)) + "|")
  for rule in dict.fromkeys(row["clipping"] for row in rows):
    found = {(row["optimizer"], row["learning_rate"]): row["losses"] for row in rows if row["clipping"] == rule}
    cells = [f"{np.mean(found[c]):.3f} ± {np.std(found[c], ddof=min(1, len(found[c]) - 1)):.3f}" for c in columns]
    lines.append(f"| {LABELS[rule]} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
  parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=400)
  parser.add_argument("--output-dir", type=Path, default=ROOT / "benchmarks" / "results")
  args = parser.parse_args(argv)
  if args.seeds < 1 or args.steps < 1:
    parser.error("--seeds and --steps have to be 1 or more")
  args.output_dir.mkdir(parents=True, exist_ok=True)
  corpus = lm_data.load_corpus()
  rows = []
  for case in args.cases:
    for rule in args.rules:
      started = time.perf_counter()
      losses = train(case, rule, range(args.seeds), args.steps, corpus)
      print(f"{case} {rule}: {np.mean(losses):.4f} ({time.perf_counter() - started:.0f} s)", flush=True)
      optimizer, learning_rate = CASES[case]
      rows.append({"optimizer": optimizer, "learning_rate": learning_rate, "clipping": rule, "losses": losses})
  about = {
    "device": f"{platform.machine()}, {os.cpu_count()} cores",
    "python": platform.python_version(),  # its standard library is the data
    "jax": jax.__version__,
    "optax": optax.__version__,
    "optax_mpo": mpo.__version__,
    "command": " ".join(["python benchmarks/clipping.py", *(sys.argv[1:] if argv is None else argv)]),
    "parameters": PARAMETERS,
    "steps": args.steps,
    "seeds": args.seeds,
    "max_norm": MAX_NORM,
    "max_rms": MAX_RMS,
  }
  (args.output_dir / "clipping.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
  print(f"\n{args.steps} steps, {args.seeds} seeds\n{table(rows)}")
  return 0


if __name__ == "__main__":
  sys.exit(main())

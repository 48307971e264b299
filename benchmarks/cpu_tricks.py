"""What each trick for XLA:CPU (`optax_mpo/_core/xla_cpu.py`) still brings: training steps with and without it.

    pip install -e '.[benchmarks]'
    python benchmarks/cpu_tricks.py                                # ten minutes on 2 CPU cores
    python benchmarks/cpu_tricks.py --tricks held --rounds 20

Each trick is measured where it should help most, and in another model. The step is compiled with the trick and
without it. Both run in turn, and the second of two steps counts, as in step_time.py. A row has the median time without
the trick in relation to that with it, its quartiles, and the seconds with it. A trick that brings less than 3% with the
newest JAX in all its rows goes. `kept_division` is there for bits: its rows tell its cost.

Prints a table and writes cpu_tricks.json to --output-dir. Rows of other tricks from the same device and JAX are kept.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

if __name__ == "__main__":  # a script does not have the root of the repository on its path
  sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.step_time import MODELS, Runner
from optax_mpo._core import order, xla_cpu

# What does without a trick, and the models and modes that it is measured in.
TRICKS: dict[str, tuple[Callable[..., Any], tuple[tuple[str, str], ...]]] = {
  "held": (lambda x, like: x, (("leaves-8x4m", "mpo-16"), ("lm-24layers", "mpo-16-auto"))),
  "laid_out": (lambda x: x, (("mlp", "mpo-16"), ("lm-8m-unrolled", "mpo-16"))),
  "tie": (order.barrier, (("mlp", "mpo-compact-auto"), ("lm-8m", "mpo-16-auto"))),
  "on_all_cores": (lambda i: i, (("leaves-8x4m", "mpo-compact"), ("mlp", "mpo-compact-auto"))),
  "kept_division": (lambda x, divisor: [x, divisor], (("leaves-8x4m", "mpo-compact"), ("lm-8m", "mpo-compact-auto"))),
}


def measure(trick: str, model: str, mode: str, rounds: int) -> dict[str, Any]:
  """Times a step with a trick and without it, in turn."""
  runners = {}
  for name in ("with", "without"):
    jax.clear_caches()  # what is traced with the trick
    with mock.patch.object(xla_cpu, trick, getattr(xla_cpu, trick) if name == "with" else TRICKS[trick][0]):
      runners[name] = Runner(MODELS[model](), mode, "adamw")
    for _ in range(2):  # not measured, since the first calls allocate
      runners[name].run()
  seconds: dict[str, list[float]] = {name: [] for name in runners}
  for i in range(rounds):
    for name in np.random.default_rng(i).permutation(list(runners)):
      runners[name].run()
      seconds[name].append(runners[name].run()[1])
  ratios = np.array(seconds["without"]) / np.array(seconds["with"])
  low, ratio, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
  found = {"ratio": ratio, "lower_quartile": low, "upper_quartile": high}
  return {"trick": trick, "model": model, "mode": mode} | found | {"seconds": float(np.median(seconds["with"]))}


def table(rows: Sequence[dict[str, Any]]) -> str:
  lines = ["| trick | model | mode | time without it | quartiles |", "|---|---|---|---|---|"]
  for row in rows:
    quartiles = f"{row['lower_quartile']:.2f} to {row['upper_quartile']:.2f}"
    lines.append(f"| `{row['trick']}` | {row['model']} | `{row['mode']}` | {row['ratio']:.2f} | {quartiles} |")
  return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description="What each trick for XLA:CPU brings.")
  parser.add_argument("--tricks", nargs="+", choices=TRICKS, default=list(TRICKS), metavar="TRICK")
  parser.add_argument("--rounds", type=int, default=16, help="steps with each, and without (default: 16)")
  parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
  args = parser.parse_args(argv)
  if jax.default_backend() != "cpu":
    parser.error(f"these are tricks for CPUs, and JAX runs on {jax.default_backend()}: set JAX_PLATFORMS=cpu")
  args.output_dir.mkdir(parents=True, exist_ok=True)
  about = {"device": f"{platform.machine()}, {os.cpu_count()} cores", "jax": jax.__version__}
  path = args.output_dir / "cpu_tricks.json"
  found = json.loads(path.read_text()) if path.exists() else {}
  kept = found["rows"] if all(found.get(key) == value for key, value in about.items()) else []
  rows = [row for row in kept if row["trick"] not in args.tricks]
  rows += [measure(trick, *case, args.rounds) for trick in args.tricks for case in TRICKS[trick][1]]
  rows.sort(key=lambda row: list(TRICKS).index(row["trick"]))
  print(table(rows))
  path.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())

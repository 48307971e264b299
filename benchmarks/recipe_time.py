"""What parts of a recipe cost in time with gradient release, each against the step without it, interleaved in one run.

    pip install -e '.[benchmarks]'
    python benchmarks/recipe_time.py            # ten minutes on 2 CPU cores
    python benchmarks/recipe_time.py --rounds 5 --models lm-8m

All with `value_and_update`, AdamW and 16 bits. In each round both steps of a pair run twice, in an order that changes,
and the second run counts. The ratio is the median over rounds. Microbatches are compared with as many ordinary steps of
one microbatch each, which also update the weights as often. Writes recipe_time.json to --output-dir.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import optax_mpo as mpo

if __name__ == "__main__":  # a script does not have the root of the repository on its path
  sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.models import Model, language_model
from benchmarks.step_time import Runner, small_lm

MICROBATCHES = 8
MODELS: dict[str, Callable[..., Model]] = {
  "lm-8m": functools.partial(small_lm, layers=8),
  "lm-125m": functools.partial(language_model, "125m", context=256),
}
AUTO, PARTS = "mpo-16-auto", "mpo-16-auto-microbatches"


@dataclasses.dataclass(frozen=True)
class Case:
  """A step, the step without that part of the recipe, and the largest ratio that we claim.

  Attributes:
    text: what the step has and the other has not.
    step: its batch, mode and optimizer.
    without: likewise.
    count: how many steps of the other do the same work.
    bound: the claim.
  """

  text: str
  step: tuple[int, str, str]
  without: tuple[int, str, str]
  count: int
  bound: float


CASES = (
  Case("recorded norms and clipping by a delayed norm", (4, AUTO, "adamw-recorded"), (4, AUTO, "adamw"), 1, 1.03),
  Case("clipping by the global norm, two passes", (4, AUTO, "adamw-clip"), (4, AUTO, "adamw"), 1, 1.75),
  Case("8 microbatches of one", (MICROBATCHES, PARTS, "adamw"), (1, AUTO, "adamw"), MICROBATCHES, 1.05),
)


def measure(model: str, case: Case, rounds: int) -> dict[str, object]:
  """Returns a row: the median and the quartiles of the ratio, and both times in seconds."""
  step, without = (Runner(MODELS[model](batch=batch), mode, tx) for batch, mode, tx in (case.step, case.without))

  def once(runner: Runner, count: int) -> float:
    runner.run()  # not measured: in training, the previous step is one of the same program
    return sum(runner.run()[1] for _ in range(count))

  pairs = []
  for i in range(rounds + 1):
    if i % 2:
      first = once(step, 1)
      pairs.append((first, once(without, case.count)))
    else:
      second = once(without, case.count)
      pairs.append((once(step, 1), second))
  with_part, others = np.array(pairs[1:]).T  # the first round allocates
  low, ratio, high = np.quantile(with_part / others, [0.25, 0.5, 0.75])
  return {
    "model": model,
    "case": case.text,
    "ratio": float(ratio),
    "lower_quartile": float(low),
    "upper_quartile": float(high),
    "seconds": float(np.median(with_part)),
    "seconds_without": float(np.median(others)),
    "rounds": rounds,
    "bound": case.bound,
  }


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description="What parts of a recipe cost in time, with gradient release.")
  parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
  parser.add_argument("--rounds", type=int, default=15, help="pairs of each case (default: 15)")
  parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
  args = parser.parse_args(argv)
  if args.rounds < 1:
    parser.error("--rounds has to be 1 or more")
  device = jax.devices()[0]
  about = {
    "device": device.device_kind if device.platform != "cpu" else f"{platform.machine()}, {os.cpu_count()} cores",
    "jax": jax.__version__,
    "optax_mpo": mpo.__version__,
  }
  rows = [measure(model, case, args.rounds) for model in args.models for case in CASES]
  table = Table("model", "with", "ratio", "quartiles", "claim", title=f"{about['device']}, JAX {about['jax']}")
  for row in rows:
    quartiles = f"{row['lower_quartile']:.3f} to {row['upper_quartile']:.3f}"
    table.add_row(str(row["model"]), str(row["case"]), f"{row['ratio']:.3f}", quartiles, f"<= {row['bound']}")
  Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)
  args.output_dir.mkdir(parents=True, exist_ok=True)
  (args.output_dir / "recipe_time.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())

"""Which models train on which cards with their state in host memory, without a GPU.

    pip install -e '.[benchmarks]'
    python benchmarks/what_fits.py          # a quarter of an hour on two cores; what_fits.json has it already

A row is a step of AdamW, batch 1 x 1024, layers recomputed, compiled by XLA:GPU for an RTX 4090: the peak on the card
and the bytes in host memory. A card fits if the peak leaves 1 GiB for CUDA's context and libraries. Writes
what_fits.json to --output-dir; rows already in it are kept, unless --fresh is given.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs here

import jax

import optax_mpo as mpo
from optax_mpo._memory.gpu_targets import TARGETS
from optax_mpo._planner import cells
from optax_mpo._planner.decoder import LM_SIZES
from optax_mpo._planner.remembered import Remembered

GIB = 2**30
CARD = "rtx4090"
MODELS = {
  "1B": "llama3.2-1b",
  "3B": "llama3.2-3b",
  "8B": "llama3-8b",
  "14B": "qwen2.5-14b",
  "32B": "qwen2.5-32b",
  "70B": "llama3-70b",
}
FORMS = {"exact": "mpo-16-host", "compact": "mpo-compact-host"}
MEMORY = {  # bytes that a program can have on cards of so many GB
  8: int(7.6 * GIB),
  16: int(15.4 * GIB),
  24: TARGETS["rtx4090"].memory,
  48: TARGETS["l40s"].memory,
  80: TARGETS["h100"].memory,
}


def measure(model: str, storage: str) -> dict[str, Any]:
  """Compiles one step. Returns its row."""
  size = MODELS[model]
  row = cells.of_decoder(LM_SIZES[size], size, storage, "adamw", [1], 1024, 1, CARD)
  anything = cells.Limits(2**50)
  (figures,) = cells.row_of(row, anything, Remembered(None)).values()
  assert figures
  return {"model": model, "shape": size, "storage": storage, **figures._asdict()}


def fits(row: dict[str, Any], card: int) -> bool:
  """Whether a step fits on a card of so many GB, with 1 GiB to spare."""
  return row["peak"] + GIB <= MEMORY[card]


def _least(both: Sequence[dict[str, Any] | None], card: int) -> str:
  """What has to be on the host: the state alone, or the layers' weights too; or that neither fits."""
  for row, name in zip(both, ("state", "layers too"), strict=True):
    if row and fits(row, card):
      return name
  return "no" if both[1] else "?"


def table(rows: Sequence[dict[str, Any]]) -> str:
  """The table in docs/offload.md."""
  found = {(row["model"], row["storage"]): row for row in rows}
  lines = [
    "| | state on the host: card + host | layers too: card + host | 8 GB | 16 GB | 24 GB | 48 GB | 80 GB |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for model in MODELS:
    for form, storage in FORMS.items():
      both = [found.get((model, name)) for name in (storage, f"{storage}-weights")]
      sizes = [f"{row['peak'] / GIB:.1f} + {row['host'] / GIB:.0f} GiB" if row else "not compiled" for row in both]
      columns = [_least(both, card) for card in MEMORY]
      lines.append(f"| {' | '.join([f'{model}, {form}', *sizes, *columns])} |")
  return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description="Which models train on which cards with their state in host memory.")
  parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
  parser.add_argument("--fresh", action="store_true", help="compile again what the JSON has already")
  parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
  args = parser.parse_args(argv)
  path = args.output_dir / "what_fits.json"
  rows = {(r["model"], r["storage"]): r for r in json.loads(path.read_text())["rows"]} if path.exists() else {}
  for model in args.models:
    for storage in (name + where for name in FORMS.values() for where in ("", "-weights")):
      if args.fresh or (model, storage) not in rows:
        rows[model, storage] = measure(model, storage)
        report = {"jax": jax.__version__, "optax_mpo": mpo.__version__, "card": CARD, "rows": list(rows.values())}
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(model, storage, f"{rows[model, storage]['peak'] / GIB:.1f} GiB", flush=True)
  if len(rows) == 2 * len(FORMS) * len(MODELS):
    print(table(sorted(rows.values(), key=lambda row: list(MODELS).index(row["model"]))))
  return 0


if __name__ == "__main__":
  sys.exit(main())

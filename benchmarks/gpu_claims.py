"""Compares gpu_check.json with the claims made before the measurements.

    python benchmarks/gpu_claims.py                      # benchmarks/results/gpu_check.json
    python benchmarks/gpu_claims.py results/gpu_check.json
    python benchmarks/gpu_claims.py --markdown           # the tables of docs/gpu.md and docs/performance.md

A claim is an entry of CLAIMS: a figure computed from the rows of the JSON, and a bound. Bounds are not moved to fit a
card. A claim whose rows are missing or failed counts as not measured. Exits with 1 unless all claims hold.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

if __name__ == "__main__":  # a script does not have the root of the repository on its path
  sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

Rows = dict[tuple[str, str], dict[str, Any]]
BATCHES = ("lm-1.3b", "lm-1.3b-8x1024")
COMMITTED = Path(__file__).parent / "results" / "gpu_check.json"


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim about a card.

  Attributes:
    text: the claim in words, with the bound.
    measure: computes the figure from the rows. Raises KeyError, ValueError or StopIteration if rows are missing.
    holds: whether a figure is within the bound.
    form: the format of the figure.
  """

  text: str
  measure: Callable[[Rows], float]
  holds: Callable[[float], bool]
  form: str = "{:.2f}"


def ratio(model: str, mode: str) -> Callable[[Rows], float]:
  return lambda rows: rows[model, mode]["ratio"]


def copy_share(mode: str) -> Callable[[Rows], float]:
  """The fraction of a copy's bandwidth that the optimizer alone reaches, for leaves of any size."""
  return lambda rows: next(r["copy_share"] for (_, m), r in rows.items() if m == mode and "copy_share" in r)


def farthest_peak(mode: str) -> Callable[[Rows], float]:
  """The largest relative difference between a peak and its prediction, over all models."""
  return lambda rows: max(
    abs(r["peak_bytes"] / r["predicted_bytes"] - 1)
    for (_, m), r in rows.items()
    if m == mode and "predicted_bytes" in r
  )


def differing(*names: str, mode: str = "exactness") -> Callable[[Rows], float]:
  return lambda rows: max(rows["lm-tiny", mode]["share_of_difference"][name] for name in names)


def host(model: str, mode: str, figure: str) -> Callable[[Rows], float]:
  return lambda rows: rows[model, mode][figure]


def against_moved_whole(model: str) -> Callable[[Rows], float]:
  """The time of the exact step with state on the host, relative to Optax's, whose state is moved as a whole."""
  return lambda rows: rows[model, "mpo-16-host"]["seconds"] / rows[model, "optax-f32-host"]["seconds"]


def violations(rows: Rows) -> float:
  return sum(rows["codec", f"codec-{bits}"]["violations"] for bits in (16, 8, 4))


def loss_apart(mode: str) -> Callable[[Rows], float]:
  """The relative difference of the last losses of the training run from those with f32 masters."""

  def measure(rows: Rows) -> float:
    ours, theirs = (rows["text-350m", f"train {m}"]["last_losses_mean"] for m in (mode, "optax-f32"))
    return abs(ours / theirs - 1)

  return measure


HOST_STEPS = ("state on the host", "state and weights on the host")
BIT_STEPS = ("layer", "layer with kernels", "auto", "auto with kernels")
MOSAIC = "layer with kernels in Mosaic"
EXACT, COMPACT = "mpo-16-auto-kernels", "mpo-compact-auto-kernels"
CLAIMS = (
  Claim("exact, 1.3B, 1 x 1024: at most 0.90 of Optax's step", ratio("lm-1.3b", EXACT), lambda x: x <= 0.90),
  Claim("exact, 1.3B, 8 x 1024: at most 1.00 of Optax's step", ratio("lm-1.3b-8x1024", EXACT), lambda x: x <= 1.0),
  Claim("8-bit state, 1.3B, 1 x 1024: at most 0.90", ratio("lm-1.3b", COMPACT), lambda x: x <= 0.90),
  Claim("8-bit state, 1.3B, 8 x 1024: at most 1.00", ratio("lm-1.3b-8x1024", COMPACT), lambda x: x <= 1.0),
  Claim("exact update: at least 0.85 of a copy's bandwidth", copy_share(EXACT), lambda x: x >= 0.85),
  Claim("8-bit update: at least 0.85 of a copy's bandwidth", copy_share(COMPACT), lambda x: x >= 0.85),
  Claim("exact: peaks within 3% of the prediction", farthest_peak(EXACT), lambda x: x <= 0.03, "{:.1%}"),
  Claim("8-bit state: peaks within 3% of the prediction", farthest_peak(COMPACT), lambda x: x <= 0.03, "{:.1%}"),
  Claim("masters: no bit differs from f32 Optax", differing("optax-f32"), lambda x: x == 0, "{:.2g}"),
  Claim(
    "fused layers, with kernels and without: no bit differs",
    differing("layer", "layer with kernels"),
    lambda x: x == 0,
    "{:.2g}",
  ),
  Claim(
    "value_and_update, with kernels and without: no bit differs",
    differing("auto", "auto with kernels"),
    lambda x: x == 0,
    "{:.2g}",
  ),
  Claim("fused layers, kernels in Mosaic GPU: no bit differs", differing(MOSAIC), lambda x: x == 0, "{:.2g}"),
  Claim(
    "8-bit state, kernels in Mosaic GPU: no bit differs",
    differing(MOSAIC, mode="exactness-compact"),
    lambda x: x == 0,
    "{:.2g}",
  ),
  Claim("exact, 1.3B, 32 x 1024: at most 1.00 of Optax's step", ratio("lm-1.3b-32x1024", EXACT), lambda x: x <= 1.0),
  Claim("8-bit state, 1.3B, 32 x 1024: at most 1.00", ratio("lm-1.3b-32x1024", COMPACT), lambda x: x <= 1.0),
  Claim("state and weights on the host: no bit differs", differing(*HOST_STEPS), lambda x: x == 0, "{:.2g}"),
  Claim(
    "8-bit state, all kinds of steps: no bit differs",
    differing(*BIT_STEPS, *HOST_STEPS, mode="exactness-compact"),
    lambda x: x == 0,
    "{:.2g}",
  ),
  Claim("the codec's laws hold for all 2^32 patterns: violations", violations, lambda x: x == 0, "{:.0f}"),
  Claim(
    "state on the host, exact, 1 x 1024: at least 0.70 of the bus",
    host("lm-1.3b", "mpo-16-host", "bus_share"),
    lambda x: x >= 0.70,
  ),
  Claim(
    "state and layers on the host, exact, 1 x 1024: at least 0.70 of the bus",
    host("lm-1.3b", "mpo-16-host-weights", "bus_share"),
    lambda x: x >= 0.70,
  ),
  Claim(
    "state on the host, exact, 32 x 1024: at most 1.15 of the step on the device",
    host("lm-1.3b-32x1024", "mpo-16-host", "device_ratio"),
    lambda x: x <= 1.15,
  ),
  Claim(
    "state on the host, 8-bit, 8 x 1024: at most 1.15 of the step on the device",
    host("lm-1.3b-8x1024", "mpo-compact-host", "device_ratio"),
    lambda x: x <= 1.15,
  ),
  Claim(
    "state on the host, exact, 32 x 1024: at most 1.00 of Optax moved whole",
    against_moved_whole("lm-1.3b-32x1024"),
    lambda x: x <= 1.0,
  ),
  Claim(
    "state on the host, exact: peaks within 3% of the prediction",
    farthest_peak("mpo-16-host"),
    lambda x: x <= 0.03,
    "{:.1%}",
  ),
  Claim("350M on text, exact: last losses within 1% of f32", loss_apart("mpo-16-auto"), lambda x: x <= 0.01, "{:.1%}"),
  Claim(
    "350M on text, 8-bit state: last losses within 2% of f32",
    loss_apart("mpo-compact-auto"),
    lambda x: x <= 0.02,
    "{:.1%}",
  ),
)


def merged(report: dict[str, Any]) -> Rows:
  """Returns the figures by model and mode, from all parts that did not fail."""
  rows: Rows = {}
  for row in report["rows"]:
    if "error" not in row:
      rows.setdefault((row["model"], row["mode"]), {}).update(row)
  return rows


def judged(report: dict[str, Any]) -> list[tuple[str, str, str]]:
  """Returns for each claim its text, the measured figure, and whether it holds: yes, no, or not measured."""
  rows, found = merged(report), []
  for claim in CLAIMS:
    try:
      figure = claim.measure(rows)
    except (KeyError, ValueError, StopIteration):
      found.append((claim.text, "", "not measured"))
    else:
      found.append((claim.text, claim.form.format(figure), "yes" if claim.holds(figure) else "no"))
  return found


def by_mode(report: dict[str, Any]) -> list[tuple[str, ...]]:
  """Returns for each measured mode its label and, by batch size, the peak, what was predicted, and times Optax.

  A batch size has its cells if both the peak and the ratio were measured. Modes without any are left out.
  """
  from benchmarks.modes import MODES  # here, since it imports JAX

  rows, found = merged(report), []
  for name, mode in MODES.items():
    cells: list[str] = []
    for model in BATCHES:
      r = rows.get((model, name), {})
      if "ratio" in r and r.get("peak_bytes") and r.get("predicted_bytes"):
        cells += [f"{r['peak_bytes'] / 2**30:.2f} ({r['predicted_bytes'] / 2**30:.2f})", f"{r['ratio']:.2f}"]
      else:
        cells += ["", ""]
    if any(cells):
      found.append((mode.label, *cells))
  return found


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  """Returns a table in Markdown."""
  return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *lines])


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description="Compares gpu_check.json with the claims about it.")
  parser.add_argument("json", nargs="?", type=Path, default=COMMITTED, help="default: the committed one")
  parser.add_argument("--markdown", action="store_true", help="print the tables of the docs")
  args = parser.parse_args(argv)
  report = json.loads(args.json.read_text())
  verdicts = judged(report)
  if args.markdown:
    print(markdown(["claim", report["device"], "holds"], verdicts), end="\n\n")
    heads = [text for batch in (1, 8) for text in (f"{batch} x 1024: peak (predicted), GiB", "times Optax")]
    print(markdown(["", *heads], by_mode(report)))
    return 0
  table = Table("claim", "measured", "holds", title=f"{report['device']}, JAX {report['jax']}")
  for verdict in verdicts:
    table.add_row(*verdict)
  Console(width=120).print(table)
  return 0 if all(holds == "yes" for _, _, holds in verdicts) else 1


if __name__ == "__main__":
  sys.exit(main())

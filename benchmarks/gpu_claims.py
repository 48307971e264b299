"""Compares gpu_check.json with the claims made before the measurements. Prints the table that docs/gpu.md shows.

    python benchmarks/gpu_claims.py                      # benchmarks/results/gpu_check.json
    python benchmarks/gpu_claims.py results/gpu_check.json

A claim is an entry of CLAIMS: a figure computed from the rows of the JSON, and a bound. Bounds are not moved to fit a
card. A claim whose rows are missing or failed counts as not measured. Exits with 1 unless all claims hold.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Rows = dict[tuple[str, str], dict[str, Any]]
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


def differing(*names: str) -> Callable[[Rows], float]:
  return lambda rows: max(rows["lm-tiny", "exactness"]["share_of_difference"][name] for name in names)


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
)


def judged(report: dict[str, Any]) -> list[tuple[str, str, str]]:
  """Returns for each claim its text, the measured figure, and whether it holds: yes, no, or not measured."""
  rows: Rows = {(r["model"], r["mode"]): r for r in report["rows"] if "error" not in r}
  found = []
  for claim in CLAIMS:
    try:
      figure = claim.measure(rows)
    except (KeyError, ValueError, StopIteration):
      found.append((claim.text, "", "not measured"))
    else:
      found.append((claim.text, claim.form.format(figure), "yes" if claim.holds(figure) else "no"))
  return found


def main(argv: Sequence[str] | None = None) -> int:
  arguments = sys.argv[1:] if argv is None else argv
  report = json.loads(Path(arguments[0] if arguments else COMMITTED).read_text())
  table = Table("claim", "measured", "holds", title=f"{report['device']}, JAX {report['jax']}")
  verdicts = judged(report)
  for verdict in verdicts:
    table.add_row(*verdict)
  Console(width=120).print(table)
  return 0 if all(holds == "yes" for _, _, holds in verdicts) else 1


if __name__ == "__main__":
  sys.exit(main())

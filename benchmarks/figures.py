"""Draws the figures of the documentation as SVG, from the committed JSON.

    python benchmarks/figures.py                       # writes docs/figures/*.svg

Each figure is a function of benchmarks/results/*.json, so that a test can tell whether the committed files are up to
date. They are written by hand and not by matplotlib: the same text on every machine. A light panel behind each makes
them readable on light and dark pages. A color stands for one thing in all figures.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"

# One thing, one color. Those of the bit diagram are those of the bytes.
WEIGHTS, BITS, MOMENTS, TEMPORARIES = "#3949ab", "#e07b00", "#5f9ea0", "#b9bec9"
DOTS, INK, SOFT, PANEL = "#5a3d7a", "#1f2430", "#5b6270", "#fbfbfd"


class Svg:
  """Collects elements of a figure of `width` x `height` pixels."""

  def __init__(self, width: int, height: int, title: str):
    self._size = width, height
    self._title = title
    self._parts: list[str] = []

  def rect(self, x: float, y: float, width: float, height: float, fill: str) -> None:
    self._parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>')

  def line(self, x1: float, y1: float, x2: float, y2: float, color: str = "#d5d8e0", width: float = 1) -> None:
    position = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    self._parts.append(f'<line {position} stroke="{color}" stroke-width="{width}"/>')

  def path(self, points: Sequence[tuple[float, float]], color: str, dashes: str = "") -> None:
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    style = f'fill="none" stroke="{color}" stroke-width="2.5" stroke-linecap="round"'
    self._parts.append(f'<polyline points="{joined}" {style} stroke-dasharray="{dashes or "none"}"/>')

  def dot(self, x: float, y: float, color: str = DOTS) -> None:
    self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}" fill-opacity="0.75"/>')

  def text(
    self, x: float, y: float, text: str, size: int = 14, color: str = INK, anchor: str = "start", bold: bool = False
  ) -> None:
    weight = ' font-weight="600"' if bold else ""
    style = f'font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}'
    self._parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>')

  def __str__(self) -> str:
    width, height = self._size
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head += ' role="img" font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif">'
    panel = f'<rect width="{width}" height="{height}" rx="8" fill="{PANEL}"/>'
    return "\n".join([head, f"<title>{escape(self._title)}</title>", panel, *self._parts, "</svg>"]) + "\n"


# What persists for each parameter, by dtype: weights, extra bits, two moments. The rest of a peak is temporary.
HELD = {
  "optax-f32": ("Optax, f32 masters", 4.0, 0.0, 8.0),
  "mpo-16-auto": ("exact", 2.0, 2.0, 8.0),
  "mpo-compact-auto": ("compact", 2.0, 1.0, 2.125),
  "mpo-16-host": ("exact, state on the host", 2.0, 0.0, 0.0),
}


def peaks(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[str, list[float], float]]:
  """Returns the label, the bytes per parameter by kind, and those on the host, of each mode at 8.8B.

  Raises:
    ValueError: if the dtypes do not explain what the compiled step holds.
  """
  found = {r["mode"]: r for r in rows if (r["model"], r["optimizer"], r["target"]) == ("lm-8.8b", "adamw", "h200")}
  bars = {}
  for mode, (label, *held) in HELD.items():
    total, arguments, host = (
      found[mode][key] / found[mode]["parameters"] for key in ("total_bytes", "argument_bytes", "host_bytes")
    )
    if abs(sum(held) - arguments) > 0.01:
      raise ValueError(f"{mode}: {arguments:.3f} bytes per parameter persist, but its dtypes take {sum(held):.3f}.")
    bars[mode] = label, [*held, total - sum(held)], host
  return bars


def bytes_per_parameter() -> Svg:
  """Stacked bars: what a parameter takes on the card at the peak of a step."""
  bars = peaks(json.loads((RESULTS / "peak_memory.json").read_text())["rows"])
  figure = Svg(600, 310, "Bytes per parameter on the card at the peak of an AdamW step, 8.8B parameters")
  figure.text(20, 30, "Bytes per parameter on the card, AdamW, 8.8B parameters", 16, bold=True)
  kinds = (
    ("weights", WEIGHTS),
    ("extra bits", BITS),
    ("moments", MOMENTS),
    ("gradients and temporaries", TEMPORARIES),
  )
  x = 20.0
  for label, color in kinds:
    figure.rect(x, 46, 13, 13, color)
    figure.text(x + 19, 57, label, 14)
    x += 44 + 7.2 * len(label)
  scale = 470 / 16
  for i, (label, parts, host) in enumerate(bars.values()):
    y, x = 96 + 58 * i, 20.0
    figure.text(20, y - 5, label + (f", where it takes {host:.0f} more" if host else ""), 14, SOFT)
    for amount, (_, color) in zip(parts, kinds, strict=True):
      figure.rect(x, y, amount * scale, 24, color)
      x += amount * scale
    figure.text(x + 8, y + 18, f"{sum(parts):.2f}", 15, bold=True)
  return figure


def codec() -> Svg:
  """The bits of an f32 number: those of the bf16 weight, and the extra bits."""
  figure = Svg(600, 275, "An f32 number is a bf16 weight and 16 extra bits")
  cell, left = 17.5, 20.0
  figure.text(left, 30, "f32 master weight: never stored", 15, SOFT)
  for name, start, count in (("sign", 0, 1), ("exponent", 1, 8), ("significand", 9, 23)):
    for bit in range(start, start + count):
      figure.rect(left + bit * cell, 40, cell - 1.5, 26, WEIGHTS if bit < 16 else BITS)
    if count > 1:
      figure.text(left + (start + count / 2) * cell, 84, f"{name}, {count}", 13, SOFT, "middle")
  for start, label, color, lines in (
    (0, "bf16 weight, 2 bytes", WEIGHTS, ("in params: the model", "computes with it")),
    (16, "16 extra bits, 2 bytes", BITS, ("in opt_state: what the", "rounding to bf16 cut off")),
  ):
    x = left + start * cell + (8 if start else 0)
    for bit in range(16):
      figure.rect(x + bit * (cell - 0.6), 166, cell - 2.1, 26, color)
    figure.text(x, 156, label, 15, bold=True)
    for i, line in enumerate(lines):
      figure.text(x, 212 + 18 * i, line, 14, SOFT)
  figure.text(300, 118, "split ↓  integer operations, exact; join ↑  back, bit for bit", 13, INK, "middle")
  figure.text(left, 260, "8 and 4 extra bits keep the upper ones: 1 and 0.5 bytes.", 13, SOFT)
  return figure


def _dots(
  figure: Svg, rows: Sequence[tuple[str, Sequence[float]]], x: float, y: float, width: float, left: bool
) -> None:
  """A dot for each seed, a row for each label, on a scale of its own."""
  values = [v for _, losses in rows for v in losses]
  low, high = min(values), max(values)
  pad = 0.06 * (high - low)
  low, high = low - pad, high + pad
  for i, (label, losses) in enumerate(rows):
    row = y + 26 * i
    figure.line(x, row, x + width, row)
    if left:
      figure.text(x - 10, row + 5, label, 13, anchor="end")
    for loss in losses:
      figure.dot(x + width * (loss - low) / (high - low), row)
    middle = x + width * (statistics.mean(losses) - low) / (high - low)
    figure.line(middle, row - 9, middle, row + 9, INK, 2)
  bottom = y + 26 * len(rows)
  for value, anchor in ((low + pad, "start"), (high - pad, "end")):
    at = x + width * (value - low) / (high - low)
    figure.text(at, bottom, f"{value:.2f}", 12, SOFT, anchor)


SERIES = {
  "bf16": ("plain bf16", "#c62828", ""),
  "fp32": ("f32 masters, and exact: equal", INK, ""),
  "compact": ("compact", "#00a88f", "2 7"),
}


def losses() -> Svg:
  """Validation losses during training where plain bf16 stalls: two tasks, the mean of three seeds.

  Raises:
    ValueError: if the exact mode does not have the losses of f32 masters.
  """
  tasks = json.loads((RESULTS / "accuracy.json").read_text())["tasks"]
  figure = Svg(600, 330, "Validation losses during training, by how weights and state are stored")
  figure.text(20, 30, "Validation loss at a small learning rate, mean of three seeds", 16, bold=True)
  x = 20.0
  for label, color, dashes in SERIES.values():
    figure.path([(x, 54), (x + 24, 54)], color, dashes)
    figure.text(x + 31, 59, label, 14)
    x += 58 + 7.2 * len(label)
  for j, (task, title) in enumerate((("lm", "language model"), ("digits", "digits"))):
    found = tasks[task]["losses"]
    if found["mpo16"] != found["fp32"]:
      raise ValueError(f"{task}: with 16 bits the losses differ from those of f32 masters.")
    curves = {mode: [statistics.mean(at) for at in zip(*found[mode], strict=True)] for mode in SERIES}
    top = max(max(curve) for curve in curves.values())
    left, right, low, high = 60 + 285 * j, 290 + 285 * j, 285, 105
    figure.text(left, 92, title, 14, bold=True)
    for tick in range(int(top) + 1):
      y = low - (low - high) * tick / top
      figure.line(left, y, right, y)
      figure.text(left - 8, y + 4, str(tick), 12, SOFT, "end")
    figure.text(left, low + 20, "step 0", 12, SOFT)
    figure.text(right, low + 20, f"{tasks[task]['steps']}", 12, SOFT, "end")
    for mode, curve in curves.items():
      step = (right - left) / len(curve)
      points = [(left + step * (i + 1), low - (low - high) * loss / top) for i, loss in enumerate(curve)]
      figure.path(points, SERIES[mode][1], SERIES[mode][2])
  return figure


CLIPPING = {
  "none": "none",
  "exact": "global norm, two passes",
  "delayed": "delayed norm",
  "delayed-0.9": "delayed norm, decay 0.9",
  "layers": "layer by layer",
}


def clipping() -> Svg:
  """Final validation losses of the ways to clip: four settings, a dot for each seed."""
  rows = json.loads((RESULTS / "clipping.json").read_text())["rows"]
  cases = sorted({(r["optimizer"], r["learning_rate"]) for r in rows})
  figure = Svg(600, 450, "Final validation losses of the ways to clip, three seeds")
  figure.text(20, 30, "Final validation loss by clipping", 16, bold=True)
  figure.text(20, 50, "a dot for each seed, a bar at their mean; lower is better", 13, SOFT)
  for j, (optimizer, rate) in enumerate(cases):
    x, y = 200 + 200 * (j % 2), 104 + 184 * (j // 2)
    figure.text(x, y - 22, f"{optimizer}, learning rate {rate:g}", 13, bold=True)
    found = {r["clipping"]: r["losses"] for r in rows if (r["optimizer"], r["learning_rate"]) == (optimizer, rate)}
    _dots(figure, [(label, found[rule]) for rule, label in CLIPPING.items()], x, y, 175, left=j % 2 == 0)
  return figure


PLACES = {
  "mpo-16-host": ("state on the host", "#2e7d32"),
  "mpo-16-host-weights": ("weights of the layers too", "#d81b60"),
}
CARDS = (8, 16, 24, 48, 80)


def cards() -> Svg:
  """What a card has to hold to train a model in exact mode: state on the host, and weights too. A log scale."""
  rows = json.loads((RESULTS / "what_fits.json").read_text())["rows"]
  figure = Svg(600, 372, "Peak on the card by model, with state or state and layers on the host, and sizes of cards")
  figure.text(20, 30, "What fits on which card, exact AdamW", 16, bold=True)
  x = 20.0
  for label, color in PLACES.values():
    figure.dot(x + 5, 52, color)
    figure.text(x + 16, 57, label, 14)
    x += 44 + 7.2 * len(label)
  left, right, top, step = 60, 580, 108, 38

  def at(gib: float) -> float:
    return left + (right - left) * math.log(gib) / math.log(200)

  models = list(dict.fromkeys(row["model"] for row in rows))
  bottom = top + step * len(models) - 16
  for size in CARDS:
    figure.line(at(size - 1), top - 14, at(size - 1), bottom, SOFT)
    figure.text(at(size - 1), top - 20, f"{size} GB", 12, SOFT, "middle")
  for i, model in enumerate(models):
    y = top + step * i + 8
    figure.text(left - 10, y + 5, model, 14, anchor="end", bold=True)
    peaks = {row["storage"]: row["peak"] / 2**30 for row in rows if row["model"] == model and row["storage"] in PLACES}
    figure.line(*(at(min(peaks.values())), y, at(max(peaks.values())), y), INK)
    for storage, gib in peaks.items():
      figure.dot(at(gib), y, PLACES[storage][1])
      figure.text(at(gib), y - 9, f"{gib:.1f}" if gib < 10 else f"{gib:.0f}", 12, SOFT, "middle")
  figure.text(
    left, bottom + 24, "GiB on the card at the peak, a log scale; a card's line is 1 GiB below its size", 13, SOFT
  )
  return figure


FIGURES: dict[str, Callable[[], Svg]] = {
  "memory": bytes_per_parameter,
  "codec": codec,
  "losses": losses,
  "clipping": clipping,
  "cards": cards,
}


def main() -> None:
  """Writes all figures."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--output-dir", type=Path, default=ROOT / "docs/figures")
  folder = parser.parse_args().output_dir
  folder.mkdir(parents=True, exist_ok=True)
  for name, draw in FIGURES.items():
    (folder / f"{name}.svg").write_text(str(draw()))


if __name__ == "__main__":
  main()
